"""Checkpoints: a run that is stopped goes on as if it had not been.

train.train() starts with start(), saves with save_checkpoint() each time that one is due, and ends
after the step it is at when stop_signals() says so.
"""
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mole import Adapter
from support import adapters
from support.files import json_object, replacing, unpickled

CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and what it replaced
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")      # Windows has two
Optimizers = list[torch.optim.Optimizer]


def holds_checkpoint(out: Path) -> bool:
    return any((out / name).is_file() for name in CHECKPOINTS)


def check_free(out: Path, wanted: bool) -> None:
    """Raises: ValueError when the folder holds what must not be written over.

    wanted: whether to go on from a checkpoint in it.
    """
    if holds_checkpoint(out):
        if not wanted:
            raise ValueError(f"{out} holds a run; add --resume to go on, or name another --out")
    elif (out / "adapter.safetensors").exists():
        raise ValueError(f"{out} holds an adapter, but no checkpoint to go on from; name another "
                         "--out")


def save_checkpoint(out: Path, adapter: Adapter, optimizers: Optimizers, step: int, number: int,
                    settings: dict) -> None:
    """adapter.safetensors for use, checkpoint.pt to go on from; the checkpoint before is kept.

    step, number: the next step's and its first micro-batch's. Both files are written aside; then
    the adapter is renamed, the old checkpoint, and last the new one.
    """
    state = {"step": step, "number": number, "settings": json.dumps(settings),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "adapter": {name: p.detach() for name, p in adapter.tensors().items()}}
    with replacing(out / CHECKPOINTS[0]) as last:        # renamed last: all is there then
        torch.save(state, last)
        adapters.write(adapter, out / "adapter.safetensors", step=str(step),
                       settings=state["settings"])
        if (out / CHECKPOINTS[0]).is_file():
            (out / CHECKPOINTS[0]).replace(out / CHECKPOINTS[1])


def read_checkpoint(out: Path) -> dict | None:
    """The last checkpoint in `out` that can be read, or None if none is. Raises: ValueError."""
    broken = []
    for file in (out / name for name in CHECKPOINTS):
        if file.is_file():
            try:
                state = unpickled(file)
                if not isinstance(state, dict) or not state.keys() >= {
                        "settings", "adapter", "optimizers", "step", "number"}:
                    raise ValueError(f"{file}: is no checkpoint")
                state["settings"] = json_object(state["settings"], file)
                for line in broken:
                    print(f"{line}; going on from the one before it", file=sys.stderr)
                return state
            except ValueError as error:
                broken.append(str(error))
    if broken:
        raise ValueError(f"{broken[0]}; name another --out")
    return None


def load_checkpoint(out: Path, adapter: Adapter, optimizers: Optimizers,
                    settings: dict) -> tuple[int, int]:
    """Take up the run in `out`; -> next step, next micro-batch. Raises: ValueError if another's."""
    state = read_checkpoint(out)
    if state is None:
        return 0, 0
    before = state["settings"]
    changed = [name for name in settings                 # what old runs do not name was not asked
               if settings[name] != before.get(name, "None")]                # for
    for name in changed:                                 # more processes, more data: may go on
        told = f"{out} began with {name} = {before.get(name)}, not {settings[name]}"
        if name not in ("micro_batches", "fingerprints"):
            raise ValueError(f"--resume: {told}")
        print(f"note: {told}", file=sys.stderr)
    adapters.fill_in(adapter, state["adapter"], out)
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return state["step"], state["number"]


def start(out: Path, adapter: Adapter, optimizers: Optimizers, settings: dict, wanted: bool,
          workers: int) -> tuple[int, int]:
    """Step and micro-batch to begin with, the same in all processes. Raises: ValueError.

    wanted: whether to go on from a checkpoint in `out`; else, or where there is none, (0, 0).
    """
    own = load_checkpoint(out, adapter, optimizers, settings) if wanted else (0, 0)
    places = [own] * workers
    if workers > 1:
        dist.all_gather_object(places, own)
    if len(set(places)) > 1:
        raise ValueError(f"--resume: processes found {set(places)} (step, micro-batch) in "
                         f"{out}; it must be a folder that all machines see")
    return own


def leave(step: int, rank: int, asked: list[int]) -> None:
    """End all processes once the first has saved the step after which one was asked to stop.

    asked: by which signals this one was; the exit code tells the first, as shells count.
    """
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        print(f"stopped after {step} steps; --resume goes on", file=sys.stderr)
    sys.exit(128 + (asked or [signal.SIGTERM])[0])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that signals write to, so that a step ends and is saved before the run does.

    Ctrl-C, and what ends a job from outside: SIGTERM, SIGHUP (unless it is ignored, as by nohup),
    SIGUSR1, SIGUSR2, SIGXCPU. A second Ctrl-C does not wait.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
    kinds = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {kind: signal.signal(kind, note) for kind in kinds
              if signal.getsignal(kind) != signal.SIG_IGN}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
