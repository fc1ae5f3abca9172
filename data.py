"""Samples and batches: a user's own pictures, and whatever else can draw samples.

A sample is an instruction, the picture that it asks for, and the pictures that were given: native
references (the picture to edit) and clean conditions (edges, depth, pose, a subject, ...).

A source draws samples by a random generator: source.draw(rng, size) -> up to `size` of them, that
are given the same number of pictures, of the same sizes. The embedded one is in tiny/world.py.

Key: H, W pixels; all pictures are uint8 (H, W, 3) arrays until `to_tensor` maps them to [-1, 1].
"""
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps


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


def open_source(text: str, named: dict[str, Callable[[], Source]] = {},
                size: tuple[int, int] | None = None, root: Path | None = None,
                bad: list[str] | None = None) -> tuple[Source, float]:
    """A command line's SOURCE[:weight] -> (source, weight). SOURCE: a name | FOLDER | FILE.jsonl.

    named: sources that are known by name; size, root, bad: as Folder takes them.
    """
    name, colon, weight = text.rpartition(":")
    try:
        name, value = (name, float(weight)) if colon else (text, 1.0)
    except ValueError:                                   # a colon that belongs to the path
        name, value = text, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--data {text}: the weight must be a positive number")
    return (named[name]() if name in named else Folder(name, size, root, bad)), value


def batches(sources: list[tuple[Source, float]], size: int, seed: int, start: int = 0,
            stride: int = 1) -> Iterator[list[Sample]]:
    """One source per batch, by weight. Batch number i depends on the seed and i alone."""
    weights = np.array([weight for _, weight in sources])
    for i in count(start, stride):
        rng = np.random.default_rng([seed, i])
        yield sources[rng.choice(len(sources), p=weights / weights.sum())][0].draw(rng, size)
