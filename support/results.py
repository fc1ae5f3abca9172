"""What a scoring leaves in --out: the numbers, a table of them, a sheet of pictures.

evaluate.py asks check_out() whether they may be put there; evaluate.bench_tiny(),
pairs.score_source() and benchmark_table.report() write() them.
"""
import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from support.files import write_json, write_text
from support.pictures import save_picture
from support.words import say

FILES = ("scores.json", "table.md", "sheet.png")         # what --out takes
HOLE = "–"                                               # in a table: not measured, or not to be
SCORING = "scoring.md"                                   # and, of a benchmark, this


def check_out(args: argparse.Namespace, kept: bool = False) -> None:
    """Raises: ValueError where a folder is in the way of the scores, or others stand there.

    kept: whether what stands there is an earlier part of the same work, and is gone on with.
    """
    for name in (*FILES, SCORING):
        if (args.out / name).is_dir():
            raise ValueError(f"--out {args.out}: {name} in it is a folder, where a file is to go")
    there = [name for name in FILES if (args.out / name).exists()]
    if there and not (args.overwrite or kept):
        raise ValueError(f"--out {args.out}: holds {there[0]} already; name another --out, or add "
                         "--overwrite")


def cell(value: float | None, shape: str = "{:.2f}") -> str:
    """A number of a table, or its hole."""
    return HOLE if value is None else shape.format(value)


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table whose columns stand below each other as text, too."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write(out: Path, numbers: object, text: str, sheet: np.ndarray,
          route_by: str | None = None) -> None:
    """FILES, each whole or not at all; the table is printed too, and what it was routed by."""
    text += f"\n\nRouted by: {route_by}" if route_by is not None else ""
    write_json(out / "scores.json", numbers)
    write_text(out / "table.md", text + "\n")
    save_picture(sheet, out / "sheet.png")
    for line in ("", *text.split("\n"), ""):
        say(line)
