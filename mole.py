"""InstructMoLE: a mixture of low-rank experts, routed once per image by the whole instruction.

    z = instruction vector                                              one per image
    p = softmax(G z + noise),   noise ~ N(0, 1/E^2) in training         one router G per layer
    y = x W^T + b + sum over e in top-k(p) of p_e * s * (x A_e) B_e     W, b frozen; s = alpha / r

    L_balance       = E * sum_e f_e P_e                                 f: share kept, P: mean p
    L_orthogonality = sum_{i != j} cos(Y_i, Y_j)^2 / (E (E - 1)),       Y_e = s X A_e B_e

All of it happens in rank space: H = X A holds every expert's r inner channels at once, the mixture
is (H * w) B, and the cosines come from the Gram matrices H^T H and B B^T without any Y_e.

Key: B batch, or a low-rank layer's second matrix, A its first; N tokens; S any number of them; E
experts; k kept; r rank; s scale; T text tokens; D width of z, the pooled CLIP vector's; d a head's.
Source: arXiv 2512.21788 and its public code. But for its defaults this file knows no model.
"""
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterConfig:
    """What is put on the model; the paper's by default. Targets: ends of names, * any block."""
    lora_targets: tuple[str, ...] = ("x_embedder", "attn.to_q", "attn.to_k", "attn.to_v",
                                     "attn.to_out.0", "norm1.linear", "norm.linear",
                                     "ff.net.0.proj", "single_transformer_blocks.*.proj_mlp")
    lora_rank: int = 256
    lora_alpha: float = 256                              # the LoRA's scale is alpha / rank
    mole_targets: tuple[str, ...] = ("ff.net.2", "single_transformer_blocks.*.proj_out")
    routing: str = "instruction"                         # of the MoLE layers; more in baselines.py
    token_targets: tuple[str, ...] = ()                  # MoLE layers routed by each token instead
    experts: int = 8                                     # E
    top_k: int = 4                                       # k, per image (or per token)
    rank: int = 32                                       # r of one expert
    alpha: float = 32                                    # s = alpha / rank
    balance_weight: float = 0.1                          # of layers routed by the instruction
    token_balance_weight: float = 0.01                   # of layers routed by tokens
    orthogonality_weight: float = 0.01
    resampler: bool = True                               # False: z is the pooled CLIP vector alone
    resampler_width: int = 768
    resampler_depth: int = 2
    resampler_heads: int = 12
    resampler_head_dim: int = 64
    dropout: float = 0.1                                 # on what the resampler adds to z


# ---------------------------------------------------------------------------------- the equations

def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (..., E) -> p, weights w = p on the k largest (*not* renormalised), kept 0 or 1."""
    p = logits.softmax(dim=-1)
    kept = torch.zeros_like(p).scatter(-1, p.topk(top_k, dim=-1).indices, 1.0)
    return p, p * kept, kept


def balance_loss(p: Tensor, kept: Tensor) -> Tensor:
    """E * sum_e f_e P_e over all rows; p, kept (..., E). The f_e sum to k; even use gives k."""
    p, kept = p.flatten(0, -2), kept.flatten(0, -2)      # (rows, E)
    return p.shape[-1] * torch.dot(kept.mean(0), p.mean(0))


def inner_products(H: Tensor, B: Tensor, experts: int) -> Tensor:
    """<Y_i, Y_j> / s^2 of the outputs of any two experts, kept or not, on all tokens, (E, E).

    Shapes: H = X A (..., E r), B (E r, out). Exactly those of the E flattened outputs, because
    <Y_i, Y_j> = s^2 sum over rows a of i, columns b of j of (H^T H)_ab (B B^T)_ab; fp32 or wider.
    """
    wide, r = torch.promote_types(H.dtype, torch.float32), len(B) // experts
    H, B = H.flatten(0, -2).to(wide), B.to(wide)         # (rows, E r), (E r, out)
    with torch.autocast(H.device.type, enabled=False):
        gram = (H.T @ H) * (B @ B.T)                     # (E r, E r)
    return gram.view(experts, r, experts, r).sum((1, 3))


def orthogonality_loss(H: Tensor, B: Tensor, experts: int, scale: float = 1.0) -> Tensor:
    """Mean squared cosine of two different experts' outputs; s cancels, but for norms near 0."""
    inner = inner_products(H, B, experts)
    ratio = inner / inner.diagonal().clamp(min=1e-24 / scale ** 2)           # <Y_i, Y_j> / |Y_j|^2
    square = ratio * ratio.T                             # cos_ij^2; a root is too steep at 0
    return square.triu(1).sum() * (2 / max(1, experts * (experts - 1)))


