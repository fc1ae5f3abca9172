"""What lies in a folder of pictures: targets, captions, references, and what is left out.

data.Folder reads folders without metadata here; what is left out is told by support/summary.py.
"""
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from support.pictures import PICTURES, pictures_in
from support.tables import read_text, skipping

RUBBISH = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "__macosx", "$recycle.bin")
EXAMPLES = 3                                             # of what is left out


def read_pairs(folder: Path, bad: list[str] | None, left_out: list[str]
               ) -> Iterator[tuple[str, dict]]:
    """Rows, like tables.read_rows', of a folder without metadata, as other trainers take it.

    Each picture, say 1.png, is a target, and 1.txt its instruction. Its references are in control/:
    1.png, or 1_0.png, 1_1.png, ...; where that folder has pictures, each target must have some.
    left_out takes lines about what else is there; what is missing may be among it.
    """
    targets, given = pictures_in(folder), defaultdict(list)
    stems = {target.stem for target in targets}
    texts = {file.stem: file for file in folder.glob("[!.]*") if file.suffix.lower() == ".txt"}
    for path in pictures_in(folder / "control"):
        stem, _, number = path.stem.rpartition("_")
        if path.stem in stems or not number.isdecimal():
            stem, number = path.stem, "-1"
        given[stem].append((int(number), f"control/{path.name}"))
    used = {*targets, *(texts[stem] for stem in stems & texts.keys())}
    used.update(folder / path for stem in stems & given.keys() for _, path in given[stem])
    left_out.extend(unused(folder, used))
    besides = "".join(f"; left out: {line}" for line in left_out) if bad is None else ""
    for target in targets:
        with skipping(bad):
            text, references = texts.get(target.stem), sorted(given.get(target.stem, ()))
            if not text or not text.is_file():
                raise FileNotFoundError(f"{target}: its instruction is missing, {target.stem}.txt"
                                        f"{besides}")
            if given and not references:
                raise FileNotFoundError(f"{target}: its reference is missing in control/{besides}")
            yield str(target), {"target": target.name, "instruction": read_text(text).strip(),
                                "images": [path for _, path in references]}


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder, however deep, but for what is hidden or a system's."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders
                            if name[0] != "." and name.lower() not in RUBBISH)
        found += [Path(place, name) for name in sorted(names)
                  if name[0] != "." and name.lower().endswith(PICTURES)]
    return found


def unused(folder: Path, used: set[Path]) -> list[str]:
    """Lines that count and name the files in a folder and its control/, and pictures below it."""
    control, files, below = folder / "control", [], []
    there = [path for place in (folder, control) for path in sorted(place.glob("[!.]*"))
             if path.name.lower() not in RUBBISH and path not in used and path != control]
    for path in there:
        if path.is_dir():
            below += pictures_below(path)
        else:
            files.append(path)
    lines = []
    if files:
        lines.append(f"files, {few(files, folder)}: neither a picture with a caption, nor a "
                     "caption or a reference of one")
    if below:
        lines.append(f"pictures in folders below, {few(below, folder)}: name each folder with a "
                     "--data of its own, or list the pictures in a metadata.jsonl")
    return lines


def unnamed(folder: Path, table: Path, rows: Iterable[list[Path]]) -> list[str]:
    """Lines about what a table in a folder, with rows of such paths, does not name."""
    named, other = set(chain.from_iterable(rows)), folder / "metadata.csv"
    folder = Path(os.path.abspath(folder))               # as rows have their paths
    lines = [f"{other.name}, as {table.name} is there"] if other.is_file() and (
        other.name != table.name) else []
    if rest := [path for path in pictures_below(folder) if path not in named]:
        lines.append(f"pictures that no row names, {few(rest, folder)}")
    return lines


def few(files: list[Path], folder: Path) -> str:
    """Their number, and the first of them."""
    names = [str(file.relative_to(folder)) for file in files[:EXAMPLES]]
    return f"{len(files):,} ({', '.join(names)}{', ...' if len(files) > EXAMPLES else ''})"
