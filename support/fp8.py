"""Weights in 8 bits: kept so, and widened where they are used or, with --matmul, multiplied so.

weights.assign() makes such layers where a file has them; train.py asks for them with --base-dtype.
devices.ready() asks for products in 8 bits, for --matmul: of tokens with the weights of blocks.
"""
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dit

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
LARGEST = 448                                            # of e4m3; all that is narrowed here is so


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


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, channels) -> the same in e4m3, and the scale (rows, 1), fp32, to multiply it by."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn), scale


def rounded(W: Tensor, scale: Tensor | None, device: torch.device | None
            ) -> tuple[Tensor, Tensor]:
    """A weight as by_row() gives it, where it was; a device may do the work."""
    home = W.device
    if device is None or home.type == "meta":            # of which there is nothing to do
        device = home
    scale = None if scale is None else scale.to(device)
    W, scale = by_row(Widened.wide(W.to(device), scale, torch.float32))
    return W.to(home), scale.to(home)


def to_fp8(model: nn.Module, device: torch.device | None = None) -> None:
    """Keep the linear layers' weights in 8 bits, each row with a scale of its own.

    device: as rounded() takes it.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype not in FP8:
            layer.weight.data, scale = rounded(layer.weight.data, None, device)
            narrow(layer, scale)


class Multiplied(Widened):
    """Widened, but for its forward: x is narrowed too, each token by a scale of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W, scale)
        ctx.kind = x.dtype
        tokens, token_scale = by_row(x.flatten(0, -2))   # (tokens, in), (tokens, 1)
        y = torch._scaled_mm(tokens, W.T, token_scale, scale.view(1, -1),    # F.scaled_mm would
                             out_dtype=torch.bfloat16, use_fast_accum=True)  # end the graph
        y = y.to(x.dtype) if b is None else y.to(x.dtype) + b                # (tokens, out)
        return y.view(*x.shape[:-1], -1)


class MultipliedLinear(NarrowLinear):
    """A frozen linear layer that multiplies in 8 bits forward; in backward its weight is widened.

    Eq.: y = t W_s^T * s_W + b, where t is x / s_t rounded to e4m3, s_t = max |x| / 448 for each
    token, and W_s, s_W are the same for each row of W.
    """

    def forward(self, x: Tensor) -> Tensor:              # (..., in) -> (..., out)
        return Multiplied.apply(x, self.weight, self.scale, self.bias)


def multiply_in_fp8(model: dit.FluxTransformer, device: torch.device | None = None) -> None:
    """Have the blocks' linear layers on tokens multiply in 8 bits.

    Weights that are e4m3 already stay as they are, with their scales. Modulations, which see one
    vector for all tokens, and layers whose sides are no multiple of 16 stay as they are. device: as
    rounded() takes it.
    """
    for block in model.blocks:
        modulations = {id(layer) for part in block.modules() if isinstance(part, dit.Modulation)
                       for layer in part.modules()}
        for layer in block.modules():
            if (isinstance(layer, nn.Linear) and id(layer) not in modulations
                    and layer.in_features % 16 == layer.out_features % 16 == 0):
                multiply(layer, device)


def multiply(layer: nn.Linear, device: torch.device | None = None) -> None:
    """Make a layer one that multiplies in 8 bits, in its place."""
    W, scale = layer.weight.data, getattr(layer, "scale", None)
    if W.dtype != torch.float8_e4m3fn:
        W, scale = rounded(W, scale, device)
    rows = torch.ones(len(W), 1, device=W.device)
    layer.weight.data = W
    narrow(layer, rows if scale is None else rows * scale.float())
    layer.__class__ = MultipliedLinear


def check_device(kinds: Iterable[torch.dtype], device: torch.device | str, where: object) -> None:
    """Raises: ValueError for fp8 on a device that holds none."""
    if torch.device(device).type == "mps" and FP8 & set(kinds):
        raise ValueError(f"{where}: mps holds no fp8; take a bf16 file, or --device cpu")


def check_products(device: torch.device) -> None:
    """Raises: ValueError for a device that does not multiply in 8 bits."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if not able:
        raise ValueError(f"--matmul fp8: {device} does not multiply in 8 bits; that needs a CUDA "
                         "device of compute capability 8.9 or more. Leave it out")
