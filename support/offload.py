"""Models larger than the device: their weights visit it, whole.

sample.py calls it around every use of a part; nothing moves where a part is on its device already.
A transformer for which there is no room visits block by block: support/streaming.py. train.py has
settle() decide so, and support/dry_run.py counts with the same room_for().
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import call

import torch
from torch import Tensor, nn

from support import devices
from support.words import note


def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """For good, each in its place."""
    for t in tensors:
        t.data = t.data.to(device)


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the device has the model's weights, or room for them."""
    away = [t.nbytes for t in weights_of(model) if t.device.type != device.type]
    return not away or sum(away) < devices.ROOM * devices.memory(device)


def room_for(frozen: int, encoders: int, trained: int, room: float) -> tuple[bool, bool]:
    """Whether a device has room for a transformer with an adapter in training; for encoders, too.

    All in bytes. trained: the adapter's; its gradients, and AdamW's two states, have as many.
    """
    needed = frozen + 4 * trained
    return needed < devices.ROOM * room, needed + encoders < devices.ROOM * room


def settle(pipe: object) -> bool:
    """Lay a sample.Pipeline's transformer on its device, to be trained; or False: it must stream.

    Encoders that are there, and have no room beside it, leave it: they visit.
    """
    encoders, device = (pipe.t5, pipe.clip, pipe.vae), pipe.device
    trained = [*pipe.adapter.tensors().values()]
    frozen = [t for t in weights_of(pipe.dit) if not t.requires_grad]

    def there(tensors: Iterable[Tensor]) -> int:
        return sum(t.nbytes for t in tensors if t.device.type == device.type)
    beside = there(t for part in encoders for t in weights_of(part))
    room = devices.memory(device)
    if device.type == "cuda":                            # of which this is what is free
        room += there([*frozen, *trained]) + beside
    fits, with_encoders = room_for(sum(t.nbytes for t in frozen), beside,
                                   sum(t.nbytes for t in trained), room)
    fits = fits or device.type == "cpu"
    if device.type != "cpu" and not with_encoders and beside:
        note("text encoders and autoencoder have no room beside what is trained: they visit, or "
             "compute on the CPU; --cache encodes all once")
        for part in encoders:
            part.to("cpu")
    pipe.dit.to(device if fits else "cpu")
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
