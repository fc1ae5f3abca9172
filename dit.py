"""The FLUX diffusion transformer: packed latents and text tokens -> velocity.

    xt = (1 - t) x0 + t noise,    velocity = noise - x0,    x(t_next) = x(t) + (t_next - t) velocity

Text, target, native references and clean conditions are tokens of one sequence and attend to each
other without a mask. Native references share the target's stream and its time t; clean conditions
use the same weights but are modulated as at t = 0, and leave no output.

Key: B batch; h, w latent grid; C = 16 latent channels; P = 64 packed; T text, I target, R native
reference, Q clean condition tokens; S all of them; D width; N heads; d head size.
Module names are the keys of the Hugging Face folder's transformer/.
Source: arXiv 2506.15742 (Kontext) and 2512.21788 (conditions), black-forest-labs/flux, diffusers.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weights


@dataclass(frozen=True)
class DiTConfig:
    """The entries of transformer/config.json that the model depends on."""
    in_channels: int                                     # P: 16 latent channels of 2x2 patches
    num_layers: int                                      # double blocks: text, image weights apart
    num_single_layers: int                               # single blocks: one set of weights for all
    attention_head_dim: int                              # d
    num_attention_heads: int                             # N; the width is N d
    joint_attention_dim: int                             # width of the T5 tokens
    pooled_projection_dim: int                           # width of the CLIP vector
    axes_dims_rope: tuple[int, ...]                      # head channels for (index, row, column)
    guidance_embeds: bool = False                        # a distilled guidance scale is an input

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# ------------------------------------------------------------------- tokens, positions, time steps

def pack(latents: Tensor) -> Tensor:
    """Latents to tokens of 2x2 patches. (B, C, h, w) -> (B, (h/2)(w/2), 4C), channels slowest."""
    if latents.shape[-1] % 2 or latents.shape[-2] % 2:
        raise ValueError(f"latents of {latents.shape[-2]}x{latents.shape[-1]}: sides must be even")
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens to latents, the inverse of pack. (B, (h/2)(w/2), 4C) -> (B, C, h, w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2)), 2)


def position_ids(h: int, w: int, index: int = 0, shift: int = 0) -> Tensor:
    """(index, row, column + shift) of the 2x2 patches of (h, w) latents -> ((h/2)(w/2), 3) fp32."""
    row, column = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2) + shift, indexing="ij")
    return torch.stack([torch.full_like(row, index), row, column], -1).flatten(0, 1).float()


def reference_ids(sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Position ids of all references, native ones first, from their latent sizes (h, w).

    Reference i has index i + 1; its columns start where those of the references before it end.
    """
    shifts = [sum(w // 2 for _, w in sizes[:i]) for i in range(len(sizes))]
    return [position_ids(h, w, i + 1, shift)
            for i, ((h, w), shift) in enumerate(zip(sizes, shifts))]


def schedule(steps: int, tokens: int) -> Tensor:
    """Times from 1 (noise) to 0, (steps + 1,) fp32: the more target tokens, the longer near 1.

    Eq.: e^mu / (e^mu + 1/t - 1), with mu linear in the target tokens, 256 -> 0.5, 4096 -> 1.15.
    Raises: ValueError unless steps >= 1.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least one is needed")
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (math.exp(mu) / (math.exp(mu) + 1 / t - 1)).float()               # 1/0 = inf gives 0


def rope(ids: Tensor, axes: tuple[int, ...], theta: float = 10000.0) -> Tensor:
    """Rotation table for position ids (S, 3) -> (2, S, d/2) fp32: cosines, sines."""
    angles = [ids[:, i, None].cpu().double()
              * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
              for i, dim in enumerate(axes)]             # fp64 on the CPU: some devices have none
    angle = torch.cat(angles, dim=1)                     # (S, d/2)
    return torch.stack([angle.cos(), angle.sin()]).float().to(ids.device)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Turn neighbouring channel pairs by their angles, in fp32. x (B, N, S, d), pe (2, S, d/2)."""
    cos, sin = pe
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)                     # each (B, N, S, d/2)
    return torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], -1).flatten(-2).to(x.dtype)


