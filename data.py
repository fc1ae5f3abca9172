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
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from support.bad_rows import Bad, check_few, skipping
from support.commands import source_and_weight
from support.folders import left_out, read_pairs, table_of
from support.inspection import looked_through
from support.names import check_unread, ours, pictures_named
from support.pictures import LONGEST, checked_size, fitted, load_image, resize, to_tensor
from support.tables import checked_text, located, read_rows, row_paths, row_texts

NEIGHBOURS = 16                                          # batches in a row from one row group
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

    @property
    def given(self) -> list[np.ndarray]:
        """All pictures that are given with its instruction."""
        return [*self.images, *self.conds]


class Source(Protocol):
    """What batches are drawn from.

    A source that has an end also has all(first, stride) -> Iterator[Sample], every stride-th of its
    samples, and contents() -> Iterator[tuple], by which data are told from others.
    """

    def draw(self, rng: Random, size: int, nearby: Random) -> list[Sample]:
        """Up to `size` samples that are given the same number of pictures, of the same sizes.

        nearby: a second generator, the same for NEIGHBOURS batches in a row: a source that reads
        large blocks chooses the block by it.
        """


def stack(given: Iterable[list[np.ndarray]]) -> list[Tensor]:
    """Each sample's list of pictures -> one batch per place in the list, each (B, 3, H, W)."""
    return [to_tensor(list(pictures)) for pictures in zip(*given, strict=True)]


@dataclass(frozen=True, slots=True)
class Row:
    """A checked line of a user's folder; its pictures are read when they are drawn."""
    instruction: str
    paths: list[Path]                                    # target, native references, clean ones
    sizes: list[tuple[int, int]]                         # (W, H) that each of them will take
    natives: int                                         # how many are native references
    task: str
    where: str                                           # words for where the line stands
    own_sizes: list[tuple[int, int]]                     # of the files


