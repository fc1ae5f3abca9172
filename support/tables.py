"""Tables of a user's own data: .jsonl, .csv or pairs of files, by the names that trainers use.

data.Folder reads its rows here, and sample.py those of --batch.
"""
import csv
import io
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.files import parse_json
from support.pictures import pictures_in

MOST_BAD = 0.1                                           # of the lines may be skipped, if asked for
LONGEST = 4096                                           # letters of a path: more, no system opens
NAMES = {"target": ("target", "file_name", "image_path", "image", "output_image"),
         "instruction": ("instruction", "prompt", "caption", "text"),
         "images": ("images", "input_images", "kontext_images", "control_path", "cond_image"),
         "conds": ("conds",)}
NUMBERED = re.compile(r"control_path_(\d{1,9})")         # one of several images


@contextmanager
def skipping(bad: list[str] | None) -> Iterator[None]:
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


def tell_skipped(bad: list[str] | None) -> None:
    """Say at a command's end what was wrong with the rows that were left out."""
    if bad:
        print(f"bad lines of the data, skipped: {len(bad)}", *bad, sep="\n  ", file=sys.stderr)


def read_text(file: Path) -> str:
    """The file's text. Raises: ValueError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None


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
            row[name] = parse_json(row[name], f"{where} {name!r}")
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
            with skipping(bad):
                row = (from_cells if table else parse_json)(line, where)
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected an object like {{\"instruction\": ...}}")
            if isinstance(row, dict):
                if numbered := sorted((int(found[1]), name) for name in row
                                      if (found := NUMBERED.fullmatch(name))):
                    paths = [row.pop("control_path", None), *(row.pop(n) for _, n in numbered)]
                    row["control_path"] = [path for path in paths if path is not None]
                yield where, row


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
            stem, number = path.stem, "-1"
        given[stem].append((int(number), f"control/{path.name}"))
    for target in targets:
        with skipping(bad):
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