def sinusoid(value: Tensor, channels: int = 256) -> Tensor:
    """Embed value * 1000, (B,) -> (B, channels) fp32: cosines, then sines."""
    # Reference: frequencies are taken in fp32; in fp64 outputs of the released model move by 5e-5.
    half = torch.arange(channels // 2, dtype=torch.float32, device=value.device)
    frequency = torch.exp(-math.log(10000) * half / (channels // 2))
    # Deviation: fp32 throughout. The released code multiplies in bf16: guidance 2.5 becomes 2.496.
    angle = (value.float() * 1000)[:, None] * frequency  # (B, channels / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ------------------------------------------------------------------------------------------ layers

class MLPEmbedder(nn.Module):
    """linear, SiLU, linear."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:              # (B, dim) -> (B, D)
        return self.linear_2(F.silu(self.linear_1(x)))


class ConditioningVector(nn.Module):
    """vec = time + guidance + pooled text, each through its own MLP."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(256, c.width)
        if c.guidance_embeds:
            self.guidance_embedder = MLPEmbedder(256, c.width)
        self.text_embedder = MLPEmbedder(c.pooled_projection_dim, c.width)

    def forward(self, t: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        vec = self.timestep_embedder(sinusoid(t).to(pooled.dtype))           # (B, D)
        if hasattr(self, "guidance_embedder"):
            vec = vec + self.guidance_embedder(sinusoid(guidance).to(pooled.dtype))
        return vec + self.text_embedder(pooled)


class ModulationOut(NamedTuple):
    shift: Tensor                                        # each (B, 1, D)
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """vec -> one (shift, scale, gate) per sublayer."""

    def __init__(self, width: int, sublayers: int):
        super().__init__()
        self.parts = 3 * sublayers
        self.linear = nn.Linear(width, self.parts * width)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        parts = self.linear(F.silu(vec))[:, None].chunk(self.parts, dim=-1)
        return [ModulationOut(*parts[i:i + 3]) for i in range(0, len(parts), 3)]


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    """LayerNorm without learned scale, then the scale and shift of the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod.scale) + mod.shift


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight, in fp32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class FeedForward(nn.Module):
    """linear, GELU (tanh), linear. The names net.0.proj and net.2 are the checkpoint's."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(width, 4 * width)}),
                                  nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))


class Attention(nn.Module):
    """Projections of one or two kinds of tokens (image, and text under names with `add`)."""

    def __init__(self, c: DiTConfig, double: bool):
        super().__init__()
        D, self.heads = c.width, c.num_attention_heads
        self.norm_q, self.norm_k = RMSNorm(c.attention_head_dim), RMSNorm(c.attention_head_dim)
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        if double:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
            self.norm_added_q, self.norm_added_k = (
                RMSNorm(c.attention_head_dim), RMSNorm(c.attention_head_dim))
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(D, D)]), nn.Linear(D, D)

    def split(self, x: Tensor) -> Tensor:                # (B, S, D) -> (B, N, S, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def image(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v         # each (B, N, S, d)

    def text(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(layer(x))
                   for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return self.norm_added_q(q), self.norm_added_k(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with rotary positions; q may hold fewer, leading, tokens than k.

    q (B, N, S', d), k, v (B, N, S, d), pe (2, S, d/2) -> (B, S', D).
    """
    out = F.scaled_dot_product_attention(rotate(q, pe[:, :q.shape[2]]), rotate(k, pe), v)
    return out.transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Text and image have own weights and meet in attention; clean conditions use the image's."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(c.width, 2), Modulation(c.width, 2)
        self.attn = Attention(c, double=True)
        self.ff, self.ff_context = FeedForward(c.width), FeedForward(c.width)

    def forward(self, img: Tensor, txt: Tensor, cond: Tensor | None, vec: Tensor,
                clean: Tensor | None, pe: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """img (B, I+R, D), txt (B, T, D), cond (B, Q, D) or None -> the three, one block on."""
        img_mod, txt_mod = self.norm1(vec), self.norm1_context(vec)
        streams = [self.attn.text(modulate(txt, txt_mod[0])),
                   self.attn.image(modulate(img, img_mod[0]))]
        if cond is not None:
            cond_mod = self.norm1(clean)
            streams.append(self.attn.image(modulate(cond, cond_mod[0])))
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*streams))       # (B, N, S, d)
        sizes = [stream[0].shape[2] for stream in streams]
        out = attend(q, k, v, pe).split(sizes, dim=1)    # T, I+R and Q tokens, each (B, ., D)

        txt = txt + txt_mod[0].gate * self.attn.to_add_out(out[0])           # (B, T, D)
        txt = txt + txt_mod[1].gate * self.ff_context(modulate(txt, txt_mod[1]))
        img = self.image_rest(img, out[1], img_mod)      # (B, I+R, D)
        if cond is not None:
            cond = self.image_rest(cond, out[2], cond_mod)   # (B, Q, D)
        return img, txt, cond

    def image_rest(self, x: Tensor, out: Tensor, mod: list[ModulationOut]) -> Tensor:
        x = x + mod[0].gate * self.attn.to_out[0](out)
        return x + mod[1].gate * self.ff(modulate(x, mod[1]))


class SingleBlock(nn.Module):
    """Attention and MLP side by side, on all tokens alike."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm = Modulation(c.width, 1)
        self.attn = Attention(c, double=False)
        self.proj_mlp = nn.Linear(c.width, 4 * c.width)
        self.proj_out = nn.Linear(5 * c.width, c.width)

    def forward(self, x: Tensor, cond: Tensor | None, vec: Tensor, clean: Tensor | None, pe: Tensor,
                last: bool) -> tuple[Tensor, Tensor | None]:
        """x (B, T+I+R, D), cond (B, Q, D) or None -> both, one block on; after the last no cond."""
        mod = self.norm(vec)[0]
        x_in = modulate(x, mod)                          # (B, T+I+R, D)
        q, k, v = self.attn.image(x_in)                  # each (B, N, T+I+R, d)
        if cond is not None:
            cond_mod = self.norm(clean)[0]
            cond_in = modulate(cond, cond_mod)           # (B, Q, D)
            cond_q, cond_k, cond_v = self.attn.image(cond_in)
            k, v = torch.cat([k, cond_k], dim=2), torch.cat([v, cond_v], dim=2)
            q = q if last else torch.cat([q, cond_q], dim=2)
        out = attend(q, k, v, pe)                        # (B, S, D); in the last (B, T+I+R, D)
        out, cond_out = out[:, :x.shape[1]], out[:, x.shape[1]:]
        x = x + mod.gate * self.rest(x_in, out)
        if cond is None or last:                         # nothing reads the conditions any more
            return x, None
        return x, cond + cond_mod.gate * self.rest(cond_in, cond_out)

    def rest(self, x_in: Tensor, out: Tensor) -> Tensor:
        mlp = F.gelu(self.proj_mlp(x_in), approximate="tanh")                # (B, ., 4D)
        return self.proj_out(torch.cat([out, mlp], dim=-1))


class FinalModulation(nn.Module):
    """LayerNorm, then scale and shift from vec."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        # Reference: scale comes before shift here, the other way round than in every block.
        scale, shift = self.linear(F.silu(vec))[:, None].chunk(2, dim=-1)
        return modulate(x, ModulationOut(shift, scale, scale))


def call(block: nn.Module, *args: object) -> object:
    return block(*args)


class FluxTransformer(nn.Module):
    """The whole transformer, at any size."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        axes = config.axes_dims_rope
        if len(axes) != 3 or any(dim % 2 for dim in axes) or sum(axes) != config.attention_head_dim:
            raise ValueError(f"axes_dims_rope {axes} must be three even numbers that sum to "
                             f"{config.attention_head_dim}")
        self.config = c = config
        self.x_embedder = nn.Linear(c.in_channels, c.width)
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.width)
        self.time_text_embed = ConditioningVector(c)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(c) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(c) for _ in range(c.num_single_layers))
        self.norm_out = FinalModulation(c.width)
        self.proj_out = nn.Linear(c.width, c.in_channels)

    def forward(self, img: Tensor, txt: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor,
                img_ids: Tensor, cond: Tensor | None = None, cond_ids: Tensor | None = None,
                run: Callable = call) -> Tensor:
        """Velocity of the target (and of the native references, which callers drop).

        Shapes: img (B, I+R, P), txt (B, T, T5 width), pooled (B, CLIP width), t and guidance (B,),
        img_ids (I+R, 3), cond (B, Q, P), cond_ids (Q, 3) -> (B, I+R, P).
        Units: t in [0, 1], 1 = pure noise; guidance is the scale itself, 2.5 by custom.
        run(block, *args) calls one block: the place for checkpointing, or for moving weights about.
        Reference: arXiv 2506.15742; clean conditions: arXiv 2512.21788.
        """
        txt_ids = img_ids.new_zeros(txt.shape[1], 3)
        ids = torch.cat([txt_ids, img_ids] if cond is None else [txt_ids, img_ids, cond_ids])
        pe = rope(ids, self.config.axes_dims_rope)       # (2, S, d/2)
        vec = self.time_text_embed(t, guidance, pooled)  # (B, D)
        clean = None if cond is None else self.time_text_embed(
            torch.zeros_like(t), guidance, pooled)       # (B, D)
        img = self.x_embedder(img)                       # (B, I+R, D)
        txt = self.context_embedder(txt)                 # (B, T, D)
        cond = None if cond is None else self.x_embedder(cond)               # (B, Q, D)
        for block in self.transformer_blocks:
            img, txt, cond = run(block, img, txt, cond, vec, clean, pe)
        x = torch.cat([txt, img], dim=1)                 # (B, T+I+R, D)
        for block in self.single_transformer_blocks:
            x, cond = run(block, x, cond, vec, clean, pe,
                          block is self.single_transformer_blocks[-1])
        img = self.norm_out(x[:, txt.shape[1]:], vec)    # (B, I+R, D)
        return self.proj_out(img)                        # (B, I+R, P)


def load_dit(folder: str | Path, device: torch.device | str = "cpu",
             dtype: torch.dtype | None = None) -> FluxTransformer:
    """Read a FLUX Kontext folder's transformer/. Raises: FileNotFoundError, ValueError."""
    return weights.load_part(FluxTransformer, DiTConfig, folder, device, dtype)
