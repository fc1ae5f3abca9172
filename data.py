"""Samples and batches: a user's own pictures, and the public data sets.

A sample is an instruction, the picture that it asks for, and the pictures that were given: native
references (the picture to edit) and clean conditions (edges, depth, pose, a subject, ...).

A source draws samples by a random generator: source.draw(rng, size) -> up to `size` of them, that
are given the same number of pictures, of the same sizes. The embedded one is in tiny/world.py.

Key: H, W pixels; all pictures are uint8 (H, W, 3) arrays until `to_tensor` maps them to [-1, 1].
"""
import csv
import io
import json
import logging
import os
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count, islice, product
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps

warnings.filterwarnings("ignore", module="PIL")          # large photographs are welcome, and what
logging.getLogger("PIL").setLevel(logging.CRITICAL)      # is broken is an error in one line


@dataclass(frozen=True)
class Sample:
    """One training or test example. `task` is for logs only: it never enters the network."""
    instruction: str
    target: np.ndarray                                   # (H, W, 3) uint8
    images: list[np.ndarray] = field(default_factory=list)    # native references, each (H, W, 3)
    conds: list[np.ndarray] = field(default_factory=list)     # clean conditions, each (H, W, 3)
    task: str = ""
    scene: object = None                                 # tiny world only: the scene of `target`


class Source(Protocol):
    def draw(self, rng: np.random.Generator, size: int) -> list[Sample]: ...
    # and, if it has an end: all(first, stride) -> Iterator[Sample]; contents() -> Iterator[tuple],
    # which tells these data from others


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Stack pictures of one size. (H, W, 3) uint8 in 0..255 -> (B, 3, H, W) float32 in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)     # (B, 3, H, W)
    return batch.float().contiguous() / 127.5 - 1


def stack(given: Iterable[list[np.ndarray]]) -> list[torch.Tensor]:
    """Each sample's list of pictures -> one batch per place in the list, each (B, 3, H, W)."""
    return [to_tensor(list(pictures)) for pictures in zip(*given, strict=True)]