class Folder:
    """A folder with metadata.jsonl, .csv or .json or, without them, pairs as read_pairs takes them.

    Or such a file, with paths relative to it. Each line, or entry of a list, is an object: target
    (path), instruction (str), images (paths of native references), conds (paths of clean
    conditions), task (str); the last three may be absent, a single path may stand for a list;
    support/names.py lists the names that others use. size: (W, H) that every picture takes, or None
    to keep each near its own size, the longer side at most `longest`; the first reference takes the
    target's, as in sampling. root: the folder that no path may leave, by default the file's own.
    bad: takes what is wrong with lines, now and when they are drawn; of ten, one may be bad.
    unread: entries without a known name, in how many rows. Raises: FileNotFoundError, ValueError;
    they name the line.
    """

    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 root: Path | None = None, bad: Bad | None = None, longest: int = LONGEST):
        self.path, self.size, self.root, self.longest = Path(path), size, root, longest
        self.file = table_of(self.path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.all_bad = bad                               # bad rows of all sources; None: raise
        self.bad = None if bad is None else {}           # this one's, at most one in ten
        self.checked_rows: list[Row] = []
        self.groups: dict[tuple, list[Row]] = {}         # by number of natives, and sizes
        self.unread: Counter[str] = Counter()
        self.named: set[str] = set()                     # pictures that rows name, bad ones too
        read = partial(read_rows, self.file) if self.file else partial(read_pairs, self.folder)
        for row, rest in looked_through(read, self.checked, self.bad, str(path)):
            self.checked_rows.append(row)
            self.groups.setdefault((row.natives, *row.sizes), []).append(row)
            self.unread.update(rest)
        self.number = len(self.bad or ()) + len(self.checked_rows)
        check_few(self.bad, self.number, self.all_bad)
        if not self.checked_rows:
            raise ValueError(f"{self.file or path}: holds no rows")

    def checked(self, where: str, line: dict) -> tuple[Row, list[str]]:
        """A line as a row, and its entries without a known name that hold something.

        Raises: ValueError, FileNotFoundError for what cannot be trained on.
        """
        self.named.update(pictures_named(line))
        line, rest = ours(line, where)
        target, instruction = row_texts(line, ("target", "instruction"), where, rest)
        images, conds = (row_paths(line, key, where) for key in ("images", "conds"))
        paths = [located(path, self.folder, self.root, where)
                 for path in (target, *images, *conds)]
        check_unread(rest, self.folder, paths, where)
        found = [checked_size(path, where) for path in paths]                # finds broken ones
        task = checked_text(str(line.get("task", "")), where)
        sizes = [self.size or fitted(size, self.longest) for size in found]
        if images:
            sizes[1] = sizes[0]                          # the picture to edit takes the target's
        return (Row(instruction, paths, sizes, len(images), task, where, found),
                [name for name, value in rest.items() if value not in (None, "", [])])

    def left_out(self) -> list[str]:
        """Lines about what lies beside the data and is not used."""
        return left_out(self.path, self.file, self.named)

    def read(self, row: Row) -> Sample:
        target, *given = (resize(load_image(path, row.where), size)
                          for path, size in zip(row.paths, row.sizes))
        return Sample(row.instruction, target, given[:row.natives], given[row.natives:], row.task)

    def draw(self, rng: Random, size: int, nearby: Random | None = None) -> list[Sample]:
        """Up to `size` different rows of one group; a group is as likely as it is large.

        Another row is drawn for one that has gone bad since the start, if those are skipped.
        """
        groups, samples = list(self.groups.values()), list[Sample]()
        weights = np.array([len(rows) for rows in groups], float)
        while not samples:                               # again where all of a group have gone bad
            rows = groups[rng.choice(len(groups), p=weights / weights.sum())]
            order = list(rng.choice(len(rows), min(size, len(rows)), replace=False))
            for i in order:                              # it grows where a row has gone bad
                good = self.read_good(rows[i])
                samples += good
                if not good and len(order) < len(rows):  # another one in its place
                    order.append(rng.choice(np.delete(np.arange(len(rows)), order)))
        return samples

    def read_good(self, row: Row) -> list[Sample]:
        """The row's sample; none if it is bad by now and such rows are skipped."""
        with skipping(self.bad):
            return [self.read(row)]
        check_few(self.bad, self.number, self.all_bad)   # only after a bad row
        return []

    def all(self, first: int = 0, stride: int = 1) -> Iterator[Sample]:
        """Every row that is not bad, or every stride-th."""
        for row in self.checked_rows[first::stride]:
            yield from self.read_good(row)

    def contents(self) -> Iterator[tuple]:
        for row in self.checked_rows:
            yield row.instruction, *((path.name, path.stat().st_size) for path in row.paths)


def open_source(text: str, *known: dict[str, Callable[..., Source]],
                **how: object) -> tuple[Source, float]:
    """A command line's SOURCE[:weight] -> (source, weight). known, how: as open_one() takes them.

    Raises: ValueError, FileNotFoundError.
    """
    name, weight = source_and_weight(text)
    return open_one(name, *known, **how), weight


def open_one(name: str, named: dict[str, Callable[[], Source]] = {},
             public: dict[str, Callable[..., Source]] = {}, size: tuple[int, int] | None = None,
             root: Path | None = None, bad: Bad | None = None, longest: int = LONGEST,
             draws: int | None = None, option: str = "--data") -> Source:
    """A source: a name | FOLDER | FILE.jsonl, .csv or .json | a public set's name=PATH.

    named, public: the sources that are known so; size, root, bad, longest: as Folder takes them;
    draws: as public sets do; option: for errors. Raises: ValueError, FileNotFoundError.
    """
    if not name.strip():
        raise ValueError(f"{option} is empty: name a folder, or a file of rows")
    if name in named:
        return named[name]()
    kind, equals, path = name.partition("=")
    if equals and kind in public:
        if not Path(path).exists():
            raise FileNotFoundError(f"{option} {name}: not found; after {kind}= must stand the "
                                    "set's folder or file")
        return public[kind](path, size, bad, draws, longest)
    if not Path(name).exists():
        why = (f"no public set {kind!r}; there are {', '.join(public)}" if equals else
               "not found; it must be a folder of data, or a .jsonl, .csv or .json file")
        raise FileNotFoundError(f"{option} {name}: {why}")
    return Folder(name, size, root, bad, longest)


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
