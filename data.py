"""Samples and batches: the tiny world, and a user's own folder.

A sample is an instruction, the picture that it asks for, and the pictures that were given: native
references (the picture to edit) and clean conditions (edges, depth, pose, a subject, ...).

The tiny world holds 64x64 pictures of one or two objects, small or big, on a 3x3 grid, or of one
stick figure. A scene is data; `draw(scene)` is its only picture, so the right answer to every
instruction is known exactly. One scene in ten is held out of training by a stable hash.

Key: H, W pixels; all pictures are uint8 (H, W, 3) arrays until `to_tensor` maps them to [-1, 1].

Run: python data.py        # writes one sample of every task to tiny_world.png
"""
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from math import cos, pi, sin
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps


@dataclass(frozen=True)
class Sample:
    """One training or test example. `task` is for logs only: it never enters the network."""
    instruction: str
    target: np.ndarray                                   # (H, W, 3) uint8
    images: list[np.ndarray] = field(default_factory=list)    # native references, each (H, W, 3)
    conds: list[np.ndarray] = field(default_factory=list)     # clean conditions, each (H, W, 3)
    task: str = ""
    scene: "Scene | None" = None                         # tiny world only: the scene of `target`


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Stack pictures of one size. (H, W, 3) uint8 in 0..255 -> (B, 3, H, W) float32 in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)     # (B, 3, H, W)
    return batch.float().contiguous() / 127.5 - 1


def stack(given: Iterable[list[np.ndarray]]) -> list[torch.Tensor]:
    """Each sample's list of pictures -> one batch per place in the list, each (B, 3, H, W)."""
    return [to_tensor(list(pictures)) for pictures in zip(*given, strict=True)]


def grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures in rows, each aligned at the right, on grey -> (H, W, 3) uint8."""
    cell = max(side for row in rows for picture in row for side in picture.shape[:2])
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * cell, columns * cell, 3), 128, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row, columns - len(row)):
            height, width = picture.shape[:2]
            sheet[i * cell:i * cell + height, j * cell:j * cell + width] = picture
    return sheet


# ------------------------------------------------------------------------------ reading pictures

def load_image(path: str | Path) -> Image.Image:
    """Read any picture as a person would see it, in RGB.

    EXIF rotation is applied, alpha is laid on white, palettes and 16-bit greys become 8-bit RGB.
    Raises: FileNotFoundError, or ValueError when the file is no readable picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
        with quiet, Image.open(path) as opened:          # large photographs are welcome
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, RuntimeError,
            Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from None
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: 0..65535 -> 0..255
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def fitted(size: tuple[int, int], longest: int = 512, multiple: int = 16) -> tuple[int, int]:
    """(W, H) shrunk to `longest` on the longer side (never enlarged), each side to `multiple`."""
    scale = min(1.0, longest / max(size))
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return width, height


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture of that (W, H), as (H, W, 3) uint8."""
    return np.asarray(image if image.size == size else
                      image.resize(size, Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------- the tiny world

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

    def held_out(self) -> bool:
        """One scene in ten is kept for testing. Stable over runs, machines, drawing order."""
        text = f"{self.background} {sorted(self.things)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 10 == 0


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


def draw(scene: Scene) -> np.ndarray:
    """The only picture of a scene, (H, W, 3) uint8: each thing is laid over what is behind it."""
    picture = np.full((SIZE, SIZE, 3), COLOURS[scene.background], np.float32)
    for thing in scene.things:
        cover = mask(thing.shape, thing.cell, thing.radius, thing.pose)      # (H, W, 1)
        picture += cover * (np.array(COLOURS[thing.colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


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
    picture = np.zeros((SIZE, SIZE, 3), np.float32)
    for i, thing in enumerate(scene.things):
        cover = mask(thing.shape, thing.cell, thing.radius, thing.pose)      # (H, W, 1)
        picture += cover * (110 + 120 * i - picture)
    return np.rint(picture).astype(np.uint8)


def pose_map(scene: Scene) -> np.ndarray:
    """The skeleton of the scene's figure, (H, W, 3): one colour per bone, on black."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE))
    pen = ImageDraw.Draw(image)
    for colour, ends in zip(BONES, bones(scene.things[0].pose)):
        pen.line([(a * SCALE, b * SCALE) for a, b in ends], COLOURS[colour], 2 * SCALE)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def boxed(scene: Scene, thing: Thing) -> np.ndarray:
    """The picture of the scene with a black box over the cell of one thing, (H, W, 3)."""
    picture = draw(scene).copy()
    x, y = 12 + 20 * (thing.cell % 3), 12 + 20 * (thing.cell // 3)
    picture[y - 11:y + 11, x - 11:x + 11] = 0
    return picture


# Wordings per task. The last two of each list are used for testing only.
WORDINGS = {
    "t2i": ["{scene}", "a picture of {scene}", "draw {scene}", "paint {scene}",
            "make a picture with {scene}", "show {scene}", "an image of {scene}",
            "please draw {scene}"],
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
              "please use the object of the {first} picture in the {map} of the {second}{rest} "
              "on {colour}"],
}
BASE_TASKS = ("t2i", "recolour", "reshape", "move", "remove", "add", "background")
NEW_TASKS = ("canny", "depth", "pose", "fill", "subject", "multi", "mixed")
EDITS = BASE_TASKS[1:]
# A batch holds tasks that are given the same number of native and clean pictures.
PAIRS = ("multi", "mixed")
GROUPS = (("t2i",), EDITS, ("canny", "depth", "pose", "fill", "subject"), PAIRS)


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


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
    """A random sample of one task; with `held_out`, of scenes and wordings never trained on.

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

    A group is as likely as its tasks are together; an edit, which a base knows, counts half, and
    a task of two conditions twice.
    """

    def __init__(self, tasks: tuple[str, ...] = BASE_TASKS + NEW_TASKS):
        self.groups = [group for tasks_of in GROUPS
                       if (group := [t for t in tasks_of if t in tasks])]
        sizes = np.array([sum(.5 if task in EDITS else 2 if task in PAIRS else 1 for task in group)
                          for group in self.groups])
        self.chances = sizes / sizes.sum()

    def draw(self, rng: np.random.Generator, size: int) -> list[Sample]:
        """`size` samples that are given the same number of pictures."""
        group = self.groups[rng.choice(len(self.groups), p=self.chances)]
        return [tiny_sample(rng, pick(rng, group)) for _ in range(size)]


