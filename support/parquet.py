"""Public sets in parquet files: row groups read whole, rows drawn at random, bad ones skipped.

support/public_sets.py says what the rows of each set mean.
"""
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image

from support.bad_rows import Bad, check_few, skipping
from support.conditions import pick
from support.pictures import LONGEST, fitted, load_image, open_picture, resize
from support.tables import checked_text

HELD_OUT = re.compile(                                   # files and folders not for training
    r"(?<![a-z])(dev(elopment)?|tests?|val(id(ation)?)?)(?![a-z])", re.I)


@contextmanager
def reading(what: object) -> Iterator[None]:
    """pyarrow's errors as one ValueError."""
    from pyarrow import ArrowException
    try:
        yield
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())               # some have several lines
        raise ValueError(f"{what}: cannot be read as parquet ({why})") from None


def row_groups(files: list[Path], columns: tuple[str, ...], whose: str
               ) -> Iterator[tuple[Path, int, int, int]]:
    """All row groups that hold any: file, group in it, rows before it, rows in it.

    Raises: ValueError where a file is none, or lacks one of the columns.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{files[0]}: parquet files need pyarrow: pip install pyarrow") from None
    for file in files:
        with reading(file):
            about = parquet.read_metadata(file)
            names = set(about.schema.to_arrow_schema().names)
            counts = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        if missing := [repr(name) for name in columns if name not in names]:
            raise ValueError(f"{file}: has no column {' or '.join(missing)}, as {whose} has; is it "
                             "another set?")
        before = accumulate(counts, initial=0)
        yield from ((file, i, *here) for i, here in enumerate(zip(before, counts)) if here[1])


def read_group(file: Path, group: int, columns: tuple[str, ...], what: object) -> list[dict]:
    """Some columns of a row group, as one dict for each row. Raises: ValueError naming `what`."""
    from pyarrow import parquet
    with reading(what):
        return parquet.ParquetFile(file).read_row_group(group, list(columns)).to_pylist()


def bytes_of(cell: object, where: str) -> io.BytesIO:
    """A cell's picture, as its file's bytes. Raises: ValueError."""
    if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
        raise ValueError(f"{where}: holds no picture")
    return io.BytesIO(cell["bytes"])


class Public:
    """A public set: a parquet file or a folder of them; COCOFolder finds and reads its own.

    Whole row groups are read, and the last ones kept; neighbouring batches draw from the same.
    size: (W, H) that every picture takes, or None as Folder does it. bad, longest: as it does.
    draws: how many ways there are to draw a row's wording, conditions, boxes; None: endless.
    Raises: FileNotFoundError, ValueError naming file and row.
    """
    columns: tuple[str, ...]                             # that a file must have, the target first
    # How many conditions a sample may have; with n of them a batch has size // n samples.
    conditions: tuple[int, ...] = (1,)

    def __init__(self, path: str | Path, size: tuple[int, int] | None = None,
                 bad: Bad | None = None, draws: int | None = None, longest: int = LONGEST):
        self.size, self.draws, self.longest = size, draws, longest
        self.bad, self.all_bad = None if bad is None else {}, bad
        self.groups: list[tuple[Path, int, int]] = []    # file, row group in it, rows before it
        self.sizes: list[int] = []                       # rows in it
        self.find_groups(Path(path))
        if not self.groups:
            raise ValueError(f"{path}: holds no rows")
        self.chances = np.array(self.sizes) / sum(self.sizes)
        self.kept, self.lock = lru_cache(maxsize=2)(self.read), Lock()

    def find_groups(self, path: Path) -> None:
        """Find the row groups."""
        files = sorted(file for file in path.rglob("[!.]*.parquet") if not any(
            map(HELD_OUT.search, file.relative_to(path).parts))) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            why = "no parquet files (dev, test and val are left out)"
            raise FileNotFoundError(f"{path}: {why if path.exists() else 'not found'}")
        for *group, rows in row_groups(files, self.columns, type(self).__name__):
            self.groups.append(tuple(group))
            self.sizes.append(rows)

    def read(self, number: int) -> list[dict]:
        """The rows of a row group."""
        file, group, before = self.groups[number]
        return read_group(file, group, self.columns,
                          f"{file} rows {before} to {before + self.sizes[number]}")

    def draw(self, rng: np.random.Generator, size: int,
             nearby: np.random.Generator | None = None) -> list:
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
                  conditions: int) -> list:
        """Up to `wanted` samples of a row group, in random order, with so many conditions each."""
        samples: list = []
        rows, size = self.rows(number), None             # (W, H) of the first one's target
        for i in rng.permutation(len(rows)):
            with self.skipping():
                row, where = rows[i], self.where(number, i)
                if samples and self.size_of(row, where) != size:
                    continue                             # spares decoding what will not fit
                own = rng if self.draws is None else np.random.default_rng(
                    [number, i, conditions, int(rng.integers(self.draws))])
                sample = self.sample(row, own, conditions, where)
                if sample is None:
                    continue
                if not samples:
                    size = self.size_of(row, where)
                elif shapes_of(sample) != shapes_of(samples[0]):
                    continue
                samples.append(sample)
            if len(samples) == wanted:
                break
        return samples

    def rows(self, number: int) -> list[dict]:
        """The rows of a row group; none if it is a bad one."""
        with self.skipping(), self.lock:                 # one thread reads for all
            return self.kept(number)
        return []

    def where(self, number: int, i: int) -> str:
        """Words for where a row stands."""
        file, _, before = self.groups[number]
        return f"{file} row {before + i}"

    def size_of(self, row: dict, where: str) -> tuple[int, int]:
        """The size that the target says it has."""
        if self.size:
            return self.size
        with open_picture(*self.content(row, self.columns[0], where)) as image:
            return fitted(image.size, self.longest)

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Note what is wrong with a row, if bad ones are skipped. Raises: ValueError."""
        known = len(self.bad or ())
        with skipping(self.bad):
            yield
        if self.bad and len(self.bad) > known:
            check_few(self.bad, sum(self.sizes), self.all_bad)

    def all(self, first: int = 0, stride: int = 1) -> Iterator:
        """Every draw of every row that is no bad one, or of every stride-th."""
        for number, before in zip(range(len(self.sizes)), accumulate(self.sizes, initial=0)):
            rows = self.rows(number)
            for i in range((first - before) % stride, len(rows), stride):
                for conditions, draw in product(self.conditions, range(self.draws or 1)):
                    with self.skipping():
                        own = np.random.default_rng([number, i, conditions, draw])
                        if sample := self.sample(rows[i], own, conditions, self.where(number, i)):
                            yield sample

    def contents(self) -> Iterator[tuple]:
        for (file, group, _), rows in zip(self.groups, self.sizes):
            yield file.name, file.stat().st_size, group, rows

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> object:
        """A sample, or None when the row is none. Raises: ValueError."""
        raise NotImplementedError

    def content(self, row: dict, column: str, where: str) -> tuple[Path | io.BytesIO, str]:
        """What open_picture() takes: a cell's bytes, or, in a plain folder, its file."""
        cell, where = row[column], f"{where} {column!r}"
        return (cell, "") if isinstance(cell, Path) else (bytes_of(cell, where), where)

    def picture(self, row: dict, column: str, where: str) -> Image.Image:
        return load_image(*self.content(row, column, where))

    def fit(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        return resize(image, size or self.size or fitted(image.size, self.longest))


def shapes_of(sample: object) -> list[tuple[int, ...]]:
    return [picture.shape for picture in (sample.target, *sample.given)]


def text_of(value: object, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column!r} holds no text")
    return checked_text(value.strip(), where)
