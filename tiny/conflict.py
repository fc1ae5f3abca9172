"""Tasks in conflict: one map, to be used in ways that the instruction alone names.

The tiny world's own tasks hardly contradict one another, as each is given pictures of its own kind.
Here all are given the edges of the same two things, and the same words for these: a few words more
say what else is to be done. tiny/experiment.py trains on them; the embedded model never has.
"""
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from data import Sample
from support.conditions import pick
from tiny.world import BIG, Scene, Thing, describe, draw, edge_map, near, random_scene, words

# What becomes of the first and the second thing of a scene that the map was drawn from.
CHANGES: dict[str, Callable[[Thing, Thing], tuple[Thing, ...]]] = {
    "as it is": lambda one, two: (one, two),
    "one alone": lambda one, two: (one,),
    "colours exchanged": lambda one, two: (replace(one, colour=two.colour),
                                           replace(two, colour=one.colour)),
    "places exchanged": lambda one, two: (replace(one, cell=two.cell),
                                          replace(two, cell=one.cell)),
    "grown": lambda one, two: (replace(one, radius=BIG), replace(two, radius=BIG))}
TASKS = tuple(CHANGES)
MORE_WORDS = {
    "as it is": [""],
    "one alone": [", remove the second", ", take away the second"],
    "colours exchanged": [", change the colour of the first and the second",
                          ", give the first the colour of the second"],
    "places exchanged": [", change the place of the first and the second",
                         ", move the first to the place of the second"],
    "grown": [", make it big", ", draw it big"]}


def conflict_sample(rng: np.random.Generator, task: str, held_out: bool = False) -> Sample:
    """A random sample of one of TASKS; with `held_out`, of scenes never trained on."""
    while True:
        given = random_scene(rng, 2, new_shapes=True)
        one, two = given.things
        scene = Scene(given.background, CHANGES[task](one, two))
        if (one.colour != two.colour and not near(one.cell, two.cell)    # big ones hardly overlap
                and given.held_out() == scene.held_out() == held_out):
            break
    text = words(rng, "canny", False, things=describe(given, places=False),
                 colour=given.background).rstrip(".")
    return Sample(text + pick(rng, MORE_WORDS[task]), draw(scene), [], [edge_map(given)], task,
                  scene)


class ConflictWorld:
    """Endless samples of some of TASKS, each as likely as any other, for training."""

    def __init__(self, tasks: tuple[str, ...] = TASKS):
        self.tasks = tasks

    def draw(self, rng: np.random.Generator, size: int,
             nearby: np.random.Generator | None = None) -> list[Sample]:
        return [conflict_sample(rng, pick(rng, self.tasks)) for _ in range(size)]