def tiny_test(task: str, number: int, seed: int = 0) -> list[Sample]:
    """The fixed held-out samples of a task: the same for every call with the same arguments."""
    rng = np.random.default_rng([seed, list(WORDINGS).index(task)])
    return [tiny_sample(rng, task, held_out=True) for _ in range(number)]


# ---------------------------------------------------------------------------- a user's own folder

MOST_BAD = 0.1                                           # of the lines may be skipped, if asked for
NAMES = {"target": ("target", "file_name", "image_path", "image", "output_image"),
         "instruction": ("instruction", "prompt", "caption", "text"),
         "images": ("images", "input_images", "kontext_images", "control_path", "cond_image"),
         "conds": ("conds",)}


@contextmanager
def noting(bad: list[str] | None) -> Iterator[None]:
    """Write what is wrong with a row to `bad`, if there is such a list, instead of raising it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if bad is None:
            raise
        bad.append(" ".join(str(error).split()))


def read_rows(file: Path, bad: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with words for where it stands. Raises: ValueError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where, row = f"{file} line {number}", None
            with noting(bad):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not valid JSON ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected an object like {{\"instruction\": ...}}")
            if isinstance(row, dict):
                yield where, row


def entry(row: dict, name: str, where: str) -> object:
    """A row's entry under our name or one others use, or None. Raises: ValueError for two."""
    found = [other for other in NAMES[name] if other in row]
    if len(found) > 1:
        raise ValueError(f"{where}: {found[0]!r} and {found[1]!r} both mean {name!r}; keep one")
    return row[found[0]] if found else None


def checked_text(text: str, where: str) -> str:
    """The text. Raises: ValueError when it has bytes or halves of letters that no text can have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {text!a} is not valid Unicode text") from None
    return text


def row_text(row: dict, name: str, where: str) -> str:
    """A row's text. Raises: ValueError if there is none."""
    text = entry(row, name, where)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: needs a non-empty text under {name!r}")
    return checked_text(text, where)


def row_paths(row: dict, name: str, where: str) -> list[str]:
    """A row's path or list of paths. Raises: ValueError."""
    paths = entry(row, name, where)
    paths = [] if paths is None else paths
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: {name!r} must be a path or a list of paths")
    return paths


def located(path: str, folder: Path, root: Path | None, where: str) -> Path:
    """Where a row's path leads. Raises: ValueError if out of `root`, by default the data's folder.

    Paths are taken as written: links inside the folder are their owner's business.
    """
    whole, root = Path(os.path.abspath(folder / path)), Path(os.path.abspath(root or folder))
    if not whole.is_relative_to(root):
        raise ValueError(f"{where}: {path!r} leads out of {root}; --data-root FOLDER allows more")
    return whole


def read_picture(path: Path, where: str) -> Image.Image:
    """load_image, with the row named in its errors."""
    try:
        return load_image(path)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from None


