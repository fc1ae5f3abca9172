"""Looking through rows in several threads: their order, and what is wrong with them, as in one.

data.Folder has its rows checked here before training begins; a bar shows that something goes on.
"""
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from support.commands import is_first
from support.tables import skipping

THREADS = min(8, os.cpu_count() or 1)                    # Pillow decodes in several at once
AHEAD = 4 * THREADS                                      # rows that are looked at together
QUIET = 1.0                                              # seconds without a bar
Found = TypeVar("Found")


def looked_through(read: Callable[[list[str] | None], Iterator[tuple]],
                   check: Callable[..., Found], bad: list[str] | None, what: str
                   ) -> Iterator[Found]:
    """What check(*row) gives for each row; what it raises joins `bad`, if there is such a list.

    read: gives the rows, and writes to a list, if it gets one, what is wrong with those that it
    leaves out. What it raises, of a whole table, is raised after all that stands before it.
    """
    left_out: list[str] = []
    rows, noted = read(None if bad is None else left_out), [] if bad is None else bad
    waiting: deque[tuple[int, Future[Found]]] = deque()  # with how many were left out before
    pool, reading, broken, known = ThreadPoolExecutor(THREADS), True, None, 0
    bar = tqdm(desc=f"looking through {what}", unit=" rows", mininterval=1, delay=QUIET,
               leave=False, disable=not is_first())
    try:
        while True:
            try:
                while reading and len(waiting) < AHEAD:
                    row = next(rows)                     # others may be left out before it
                    waiting.append((len(left_out), pool.submit(check, *row)))
            except StopIteration:
                reading = False
            except (ValueError, OSError) as error:
                reading, broken = False, error
            if not waiting:
                break
            before, future = waiting.popleft()
            noted.extend(left_out[known:before])
            known, found = before, list[Found]()
            with skipping(bad):
                found.append(future.result())
            bar.update()
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    noted.extend(left_out[known:])
    if broken:
        raise broken