class PerceiverAttention(nn.Module):
    """The query attends to the text and to itself."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def by_head(self, x: Tensor) -> Tensor:              # (B, S, inner) -> (B, heads, S, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, txt: Tensor, query: Tensor) -> Tensor:
        txt, query = self.norm1(txt), self.norm2(query)  # (B, T, width), (B, 1, width)
        k, v = self.to_kv(torch.cat([txt, query], dim=1)).chunk(2, dim=-1)   # (B, T+1, inner)
        out = F.scaled_dot_product_attention(
            self.by_head(self.to_q(query)), self.by_head(k), self.by_head(v))
        return self.to_out(out.transpose(1, 2).flatten(2))                   # (B, 1, width)


class InstructionVector(nn.Module):
    """z = resampled T5 tokens + pooled CLIP vector. Parameter names are the research code's."""

    def __init__(self, c: AdapterConfig, text_width: int, pooled_width: int):
        super().__init__()
        width = c.resampler_width
        self.latents = nn.Parameter(torch.randn(1, 1, width) / width ** 0.5)     # the first query
        self.proj_in = nn.Linear(text_width, width)
        self.proj_out = nn.Linear(width, pooled_width)
        self.norm_out = nn.LayerNorm(pooled_width)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(nn.ModuleList([
            PerceiverAttention(width, c.resampler_heads, c.resampler_head_dim),
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                          nn.Linear(4 * width, width, bias=False))])
            for _ in range(c.resampler_depth))

    def forward(self, txt: Tensor, pooled: Tensor) -> Tensor:
        """txt (B, T, text width), pooled (B, D) -> (B, D), in the resampler's own type."""
        txt, pooled = txt.to(self.latents.dtype), pooled.to(self.latents.dtype)
        txt = self.proj_in(txt)                          # (B, T, width)
        query = self.latents.expand(len(txt), -1, -1)    # (B, 1, width)
        for attention, feed_forward in self.layers:
            query = attention(txt, query) + query        # (B, 1, width)
            query = feed_forward(query) + query          # (B, 1, width)
        return self.dropout(self.norm_out(self.proj_out(query)))[:, 0] + pooled          # (B, D)


# --------------------------------------------------------------------------------- adapted layers

@dataclass
class Routing:
    """What all layers share during a call: whom they serve, and the sums of their own losses."""
    z: Tensor                                            # (B, D) instruction vectors
    losses: bool                                         # whether layers should add theirs
    balance: Tensor = field(default_factory=lambda: torch.zeros(()))         # sum, times weight
    orthogonality: Tensor = field(default_factory=lambda: torch.zeros(()))   # sum, times weight
    recomputing: bool = False                            # this pass repeats one, in backward


