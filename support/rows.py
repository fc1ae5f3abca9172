"""Rows of a benchmark's parquet files: texts at once, pictures when they are asked for.

omnicontext.read() and spatial.read() go through here; public_sets.PUBLIC draw theirs at random.
"""
from functools import lru_cache
from pathlib import Path

from PIL import Image

from support.parquet import bytes_of, read_group, row_groups
from support.pictures import load_image


class Rows:
    """A file, or in a folder those of a split, in order; the first `most` rows, or all.

    texts, pictures: names of columns. Raises: FileNotFoundError, ValueError naming file and row.
    """

    def __init__(self, path: Path, split: str, whose: str, texts: tuple[str, ...],
                 pictures: tuple[str, ...], most: int | None = None):
        files = sorted(path.rglob(f"{split}-*.parquet")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path}: " + (
                f"holds no file {split}-*.parquet, as {whose} has; name that folder, or one file"
                if path.is_dir() else "no such file or folder"))
        self.columns = pictures
        self.texts: list[dict] = []                      # of each row
        self.places: list[tuple[Path, int, int, int]] = []       # file, group, row in it, in file
        for file, group, before, rows in row_groups(files, (*texts, *pictures), whose):
            left = rows if most is None else min(rows, most - len(self.texts))
            if left > 0:
                self.texts += read_group(file, group, texts, file)[:left]
                self.places += [(file, group, i, before + i) for i in range(left)]
        if not self.texts:
            raise ValueError(f"{path}: holds no row; name the files of {whose}")
        self.kept = lru_cache(maxsize=1)(read_group)     # neighbours are in one group

    def where(self, i: int) -> str:
        """Words for where a row stands."""
        return f"{self.places[i][0]} row {self.places[i][3]}"

    def pictures(self, i: int, column: str) -> list[Image.Image]:
        """A row's picture, or its list of them, as load_image() gives them. Raises: as it does."""
        file, group, place, _ = self.places[i]
        cells = self.kept(file, group, self.columns, file)[place][column]
        cells = cells if isinstance(cells, list) and cells else [cells]      # [] is no picture
        where = f"{self.where(i)} {column!r}"
        return [load_image(bytes_of(cell, where), where) for cell in cells]