def grid(rows: list[list[np.ndarray]], texts: list[str]) -> np.ndarray:
    """Pictures in rows, aligned at the right, on grey, a text below each -> (H, W, 3) uint8."""
    cell = max(side for row in rows for picture in row for side in picture.shape[:2])
    columns, line = max(map(len, rows)), 14              # pixels of a line of text
    sheet = Image.new("RGB", (columns * cell, len(rows) * (cell + line)), "grey")
    pen = ImageDraw.Draw(sheet)
    for top, row, text in zip(count(0, cell + line), rows, texts):
        for j, picture in enumerate(row, columns - len(row)):
            sheet.paste(Image.fromarray(picture), (j * cell, top))
        pen.text((2, top + cell), text[:columns * cell // 5], "white", font_size=10)
    return np.asarray(sheet)


# ------------------------------------------------------------------------------ reading pictures

@contextmanager
def opened(source: str | Path | io.BytesIO, where: str = "") -> Iterator[Image.Image]:
    """A picture file, or its bytes, of which the head alone is read yet; the row at `where` has it.

    Raises: FileNotFoundError, or ValueError when the file is no readable picture.
    """
    path = where if isinstance(source, io.BytesIO) else f"{where}: {source}" if where else source
    if path is not where and not os.path.isfile(source):  # Path.is_file minds names too long
        raise FileNotFoundError(f"{path}: no such picture file")
    try:
        with Image.open(source) as image:
            if max(image.size) >= 2 ** 16:               # no camera's: a broken or a hostile head
                raise ValueError(f"it claims to have {image.width} x {image.height} pixels")
            yield image
    except (OSError, SyntaxError, ValueError, RuntimeError, TypeError, AttributeError,
            Image.DecompressionBombError) as error:      # Pillow's readers have no error of theirs
        why = str(error).partition(" <")[0]              # without an object's address
        raise ValueError(f"{path}: cannot be read as a picture ({why})") from None


def load_image(source: str | Path | io.BytesIO, where: str = "") -> Image.Image:
    """Read any picture as a person would see it, in RGB. Raises: as `opened` does.

    EXIF rotation is applied, alpha is laid on white, palettes and 16-bit greys become 8-bit RGB.
    """
    with opened(source, where) as image:
        if image.mode == "F":                            # nobody knows where its white is
            raise ValueError("it holds floats; save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(image)
        image.load()
    if image.mode.startswith("I"):                       # 16-bit grey: 0..65535 -> 0..255
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


# ---------------------------------------------------------------------------- a user's own folder

MOST_BAD = 0.1                                           # of the lines may be skipped, if asked for
LONGEST = 4096                                           # letters of a path: more, no system opens
NAMES = {"target": ("target", "file_name", "image_path", "image", "output_image"),
         "instruction": ("instruction", "prompt", "caption", "text"),
         "images": ("images", "input_images", "kontext_images", "control_path", "cond_image"),
         "conds": ("conds",)}
NUMBERED = re.compile(r"control_path_(\d{1,9})")         # one of several images
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@contextmanager
def noting(bad: list[str] | None) -> Iterator[None]:
    """Write what is wrong with a row to `bad`, if there is such a list, instead of raising it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if bad is None:
            raise
        if (line := " ".join(str(error).split())) not in bad:
            bad.append(line)


def check_few(bad: list[str], rows: int) -> None:
    """Raises: ValueError when so many of so many rows are bad that something else is wrong."""
    if len(bad) > MOST_BAD * rows:
        raise ValueError(f"{len(bad)} rows are bad, which is too many to skip; the first: {bad[0]}")


def read_text(file: Path) -> str:
    """The file's text. Raises: ValueError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None


def from_json(text: str, where: object) -> object:
    """Raises: ValueError naming where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def read_csv(file: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a table that are not empty, each with the number of its last line.

    Raises: ValueError for the file, not for a row: after an error nobody knows where rows end.
    """
    table = csv.DictReader(io.StringIO(read_text(file)), skipinitialspace=True, strict=True)
    try:
        names = [name for name in table.fieldnames or [] if name]
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: two columns have the same name")
        for row in table:
            if any(row.values()):
                yield table.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file} line {table.reader.line_num}: not valid CSV ({error})") from None


def from_cells(cells: dict, where: str) -> dict:
    """A table's row: empty cells are none, a list of paths is in JSON. Raises: ValueError."""
    if None in cells:
        raise ValueError(f"{where}: has more cells than the first line has names")
    row = {name: text for name, cell in cells.items() if cell and (text := cell.strip())}
    for name in row.keys() & {*NAMES["images"], *NAMES["conds"]}:
        if row[name][0] + row[name][-1] == "[]":
            row[name] = from_json(row[name], f"{where} {name!r}")
    return row


def read_rows(file: Path, bad: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl or .csv file, each with words for where it stands.

    Entries control_path_0, control_path_1, ... become one list, in that order. Raises: ValueError.
    """
    table = file.suffix.lower() == ".csv"
    lines = read_csv(file) if table else enumerate(read_text(file).split("\n"), 1)
    for number, line in lines:
        if table or line.strip():
            where, row = f"{file} line {number}", None
            with noting(bad):
                row = (from_cells if table else from_json)(line, where)
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected an object like {{\"instruction\": ...}}")
            if isinstance(row, dict):
                if numbered := sorted((int(found[1]), name) for name in row
                                      if (found := NUMBERED.fullmatch(name))):
                    paths = [row.pop("control_path", None), *(row.pop(n) for _, n in numbered)]
                    row["control_path"] = [path for path in paths if path is not None]
                yield where, row


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, in order; none where there is no such folder."""
    return sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in PICTURES)


def read_pairs(folder: Path, bad: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Rows, like read_rows', of a folder without metadata, as other trainers take it.

    Each picture, say 1.png, is a target, and 1.txt its instruction. Its references are in control/:
    1.png, or 1_0.png, 1_1.png, ...; where that folder has pictures, each target must have some.
    """
    targets, given = pictures_in(folder), defaultdict(list)
    stems = {target.stem for target in targets}
    for path in pictures_in(folder / "control"):
        stem, _, number = path.stem.rpartition("_")
        if path.stem in stems or not number.isdecimal():
            stem, number = path.stem, -1
        given[stem].append((int(number), f"control/{path.name}"))
    for target in targets:
        with noting(bad):
            text, references = target.with_suffix(".txt"), sorted(given.get(target.stem, ()))
            if not text.is_file():
                raise FileNotFoundError(f"{target}: its instruction is missing, {text.name}")
            if given and not references:
                raise FileNotFoundError(f"{target}: its reference is missing in control/")
            yield str(target), {"target": target.name, "instruction": read_text(text).strip(),
                                "images": [path for _, path in references]}


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
        raise ValueError(f"{where}: {text[:60]!a} is not valid Unicode text") from None
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
    if len(checked_text(path, where)) > LONGEST or re.search(r"[\0-\x1f]", path):
        raise ValueError(f"{where}: {path[:60]!a} cannot be a path")
    whole, within = Path(os.path.abspath(folder / path)), Path(os.path.abspath(root or folder))
    if not whole.is_relative_to(within):
        more = "" if root else "; --data-root FOLDER allows more"
        raise ValueError(f"{where}: {path!r} leads out of {within}{more}")
    return whole


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
    """A folder with metadata.jsonl, metadata.csv or, without them, pairs as read_pairs takes them.

    Or a .jsonl or .csv file with paths relative to it. Each line is an object: target (path),
    instruction (str), images (paths of native references), conds (paths of clean conditions), task
    (str); the last three may be absent, a single path may stand for a list. size: (W, H) that every
    picture takes, or None to keep each near its own size, the longer side at most 512; the first
    reference takes the target's, as in sampling. root: the folder that no path may leave, by
    default the file's own. bad: a list that takes the bad lines' errors; one in ten may be bad.
    Raises: FileNotFoundError, ValueError; they name the line.
    """

    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 root: Path | None = None, bad: list[str] | None = None):
        path, self.size, worse = Path(path), size, None if bad is None else []
        folder = path if path.is_dir() else path.parent
        files = [path / "metadata.jsonl", path / "metadata.csv"] if path.is_dir() else [path]
        file = next(filter(Path.is_file, files), None)
        if file is None and not pictures_in(path):
            raise FileNotFoundError(f"{path}: {'holds no data' if path.is_dir() else 'not found'}; "
                                    "a data folder needs metadata.jsonl, metadata.csv, or pictures "
                                    "with .txt files")
        self.groups: dict[tuple, list[Row]] = {}         # rows whose pictures have equal sizes
        for where, row in read_rows(file, worse) if file else read_pairs(folder, worse):
            with noting(worse):
                instruction, target = (row_text(row, name, where)
                                       for name in ("instruction", "target"))
                images, conds = (row_paths(row, name, where) for name in ("images", "conds"))
                paths = [located(path, folder, root, where) for path in (target, *images, *conds)]
                found = [load_image(path, where).size for path in paths]     # finds broken ones
                sizes = [self.size or fitted(size) for size in found]
                if images:
                    sizes[1] = sizes[0]                  # the picture to edit takes the target's
                task = checked_text(str(row.get("task") or ""), where)
                self.groups.setdefault((len(images), *sizes), []).append(
                    Row(instruction, paths, sizes, len(images), task, where))
        if worse:
            check_few(worse, len(worse) + sum(map(len, self.groups.values())))
            bad.extend(worse)
        if not self.groups:
            raise ValueError(f"{file or path}: holds no rows")

    def read(self, row: Row) -> Sample:
        pictures = [resize(load_image(path, row.where), size)
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

    def all(self, first: int = 0, stride: int = 1) -> Iterator[Sample]:
        """Every row, or every stride-th."""
        rows = chain.from_iterable(self.groups.values())
        return map(self.read, islice(rows, first, None, stride))

    def contents(self) -> Iterator[tuple]:
        for row in chain.from_iterable(self.groups.values()):
            yield row.instruction, *((path.name, path.stat().st_size) for path in row.paths)


# ---------------------------------------------------------------------------- the public data sets

SECOND_PROMPT = 0.7                                      # OmniEdit: of a row's second wording
RECREATE = 0.3                                           # SubjectSpatial200K: of no description
POSE, CAPTION = 0.75, 0.2                                # COCO: of the skeleton; of a bare caption
LOW, TIMES = (50, 150), (2, 2.5)                         # Canny: low threshold, high / low
BOX = (0.25, 0.75)                                       # sides of a box, in the picture's
NEIGHBOURS = 16                                          # batches that read the same row group
THREADS = 2                                              # that draw batches ahead

# What a condition is called in an instruction, and how a caption is led in by one.
PHRASES = {"subject": "the {item} of {which}", "canny": "the edges in {which}",
           "depth": "the depth map in {which}", "fill": "the picture around the box in {which}"}
STYLES = ("Make a picture from {all}.", "Combine {all}.", "With {all}, make one picture.")
LEADS = {"pose": ("{caption}, in the pose of the skeleton", "follow the pose: {caption}"),
         "canny": ("{caption}, along the edges", "follow the edges: {caption}"),
         "depth": ("{caption}, in the depth of the map", "follow the depth map: {caption}"),
         "fill": ("fill the black part: {caption}", "complete the picture: {caption}")}

# OpenPose's 18 points by their numbers among COCO's 17, the neck between both shoulders; the limbs
# between them. Point and limb number i have the i-th of 18 hues.
POINTS = (0, (5, 6), 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
         (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))
HUES = [ImageColor.getrgb(f"hsl({20 * i},100%,50%)") for i in range(18)]


def canny(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """Edges as OpenCV's Canny draws them on a grey picture: white on black, (H, W, 3) -> the same.

    Sobel's gradient in |x| + |y|; ridges above `low` that hang together with some above `high`.
    Source: Canny, 1986, "A computational approach to edge detection".
    """
    grey = np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.int32)
    p = np.pad(grey, 1, mode="edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]                  # (H, W + 2), smoothed downwards
    columns = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]      # (H + 2, W)
    x, y = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]            # (H, W)
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


def pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


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


@contextmanager
def reading(what: object) -> Iterator[None]:
    """pyarrow's errors as one ValueError."""
    from pyarrow import ArrowException
    try:
        yield
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())               # some have several lines
        raise ValueError(f"{what}: cannot be read as parquet ({why})") from None


class Public:
    """A public set in parquet files, if not told otherwise: a file, or a folder of them.

    Whole row groups are read, and the last ones kept; neighbouring batches draw from the same.
    size: (W, H) that every picture takes, or None as Folder does it. bad: as Folder takes it.
    draws: how many ways there are to draw a row's wording, conditions, boxes; None: endless.
    Raises: FileNotFoundError, ValueError naming file and row.
    """
    columns: tuple[str, ...]                             # that a file must have, the target first
    conditions: tuple[int, ...] = (1,)                   # how many a sample may have; with n of
                                                         # them a batch has size // n samples
    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 bad: list[str] | None = None, draws: int | None = None):
        self.size, self.draws = size, draws
        self.bad, self.all_bad = None if bad is None else [], bad
        self.groups: list[tuple[Path, int, int]] = []    # file, row group in it, rows before it
        self.sizes: list[int] = []                       # rows in it
        self.open(Path(path))
        if not self.groups:
            raise ValueError(f"{path}: holds no rows")
        self.chances = np.array(self.sizes) / sum(self.sizes)
        self.kept, self.lock = lru_cache(maxsize=2)(self.read), Lock()

    def open(self, path: Path) -> None:
        """Find the row groups."""
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
        files = sorted(file for file in path.rglob("*.parquet") if not HELD_OUT.match(file.name)
                       ) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            why = "no parquet files (dev, test and val are left out)"
            raise FileNotFoundError(f"{path}: {why if path.exists() else 'not found'}")
        for file in files:
            with reading(file):
                about = parquet.read_metadata(file)
                names = set(about.schema.to_arrow_schema().names)
                counts = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
            if missing := [name for name in self.columns if name not in names]:
                raise ValueError(f"{file}: has no column {missing[0]!r}, as {type(self).__name__} "
                                 "has; is it another set?")
            self.groups += [(file, i, sum(counts[:i])) for i in range(len(counts)) if counts[i]]
            self.sizes += [number for number in counts if number]

    def read(self, number: int) -> list[dict]:
        """The rows of a row group."""
        from pyarrow import parquet
        file, group, before = self.groups[number]
        with reading(f"{file} rows {before} to {before + self.sizes[number]}"):
            table = parquet.ParquetFile(file).read_row_group(group, columns=list(self.columns))
            return table.to_pylist()

    def draw(self, rng: np.random.Generator, size: int,
             nearby: np.random.Generator | None = None) -> list[Sample]:
        """Up to `size` samples of one row group, the pictures of equal sizes.

        nearby: chooses the row group; the same for neighbouring batches.
        """
        conditions = pick(rng, self.conditions)
        for _ in range(8):                               # a row group may have nothing to offer
            number = int((nearby or rng).choice(len(self.sizes), p=self.chances))
            samples = self.draw_from(number, rng, max(1, size // conditions), conditions)
            if samples:
                return samples
        raise ValueError(f"{self.groups[number][0]}: holds no row that can be used")

    def draw_from(self, number: int, rng: np.random.Generator, wanted: int,
                  conditions: int) -> list[Sample]:
        samples: list[Sample] = []
        rows, look = self.rows(number), None             # look: (W, H) of the first one's target
        for i in rng.permutation(len(rows)):
            with self.noting():
                row, where = rows[i], self.where(number, i)
                if samples and self.look(row, where) != look:
                    continue                             # spares decoding what will not fit
                own = rng if self.draws is None else np.random.default_rng(
                    [number, i, conditions, int(rng.integers(self.draws))])
                sample = self.sample(row, own, conditions, where)
                if sample and shapes(sample) == shapes(samples[0] if samples else sample):
                    look = look if samples else self.look(row, where)
                    samples.append(sample)
            if len(samples) == wanted:
                break
        return samples

    def rows(self, number: int) -> list[dict]:
        """The rows of a row group; none if it is a bad one."""
        rows: list[dict] = []
        with self.noting(), self.lock:                   # one thread reads for all
            rows = self.kept(number)
        return rows

    def where(self, number: int, i: int) -> str:
        """Words for where a row stands."""
        file, _, before = self.groups[number]
        return f"{file} row {before + i}"

    def look(self, row: dict, where: str) -> tuple[int, int]:
        """The size that the target says it has."""
        if self.size:
            return self.size
        with opened(*self.content(row, self.columns[0], where)) as image:
            return fitted(image.size)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is wrong with a row, if bad ones are skipped. Raises: ValueError."""
        known = len(self.bad or [])
        with noting(self.bad):
            yield
        if self.bad and len(self.bad) > known:
            check_few(self.bad, sum(self.sizes))
            self.all_bad.extend(line for line in self.bad[known:] if line not in self.all_bad)

    def all(self, first: int = 0, stride: int = 1) -> Iterator[Sample]:
        """Every draw of every row that is no bad one, or of every stride-th."""
        for number, (_, _, before) in enumerate(self.groups):
            rows = self.rows(number)
            for i in range((first - before) % stride, len(rows), stride):
                for conditions, draw in product(self.conditions, range(self.draws or 1)):
                    with self.noting():
                        own = np.random.default_rng([number, i, conditions, draw])
                        if sample := self.sample(rows[i], own, conditions, self.where(number, i)):
                            yield sample

    def contents(self) -> Iterator[tuple]:
        for (file, group, _), rows in zip(self.groups, self.sizes):
            yield file.name, file.stat().st_size, group, rows

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample | None:
        """A sample, or None when the row is none. Raises: ValueError."""
        raise NotImplementedError

    def content(self, row: dict, column: str, where: str) -> tuple[Path | io.BytesIO, str]:
        """What `opened` takes: a cell's bytes, or, in a plain folder, its file."""
        cell = row[column]
        if isinstance(cell, Path):
            return cell, ""
        if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
            raise ValueError(f"{where}: {column!r} holds no picture")
        return io.BytesIO(cell["bytes"]), f"{where} {column!r}"

    def picture(self, row: dict, column: str, where: str) -> Image.Image:
        return load_image(*self.content(row, column, where))

    def fit(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        return resize(image, size or self.size or fitted(image.size))


def shapes(sample: Sample) -> list[tuple[int, ...]]:
    return [picture.shape for picture in (sample.target, *sample.images, *sample.conds)]


def text_of(value: object, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column!r} holds no text")
    return checked_text(value.strip(), where)


class OmniEdit(Public):
    """TIGER-Lab/OmniEdit-Filtered-1.2M: a picture, an edit in one or two wordings, the result."""
    columns = ("edited_img", "src_img", "edited_prompt_list")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample | None:
        wordings = row["edited_prompt_list"] or []
        if not isinstance(wordings, list):
            raise ValueError(f"{where}: 'edited_prompt_list' must be a list of texts")
        if not wordings:
            return None
        second = len(wordings) > 1 and rng.random() < SECOND_PROMPT
        target = self.fit(self.picture(row, "edited_img", where))
        source = self.fit(self.picture(row, "src_img", where), target.shape[1::-1])
        return Sample(text_of(wordings[int(second)], "edited_prompt_list", where), target, [source],
                      task="edit")


class MUSAR(Public):
    """guozinan/MUSAR-Gen: two subjects, and a picture of both."""
    columns = ("tgt_img", "cond_img_0", "cond_img_1", "prompt")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        target, *conds = (self.fit(self.picture(row, name, where))
                          for name in ("tgt_img", "cond_img_0", "cond_img_1"))
        return Sample(text_of(row["prompt"], "prompt", where), target, [], conds, "multi")


class SubjectSpatial(Public):
    """Xuan-World/SubjectSpatial200K: a subject beside a picture of it, with that one's maps."""
    columns = ("image", "bbox", "canny", "depth", "description")
    conditions = (1, 2, 3)

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        both, about = self.picture(row, "image", where), row["description"]
        if not isinstance(about, dict):
            raise ValueError(f"{where}: 'description' must have an item and a description_0")
        left, right = (both.crop((x, 0, x + both.width // 2, both.height))
                       for x in (0, both.width // 2))
        size = self.size or (512, 512)
        names = [str(name) for name in rng.choice(list(PHRASES), number, replace=False)]
        conds = [self.fit(right, size) if name == "subject" else
                 self.blacked(left, row["bbox"], size, where) if name == "fill" else
                 self.fit(self.picture(row, name, where), size) for name in names]
        places = {1: ["the picture"], 2: ["the left picture", "the right picture"],
                  3: [f"the {nth} picture" for nth in ("first", "second", "third")]}[number]
        item = text_of(about.get("item"), "description.item", where)
        phrases = [PHRASES[name].format(item=item, which=place)
                   for name, place in zip(names, places)]
        told = " and ".join(phrases[i] for i in rng.permutation(number))
        tail = (f"Recreate the {item}." if rng.random() < RECREATE else
                text_of(about.get("description_0"), "description.description_0", where))
        style = pick(rng, STYLES)
        return Sample(f"{style.format(all=told)} {tail}", self.fit(left, size), [], conds,
                      "+".join(sorted(names)))

    def blacked(self, left: Image.Image, bbox: object, size: tuple[int, int],
                where: str) -> np.ndarray:
        """The left half with a black box; bbox is (x, y, w, h) of its centre, of the whole's."""
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(
                isinstance(v, (int, float)) and 0 <= v <= 1 for v in bbox):
            raise ValueError(f"{where}: 'bbox' must be four numbers in [0, 1]")
        picture = self.fit(left, size).copy()
        (x, y, w, h), (height, width) = bbox, picture.shape[:2]
        top, bottom = (int(np.clip(v * height, 0, height)) for v in (y - h / 2, y + h / 2))
        first, last = (int(np.clip(v * 2 * width, 0, width)) for v in (x - w / 2, x + w / 2))
        if top >= bottom or first >= last:
            raise ValueError(f"{where}: 'bbox' has nothing of the left half")
        picture[top:bottom, first:last] = 0
        return picture


def points_of(value: object, column: str, where: str) -> list[float]:
    """A person's 17 (x, y, seen) in one list, empty if nothing of them is seen."""
    if not isinstance(value, list) or len(value) != 51 or not all(
            type(v) in (int, float) and abs(v) < 1e5 for v in value):
        raise ValueError(f"{where}: {column!r} must be 51 numbers")
    return value if any(value[2::3]) else []


class COCO(Public):
    """wangherr/coco2017_train_512x_image_caption_openpose: a picture, its skeletons, a caption."""
    columns = ("image", "conditioning_image", "text")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        image = self.picture(row, "image", where)
        pose, text = row["conditioning_image"], row["text"]
        target, others = self.fit(image), ("canny", "fill", "depth")[:3 if row.get("depth") else 2]
        task = "pose" if rng.random() < POSE and pose != () else pick(rng, others)
        if task == "pose":
            cond = (skeletons(pose, image.size, target.shape) if isinstance(pose, tuple) else
                    self.fit(self.picture(row, "conditioning_image", where)))
        elif task == "depth":
            cond = self.fit(self.picture(row, "depth", where), target.shape[1::-1])
        else:
            cond = (random_canny if task == "canny" else random_box)(rng, target)
        caption = text_of(pick(rng, text) if isinstance(text, tuple) else text, "text", where)
        if rng.random() >= CAPTION:
            caption = pick(rng, LEADS[task]).format(caption=caption)
        return Sample(caption, target, [], [cond], task)


class COCOFolder(COCO):
    """COCO 2017 as its authors give it: a folder with train2017/ and annotations/.

    A row has all captions and people of a picture, in tuples, which parquet files cannot have: one
    caption is drawn, and all skeletons. Where depth/ has its stem, that is the picture's depth map.
    """

    def open(self, path: Path) -> None:
        folder, notes = path / "train2017", path / "annotations"
        depth = {picture.stem: picture for picture in pictures_in(path / "depth")}
        rows: dict[int, dict] = {}
        for column, name, key, check in (
                ("text", "captions", "caption", text_of),
                ("conditioning_image", "person_keypoints", "keypoints", points_of)):
            file = notes / f"{name}_train2017.json"
            whole = from_json(read_text(file), file)     # hundreds of megabytes: one at a time
            if column == "text":                         # this file names the pictures too
                for number, picture in self.entries(
                        file, whole, "images", "id", "file_name", lambda name, key, where: located(
                            text_of(name, key, where), folder, folder, where)):
                    rows[number] = {"image": picture, "conditioning_image": (), "text": (),
                                    "depth": depth.get(picture.stem)}
            for number, value in self.entries(file, whole, "annotations", "image_id", key, check):
                if value and number in rows:
                    rows[number][column] += (value,)
        self.listed = [row for row in rows.values() if row["text"]]
        self.groups, self.sizes = [(folder, 0, 0)][:len(self.listed)], [len(self.listed)]

    def entries(self, file: Path, whole: object, part: str, id_: str, key: str,
                check: Callable[[object, str, str], object]) -> Iterator[tuple[int, object]]:
        """A picture's number, and what is said of it, for each entry in a part of a file."""
        entries = whole.get(part) if isinstance(whole, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file}: holds no list {part!r}, as COCO's files do")
        self.sizes = [len(entries)]                      # what noting() counts the bad ones by
        for i, entry in enumerate(entries):
            with self.noting():
                where = f"{file} {part} {i}"
                if not isinstance(entry, dict) or type(entry.get(id_)) is not int:
                    raise ValueError(f"{where}: {id_!r} must be a whole number")
                yield entry[id_], check(entry.get(key), key, where)

    def read(self, number: int) -> list[dict]:
        return self.listed

    def contents(self) -> Iterator[tuple]:
        for row in self.listed:
            yield row["image"].name, row["text"]

    def where(self, number: int, i: int) -> str:
        return str(self.listed[i]["image"])


def open_coco(path: str | Path, *options: object) -> COCO:
    """COCO in either form."""
    plain = any((Path(path) / name).is_dir() for name in ("annotations", "train2017"))
    return (COCOFolder if plain else COCO)(path, *options)


HELD_OUT = re.compile(r"dev|test|val")                   # files that are not for training
PUBLIC = {"omniedit": OmniEdit, "musar": MUSAR, "subjectspatial": SubjectSpatial, "coco": open_coco}


def open_source(text: str, named: dict[str, Callable[[], Source]] = {},
                size: tuple[int, int] | None = None, root: Path | None = None,
                bad: list[str] | None = None, draws: int | None = None) -> tuple[Source, float]:
    """A command line's SOURCE[:weight] -> (source, weight).

    SOURCE: a name | FOLDER | FILE.jsonl or .csv | a public set's name=PATH. named: sources that are
    known by name; size, root, bad: as Folder takes them; draws: as Public does.
    """
    name, colon, weight = text.rpartition(":")
    try:
        name, value = (name, float(weight)) if colon else (text, 1.0)
    except ValueError:                                   # a colon that belongs to the path
        name, value = text, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--data {text}: the weight must be a positive number")
    if name in named:
        return named[name](), value
    kind, equals, path = name.partition("=")
    if equals and kind in PUBLIC:
        return PUBLIC[kind](path, size, bad, draws), value
    if equals and not Path(name).exists():
        raise ValueError(f"--data {text}: no public set {kind!r}; there are {', '.join(PUBLIC)}")
    return Folder(name, size, root, bad), value


def batches(sources: list[tuple[Source, float]], size: int, seed: int, start: int = 0,
            stride: int = 1) -> Iterator[list[Sample]]:
    """One source per batch, by weight. Batch number i depends on the seed and i alone.

    The next ones are drawn by threads while one is in use.
    """
    weights = np.array([weight for _, weight in sources])

    def draw(i: int) -> list[Sample]:
        rng = np.random.default_rng([seed, i])
        source = sources[rng.choice(len(sources), p=weights / weights.sum())][0]
        if isinstance(source, Public):
            return source.draw(rng, size, np.random.default_rng([seed, i // NEIGHBOURS]))
        return source.draw(rng, size)

    numbers, pool = count(start, stride), ThreadPoolExecutor(THREADS)
    try:
        ahead = deque(pool.submit(draw, i) for i in islice(numbers, THREADS))
        while True:
            ahead.append(pool.submit(draw, next(numbers)))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
