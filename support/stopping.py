"""How a run is stopped: by signals, or by data that cannot be read; the step it is at is saved.

train.train() runs within stop_signals(), draws by one_ahead(), and ends with leave().
"""
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch.distributed as dist

from support.commands import is_first

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")      # Windows has two


def one_ahead(items: Iterator, asked: list) -> Iterator:
    """The items, read one ahead: an error in reading the next joins `asked` before one is used.

    So a step whose successor has no data is saved before the run ends.
    """
    current = next(items)
    while True:
        following = None
        try:
            following = next(items)
        except (ValueError, OSError) as error:
            asked.append(error)
        yield current
        current = following


def leave(step: int, asked: list[int | Exception]) -> None:
    """End all processes once the first has saved the step after which one was asked to stop.

    asked: by which signals, or errors, this one was; the first tells the exit code, as shells
    count signals. Raises: ValueError, in the first process, for an error.
    """
    reasons = [why if isinstance(why, int) else str(why) for why in asked]
    every = [reasons]
    if dist.is_initialized():                            # which waits for all, too
        every = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, reasons)
    why = next(chain.from_iterable(every))
    if isinstance(why, str) and is_first():
        way = "" if "--skip-bad" in why else ", or add --skip-bad to draw others instead"
        raise ValueError(f"{why}; stopped after {step} steps, which are saved: mend it{way}, and "
                         "--resume goes on")
    if is_first():
        print(f"stopped after {step} steps; --resume goes on", file=sys.stderr)
    sys.exit(2 if isinstance(why, str) else 128 + why)


@contextmanager
def stop_signals() -> Iterator[list[int | Exception]]:
    """A list that signals write to, so that a step ends and is saved before the run does.

    Ctrl-C, and what ends a job from outside: SIGTERM, SIGHUP (unless it is ignored, as by nohup),
    SIGUSR1, SIGUSR2, SIGXCPU. A second Ctrl-C does not wait.
    """
    asked: list[int | Exception] = []

    def take(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
    kinds = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {kind: signal.signal(kind, take) for kind in kinds
              if signal.getsignal(kind) != signal.SIG_IGN}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
