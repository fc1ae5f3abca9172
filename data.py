"""Samples and batches: a user's own pictures, and the public data sets.

A sample is an instruction, the picture that it asks for, and the pictures that were given: native
references (the picture to edit) and clean conditions (edges, depth, pose, a subject, ...).

A source draws samples by a random generator: source.draw(rng, size) -> up to `size` of them, that
are given the same number of pictures, of the same sizes. The embedded one is in tiny/world.py.

Key: H, W pixels; all pictures are uint8 (H, W, 3) arrays until `to_tensor` maps them to [-1, 1].
"""
import io
import json
import os
import re
import warnings
from collections import deque
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
from PIL import Image, ImageOps

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photographs are welcome


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
    # and all(first, stride) -> Iterator[Sample], if it has an end


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

def load_image(source: str | Path | io.BytesIO, where: str = "") -> Image.Image:
    """Read any picture as a person would see it, in RGB: a file, or its bytes, called `where`.

    EXIF rotation is applied, alpha is laid on white, palettes and 16-bit greys become 8-bit RGB.
    Raises: FileNotFoundError, or ValueError when the file is no readable picture.
    """
    path = where or Path(source)
    if not where and not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, RuntimeError,
            Image.DecompressionBombError) as error:
        why = str(error).partition(" <")[0]              # without an object's address
        raise ValueError(f"{path}: cannot be read as a picture ({why})") from None
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
        if (line := " ".join(str(error).split())) not in bad:
            bad.append(line)


def check_few(bad: list[str], rows: int) -> None:
    """Raises: ValueError when so many of so many rows are bad that something else is wrong."""
    if len(bad) > MOST_BAD * rows:
        raise ValueError(f"{len(bad)} rows are bad, which is too many to skip; the first: {bad[0]}")


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
        if worse:
            check_few(worse, len(worse) + sum(map(len, self.groups.values())))
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

    def all(self, first: int = 0, stride: int = 1) -> Iterator[Sample]:
        """Every row, or every stride-th."""
        rows = chain.from_iterable(self.groups.values())
        return map(self.read, islice(rows, first, None, stride))


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
         "fill": ("fill the black part: {caption}", "complete the picture: {caption}")}


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


@contextmanager
def reading(what: object) -> Iterator[None]:
    """pyarrow's errors as one ValueError."""
    from pyarrow import ArrowException
    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{what}: cannot be read as parquet ({error})") from None


