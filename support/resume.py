"""Checkpoints: a run that is stopped goes on as if it had not been.

train.run_training() holds the run's folder alone(); train.train() starts with start(), and saves
with save_checkpoint() each time that one is due.
"""
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                                      # Windows
    fcntl = None

from mole import Adapter
from support import adapters, record
from support.commands import NO_FOLDER, is_first, may_hold, workers
from support.configs import json_object
from support.files import read_metadata, replacing, unpickled
from support.words import note

LOCK = "lock"                                            # in a run's folder, while it runs
CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and what it replaced
MAY_CHANGE = "micro_batches", "fingerprints"             # settings: more processes, more data
OPTIONS = {"adapter": "--method", "cache_draws": "--cache and --cache-draws"}    # of odd names
Optimizers = list[torch.optim.Optimizer]


def holds_checkpoint(out: Path) -> bool:
    return any((out / name).is_file() for name in CHECKPOINTS)


def check_free(out: Path, wanted: bool) -> None:
    """Raises: ValueError when the folder holds what must not be written over.

    wanted: whether to go on from a checkpoint in it.
    """
    if not may_hold(out):
        raise ValueError(f"--out {out}: {NO_FOLDER}")
    if holds_checkpoint(out):
        if not wanted:
            raise ValueError(f"{out} holds a run; add --resume to go on, or name another --out")
    elif (out / "adapter.safetensors").exists():
        raise ValueError(f"{out} holds an adapter, but no checkpoint to go on from; name another "
                         "--out")


@contextmanager
def alone(out: Path, wanted: bool) -> Iterator[None]:
    """Hold a run's folder, so that no other process trains in it.

    Raises: ValueError where one does, or has meanwhile left there what must not be written over;
    wanted: as check_free() has it.

    The system lets go of it however this process ends; where it has no such locks, none is held. Of
    several processes the first holds it for all.
    """
    if fcntl is None or not is_first():
        yield
        return
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is training in it; wait for its end, or name "
                             "another --out") from None
        except OSError:                                  # a file system without locks
            pass
        try:
            check_free(out, wanted)
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def about_adapter(step: int, settings: dict) -> dict[str, str]:
    """What an adapter's file says of its run, beside its configuration."""
    about = {"step": str(step), "settings": json.dumps(settings)}
    if "longest" in settings:                            # sampling asks for it
        about["longest"] = settings["longest"]
    return about


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
        about = about_adapter(step, settings)
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
                    note(f"{line}; going on from the one before it")
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
            option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"--resume: {told}; go on with {option} as it was, or begin another "
                             "run with another --out")
        note(f"{out}: the data are not those it began with; it goes on with them all the same"
             if name == "fingerprints" else told)
    adapters.fill_in(adapter, state["adapter"], out)
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return state["step"], state["number"]


def mend_adapter(out: Path, adapter: Adapter, step: int, settings: dict) -> None:
    """Write adapter.safetensors once more where it is gone, or broken, since the checkpoint."""
    file = out / "adapter.safetensors"
    try:
        adapters.read(file)
    except (ValueError, FileNotFoundError) as error:
        note(f"{error}; it is written again, as the checkpoint has it")
        adapters.write(adapter, file, **about_adapter(step, settings))


def start(out: Path, adapter: Adapter, optimizers: Optimizers, settings: dict, wanted: bool
          ) -> tuple[int, int]:
    """Step and micro-batch to begin with, the same in all processes. Raises: ValueError.

    wanted: whether to go on from a checkpoint in `out`; else, or where there is none, (0, 0).
    """
    if wanted and not holds_checkpoint(out):
        note(f"{out} holds no checkpoint; this run begins at its start")
    own = load_checkpoint(out, adapter, optimizers, settings) if wanted else (0, 0)
    if own[0] and is_first():
        mend_adapter(out, adapter, own[0], settings)
    places = [own] * workers()
    if workers() > 1:
        dist.all_gather_object(places, own)
    if len(set(places)) > 1:
        raise ValueError(f"--resume: processes found {set(places)} (step, micro-batch) in "
                         f"{out}; it must be a folder that all machines see")
    return own
