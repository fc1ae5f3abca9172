"""Transformers larger than the device: their blocks visit it one after another, copied ahead.

sample.generate() calls visiting(); train.run_training() streams where offload.fits() finds no room.
"""
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import Event, Thread

import torch
from torch import Tensor, nn

from support import devices, offload
from support.words import note

SLAB = 2 ** 28                                           # bytes of page-locked memory taken at once


class Lane:
    """Copying to a device beside what it computes, on a CUDA stream; elsewhere, at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pins = self.copying is not None             # whether page-locked memory is faster

    def send(self, homes: list[Tensor]) -> tuple[list[Tensor], object]:
        """Ask for copies on the device, and give a mark of their arrival."""
        with torch.cuda.stream(self.copying) if self.copying else nullcontext():
            return [home.to(self.device, non_blocking=True) for home in homes], self.mark()

    def mark(self) -> object:
        """An event after all work queued so far on the current stream; None but for CUDA."""
        return torch.cuda.current_stream(self.device).record_event() if self.copying else None

    def follow(self, mark: object) -> None:
        """Have the device wait for a mark before what is queued from now on."""
        if self.copying:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def wait(self, mark: object) -> None:
        """Wait here until the device has come to a mark."""
        if self.copying:
            mark.synchronize()

    def locked(self, size: int) -> Tensor:
        """Page-locked memory, which the device reads by itself, several times as fast."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class Slabs:
    """Copies of tensors in page-locked memory; PyTorch would round each one up to a power of 2."""

    def __init__(self, lane: Lane):
        self.lane, self.slab, self.used = lane, torch.empty(0, dtype=torch.uint8), 0

    def copy(self, home: Tensor) -> Tensor:
        if self.used + home.nbytes > len(self.slab):
            self.slab, self.used = self.lane.locked(max(SLAB, home.nbytes)), 0
        room = self.slab[self.used:self.used + home.nbytes]
        self.used += -(-home.nbytes // 64) * 64          # where the next one begins
        return room.view(home.dtype).view(home.shape).copy_(home)


def pin(homes: list[list[Tensor]], lane: Lane, stop: Event) -> None:
    """Put page-locked copies in the place of weights, a block at a time, while there is memory."""
    slabs, reserve = Slabs(lane), (1 - devices.ROOM) * devices.memory(torch.device("cpu"))
    for i, block in enumerate(homes):
        if stop.is_set() or devices.available() < reserve:
            break
        try:
            homes[i] = [home if home.is_pinned() else slabs.copy(home) for home in block]
        except RuntimeError:                             # the system locks no more
            break


def tell(device: torch.device) -> None:
    """Say that training streams."""
    note(f"{device} has no room for the transformer: its blocks visit it one after another, and "
         "are recomputed in backward; --base-dtype fp8 halves them")


@contextmanager
def stream(model: nn.Module, device: torch.device, lane: Lane | None = None) -> Iterator[Callable]:
    """A `run` for the transformer, forward and, where blocks are recomputed, backward.

    While one block computes, the next is on its way; there are never more than two. Weights become
    page-locked in the background, and stay so: the first step does not wait for it.
    """
    blocks = model.blocks
    places = {block: i for i, block in enumerate(blocks)}
    away = [[t for t in offload.weights_of(block) if t.device.type != device.type]
            for block in blocks]
    homes = [[t.data for t in block] for block in away]
    lane, stop = lane or Lane(device), Event()
    here: dict[int, tuple[list[Tensor], object]] = {}    # copies of a block's, their arrival
    last = -1                                            # the block that ran before

    def fetch(i: int) -> None:
        if 0 <= i < len(blocks) and i not in here:
            here[i] = lane.send(homes[i])

    def go_home(i: int) -> None:
        for t, home in zip(away[i], homes[i]):
            t.data = home

    def run(block: nn.Module, *args: object) -> object:
        nonlocal last
        i, asked = places[block], lane.mark()            # backward passes too
        fetch(i)
        copies, arrival = here[i]
        lane.follow(arrival)
        for t, copy in zip(away[i], copies):
            t.data = copy
        try:
            return block(*args)                          # a device is asked, and not waited for
        finally:                                         # recomputing ends by an exception
            lane.wait(asked)
            for other in here.keys() - {i}:              # all that used it is computed
                go_home(other)
                del here[other]
            backward = i in (last, last - 1)             # then they come in reverse
            fetch(i - 1 if backward else i + 1)
            last = i

    pinning = Thread(target=pin, args=(homes, lane, stop), daemon=True)
    if lane.pins:
        pinning.start()
    with ExitStack() as rest:
        for part in model.children():
            if not isinstance(part, nn.ModuleList):
                rest.enter_context(offload.on_device(part, device))
        try:
            yield run
        finally:
            stop.set()
            if lane.pins:
                pinning.join()
            lane.wait(lane.mark())
            for i in range(len(blocks)):
                go_home(i)


def visiting(model: nn.Module, device: torch.device,
             run: Callable | None = None) -> AbstractContextManager[Callable]:
    """A `with` in which the transformer's weights come to the device, whole if it has room.

    Gives what calls a block there; `run`, if its weights come and go already.
    """
    if run:
        return nullcontext(run)
    return (offload.on_device if offload.fits(model, device) else stream)(model, device)