@dataclass(frozen=True)
class Row:
    """A checked line of a user's folder; its pictures are read when they are drawn."""
    instruction: str
    paths: list[Path]                                    # target, native references, clean ones
    sizes: list[tuple[int, int]]                         # (W, H) that each of them will take
    references: int                                      # how many are native
    task: str
    where: str


class Folder:
    """A folder with metadata.jsonl, or a .jsonl file with paths relative to it.

    Each line is an object: target (path), instruction (str), images (paths of native references),
    conds (paths of clean conditions), task (str); the last three may be absent, a single path may
    stand for a list. size: (W, H) that every picture takes, or None to keep each near its own size,
    the longer side at most 512; the first reference takes the target's, as in sampling. root: the
    folder that no path may leave, by default the file's own. bad: a list that takes the bad lines'
    errors; one line in ten may be bad.
    Raises: FileNotFoundError, ValueError; they name the line.
    """

    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 root: Path | None = None, bad: list[str] | None = None):
        path = Path(path)
        self.file, self.size = path / "metadata.jsonl" if path.is_dir() else path, size
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: not found; a data folder needs metadata.jsonl")
        self.groups: dict[tuple, list[Row]] = {}         # rows whose pictures have equal sizes
        folder, worse = self.file.parent, None if bad is None else []
        for where, row in read_rows(self.file, worse):
            with noting(worse):
                instruction, target = (row_text(row, name, where)
                                       for name in ("instruction", "target"))
                images, conds = (row_paths(row, name, where) for name in ("images", "conds"))
                paths = [located(path, folder, root, where) for path in (target, *images, *conds)]
                sizes = [self.size_of(path, where) for path in paths]
                sizes[1:2] = sizes[:1] if images else sizes[1:2]
                self.groups.setdefault((len(images), *sizes), []).append(
                    Row(instruction, paths, sizes, len(images), str(row.get("task", "")), where))
        if worse and len(worse) > MOST_BAD * (len(worse) + sum(map(len, self.groups.values()))):
            raise ValueError(f"{self.file}: {len(worse)} lines are bad, which is too many to skip; "
                             f"the first: {worse[0]}")
        if bad is not None:
            bad.extend(worse)
        if not self.groups:
            raise ValueError(f"{self.file}: holds no rows")

    def size_of(self, path: Path, where: str) -> tuple[int, int]:
        """The size a picture will have. All pictures are read once, to find broken ones at once."""
        size = read_picture(path, where).size
        return self.size or fitted(size)

    def read(self, row: Row) -> Sample:
        pictures = [resize(read_picture(path, row.where), size)
                    for path, size in zip(row.paths, row.sizes)]
        images, conds = pictures[1:1 + row.references], pictures[1 + row.references:]
        return Sample(row.instruction, pictures[0], images, conds, row.task)

    def draw(self, rng: np.random.Generator, size: int) -> list[Sample]:
        """Up to `size` different rows of one group; a group is as likely as it is large."""
        groups = list(self.groups.values())
        weights = np.array([len(rows) for rows in groups], float)
        rows = groups[rng.choice(len(groups), p=weights / weights.sum())]
        chosen = rng.choice(len(rows), min(size, len(rows)), replace=False)
        return [self.read(rows[i]) for i in chosen]


def open_source(text: str, size: tuple[int, int] | None = None, root: Path | None = None,
                bad: list[str] | None = None) -> tuple["TinyWorld | Folder", float]:
    """A command line's SOURCE[:weight] -> (source, weight). SOURCE: tiny | FOLDER | FILE.jsonl.

    size, root, bad: as Folder takes them.
    """
    name, colon, weight = text.rpartition(":")
    try:
        name, value = (name, float(weight)) if colon else (text, 1.0)
    except ValueError:                                   # a colon that belongs to the path
        name, value = text, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--data {text}: the weight must be a positive number")
    return (TinyWorld() if name == "tiny" else Folder(name, size, root, bad)), value


def batches(sources: list[tuple["TinyWorld | Folder", float]], size: int, seed: int,
            start: int = 0, stride: int = 1) -> Iterator[list[Sample]]:
    """One source per batch, by weight. Batch number i depends on the seed and i alone."""
    weights = np.array([weight for _, weight in sources])
    for i in count(start, stride):
        rng = np.random.default_rng([seed, i])
        yield sources[rng.choice(len(sources), p=weights / weights.sum())][0].draw(rng, size)


def main() -> None:
    """Draw one sample of every task, given pictures left, target right."""
    samples = [tiny_test(task, 1)[0] for task in WORDINGS]
    for sample in samples:
        print(f"{sample.task:12} {sample.instruction}")
    sheet = grid([[*sample.images, *sample.conds, sample.target] for sample in samples])
    Image.fromarray(sheet).save("tiny_world.png")


if __name__ == "__main__":
    main()
