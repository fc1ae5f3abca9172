"""Lines of the source, as they stand in the files, to be shown beside what they did.

explain_inputs.asked() and the other stages of an explained edit name the functions that ran.
"""
import inspect
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.figures import text

ROOT = Path(__file__).resolve().parent.parent


def from_here(path: Path) -> Path:
    """A path within the project from its folder on; any other is itself."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


class Passage(NamedTuple):
    """Some lines of a file."""
    file: str                                            # from the project's folder on
    first: int                                           # number of its first line, from 1 on
    lines: list[str]                                     # as indented as the first, or deeper


def passage(thing: object, first: str = "", last: str = "") -> Passage:
    """A function or class, or its lines from one that holds `first` to the next that holds `last`.

    Raises: ValueError when no line does: the source has changed.
    """
    thing = inspect.unwrap(thing.func if isinstance(thing, partial) else thing)
    lines, number = inspect.getsourcelines(thing)
    begin = next((i for i, line in enumerate(lines) if first in line), None)
    end = next((i for i, line in enumerate(lines) if i >= (begin or 0) and last in line), None)
    if begin is None or end is None:
        raise ValueError(f"{getattr(thing, '__qualname__', thing)}: no line of it holds "
                         f"{first if begin is None else last!r} any more")
    if first and not last:
        end = begin                                      # that line alone
    shown = lines[begin:end + 1] if first else lines
    indent = min(len(line) - len(line.lstrip()) for line in shown if line.strip())
    file = from_here(Path(inspect.getsourcefile(thing)).resolve())
    told = file.name if file.is_absolute() else file.as_posix()
    return Passage(told, number + begin, [line[indent:].rstrip() for line in shown])


def listing(found: Passage) -> str:
    """A passage as HTML, with the numbers of its lines; comments stand back."""
    rows = []
    for number, line in enumerate(found.lines, found.first):
        code, comment = re.fullmatch(r"(.*?)((?:(?<=  )|^\s*)#.*)?", line).groups()
        told = f'<span class="comment">{text(comment)}</span>' if comment else ""
        rows.append(f'<span class="number">{number}</span>{text(code)}{told}')
    last = found.first + len(found.lines) - 1
    return (f'<figure class="code" data-file="{text(found.file)}" data-first="{found.first}">'
            f"<figcaption>{text(found.file)}, lines {found.first} to {last}</figcaption>"
            f'<pre tabindex="0">{chr(10).join(rows)}</pre></figure>')
