"""The adapter's matrices in the model's type, cast once for a micro-batch instead of at each call.

train.accumulate() puts it around a forward and its backward, which may compute blocks again.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mole import Adapter

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
def cast_once(adapter: Adapter, dtype: torch.dtype) -> Iterator[None]:
    """Within the `with` the layers have copies of that type, whose gradients go to the matrices.

    A cast for each at each call would be a tenth of the operations that a step asks for.
    """
    before = {layer: dict(layer._parameters) for layer in adapter.layers.values()}
    found = [(layer, name) for layer in before for name in MATRICES if name in before[layer]]
    own = [before[layer][name] for layer, name in found]
    if not own or all(p.dtype == dtype for p in own):
        yield
        return
    try:
        for (layer, name), copy in zip(found, Cast.apply(dtype, *own)):
            del layer._parameters[name]
            vars(layer)[name] = copy                     # stands before what nn.Module looks up
        yield
    finally:
        for layer, name in found:
            vars(layer).pop(name, None)
        for layer, parameters in before.items():         # in their order, by which all are named
            layer._parameters.clear()
            layer._parameters.update(parameters)
