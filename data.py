"""Samples and batches: what training draws, from a user's own folder or table.

A sample is an instruction, the picture that it asks for, and the pictures that were given: native
references (the picture to edit) and clean conditions (edges, depth, pose, a subject, ...).

A source draws samples by a random generator. Here is a user's Folder; the public sets are in
support/public_sets.py, the embedded world in tiny/world.py.

Key: B batch; H, W pixels; all pictures are uint8 (H, W, 3) arrays until to_tensor() maps them to
[-1, 1], (3, H, W).
"""
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from support.folders import read_pairs, unnamed, unused
from support.names import check_unread, ours
from support.pictures import fitted, load_image, pictures_in, resize, to_tensor
from support.tables import (check_few, checked_text, located, read_rows, row_paths, row_text,
                            skipping)

NEIGHBOURS = 16                                          # batches for which a source may read ahead
THREADS = 2                                              # that draw batches ahead
Random = np.random.Generator


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
    """What batches are drawn from.

    A source that has an end also has all(first, stride) -> Iterator[Sample], every stride-th of its
    samples, and contents() -> Iterator[tuple], which tells these data from others.
    """

    def draw(self, rng: Random, size: int, nearby: Random) -> list[Sample]:
        """Up to `size` samples that are given the same number of pictures, of the same sizes.

        nearby: a second generator, the same for NEIGHBOURS batches in a row: a source that reads
        large blocks chooses the block by it.
        """


def stack(given: Iterable[list[np.ndarray]]) -> list[Tensor]:
    """Each sample's list of pictures -> one batch per place in the list, each (B, 3, H, W)."""
    return [to_tensor(list(pictures)) for pictures in zip(*given, strict=True)]


@dataclass(frozen=True)
class Row:
    """A checked line of a user's folder; its pictures are read when they are drawn."""
    instruction: str
    paths: list[Path]                                    # target, native references, clean ones
    sizes: list[tuple[int, int]]                         # (W, H) that each of them will take
    natives: int                                         # how many are native references
    task: str
    where: str                                           # words for where the line stands


class Folder:
    """A folder with metadata.jsonl, metadata.csv or, without them, pairs as read_pairs takes them.

    Or a .jsonl or .csv file with paths relative to it. Each line is an object: target (path),
    instruction (str), images (paths of native references), conds (paths of clean conditions), task
    (str); the last three may be absent, a single path may stand for a list; support/names.py lists
    the names that others use. size: (W, H) that every picture takes, or None to keep each near its
    own size, the longer side at most 512; the first reference takes the target's, as in sampling.
    root: the folder that no path may leave, by default the file's own. bad: a list that takes the
    bad lines' errors; one in ten may be bad. What is there and not used is told in unread (entries
    without a known name, in how many rows) and left_out (lines about files and folders).
    Raises: FileNotFoundError, ValueError; they name the line.
    """

    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 root: Path | None = None, bad: list[str] | None = None):
        path, self.size = Path(path), size
        folder = path if path.is_dir() else path.parent
        files = [path / "metadata.jsonl", path / "metadata.csv"] if path.is_dir() else [path]
        file = next(filter(Path.is_file, files), None)
        if file is None and not pictures_in(path):
            there = "".join(f"; there are {line}" for line in unused(path, set()))
            raise FileNotFoundError(f"{path}: {'holds no data' if path.is_dir() else 'not found'}; "
                                    "a data folder needs metadata.jsonl, metadata.csv, or pictures "
                                    f"with .txt files{there}")
        own_bad = None if bad is None else []            # counted before it joins the others'
        self.groups: dict[tuple, list[Row]] = {}         # rows whose pictures have equal sizes
        self.unread, self.left_out = Counter[str](), list[str]()
        for where, line in (read_rows(file, own_bad) if file else
                            read_pairs(folder, own_bad, self.left_out)):
            with skipping(own_bad):
                row = self.checked(line, folder, root, where)
                self.groups.setdefault((row.natives, *row.sizes), []).append(row)
        if path.is_dir() and file:
            self.left_out += unnamed(folder, file, (row.paths for row in self.checked_rows()))
        if own_bad:
            check_few(own_bad, len(own_bad) + sum(map(len, self.groups.values())))
            bad.extend(own_bad)
        if not self.groups:
            raise ValueError(f"{file or path}: holds no rows")

    def checked(self, line: dict, folder: Path, root: Path | None, where: str) -> Row:
        """A line as a row. Raises: ValueError, FileNotFoundError for what cannot be trained on."""
        line, rest = ours(line, where)
        instruction, target = (row_text(line, name, where) for name in ("instruction", "target"))
        images, conds = (row_paths(line, name, where) for name in ("images", "conds"))
        paths = [located(path, folder, root, where) for path in (target, *images, *conds)]
        check_unread(rest, folder, paths, where)
        self.unread.update(name for name, value in rest.items() if value not in (None, "", []))
        found = [load_image(path, where).size for path in paths]             # finds broken ones
        sizes = [self.size or fitted(size) for size in found]
        if images:
            sizes[1] = sizes[0]                          # the picture to edit takes the target's
        task = checked_text(str(line.get("task") or ""), where)
        return Row(instruction, paths, sizes, len(images), task, where)

    def read(self, row: Row) -> Sample:
        pictures = [resize(load_image(path, row.where), size)
                    for path, size in zip(row.paths, row.sizes)]
        images, conds = pictures[1:1 + row.natives], pictures[1 + row.natives:]
        return Sample(row.instruction, pictures[0], images, conds, row.task)

    def draw(self, rng: Random, size: int, nearby: Random | None = None) -> list[Sample]:
        """Up to `size` different rows of one group; a group is as likely as it is large."""
        groups = list(self.groups.values())
        weights = np.array([len(rows) for rows in groups], float)
        rows = groups[rng.choice(len(groups), p=weights / weights.sum())]
        chosen = rng.choice(len(rows), min(size, len(rows)), replace=False)
        return [self.read(rows[i]) for i in chosen]

    def all(self, first: int = 0, stride: int = 1) -> Iterator[Sample]:
        """Every row, or every stride-th."""
        return map(self.read, islice(self.checked_rows(), first, None, stride))

    def checked_rows(self) -> Iterator[Row]:
        return chain.from_iterable(self.groups.values())

    def contents(self) -> Iterator[tuple]:
        for row in self.checked_rows():
            yield row.instruction, *((path.name, path.stat().st_size) for path in row.paths)


