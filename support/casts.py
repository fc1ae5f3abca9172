"""The adapter's matrices in the model's type, cast once for a micro-batch instead of at each call.

train.accumulate() puts it around a forward and its backward, which may compute blocks again.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mole import Adapter

MATRICES = "lora_A", "lora_B", "experts_A"               # experts_B is compared with others in fp32


@contextmanager
def cast_once(adapter: Adapter, dtype: torch.dtype) -> Iterator[None]:
    """Within the `with` the layers have copies of that type, whose gradients go to the matrices.

    All are cast as one: a call for each would be a tenth of what a step on a GPU asks for.
    """
    before = {layer: dict(layer._parameters) for layer in adapter.layers.values()}
    found = [(layer, name) for layer in before for name in MATRICES if name in before[layer]]
    own = [before[layer][name] for layer, name in found]
    if not own or all(p.dtype == dtype for p in own):
        yield
        return
    flat = torch.cat([p.flatten() for p in own]).to(dtype)
    try:
        for (layer, name), p, piece in zip(found, own, flat.split([p.numel() for p in own])):
            del layer._parameters[name]
            setattr(layer, name, piece.view_as(p))
        yield
    finally:
        for layer, name in found:
            vars(layer).pop(name, None)
        for layer, parameters in before.items():         # in their order, by which all are named
            layer._parameters.clear()
            layer._parameters.update(parameters)
