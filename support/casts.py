"""The adapter's matrices in the model's type, cast once for a block instead of at each use.

train.matching_loss() hands what casting() gives to the transformer.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import call

import torch
from torch import Tensor, nn

MATRICES = "lora_A", "lora_B", "experts_A"               # experts_B is compared with others in fp32


def copied(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same in another type, by one operation, side by side in memory."""
    sizes = [t.numel() for t in tensors]
    flat = tensors[0].new_empty(sum(sizes), dtype=dtype)
    copies = [piece.view_as(t) for piece, t in zip(flat.split(sizes), tensors)]
    torch._foreach_copy_(copies, tensors)
    return copies


class Cast(torch.autograd.Function):
    """Many tensors in another type, and their gradients back in their own."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)                 # what is not used has no gradient
        ctx.kind = own[0].dtype
        return tuple(copied(list(own), dtype))

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(copied([g for g in grads if g is not None], ctx.kind))
        return None, *(None if g is None else next(wide) for g in grads)


@contextmanager
def cast_once(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the `with` a block's adapted layers have copies of that type.

    Their gradients go to the matrices themselves.
    """
    found = [(layer, name) for layer in block.modules() for name in MATRICES
             if name in layer._parameters]
    own = [layer._parameters[name] for layer, name in found]
    if all(p.dtype == dtype for p in own):               # or there are none
        yield
        return
    try:
        for (layer, name), copy in zip(found, Cast.apply(dtype, *own)):
            layer._parameters[name] = copy               # by setattr only a Parameter could
        yield
    finally:
        for (layer, name), p in zip(found, own):
            layer._parameters[name] = p


def casting(dtype: torch.dtype, run: Callable = call) -> Callable:
    """A `run` for the transformer: a block's matrices are cast to the model's type, all at once.

    run: what calls a block. A cast for each matrix at each use would be a tenth of the operations
    that a step asks for.
    """
    def cast_and_run(block: nn.Module, *args: object) -> object:
        with cast_once(block, dtype):
            return run(block, *args)
    return cast_and_run
