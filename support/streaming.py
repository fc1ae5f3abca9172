"""Transformers larger than the device: their blocks visit it one after another, copied ahead.

sample.generate() calls visiting(); train.run_training() streams where offload.settle() tells it to.
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


class Visits:
    """A `run` for the transformer, forward and, where blocks are recomputed, backward.

    While one block computes, the next is on its way; there are never more than two.
    """

    def __init__(self, model: nn.Module, device: torch.device, lane: Lane):
        self.lane, self.places = lane, {block: i for i, block in enumerate(model.blocks)}
        self.away = [[t for t in offload.weights_of(block) if t.device.type != device.type]
                     for block in model.blocks]
        self.homes = [[t.data for t in block] for block in self.away]
        self.here: dict[int, tuple[list[Tensor], object]] = {}   # a block's copies, their arrival
        self.last = -1                                   # the block that ran before

    def __call__(self, block: nn.Module, *args: object) -> object:
        i, asked = self.places[block], self.lane.mark()  # backward passes too
        self.fetch(i)
        copies, arrival = self.here[i]
        self.lane.follow(arrival)
        for t, copy in zip(self.away[i], copies):
            t.data = copy
        try:
            return block(*args)                          # a device is asked, and not waited for
        finally:                                         # recomputing ends by an exception
            self.lane.wait(asked)
            for other in self.here.keys() - {i}:         # all that used it is computed
                self.send_home(other)
                del self.here[other]
            backward = i in (self.last, self.last - 1)   # then they come in reverse
            self.fetch(i - 1 if backward else i + 1)
            self.last = i

    def fetch(self, i: int) -> None:
        """Have a block's weights copied to the device, if there is such a block."""
        if 0 <= i < len(self.homes) and i not in self.here:
            self.here[i] = self.lane.send(self.homes[i])

    def send_home(self, i: int) -> None:
        for t, home in zip(self.away[i], self.homes[i]):
            t.data = home

    def end(self) -> None:
        self.lane.wait(self.lane.mark())
        for i in range(len(self.homes)):
            self.send_home(i)
        self.here.clear()


@contextmanager
def stream(model: nn.Module, device: torch.device, lane: Lane | None = None) -> Iterator[Visits]:
    """What calls the blocks, while all else of the transformer is on the device.

    Weights become page-locked in the background, and stay so: the first step does not wait for it.
    """
    visits, stop = Visits(model, device, lane or Lane(device)), Event()
    pinning = Thread(target=pin, args=(visits.homes, visits.lane, stop), daemon=True)
    if visits.lane.pins:
        pinning.start()
    with ExitStack() as rest:
        for part in model.children():
            if not isinstance(part, nn.ModuleList):
                rest.enter_context(offload.on_device(part, device))
        try:
            yield visits
        finally:
            stop.set()
            if visits.lane.pins:
                pinning.join()
            visits.end()


def visiting(model: nn.Module, device: torch.device,
             run: Callable | None = None) -> AbstractContextManager[Callable]:
    """A `with` in which the transformer's weights come to the device, whole if it has room.

    Gives what calls a block there; `run`, if its weights come and go already.
    """
    if run:
        return nullcontext(run)
    return (offload.on_device if offload.fits(model, device) else stream)(model, device)
