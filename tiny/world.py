"""The tiny world: pictures whose right answer to every instruction is known exactly.

64x64 pictures of one or two objects, small or big, on a 3x3 grid, or of one stick figure. A scene
is data; `draw(scene)` is its only picture. One scene in ten is kept from training by a stable hash.

Key: H, W pixels; all pictures are uint8 (H, W, 3) arrays.
"""
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from data import Sample
from support.conditions import pick

Colour = tuple[int, int, int] | int                      # RGB, or a grey
SIZE = 64                                                # pixels on a side
SCALE = 8                                                # masks are drawn 8x larger, then averaged
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 220),
           "yellow": (250, 215, 50), "purple": (140, 60, 180), "orange": (245, 130, 30),
           "white": (245, 245, 245), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
FIGURES = ("person", "robot", "wizard")                  # round, square and pointed heads
CELLS = ("top left", "top", "top right", "left", "center", "right",
         "bottom left", "bottom", "bottom right")
SMALL, BIG = 9, 13                                       # radii; big neighbours overlap
SHARE_BIG = 0.25                                         # of what a base model is trained on
POSES = tuple((left, right, legs) for left in (60, 0, -60) for right in (60, 0, -60)
              for legs in (12, 35))                      # arms: degrees up; legs: degrees apart
BONES = ("red", "yellow", "green", "blue", "purple", "white")


@dataclass(frozen=True, order=True)
class Thing:
    """An object on a grid cell, or (with a pose) a stick figure that fills the picture."""
    shape: str
    colour: str
    cell: int                                            # index into CELLS, row by row
    radius: int = SMALL
    pose: int = -1                                       # index into POSES; -1: not a figure

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and the things on it, the farthest first."""
    background: str
    things: tuple[Thing, ...]

    def digest(self) -> int:
        """A number that is its own, over runs, machines, drawing order."""
        text = f"{self.background} {sorted(self.things)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

    def held_out(self) -> bool:
        """One scene in ten is kept for testing."""
        return self.digest() % 10 == 0


def joints(pose: int, x: float = 32, y: float = 33) -> dict[str, tuple[float, float]]:
    """End points of a figure's bones in pixels, for a neck-to-hip torso centred on (x, y)."""
    left, right, legs = (angle * pi / 180 for angle in POSES[pose])
    neck, hip = (x, y - 9), (x, y + 7)
    return {"head": (x, y - 18), "neck": neck, "hip": hip,
            "left hand": (x - 17 * cos(left), neck[1] + 3 - 17 * sin(left)),
            "right hand": (x + 17 * cos(right), neck[1] + 3 - 17 * sin(right)),
            "left foot": (x - 20 * sin(legs), hip[1] + 20 * cos(legs)),
            "right foot": (x + 20 * sin(legs), hip[1] + 20 * cos(legs))}


def bones(pose: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The six lines of the skeleton, in the order of BONES."""
    at = joints(pose)
    arm = (at["neck"][0], at["neck"][1] + 3)
    return [(at["head"], at["neck"]), (at["neck"], at["hip"]), (arm, at["left hand"]),
            (arm, at["right hand"]), (at["hip"], at["left foot"]), (at["hip"], at["right foot"])]


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a polygon of radius r around (x, y)."""
    if shape == "square":
        return [(x - .85 * r, y - .85 * r), (x + .85 * r, y - .85 * r),
                (x + .85 * r, y + .85 * r), (x - .85 * r, y + .85 * r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + .8 * r), (x - r, y + .8 * r)]
    if shape == "star":
        return [(x + (r * 1.1 if i % 2 == 0 else r * .5) * sin(i * pi / 5),
                 y - (r * 1.1 if i % 2 == 0 else r * .5) * cos(i * pi / 5)) for i in range(10)]
    a = .35 * r                                          # cross
    return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a),
            (x + a, y + a), (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a),
            (x - r, y - a), (x - a, y - a)]


