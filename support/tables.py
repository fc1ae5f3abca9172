"""Tables of a user's own data, .jsonl, .json and .csv: rows, and the texts and paths in them.

data.Folder reads its rows here, and sample.py those of --batch; support/names.py knows what their
entries are called.
"""
import codecs
import csv
import io
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path

from support.bad_rows import Bad, skipping
from support.configs import checked_object, json_object, parse_json
from support.foreign import start_of
from support.names import ALSO, KNOWN, SEVERAL, meaning_of, read_name
from support.pictures import ADDRESS, PICTURES

LONGEST_PATH = 4096                                      # letters: more, no system opens
OTHER_TABLES = (".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".sqlite")


def read_text(file: Path) -> str:
    """The file's text. Raises: ValueError saying which encoding it has, if not UTF-8."""
    content = file.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        kind = "UTF-16, by its first bytes"
    elif b"\0" in content[:99]:
        kind = "it has zero bytes, as UTF-16 has, and files that hold no text"
    else:
        try:
            return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            byte = content[error.start]
            kind = f"Latin-1 or Windows-1252, perhaps: byte {error.start + 1} is {byte:#x}"
    also = ', which a spreadsheet calls "CSV UTF-8"' if file.suffix.lower() == ".csv" else ""
    raise ValueError(f"{file}: not UTF-8 text ({kind}); save it as UTF-8{also}")


def check_columns(file: Path, first: str) -> None:
    """Raises: ValueError when a table's first line does not name columns, between commas."""
    for separator, called in ((",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if any(meaning_of(name.strip(' "')) for name in first.split(separator)):
            if called:
                raise ValueError(f"{file}: its columns are separated by {called}; a .csv file "
                                 "needs commas: save it with those")
            return
    raise ValueError(f"{file}: its first line names no known column: {first[:100]!a}; it must name "
                     f"the columns: {KNOWN}")


def read_csv(file: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a table that are not empty, each with words for where it begins.

    Raises: ValueError for the file, not for a row: after an error nobody knows where rows end.
    """
    text, names, number = read_text(file), [], 1
    table = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    if text.strip():
        check_columns(file, next(filter(lambda line: line.strip(' ,;|"'), text.splitlines()), ""))
    try:
        for cells in table:
            while len(cells) > len(names) > 0 and not cells[-1]:
                cells.pop()                              # a comma at the end says nothing
            if any(cells) and names:
                cells = dict(zip_longest(names, cells))  # None: has too many cells
                yield f"{file} line {number}", cells
            elif any(cells):
                names, named = cells, [name for name in cells if name]
                if len(set(named)) < len(named):
                    raise ValueError(f"{file}: two columns have the same name")
            number = table.line_num + 1                  # a cell may have several lines
    except csv.Error as error:
        raise ValueError(f"{file} line {number}: not valid CSV ({error})") from None


def from_cells(cells: dict, where: str) -> dict:
    """A table's row: empty cells are none, a list of paths is in JSON. Raises: ValueError."""
    if None in cells:
        raise ValueError(f"{where}: has more cells than the first line has names; a text that "
                         'holds commas stands in "double quotes"')
    row = {name: text for name, cell in cells.items() if cell and (text := cell.strip())}
    for name in row:
        if row[name][0] + row[name][-1] == "[]" and read_name(name)[2] in SEVERAL:
            row[name] = parse_json(row[name], f"{where} {name!r}")
    return row


def check_kind(file: Path) -> None:
    """Raises: ValueError for a file that is called as no table is that can be read."""
    if file.suffix.lower() in PICTURES:
        raise ValueError(f"{file}: is a picture; name its folder, or a .jsonl or .csv file whose "
                         "rows name it")
    if file.suffix.lower() in OTHER_TABLES:
        raise ValueError(f"{file}: is not read as a table; save it as .jsonl, or as .csv with "
                         "commas")


def is_list(file: Path) -> bool:
    """Whether a file seems to hold one JSON list, over any number of lines."""
    return start_of(file).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_list(file: Path) -> Iterator[tuple[str, object]]:
    """What one JSON list holds, with words for where. Raises: ValueError."""
    values = parse_json(read_text(file), file)
    return ((f"{file} entry {number}", value) for number, value in enumerate(values, 1))


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """A .jsonl file's lines that are not empty, with words for where. Raises: ValueError."""
    lines = read_text(file).split("\n")
    return ((f"{file} line {number}", line) for number, line in enumerate(lines, 1)
            if line.strip())


def from_line(line: str, where: str) -> dict:
    """A .jsonl file's row. Raises: ValueError."""
    try:
        return json_object(line, where)
    except ValueError as error:
        raise ValueError(f"{error}; a line of a .jsonl file is one whole object") from None


def read_rows(file: Path, bad: Bad | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl or .csv file, or of one JSON list, with words for where each stands.

    Their entries have the names that stand there: names.ours() knows them. Raises: ValueError.
    """
    check_kind(file)
    read, parse = read_lines, from_line
    if file.suffix.lower() == ".csv":
        read, parse = read_csv, from_cells
    elif is_list(file):
        read, parse = read_list, checked_object
    for where, row in read(file):
        with skipping(bad):
            yield where, parse(row, where)


def checked_text(text: str, where: str) -> str:
    """The text. Raises: ValueError when it has bytes or halves of letters that no text can have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {text[:60]!a} is not valid Unicode text") from None
    return text


def row_texts(row: dict, names: Iterable[str], where: str, rest: Iterable[str] = ()) -> list[str]:
    """A row's texts, by these names. Raises: ValueError naming all that are missing.

    rest: the row's entries without a known name, of which one may be meant.
    """
    missing = [name for name in names
               if not isinstance(row.get(name), str) or not row[name].strip()]
    if missing:
        needed = " and ".join(f"{name!r} (or {ALSO[name]})" for name in missing)
        unknown = ", ".join(f"{name[:60]!a}" for name in islice(rest, 3))
        raise ValueError(f"{where}: needs a non-empty text under {needed}"
                         + (f"; no known name is {unknown}" if unknown else ""))
    return [checked_text(row[name], where) for name in names]


def row_text(row: dict, name: str, where: str, rest: Iterable[str] = ()) -> str:
    """A row's text. Raises: as row_texts() does."""
    return row_texts(row, [name], where, rest)[0]


def row_paths(row: dict, name: str, where: str) -> list[str]:
    """A row's path or list of paths. Raises: ValueError."""
    paths = row.get(name, [])
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: {name!r} must be a path or a list of paths")
    return paths


def checked_path(path: str, where: str) -> str:
    """The path. Raises: ValueError for what no path can be, and for an address."""
    if ADDRESS.match(path):
        raise ValueError(f"{where}: {path[:200]!a} is an address; save that picture as a file, and "
                         "name the file")
    if len(checked_text(path, where)) > LONGEST_PATH or re.search(r"[\0-\x1f]", path):
        raise ValueError(f"{where}: {path[:60]!a} cannot be a path")
    return path


def located(path: str, folder: Path, root: Path | None, where: str) -> Path:
    """Where a row's path leads. Raises: ValueError if out of `root`, by default the data's folder.

    Paths are taken as written: links inside the folder are their owner's business.
    """
    whole = Path(os.path.abspath(folder / checked_path(path, where)))
    within = Path(os.path.abspath(root or folder))
    if not whole.is_relative_to(within):
        more = "" if root else "; --data-root FOLDER allows more"
        raise ValueError(f"{where}: {path!r} leads out of {within}{more}")
    return whole