class Parquet:
    """A public set in parquet files: a file, or a folder of them. Needs pyarrow.

    Whole row groups are read, and the last ones kept; neighbouring batches draw from the same.
    size: (W, H) that every picture takes, or None as Folder does it. bad: as Folder takes it.
    draws: how many ways there are to draw a row's wording, conditions, boxes; None: endless.
    Raises: FileNotFoundError, ValueError naming file and row.
    """
    columns: tuple[str, ...]                             # that a file must have
    conditions: tuple[int, ...] = (1,)                   # how many a sample may have: a batch of
                                                         # more is so many times smaller
    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 bad: list[str] | None = None, draws: int | None = None):
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
        path, self.size, self.draws = Path(path), size, draws
        self.bad, self.all_bad = None if bad is None else [], bad
        files = sorted(file for file in path.rglob("*.parquet") if not HELD_OUT.match(file.name)
                       ) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: no parquet files")
        self.groups: list[tuple[Path, int, int]] = []    # file, row group in it, rows before it
        self.sizes: list[int] = []                       # rows in it
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
        if not self.groups:
            raise ValueError(f"{path}: holds no rows")
        self.chances = np.array(self.sizes) / sum(self.sizes)
        self.kept, self.lock = lru_cache(maxsize=2)(self.read), Lock()

    def read(self, number: int) -> list[dict]:
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
        for i in rng.permutation(self.sizes[number]):
            with self.noting():
                row, where = self.row(number, i)
                if samples and self.look(row) != look:
                    continue
                own = rng if self.draws is None else np.random.default_rng(
                    [number, i, conditions, int(rng.integers(self.draws))])
                if sample := self.sample(row, own, conditions, where):
                    samples.append(sample)
                    look = self.look(row)                # pictures of other sizes are left alone
            if len(samples) == wanted:
                break
        return samples

    def row(self, number: int, i: int) -> tuple[dict, str]:
        """A row of a row group, and words for where it stands."""
        file, _, before = self.groups[number]
        with self.lock:                                  # one thread reads for all
            return self.kept(number)[i], f"{file} row {before + i}"

    def look(self, row: dict) -> list[tuple[int, int]]:
        """The sizes that a row's pictures will have."""
        return [self.size or fitted(Image.open(io.BytesIO(row[name]["bytes"])).size)
                for name in self.columns if isinstance(row[name], dict) and "bytes" in row[name]]

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
        for number, size in enumerate(self.sizes):
            for i in range((first - self.groups[number][2]) % stride, size, stride):
                for conditions, draw in product(self.conditions, range(self.draws or 1)):
                    with self.noting():
                        row, where = self.row(number, i)
                        own = np.random.default_rng([number, i, conditions, draw])
                        if sample := self.sample(row, own, conditions, where):
                            yield sample

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample | None:
        """A sample, or None when the row is none. Raises: ValueError."""
        raise NotImplementedError

    def picture(self, row: dict, column: str, where: str) -> Image.Image:
        cell = row[column]
        if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
            raise ValueError(f"{where}: {column!r} holds no picture")
        return load_image(io.BytesIO(cell["bytes"]), f"{where} {column!r}")

    def fit(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        return resize(image, size or self.size or fitted(image.size))


def text_of(value: object, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column!r} holds no text")
    return value.strip()


class OmniEdit(Parquet):
    """TIGER-Lab/OmniEdit-Filtered-1.2M: a picture, an edit in one or two wordings, the result."""
    columns = ("src_img", "edited_img", "edited_prompt_list")

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


class MUSAR(Parquet):
    """guozinan/MUSAR-Gen: two subjects, and a picture of both."""
    columns = ("cond_img_0", "cond_img_1", "tgt_img", "prompt")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        target, *conds = (self.fit(self.picture(row, name, where))
                          for name in ("tgt_img", "cond_img_0", "cond_img_1"))
        return Sample(text_of(row["prompt"], "prompt", where), target, [], conds, "multi")


class SubjectSpatial(Parquet):
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


class COCO(Parquet):
    """wangherr/coco2017_train_512x_image_caption_openpose: a picture, its skeletons, a caption."""
    columns = ("image", "conditioning_image", "text")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        target = self.fit(self.picture(row, "image", where))
        task = "pose" if rng.random() < POSE else pick(rng, ("canny", "fill"))
        cond = (self.fit(self.picture(row, "conditioning_image", where)) if task == "pose" else
                random_canny(rng, target) if task == "canny" else random_box(rng, target))
        caption = text_of(row["text"], "text", where)
        if rng.random() >= CAPTION:
            caption = pick(rng, LEADS[task]).format(caption=caption)
        return Sample(caption, target, [], [cond], task)


HELD_OUT = re.compile(r"(dev|test|val)[^/]*")            # files that are not for training
PUBLIC = {"omniedit": OmniEdit, "musar": MUSAR, "subjectspatial": SubjectSpatial, "coco": COCO}


def open_source(text: str, named: dict[str, Callable[[], Source]] = {},
                size: tuple[int, int] | None = None, root: Path | None = None,
                bad: list[str] | None = None, draws: int | None = None) -> tuple[Source, float]:
    """A command line's SOURCE[:weight] -> (source, weight).

    SOURCE: a name | FOLDER | FILE.jsonl | a public set's name=PATH. named: sources that are known
    by name; size, root, bad: as Folder takes them; draws: as Parquet does.
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
        if isinstance(source, Parquet):
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
