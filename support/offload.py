"""Models larger than the device: their weights visit it, whole or block by block.

sample.py calls it around every use of a part; nothing moves where a part is on its device already.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from operator import call

import torch
from torch import Tensor, nn

from support import devices


def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


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


@contextmanager
def stream(model: nn.Module, device: torch.device) -> Iterator[Callable]:
    """A `run` for the transformer: its blocks visit the device one after another.

    While one computes, the next is on its way; there are never more than two.
    """
    blocks = model.blocks
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None
    visits: dict[nn.Module, ExitStack] = {}

    def wait() -> None:                                  # until what was asked has been computed
        if copying:
            torch.cuda.current_stream(device).synchronize()

    def fetch(block: nn.Module) -> None:                 # ends when the copy does
        if block not in visits:
            visits[block] = ExitStack()
            with torch.cuda.stream(copying) if copying else nullcontext():
                visits[block].enter_context(on_device(block, device))

    def run(block: nn.Module, *args: object) -> object:
        fetch(block)
        out = block(*args)                               # a GPU is asked, and not waited for
        for ahead in blocks[blocks.index(block) + 1:][:1]:
            fetch(ahead)
        wait()
        visits.pop(block).close()
        return out

    with ExitStack() as rest:
        for part in model.children():
            if not isinstance(part, nn.ModuleList):
                rest.enter_context(on_device(part, device))
        try:
            yield run
        finally:
            wait()
            for visit in visits.values():
                visit.close()
