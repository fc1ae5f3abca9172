"""What commands say on their way: counts, spans and durations in words, lines, notes.

The commands and their rooms ask here; what ends a command is support/commands.py's.
"""
import sys
from collections.abc import Sequence

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


def say(line: str) -> None:
    """Print a line, whatever is in it: names may hold no text, terminals may not know letters."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    encoding = sys.stdout.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding))


def note(line: str) -> None:
    """Say something beside the results; of several processes the first speaks."""
    if is_first():
        print(f"note: {line}", file=sys.stderr)
