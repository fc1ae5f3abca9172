"""Recomputing activations in backward, for less memory: train.py --recompute.

train.matching_loss() hands what recomputing() gives to the transformer.
"""
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from operator import call

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
