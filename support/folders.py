"""What lies in a folder of pictures: targets, captions, references, and what is left out.

data.Folder reads folders without metadata here, and says what is left out when
support/summary.py asks: only one process does.
"""
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from support.bad_rows import Bad, skipping
from support.pictures import PICTURES, pictures_in
from support.tables import is_list, read_text
from support.words import some_of

RUBBISH = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r", "__macosx", "$recycle.bin")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.json")      # of a folder, first found
LOOKED_AT = 100_000                                      # files below a folder, at most


def tables_in(folder: Path) -> list[Path]:
    """A folder's TABLES that are there; other tools' metadata.json that hold no list are none."""
    files = [folder / name for name in TABLES if (folder / name).is_file()]
    return [file for file in files if file.name != "metadata.json" or is_list(file)]


def metadata_of(path: Path) -> Path | None:
    """The file itself, or the first of the folder's tables, if there is one."""
    if path.is_file():
        return path
    return next(iter(tables_in(path)), None)


def table_of(path: Path) -> Path | None:
    """The table that data come in: a file, or in a folder, if any. Raises: FileNotFoundError."""
    file = metadata_of(path)
    if file is None and not pictures_in(path):
        there = "".join(f"; there are {line}" for line in unused(path, set()))
        raise FileNotFoundError(f"{path}: {'holds no data' if path.is_dir() else 'not found'}; "
                                f"a data folder needs {', '.join(TABLES)} (one JSON list), or "
                                f"pictures with .txt files{there}")
    return file


def parts_of(folder: Path) -> tuple[list[Path], dict[str, Path], dict[str, list[str]]]:
    """The targets in a folder without metadata; by stem, captions, and references in order."""
    targets, numbered = pictures_in(folder), defaultdict(list)
    stems = {target.stem for target in targets}
    texts = {file.stem: file for file in folder.glob("[!.]*") if file.suffix.lower() == ".txt"}
    for path in pictures_in(folder / "control"):
        stem, _, number = path.stem.rpartition("_")
        if path.stem in stems or not number.isdecimal():
            stem, number = path.stem, "-1"
        numbered[stem].append((int(number), f"control/{path.name}"))
    return targets, texts, {stem: [path for _, path in sorted(given)]
                            for stem, given in numbered.items()}


def read_pairs(folder: Path, bad: Bad | None) -> Iterator[tuple[str, dict]]:
    """Rows, like tables.read_rows', of a folder without metadata, as other trainers take it.

    Each picture, say 1.png, is a target, and 1.txt its instruction. Its references are in control/:
    1.png, or 1_0.png, 1_1.png, ...; where that folder has pictures, each target must have some.
    """
    targets, texts, given = parts_of(folder)
    stems = Counter(target.stem for target in targets)
    for target in targets:
        with skipping(bad):
            text, references = texts.get(target.stem), given.get(target.stem, [])
            if stems[target.stem] > 1:
                raise ValueError(f"{target}: another picture has the same name but for its ending, "
                                 f"and {target.stem}.txt could be either's; rename one")
            missing = None
            if not text or not text.is_file():
                missing = (f"instruction is missing, {target.stem}.txt (without {TABLES[0]} each "
                           "picture needs such a text)")
            elif given and not references:
                missing = "reference is missing in control/"
            if missing:                                  # and may be there by another name
                there = left_out(folder, None, ()) if bad is None else []
                raise FileNotFoundError(f"{target}: its {missing}" + "".join(
                    f"; left out: {line}" for line in there))
            yield str(target), {"target": target.name, "instruction": read_text(text).strip(),
                                "images": references}


def left_out(path: Path, table: Path | None, named: Iterable[str]) -> list[str]:
    """Lines about what lies beside the data in a folder, or a table's file, and is not used.

    named: the pictures that the table's rows name, bad ones too.
    """
    if table:
        return unnamed(path, table, named) if path.is_dir() else []
    targets, texts, given = parts_of(path)
    stems = {target.stem for target in targets}
    used = {*targets, *(texts[stem] for stem in stems & texts.keys())}
    used.update(path / name for stem in stems & given.keys() for name in given[stem])
    return unused(path, used)


def pictures_below(*places: Path) -> tuple[list[Path], str]:
    """The pictures in folders, however deep, but for what is hidden or a system's.

    And words for it where there is more than can be looked at while somebody waits.
    """
    found: list[Path] = []
    seen = 0
    for place, folders, names in chain.from_iterable(map(os.walk, places)):
        folders[:] = sorted(name for name in folders
                            if name[0] != "." and name.lower() not in RUBBISH)
        found += [Path(place, name) for name in sorted(names)
                  if name[0] != "." and name.lower().endswith(PICTURES)]
        seen += len(names)
        if seen > LOOKED_AT:
            return found, f" among the first {seen:,} files"
    return found, ""


def unused(folder: Path, used: set[Path]) -> list[str]:
    """Lines that count and name the files in a folder and its control/, and pictures below it."""
    control = folder / "control"
    there = [path for place in (folder, control) for path in sorted(place.glob("[!.]*"))
             if path.name.lower() not in RUBBISH and path not in used and path != control]
    files = [path for path in there if not path.is_dir()]
    below, among = pictures_below(*(path for path in there if path.is_dir()))
    lines = []
    if files:
        lines.append(f"files, {few(files, folder)}: neither a picture with a caption, nor a "
                     "caption or a reference of one")
    if below:
        lines.append(f"pictures in folders below, {few(below, folder)}{among}: name each folder "
                     "with a --data of its own, or list the pictures in a metadata.jsonl")
    return lines


def unnamed(folder: Path, table: Path, named: Iterable[str]) -> list[str]:
    """Lines about what a table in a folder, with rows that name such pictures, does not name."""
    used = {os.path.abspath(folder / name) for name in named}
    lines = [f"{other.name}, as {table.name} is there" for other in tables_in(folder)
             if other.name != table.name]
    below, among = pictures_below(folder)
    if rest := [path for path in below if os.path.abspath(path) not in used]:
        lines.append(f"pictures that no row names, {few(rest, folder)}{among}")
    return lines


def few(files: list[Path], folder: Path) -> str:
    """Their number, and the first of them."""
    return f"{len(files):,} ({some_of([file.relative_to(folder) for file in files])})"
