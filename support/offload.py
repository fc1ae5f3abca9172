"""Models larger than the device: their weights visit it, whole.

sample.py calls it around every use of a part; nothing moves where a part is on its device already.
A transformer for which there is no room visits block by block: support/streaming.py. train.py has
settle() decide so, and support/dry_run.py counts with the same room_for().
"""
import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import call

import torch
from torch import Tensor, nn

from support import commands, devices


def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def bytes_of(*models: nn.Module) -> int:
    """Of all their weights."""
    return sum(t.nbytes for model in models for t in weights_of(model))


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """For good, each in its place."""
    for t in tensors:
        t.data = t.data.to(device)


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the device has the model's weights, or room for them."""
    away = [t.nbytes for t in weights_of(model) if t.device.type != device.type]
    return not away or sum(away) < devices.ROOM * devices.memory(device)


def training_bytes(adapter: nn.Module, optimizer: str) -> int:
    """What an adapter takes in training: itself, its gradients, its optimizer's states, in fp32.

    AdamW has two states of each number; Muon, which learns the matrices A and B, one.
    """
    return sum(t.nbytes * (3 if optimizer == "muon" and name.endswith(("_A", "_B")) else 4)
               for name, t in adapter.tensors().items())


def room_for(frozen: int, training: int, encoders: int, room: float) -> tuple[bool, bool]:
    """Whether a device has room for a transformer in training; for text encoders beside it, too.

    All in bytes; training: as training_bytes() counts them.
    """
    needed = frozen + training
    return needed < devices.ROOM * room, needed + encoders < devices.ROOM * room


def settle(args: argparse.Namespace, pipe: object) -> bool:
    """Move what has room to the device on which a sample.Pipeline's adapter will be trained.

    All but the adapter is at home, mapped from disk; what finds no room stays, and visits. With
    --cache encoders are at work before the training alone. -> whether the transformer has room.
    """
    device, encoders = pipe.device, (pipe.t5, pipe.clip, pipe.vae)
    trained = [*pipe.adapter.tensors().values()]
    if device.type == "cpu":
        return True
    frozen = sum(t.nbytes for t in weights_of(pipe.dit) if not t.requires_grad)
    fits, with_encoders = room_for(frozen // (commands.workers() if args.shard else 1),
                                   training_bytes(pipe.adapter, args.optimizer),
                                   bytes_of(*encoders), devices.memory(device))
    if with_encoders and not args.cache:
        for part in encoders:
            part.to(device)
    if fits and not args.shard:                          # which moves its own share
        pipe.dit.to(device)
    move(trained, device)
    return fits


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[Callable]:
    """Within the `with` the model's weights are on the device; then they are where they were.

    Gives a plain `run` for the transformer.
    """
    kept = [(t, t.data) for t in weights_of(model) if t.device != device]
    try:
        for t, home in kept:
            t.data = home.to(device)
        yield call
    finally:
        for t, home in kept:
            t.data = home
