"""Recomputing activations in backward, for less memory: train.py --recompute.

train.matching_loss() hands what recomputing() gives to the transformer; train.train() has sparing()
decide whether it does.
"""
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from operator import call

import torch
from torch.utils.checkpoint import checkpoint

from mole import Adapter, Routing


def recomputing(adapter: Adapter, routing: Routing, run: Callable = call) -> Callable:
    """A `run` for the transformer: keep each block's inputs only, compute again in backward.

    run: what calls a block, both times. The second computation is routed like the first; what it
    adds to the losses is thrown away.
    """
    def contexts() -> tuple:                             # around the first, and the second
        return nullcontext(), adapter.follow(replace(routing, recomputing=True))
    return lambda *args: checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


def when_compiled(adapter: Adapter, choice: str) -> str:
    """What --recompute means for compiled blocks: the same, or "off" for "auto" where it must be.

    A block that keeps a count of its own (of Expert Race, of standardised routing) is compiled
    differently for the second pass, which then lacks what the first has kept.
    Raises: ValueError where both were asked for.
    """
    if all(t.requires_grad for t in adapter.tensors().values()):
        return choice
    if choice == "on":
        raise ValueError("--compile and --recompute (also for a model that is streamed) do not go "
                         f"together with routing {adapter.config.routing!r}; leave one of them out")
    return "off"


def sparing(accumulate: Callable, choice: str) -> Callable:
    """train.accumulate(), which recomputes: "on", "off", or "auto": once memory has run out.

    The step that had none is done again, from the same numbers, random ones too; so are the later
    ones.
    """
    recompute = choice == "on"

    def spared(pipe: object, micro_batches: list, factor: float, shift: float) -> dict[str, float]:
        nonlocal recompute
        states = [(t, t.clone()) for t in pipe.adapter.tensors().values() if not t.requires_grad]
        try:
            return accumulate(pipe, micro_batches, factor, recompute, shift)
        except torch.OutOfMemoryError as error:
            if recompute or choice == "off":
                more = "" if recompute else "--recompute on, or "
                raise MemoryError(f"{str(error).partition('.')[0]}; try {more}a smaller "
                                  "--batch-size, with --accumulate, or --base-dtype fp8") from None
        recompute = True                                 # here what the error held is free
        print("note: for lack of memory each block is recomputed in backward from now on; "
              "--recompute does so from the start", file=sys.stderr)
        pipe.adapter.zero_grad()
        for t, before in states:                         # what a routing learns in passing
            t.copy_(before)
        return spared(pipe, micro_batches, factor, shift)
    return spared