def open_source(text: str, named: dict[str, Callable[[], Source]] = {},
                public: dict[str, Callable[..., Source]] = {},
                size: tuple[int, int] | None = None, root: Path | None = None,
                bad: list[str] | None = None, draws: int | None = None) -> tuple[Source, float]:
    """A command line's SOURCE[:weight] -> (source, weight).

    SOURCE: a name | FOLDER | FILE.jsonl or .csv | a public set's name=PATH. named, public: the
    sources that are known so; size, root, bad: as Folder takes them; draws: as public sets do.
    Raises: ValueError, FileNotFoundError.
    """
    name, colon, weight = text.rpartition(":")
    try:
        name, value = (name, float(weight)) if colon else (text, 1.0)
    except ValueError:                                   # a colon that belongs to the path
        name, value = text, 1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--data {text}: the weight must be a positive number")
    return open_one(name, named, public, size, root, bad, draws), value


def open_one(name: str, named: dict[str, Callable[[], Source]] = {},
             public: dict[str, Callable[..., Source]] = {}, size: tuple[int, int] | None = None,
             root: Path | None = None, bad: list[str] | None = None, draws: int | None = None,
             option: str = "--data") -> Source:
    """A source by its name alone, as open_source() takes it; option: for its errors."""
    if name in named:
        return named[name]()
    kind, equals, path = name.partition("=")
    if equals and kind in public:
        return public[kind](path, size, bad, draws)
    if equals and not Path(name).exists():
        raise ValueError(f"{option} {name}: no public set {kind!r}; there are {', '.join(public)}")
    if not Path(name).exists():
        raise FileNotFoundError(f"{option} {name}: not found; it must be a folder of data, or a "
                                ".jsonl or .csv file")
    return Folder(name, size, root, bad)


def batches(sources: list[tuple[Source, float]], size: int, seed: int, start: int = 0,
            stride: int = 1) -> Iterator[list[Sample]]:
    """Batches number start, start + stride, ...; number i depends on the seed and i alone.

    One source per batch, by weight. The next ones are drawn by threads while one is in use; what a
    source raises comes out of next().
    """
    weights = np.array([weight for _, weight in sources])

    def draw(i: int) -> list[Sample]:
        rng = np.random.default_rng([seed, i])
        source = sources[rng.choice(len(sources), p=weights / weights.sum())][0]
        return source.draw(rng, size, np.random.default_rng([seed, i // NEIGHBOURS]))

    numbers, pool = count(start, stride), ThreadPoolExecutor(THREADS)
    try:
        ahead = deque(pool.submit(draw, i) for i in islice(numbers, THREADS))
        while True:
            ahead.append(pool.submit(draw, next(numbers)))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def some_of_each(sources: list[tuple[Source, float]], seed: int) -> list[Sample]:
    """Eight samples of the sources in turn, each target once: what training shows on its way."""
    samples = {}
    for i, (source, _) in enumerate((sources * 8)[:8]):
        rng = np.random.default_rng([seed, 2 ** 32 + i])
        sample, = source.draw(rng, 1, rng)
        samples.setdefault(sample.target.tobytes(), sample)
    return list(samples.values())
