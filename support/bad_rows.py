"""Rows of data that are broken, and left out where --skip-bad allows it.

Whatever reads rows (tables, folders, parquet) skips them here, data.Folder and the public sets ask
whether they are too many, and train.py and evaluate.py tell of them at the end.
"""
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MOST_BAD = 0.1                                           # of the lines may be skipped, if asked for
Bad = dict[str, None]                                    # lines about them, in order, each once


@contextmanager
def skipping(bad: Bad | None) -> Iterator[None]:
    """Write what is wrong with a row to `bad`, if that is there, instead of raising it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if bad is None:
            raise
        bad.setdefault(" ".join(str(error).split()))


def check_few(bad: Bad | None, rows: int, everyones: Bad | None) -> None:
    """Have a source's bad rows, if those are skipped, join the bad rows of all sources.

    Raises: ValueError when so many of so many rows are bad that something else is wrong.
    """
    if not bad:
        return
    if len(bad) > MOST_BAD * rows:
        raise ValueError(f"{len(bad):,} of {rows:,} rows are bad, too many to skip: --skip-bad "
                         f"leaves out one in ten, here {int(MOST_BAD * rows):,}; the first: "
                         f"{next(iter(bad))}")
    everyones.update(bad)


def tell_skipped(bad: Bad | None) -> None:
    """Say at a command's end what was wrong with the rows that were left out."""
    if bad:
        print(f"bad lines of the data, skipped: {len(bad)}", *bad, sep="\n  ", file=sys.stderr)
