"""Checkpoints: a run that is stopped goes on as if it had not been.

train.train() starts with start(), saves with save_checkpoint() each time that one is due, and ends
after the step it is at when stop_signals() or one_ahead() say so.
"""
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from mole import Adapter
from support import adapters, record
from support.files import json_object, read_metadata, replacing, unpickled
from support.words import note

CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and what it replaced
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")      # Windows has two
MAY_CHANGE = "micro_batches", "fingerprints"             # settings: more processes, more data
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
                    settings: dict, keep: int = 0) -> None:
    """adapter.safetensors for use, checkpoint.pt to go on from; the checkpoint before is kept.

    step, number: the next step's and its first micro-batch's. Both files are written aside; then
    the adapter is renamed, the old checkpoint, and last the new one. keep: so many of the last
    adapters stay as adapter_STEP.safetensors.
    """
    state = {"step": step, "number": number, "settings": json.dumps(settings),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "adapter": {name: p.detach() for name, p in adapter.tensors().items()}}
    with replacing(out / CHECKPOINTS[0]) as last:        # renamed last: all is there then
        torch.save(state, last)
        about = {"step": str(step), "settings": state["settings"]}
        if "longest" in settings:                        # sampling asks for it
            about["longest"] = settings["longest"]
        adapters.write(adapter, out / "adapter.safetensors", **about)
        named = out / f"adapter_{step:06d}.safetensors"
        if keep and named.exists() and not is_of_run(named, settings):
            note(f"{named} is of another run, and stays as it is")
        elif keep:
            adapters.write(adapter, named, **about)
        if (out / CHECKPOINTS[0]).is_file():
            (out / CHECKPOINTS[0]).replace(out / CHECKPOINTS[1])
    if keep:
        own = [file for file in out.glob("adapter_*.safetensors")
               if is_of_run(file, settings) and step_of(file) <= step]
        for file in sorted(own, key=step_of)[:-keep]:
            file.unlink()


def step_of(file: Path) -> int:
    """The STEP of adapter_STEP.safetensors."""
    return int(file.stem.removeprefix("adapter_"))


def is_of_run(file: Path, settings: dict) -> bool:
    """Whether a run with such settings has written adapter_STEP.safetensors under this name."""
    try:
        about = json_object(read_metadata(file).get("adapter", "{}"), file)
        before = json_object(about.get("settings", "{}"), file)
        own = file.name == f"adapter_{int(about.get('step', -1)):06d}.safetensors"
    except (ValueError, TypeError):                      # nothing of ours
        return False
    return own and not set(changes(before, settings)) - set(MAY_CHANGE)


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


def changes(before: dict, settings: dict) -> list[str]:
    """The names of settings that are not what they were; one that is absent counts as None."""
    return [name for name in dict.fromkeys((*settings, *record.ASKED_FOR))
            if settings.get(name, "None") != before.get(name, "None")]


def load_checkpoint(out: Path, adapter: Adapter, optimizers: Optimizers,
                    settings: dict) -> tuple[int, int]:
    """Take up the run in `out`; -> next step, next micro-batch. Raises: ValueError if another's."""
    state = read_checkpoint(out)
    if state is None:
        return 0, 0
    before = state["settings"]
    for name in changes(before, settings):
        was, now = before.get(name), settings.get(name)
        told = f"{out} began with {name} = {was}, not {now}"
        if name not in MAY_CHANGE:
            option = "--method" if name == "adapter" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume: {told}; go on with {option} as it was, or begin another "
                             "run with another --out")
        note(told)
    adapters.fill_in(adapter, state["adapter"], out)
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return state["step"], state["number"]


def start(out: Path, adapter: Adapter, optimizers: Optimizers, settings: dict, wanted: bool,
          workers: int) -> tuple[int, int]:
    """Step and micro-batch to begin with, the same in all processes. Raises: ValueError.

    wanted: whether to go on from a checkpoint in `out`; else, or where there is none, (0, 0).
    """
    if wanted and not holds_checkpoint(out):
        note(f"{out} holds no checkpoint; this run begins at its start")
    own = load_checkpoint(out, adapter, optimizers, settings) if wanted else (0, 0)
    places = [own] * workers
    if workers > 1:
        dist.all_gather_object(places, own)
    if len(set(places)) > 1:
        raise ValueError(f"--resume: processes found {set(places)} (step, micro-batch) in "
                         f"{out}; it must be a folder that all machines see")
    return own


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


def leave(step: int, rank: int, asked: list[int | Exception]) -> None:
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
    if isinstance(why, str) and rank == 0:
        way = "" if "--skip-bad" in why else ", or add --skip-bad to draw others instead"
        raise ValueError(f"{why}; stopped after {step} steps, which are saved: mend it{way}, and "
                         "--resume goes on")
    if rank == 0:
        print(f"stopped after {step} steps; --resume goes on", file=sys.stderr)
    sys.exit(2 if isinstance(why, str) else 128 + why)


@contextmanager
def stop_signals() -> Iterator[list[int | Exception]]:
    """A list that signals write to, so that a step ends and is saved before the run does.

    Ctrl-C, and what ends a job from outside: SIGTERM, SIGHUP (unless it is ignored, as by nohup),
    SIGUSR1, SIGUSR2, SIGXCPU. A second Ctrl-C does not wait.
    """
    asked: list[int | Exception] = []

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
