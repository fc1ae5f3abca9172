"""Conditions made from a picture: edges, boxes, skeletons.

support/public_sets.py calls them when it draws a row; pick() serves all that choose at random.
read_cond() is for --cond canny:FILE of sample.py.
"""
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from support.pictures import ADDRESS, Given, given_picture, load_image, resize

EDGES = (100, 200)                                       # thresholds that public scorers take
LOW, TIMES = (50, 150), (2, 2.5)                         # Canny: low threshold, high / low
BOX = (0.25, 0.75)                                       # sides of a box, in the picture's
# OpenPose's 18 points by their numbers among COCO's 17, the neck between both shoulders; the limbs
# between them. Point and limb number i have the i-th of 18 hues.
POINTS = (0, (5, 6), 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
         (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))
HUES = [ImageColor.getrgb(f"hsl({20 * i},100%,50%)") for i in range(18)]


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def canny(picture: np.ndarray, low: float, high: float, colours: bool = False) -> np.ndarray:
    """Edges as OpenCV's Canny draws them on a grey picture: white on black, (H, W, 3) -> the same.

    Sobel's gradient in |x| + |y|; ridges above `low` that hang together with some above `high`.
    colours: as it draws them on a coloured one, each pixel by the steepest of its colours.
    Source: Canny, 1986, "A computational approach to edge detection".
    """
    levels = picture if colours else np.rint(picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    p = np.pad(levels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]                  # (H, W + 2, 3 or 1), smoothed downwards
    columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]      # (H + 2, W, 3 or 1)
    x, y = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]            # (H, W, 3 or 1)
    steepest = (abs(x) + abs(y)).argmax(-1, keepdims=True)                   # (H, W, 1)
    x, y = (np.take_along_axis(gradient, steepest, -1)[..., 0] for gradient in (x, y))   # (H, W)
    size = np.pad(abs(x) + abs(y), 1)                    # (H + 2, W + 2), none outside
    steep = abs(y) > 2.414213 * abs(x)                   # more than 67.5 degrees
    flat = abs(y) < 0.414213 * abs(x)                    # less than 22.5
    own, ridge = size[1:-1, 1:-1], np.zeros(x.shape, bool)
    for where, (down, right) in ((flat, (0, 1)), (steep, (1, 0)),
                                 (~flat & ~steep & ((x < 0) == (y < 0)), (1, 1)),
                                 (~flat & ~steep & ((x < 0) != (y < 0)), (-1, 1))):
        height, width = x.shape
        before = size[1 - down:1 - down + height, 1 - right:1 - right + width]
        after = size[1 + down:1 + down + height, 1 + right:1 + right + width]
        ridge |= where & (own > before) & ((own > after) if down and right else (own >= after))
    weak = np.pad(ridge & (own > low), 1).ravel()        # what is reached is taken out
    front = np.flatnonzero(weak & (size.ravel() > high))
    found, width = np.zeros(len(weak), bool), x.shape[1] + 2
    around = np.array([down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1)])
    while len(front):
        found[front], weak[front] = True, False
        front = np.unique(front[:, None] + around)
        front = front[weak[front]]
    edges = found.reshape(size.shape)[1:-1, 1:-1]
    return np.repeat(np.where(edges, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def drawn_from(path: str | Path, where: str = "--cond") -> tuple[str, Path]:
    """A condition's kind and file: canny:FILE is ("canny", FILE), a FILE is ("", FILE).

    It may stand behind a folder, as in FOLDER/canny:FILE. A file that has such a name is itself.
    Raises: ValueError for a kind that is not drawn here.
    """
    if os.path.exists(path):
        return "", Path(path)
    if edges := re.fullmatch(r"(|.*?[/\\])canny:(.+)", str(path), re.S):
        return "canny", Path(edges[1]) / edges[2]
    other = re.search(r"(?:^|[/\\])([^/\\:]{2,}):", str(path))         # C:\ is a drive
    if not other or ADDRESS.search(str(path)):
        return "", Path(path)
    raise ValueError(f"{where} {path}: no such file, and no condition called {other[1]!r} is drawn "
                     "here; canny:FILE draws edges, while maps of depth or pose are made with "
                     "other tools and named as pictures")


def read_cond(source: Given,
              sized: Callable[[tuple[int, int]], tuple[int, int]]) -> Image.Image:
    """A condition: a picture, or the edges of one, drawn at the (W, H) that `sized` makes of its.

    Raises: as load_image() and drawn_from() do.
    """
    kind, file = drawn_from(source) if isinstance(source, (str, Path)) else ("", source)
    picture = given_picture(file)
    if not kind:
        return picture
    return Image.fromarray(canny(resize(picture, sized(picture.size)), *EDGES))


def check_cond(path: str | Path, where: str = "") -> Path:
    """The file of a condition, after a look at it. Raises: as read_cond() does."""
    file = drawn_from(path, f"{where}:" if where else "--cond")[1]
    load_image(file, where)
    return file


def random_canny(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    low = rng.uniform(*LOW)
    return canny(picture, low, min(255, low * rng.uniform(*TIMES)))


def random_box(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """The picture with a black box, or nothing but the box, (H, W, 3)."""
    height, width = (max(1, int(side * rng.uniform(*BOX))) for side in picture.shape[:2])
    top, left = (int(rng.integers(whole - side + 1))
                 for whole, side in zip(picture.shape, (height, width)))
    inside = np.zeros(picture.shape[:2], bool)
    inside[top:top + height, left:left + width] = True
    return np.where((inside if rng.random() < 0.5 else ~inside)[..., None], picture, 0
                    ).astype(np.uint8)


def skeletons(people: tuple, size: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Each one's 17 (x, y, seen) in a picture of that (W, H), drawn as by OpenPose -> (H, W, 3)."""
    height, width = shape[:2]
    sheet, radius = Image.new("RGB", (width, height)), max(1.0, max(width, height) / 128)
    pen, turn = ImageDraw.Draw(sheet), np.linspace(0, 2 * np.pi, 32)[:, None]
    for person in people:
        given = np.reshape(person, (17, 3)).astype(float)
        points = [given[np.atleast_1d(i)] for i in POINTS]                   # each (1 or 2, 3)
        places = [point[:, :2].mean(0) * (width, height) / size if point[:, 2].all() else None
                  for point in points]
        for (first, last), hue in zip(LIMBS, HUES):      # long ellipses, darker than the points
            if (a := places[first]) is not None and (b := places[last]) is not None:
                along = (b - a) / 2
                across = along[::-1] * (-1, 1) / max(1e-6, np.hypot(*along)) * radius
                outline = (a + b) / 2 + np.cos(turn) * along + np.sin(turn) * across
                pen.polygon([*map(tuple, outline)], tuple(int(0.6 * value) for value in hue))
        for place, hue in zip(places, HUES):
            if place is not None:
                pen.circle(tuple(place), radius, hue)
    return np.asarray(sheet)