def add_product(y: Tensor, x: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale * x B in one operation. y (..., out), x (..., in), B (in, out)."""
    rows = torch.addmm(y.flatten(0, -2), x.flatten(0, -2), B.to(x.dtype), alpha=scale)
    return rows.view(y.shape)


class LoRALinear(nn.Module):
    """y = x W^T + b + s (x A^T) B^T, stored as LoRA files are: A (r, in), B (out, r)."""

    def __init__(self, base: nn.Linear, c: AdapterConfig):
        super().__init__()
        r, device = c.lora_rank, base.weight.device
        self.base, self.scale = base, c.lora_alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features, device=device) / r)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))

    def forward(self, x: Tensor) -> Tensor:              # (..., in) -> (..., out)
        low = F.linear(x, self.lora_A.to(x.dtype))       # (..., r)
        return add_product(self.base(x), low, self.lora_B.T, self.scale)


class MoLELinear(nn.Module):
    """y = x W^T + b + the mixture of the kept experts. Other routings override routing_weights().

    The experts stand side by side, as in the equations: A (in, E r), B (E r, out).
    """
    by_token = False                                     # what the router sees: x, not z
    noisy = True                                         # whether training disturbs the logits
    orthogonal = True                                    # whether the experts are kept distinct

    def __init__(self, base: nn.Linear, c: AdapterConfig, name: str, z_width: int,
                 routings: list[Routing]):
        super().__init__()
        device, inner = base.weight.device, c.experts * c.rank
        self.base, self.config, self.name, self.routings = base, c, name, routings
        self.last_weights: Tensor | None = None          # w of the last call
        # Quirk: the research code starts in +-1/sqrt(r), as kaiming takes r for the fan-in.
        first = torch.empty(base.in_features, inner, device=device).uniform_(-1, 1) / c.rank ** 0.5
        self.experts_A = nn.Parameter(first)
        self.experts_B = nn.Parameter(torch.zeros(inner, base.out_features, device=device))
        width = base.in_features if self.by_token else z_width
        self.router = nn.Linear(width, c.experts, bias=False, device=device)

    def logits(self, seen: Tensor) -> Tensor:            # (..., width) -> (..., E)
        logits = self.router(seen.to(self.router.weight.dtype))
        if self.training and self.noisy:
            logits = torch.add(logits, torch.randn_like(logits), alpha=1 / self.config.experts)
        return logits

    def routing_weights(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """x (..., in) -> w (B, E), or by token (..., E), and the router's own weighted loss."""
        p, w, kept = route(self.logits(routing.z), self.config.top_k)        # (B, E)
        return w, self.config.balance_weight * balance_loss(p, kept)

    def forward(self, x: Tensor) -> Tensor:              # (B, N, in) or (B, in) -> (..., out)
        if not self.routings:
            raise ValueError(f"{self.name}: no instruction; call the model within adapter.serve()")
        c, routing, scale = self.config, self.routings[-1], self.config.alpha / self.config.rank
        w, loss = self.routing_weights(x, routing)
        self.last_weights = w.detach()
        w = w[:, None] if w.dim() < x.dim() else w       # (B, 1, E): one mixture for all tokens
        H = x @ self.experts_A.to(x.dtype)               # (..., E r)
        if routing.losses:
            routing.balance = routing.balance + loss
            if self.orthogonal:
                alike = orthogonality_loss(H, self.experts_B, c.experts, scale)
                routing.orthogonality = routing.orthogonality + c.orthogonality_weight * alike
        mixed = H.unflatten(-1, (c.experts, c.rank)) * w.to(x.dtype)[..., None]      # (..., E, r)
        return add_product(self.base(x), mixed.flatten(-2), self.experts_B, scale)   # (..., out)


class Adapter(nn.Module):
    """LoRA and MoLE layers for a frozen model, and the instruction vector that routes them.

    layers: the linear layers to adapt, by module name, each with its new class. New weights are
    fp32, whatever the model's, and change no result yet. The model is not touched before insert().
    """

    def __init__(self, layers: dict[str, tuple[nn.Linear, type[LoRALinear] | type[MoLELinear]]],
                 config: AdapterConfig, text_width: int, pooled_width: int):
        super().__init__()
        self.config = config
        self.routings: list[Routing] = []                # all layers share it, and follow the last
        self.layers = nn.ModuleDict()                    # keys are module names with "/" for "."
        for name, (base, kind) in layers.items():
            routed = (name, pooled_width, self.routings) if issubclass(kind, MoLELinear) else ()
            self.layers[name.replace(".", "/")] = kind(base, config, *routed)
        self.instruction = None
        if config.resampler and any(isinstance(m, MoLELinear) for m in self.layers.values()):
            with base.weight.device:                     # any layer's: all are on one
                self.instruction = InstructionVector(config, text_width, pooled_width)

    def insert(self, model: nn.Module) -> "Adapter":
        """Put the layers in the places of those they adapt, and freeze all else of the model."""
        model.requires_grad_(False)
        for name, layer in self.layers.items():
            model.set_submodule(name.replace("/", "."), layer)
        return self

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is saved, by name: all that is trained, and what routings count; not the model."""
        return {name.removeprefix("layers.").replace("/", "."): tensor
                for name, tensor in self.named_parameters() if ".base." not in name}

    def serve(self, txt: Tensor, pooled: Tensor,
              losses: bool = False) -> AbstractContextManager[Routing]:
        """Route the model's calls within the `with` by these instructions.

        txt (B, T, text width), pooled (B, D); losses: collect the auxiliary losses too.
        """
        z = self.instruction(txt, pooled) if self.instruction else pooled.float()        # (B, D)
        return self.follow(Routing(z, losses, z.new_zeros(()), z.new_zeros(())))

    @contextmanager
    def follow(self, routing: Routing) -> Iterator[Routing]:
        """Let every layer follow `routing` within the `with`."""
        self.routings.append(routing)
        try:
            yield routing
        finally:
            self.routings.pop()
