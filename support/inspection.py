"""Looking through rows in several threads: their order, and what is wrong with them, as in one.

data.Folder has its rows checked here before training begins; a bar shows that something goes on.
"""
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

from support.bad_rows import Bad, skipping
from support.commands import is_first

THREADS = min(8, os.cpu_count() or 1)                    # Pillow decodes in several at once
AHEAD = 4 * THREADS                                      # rows that are looked at together
QUIET = 1.0                                              # seconds without a bar
Found = TypeVar("Found")


def looked_through(read: Callable[[Bad | None], Iterator[tuple]],
                   check: Callable[..., Found], bad: Bad | None, what: str
                   ) -> Iterator[Found]:
    """What check(*row) gives for each row; what it raises joins `bad`, if that is there.

    read: gives the rows, and writes to what it gets, if that is not None, what is wrong with those
    that it leaves out. An error of its own, of the whole table, comes after all rows before it.
    """
    pool = ThreadPoolExecutor(THREADS)
    bar = tqdm(desc=f"looking through {what}", unit=" rows", mininterval=1, delay=QUIET,
               leave=False, disable=not is_first())

    def started() -> Iterator[Future[Found] | str | Exception]:
        """In the table's order: rows at work, lines about rows left out, the table's own error."""
        wrong: Bad = {}
        last: list[Exception] = []
        try:
            for row in read(None if bad is None else wrong):
                yield from wrong
                wrong.clear()
                yield pool.submit(check, *row)
        except (ValueError, OSError) as error:
            last.append(error)
        yield from (*wrong, *last)
    try:
        items = started()
        waiting = deque(islice(items, AHEAD))
        while waiting:
            item, found = waiting.popleft(), list[Found]()
            waiting.extend(islice(items, 1))
            if isinstance(item, Exception):
                raise item
            if isinstance(item, str):
                bad.setdefault(item)
                continue
            with skipping(bad):
                found.append(item.result())
            bar.update()
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