@lru_cache(maxsize=1024)
def mask(shape: str, cell: int, radius: int, pose: int) -> np.ndarray:
    """How much of each pixel a thing covers, (H, W, 1) float32 in [0, 1]."""
    image = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    pen = ImageDraw.Draw(image)
    x, y = 12 + 20 * (cell % 3), 12 + 20 * (cell // 3)

    def polygon(kind: str, x: float, y: float, r: float) -> None:
        if kind == "circle":
            pen.ellipse([(x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE], 255)
        else:
            pen.polygon([(a * SCALE, b * SCALE) for a, b in outline(kind, x, y, r)], 255)

    if pose < 0:
        polygon(shape, x, y, radius)
    else:
        for start, end in bones(pose):
            pen.line([(a * SCALE, b * SCALE) for a, b in (start, end)], 255, 5 * SCALE)
        head = {"person": "circle", "robot": "square", "wizard": "triangle"}[shape]
        polygon(head, *joints(pose)["head"], 8)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return (np.asarray(image, dtype=np.float32) / 255)[..., None]


def painted(scene: Scene, ground: Colour, colours: Iterable[Colour]) -> np.ndarray:
    """(H, W, 3) uint8: each thing, in its colour, is laid over what is behind it."""
    picture = np.full((SIZE, SIZE, 3), ground, np.float32)
    for thing, colour in zip(scene.things, colours):
        cover = mask(thing.shape, thing.cell, thing.radius, thing.pose)      # (H, W, 1)
        picture += cover * (np.array(colour, np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def draw(scene: Scene) -> np.ndarray:
    """The only picture of a scene, (H, W, 3) uint8."""
    return painted(scene, COLOURS[scene.background], (COLOURS[t.colour] for t in scene.things))


def edge_map(scene: Scene) -> np.ndarray:
    """White outlines on black, (H, W, 3): where the frontmost thing changes between pixels."""
    label = np.zeros((SIZE + 1, SIZE + 1), int)
    for i, thing in enumerate(scene.things):
        label[:SIZE, :SIZE][
            mask(thing.shape, thing.cell, thing.radius, thing.pose)[..., 0] > .5] = i + 1
    label[SIZE], label[:, SIZE] = label[SIZE - 1], label[:, SIZE - 1]
    edge = (label[:-1, :-1] != label[1:, :-1]) | (label[:-1, :-1] != label[:-1, 1:])
    return np.repeat(np.where(edge, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def depth_map(scene: Scene) -> np.ndarray:
    """Grey by nearness, (H, W, 3): background 0, the farthest thing 110, nearer ones brighter."""
    return painted(scene, 0, (110 + 120 * i for i in range(len(scene.things))))


def pose_map(scene: Scene) -> np.ndarray:
    """The skeleton of the scene's figure, (H, W, 3): one colour per bone, on black."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    pen = ImageDraw.Draw(image)
    for colour, ends in zip(BONES, bones(scene.things[0].pose)):
        pen.line([(a * SCALE, b * SCALE) for a, b in ends], COLOURS[colour], 2 * SCALE)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def boxed(scene: Scene, thing: Thing) -> np.ndarray:
    """The picture of the scene with a black box over the cell of one thing, (H, W, 3)."""
    picture = draw(scene)
    x, y = 12 + 20 * (thing.cell % 3), 12 + 20 * (thing.cell // 3)
    picture[y - 11:y + 11, x - 11:x + 11] = 0
    return picture


# Wordings per task. The last two of each list are used for testing only.
WORDINGS = {
    "t2i": ["{scene}", "a picture of {scene}", "draw {scene}", "paint {scene}",
            "make a picture with {scene}", "show {scene}", "image of {scene}",
            "{scene} please"],
    "recolour": ["make the {a} {colour}", "paint the {a} {colour}", "recolour the {a} to {colour}",
                 "change the colour of the {a} to {colour}", "the {a} should be {colour}",
                 "give the {a} the colour {colour}", "change the {a} to {colour}",
                 "please paint the {a} {colour}"],
    "reshape": ["turn the {a} into a {shape}", "make the {a} a {shape}",
                "replace the {a} with a {shape}", "change the {a} into a {shape}",
                "the {a} should be a {shape}", "change the shape of the {a} to a {shape}",
                "the {a} becomes a {shape}", "please make the {a} a {shape}"],
    "move": ["move the {a} to the {place}", "put the {a} in the {place}",
             "the {a} should be in the {place}", "place the {a} at the {place}",
             "bring the {a} to the {place}", "change the place of the {a} to the {place}",
             "shift the {a} to the {place}", "please put the {a} in the {place}"],
    "remove": ["remove the {a}", "delete the {a}", "take away the {a}", "erase the {a}",
               "remove the {a} from the picture", "the {a} should be removed", "take the {a} away",
               "please remove the {a}"],
    "add": ["add a {a} in the {place}", "put a {a} in the {place}", "draw a {a} at the {place}",
            "place a {a} in the {place}", "add a {a} to the {place}", "insert a {a} in the {place}",
            "there should be a {a} in the {place}", "please add a {a} at the {place}"],
    "background": ["make the background {colour}", "paint the background {colour}",
                   "change the background to {colour}", "the background should be {colour}",
                   "recolour the background to {colour}", "give the background the colour {colour}",
                   "put it on a {colour} background", "please make the background {colour}"],
    "canny": ["fill the edges with {things} on a {colour} background",
              "colour the edges: {things}, background {colour}",
              "{things} on a {colour} background, along the edges",
              "paint the edges as {things} on {colour}",
              "follow the edges: {things} on a {colour} background",
              "please colour the edges: {things} on {colour}"],
    "depth": ["fill the depth map with {things} on a {colour} background",
              "colour the depth map: {things}, background {colour}",
              "{things} on a {colour} background, from the depth map",
              "paint the depth map as {things} on {colour}",
              "follow the depth map: {things} on a {colour} background",
              "please colour the depth map: {things} on {colour}"],
    "pose": ["draw a {a} in this pose on a {colour} background",
             "a {a} on a {colour} background, in this pose", "give this pose to a {a} on {colour}",
             "follow the pose: a {a} on a {colour} background",
             "paint a {a} in this pose on {colour}",
             "please draw a {a} on a {colour} background in this pose"],
    "fill": ["fill the box with a {a}", "draw a {a} in the black box", "put a {a} in the box",
             "there is a {a} in the black box", "paint a {a} in the black box",
             "please fill the box with a {a}"],
    "subject": ["put it in the {place} on a {colour} background",
                "the object in the {place}, background {colour}",
                "place the object at the {place} on {colour}",
                "draw this object in the {place} on a {colour} background",
                "put this object in the {place} on {colour}",
                "please place it in the {place} on a {colour} background"],
    "multi": ["put the first object in the {place} and the second in the {place2} "
              "on a {colour} background",
              "the first object in the {place}, the second in the {place2}, background {colour}",
              "on a {colour} background, the first at the {place} and the second at the {place2}",
              "place the first at the {place}, the second at the {place2}, on {colour}",
              "draw the first object in the {place} and the second in the {place2} on {colour}",
              "please put the first in the {place} and the second in the {place2} on {colour}"],
    "mixed": ["the object of the {first} picture in the {map} of the {second}{rest} "
              "on a {colour} background",
              "follow the {map} of the {second} picture with the object of the {first}{rest}, "
              "background {colour}",
              "{first} picture: object, {second} picture: {map},{rest} on a {colour} background",
              "put the object of the {first} picture in the {map} of the {second},{rest} "
              "on {colour}",
              "draw the object of the {first} picture in the {map} of the {second},{rest} "
              "on {colour}",
              "please put the {first} object in the {map} of the {second}{rest} on {colour}"],
}
BASE_TASKS = ("t2i", "recolour", "reshape", "move", "remove", "add", "background")
NEW_TASKS = ("canny", "depth", "pose", "fill", "subject", "multi", "mixed")
EDITS = BASE_TASKS[1:]
# A batch holds tasks that are given the same number of native and clean pictures.
GROUPS = (("t2i",), EDITS, ("canny", "depth", "pose", "fill", "subject"), ("multi", "mixed"))


def other(rng: np.random.Generator, options, *taken):
    return pick(rng, [option for option in options if option not in taken])


def random_scene(rng: np.random.Generator, things: int, radius: int = SMALL,
                 new_shapes: bool = False) -> Scene:
    """A valid scene: no thing has the background's colour, no two share a cell or a description.

    Big things stand on neighbouring cells, so that they overlap; `new_shapes` forbids equal shapes.
    """
    background = pick(rng, list(COLOURS))
    first = Thing(pick(rng, SHAPES), other(rng, COLOURS, background), int(rng.integers(9)), radius)
    if things == 1:
        return Scene(background, (first,))
    cells = [c for c in range(9) if c != first.cell and (radius == SMALL or near(c, first.cell))]
    while True:
        second = Thing(pick(rng, SHAPES), other(rng, COLOURS, background), pick(rng, cells), radius)
        if second.shape != first.shape or (second.colour != first.colour and not new_shapes):
            return Scene(background, (first, second))


def near(cell: int, to: int) -> bool:
    return abs(cell // 3 - to // 3) + abs(cell % 3 - to % 3) == 1


def random_figure(rng: np.random.Generator) -> Scene:
    background = pick(rng, list(COLOURS))
    figure = Thing(pick(rng, FIGURES), other(rng, COLOURS, background), 4, SMALL,
                   int(rng.integers(len(POSES))))
    return Scene(background, (figure,))


def card(rng: np.random.Generator, thing: Thing) -> np.ndarray:
    """A subject's picture: the thing alone, big, in the middle of some plain ground."""
    return draw(Scene(other(rng, COLOURS, thing.colour), (replace(thing, cell=4, radius=BIG),)))


def describe(scene: Scene, places: bool = True) -> str:
    parts = [f"a {'big ' * (thing.radius == BIG)}{thing} in the {CELLS[thing.cell]}" if places else
             f"a {thing}" for thing in scene.things]
    return " and ".join(parts)


def words(rng: np.random.Generator, task: str, held_out: bool, **slots: str) -> str:
    """One of the task's wordings, filled in; some start with a capital, some end in a full stop."""
    wordings = WORDINGS[task] if held_out else WORDINGS[task][:-2]
    text = pick(rng, wordings).format(**slots).replace("a orange", "an orange")
    if rng.random() < .5:
        text = text[0].upper() + text[1:]
    return text + "." * int(rng.random() < .3)


def edited(rng: np.random.Generator, task: str,
           radius: int = SMALL) -> tuple[Scene, Scene, dict[str, str]]:
    """Before, after, and the words' slots of one random edit."""
    alone = task == "add" or (task == "move" and radius == BIG)  # which lies in front must show
    count = 2 if task == "remove" else 1 if alone else int(rng.integers(1, 3))
    before = random_scene(rng, count, radius)
    things, ground = list(before.things), before.background
    i = int(rng.integers(count))
    if task == "background":
        colour = other(rng, COLOURS, ground, *(thing.colour for thing in things))
        return before, Scene(colour, before.things), {"colour": colour}
    slots = {"a": str(things[i])}
    if task == "recolour":
        slots["colour"] = other(rng, COLOURS, ground, things[i].colour)
        things[i] = replace(things[i], colour=slots["colour"])
    elif task == "reshape":
        slots["shape"] = other(rng, SHAPES, things[i].shape)
        things[i] = replace(things[i], shape=slots["shape"])
    elif task == "move":
        cell = other(rng, range(9), *(thing.cell for thing in things))
        slots["place"] = CELLS[cell]
        things[i] = replace(things[i], cell=cell)
    elif task == "remove":
        del things[i]
    elif task == "add":
        while len(things) < 2:
            new = random_scene(rng, 1, radius).things[0]
            if new.colour != ground and new.cell != things[0].cell and str(new) != str(things[0]):
                things.append(new)
        slots = {"a": str(things[1]), "place": CELLS[things[1].cell]}
    return before, Scene(ground, tuple(things)), slots


def tiny_sample(rng: np.random.Generator, task: str, held_out: bool = False) -> Sample:
    """A random sample of one task; with `held_out`, of scenes never trained on.

    Those are asked for in all wordings, of which training never uses the last two.

    Raises: ValueError for an unknown task.
    """
    if task not in WORDINGS:
        raise ValueError(f"unknown task {task!r}; the tiny world has {', '.join(WORDINGS)}")
    while True:
        sample = (edit_sample(rng, task, held_out) if task in EDITS else
                  new_sample(rng, task, held_out))
        if sample is not None:
            return sample


def edit_sample(rng: np.random.Generator, task: str, held_out: bool) -> Sample | None:
    big = not held_out and rng.random() < SHARE_BIG
    before, after, slots = edited(rng, task, BIG if big else SMALL)
    distinct = len({str(thing) for thing in after.things}) == len(after.things)
    if not distinct or before.held_out() != held_out or after.held_out() != held_out:
        return None
    return Sample(words(rng, task, held_out, **slots), draw(after), [draw(before)], [], task, after)


def new_sample(rng: np.random.Generator, task: str, held_out: bool) -> Sample | None:
    """A sample of a task without a picture to edit, or None when the scene is on the other side."""
    kind = pick(rng, ("edges", "depth map")) if task == "mixed" else task
    things = (2 if task in ("depth", "multi") or kind == "depth map" else
              1 if task == "subject" else int(rng.integers(1, 3)))
    if task == "pose" or (task == "t2i" and not held_out and rng.random() < .1):
        scene = random_figure(rng)                       # a base model has seen people, in any pose
    else:
        big = kind in ("depth", "depth map") or (
            task == "t2i" and not held_out and rng.random() < SHARE_BIG)
        scene = random_scene(rng, things, BIG if big else SMALL,
                             new_shapes=task in ("canny", "depth", "mixed"))
    if scene.held_out() != held_out or (task == "fill" and scene.background == "black"):
        return None
    figure = scene.things[0].pose >= 0
    slots = {"colour": scene.background, "a": str(scene.things[0]),
             "things": describe(scene, places=False),
             "scene": describe(scene, places=not figure) + f" on a {scene.background} background",
             "place": CELLS[scene.things[0].cell], "place2": CELLS[scene.things[-1].cell]}
    conds = {"t2i": lambda: [], "canny": lambda: [edge_map(scene)],
             "depth": lambda: [depth_map(scene)], "pose": lambda: [pose_map(scene)],
             "fill": lambda: [boxed(scene, scene.things[0])],
             "subject": lambda: [card(rng, scene.things[0])],
             "multi": lambda: [card(rng, thing) for thing in scene.things],
             "mixed": lambda: [card(rng, scene.things[0]),
                               edge_map(scene) if kind == "edges" else depth_map(scene)]}[task]()
    if task == "mixed":
        swap = bool(rng.integers(2))
        conds = conds[::-1] if swap else conds
        slots |= {"first": "second" if swap else "first",
                  "second": "first" if swap else "second", "map": kind,
                  "rest": f" with a {scene.things[1]}" if len(scene.things) == 2 else ""}
    return Sample(words(rng, task, held_out, **slots), draw(scene), [], conds, task, scene)


def neighbours(scene: Scene) -> Iterator[Scene]:
    """Every scene that differs from this one in a single attribute.

    Of one thing: its colour, shape, cell, pose, or presence; a surplus thing; the background.
    """
    things = scene.things
    for i, thing in enumerate(things):
        def swap(*new: Thing) -> Scene:
            return Scene(scene.background, things[:i] + new + things[i + 1:])
        yield swap()
        yield from (swap(replace(thing, colour=c)) for c in COLOURS if c != thing.colour)
        if thing.pose >= 0:
            yield from (swap(replace(thing, shape=s)) for s in FIGURES if s != thing.shape)
            yield from (swap(replace(thing, pose=p)) for p in range(len(POSES)) if p != thing.pose)
        else:
            yield from (swap(replace(thing, shape=s)) for s in SHAPES if s != thing.shape)
            yield from (swap(replace(thing, cell=c)) for c in range(9) if c != thing.cell)
    radius = things[0].radius if things else SMALL
    for cell in set(range(9)) - {thing.cell for thing in things}:
        yield from (Scene(scene.background, (*things, Thing(s, c, cell, radius)))
                    for s in SHAPES for c in COLOURS if c != scene.background)
    yield from (Scene(c, things) for c in COLOURS if c != scene.background)


class TinyWorld:
    """Endless samples of the tiny world, for training. `tasks` may restrict it, e.g. BASE_TASKS.

    held_out: of the scenes that are never trained on, as tiny_sample() takes it.
    Every task is as likely as any other.
    """

    def __init__(self, tasks: tuple[str, ...] = BASE_TASKS + NEW_TASKS, held_out: bool = False):
        self.held_out = held_out
        self.groups = [group for tasks_of in GROUPS
                       if (group := [t for t in tasks_of if t in tasks])]
        self.chances = np.array([len(group) for group in self.groups]) / len(tasks)

    def draw(self, rng: np.random.Generator, size: int,
             nearby: np.random.Generator | None = None) -> list[Sample]:
        """`size` samples that are given the same number of pictures."""
        group = self.groups[rng.choice(len(self.groups), p=self.chances)]
        return [tiny_sample(rng, pick(rng, group), self.held_out) for _ in range(size)]


def tiny_test(task: str, number: int, seed: int = 0) -> list[Sample]:
    """The fixed held-out samples of a task: the same for every call with the same arguments."""
    rng = np.random.default_rng([seed, list(WORDINGS).index(task)])
    return [tiny_sample(rng, task, held_out=True) for _ in range(number)]
