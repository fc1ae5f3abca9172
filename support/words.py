"""What commands say on their way: counts, spans and durations in words, lines, notes.

The commands and their rooms ask here; what ends a command is support/commands.py's.
"""
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence

from support.commands import is_first


def counted(number: int, what: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def span(values: Sequence[float]) -> str:
    """8, or 4 to 16: the least and the largest, where they differ."""
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def duration(seconds: float) -> str:
    """40.0 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def some_of(names: Sequence[object], most: int = 3, between: str = ", ") -> str:
    """The first of them, and dots for more."""
    return between.join([*map(str, names[:most]), *["..."] * (len(names) > most)])


def as_typed(words: Iterable[object], windows: bool = os.name == "nt") -> str:
    """A command, or a part of one, quoted for the shell at hand."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if windows else shlex.join(words)


def say(line: str) -> None:
    """Print a line, whatever is in it, as names of files that hold no text."""
    print("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line))


def note(line: str) -> None:
    """Say something beside the results; of several processes the first speaks."""
    if is_first():
        print(f"note: {line}", file=sys.stderr)
