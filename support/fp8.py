"""Weights in 8 bits: kept so, and widened where they are used.

weights.assign() makes such layers where a file has them; train.py asks for them with --base-dtype.
"""
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}


class Widened(torch.autograd.Function):
    """x @ W.T + b. Keeps the narrow W for the backward pass, not its wide copy."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, scale: Tensor | None, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W, scale)
        ctx.kind = x.dtype                               # autocast may make grad narrower
        return F.linear(x, Widened.wide(W, scale, x.dtype), b)               # (..., out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        W, scale = ctx.saved_tensors
        return (grad @ Widened.wide(W, scale, grad.dtype)).to(ctx.kind), None, None, None

    @staticmethod
    def wide(W: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return W.to(dtype) if scale is None else W.to(dtype).mul_(scale)


class NarrowLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in fewer bits and widened when it is used."""
    scale: Tensor | None                                 # () or (out, 1), times the weight

    def forward(self, x: Tensor) -> Tensor:              # (..., in) -> (..., out)
        return Widened.apply(x, self.weight, self.scale, self.bias)


def narrow(layer: nn.Linear, scale: Tensor | None) -> None:
    """Make a layer one whose weight stays as it is stored: its class changes, in its place."""
    if scale is not None:                                # one for all, or one for each row
        scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    layer.__class__ = NarrowLinear
    layer.register_buffer("scale", scale, persistent=False)


def to_fp8(model: nn.Module) -> None:
    """Keep the linear layers' weights in 8 bits, each row with a scale of its own."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype not in FP8:
            W = layer.weight.float()
            scale = W.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448     # 448: the largest
            layer.weight.data = (W / scale).to(torch.float8_e4m3fn)
            narrow(layer, scale)


def check_device(kinds: Iterable[torch.dtype], device: torch.device | str, where: object) -> None:
    """Raises: ValueError for fp8 on a device that holds none."""
    if torch.device(device).type == "mps" and FP8 & set(kinds):
        raise ValueError(f"{where}: mps holds no fp8; take a bf16 file, or --device cpu")
