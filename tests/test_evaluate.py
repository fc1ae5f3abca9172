"""evaluate.py: the score of the tiny world."""
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import evaluate
from data import Sample
from tiny import world
from tiny.world import BASE_TASKS, BIG, FIGURES, NEW_TASKS, SHAPES, SMALL, Scene, Thing

ALL = BASE_TASKS + NEW_TASKS


def scenes() -> list[Scene]:
    """Every shape, small and big, alone and in company, and every figure."""
    found = [Scene("white", (Thing(s, c, 4, r),))
             for s in SHAPES for c in ("yellow", "black") for r in (SMALL, BIG)]
    found += [Scene("yellow", (Thing(s, "orange", 0), Thing("star", "white", 8))) for s in SHAPES]
    return found + [Scene("green", (Thing(f, "red", 4, SMALL, pose),))
                    for f in FIGURES for pose in (0, 9, 17)]


def as_sample(scene: Scene, given: list[np.ndarray]) -> Sample:
    return Sample("", world.draw(scene), given, [], "", scene)


@pytest.mark.parametrize("scene", scenes(),
                         ids=lambda s: f"{s.background} {[str(t) for t in s.things]}")
def test_the_score_takes_the_truth_and_nothing_else(scene, monkeypatch):
    monkeypatch.setattr(world, "draw", cache(world.draw))                  # asked for each picture
    sample = as_sample(scene, [])
    assert evaluate.success(sample.target, sample)
    wrong = [world.draw(other) for other in world.neighbours(scene)]
    wrong = [picture for picture in wrong if not np.array_equal(picture, sample.target)]
    assert len(wrong) >= 30
    assert not any(evaluate.success(picture, sample) for picture in wrong)


def test_neighbours_change_every_attribute():
    scene = Scene("white", (Thing("cross", "yellow", 4),))
    found = {world.draw(other).tobytes() for other in world.neighbours(scene)}
    thing = scene.things[0]
    for other in (Scene("white", (replace(thing, colour="red"),)),
                  Scene("white", (replace(thing, shape="star"),)),
                  Scene("white", (replace(thing, cell=0),)), Scene("white", ()),
                  Scene("red", (thing,)), Scene("white", (thing, Thing("star", "yellow", 8)))):
        assert world.draw(other).tobytes() in found


@pytest.mark.parametrize("task", ALL)
def test_truth_scores_all_and_copies_score_nothing(task):
    samples = world.tiny_test(task, 6)
    score = evaluate.measure(task, [s.target for s in samples], samples)
    assert score.success == 1 and score.psnr == 60
    assert score.copy_success == (None if task == "t2i" else 0)


def test_the_score_forgives_what_the_eye_forgives():
    sample = world.tiny_test("add", 1)[0]
    noisy = np.clip(sample.target + np.random.default_rng(0).normal(0, 12, sample.target.shape),
                    0, 255).astype(np.uint8)
    assert evaluate.success(noisy, sample)
    far = np.clip(sample.target + np.random.default_rng(0).normal(0, 60, sample.target.shape),
                  0, 255).astype(np.uint8)
    assert not evaluate.success(far, sample)             # mean squared error above the threshold


def test_psnr_and_error_are_in_the_units_they_claim():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert evaluate.squared_error(black, white) == 4     # from -1 to 1
    assert evaluate.psnr(black, white) == 0
