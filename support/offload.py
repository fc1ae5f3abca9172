"""Models larger than the device: their weights visit it, whole.

sample.py calls it around every use of a part; nothing moves where a part is on its device already.
A transformer for which there is no room visits block by block: support/streaming.py.
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import call

import torch
from torch import Tensor, nn

from support import devices


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
