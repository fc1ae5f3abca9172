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
from operator import call
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DiTConfig:
    """The entries of transformer/config.json that the model depends on."""
    in_channels: int                                     # P = 64: 16 latent channels, 2x2 each
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
    """2x2 patches as tokens: (B, C, h, w) -> (B, hw/4, 4C). Raises: ValueError for odd sides."""
    if latents.shape[-1] % 2 or latents.shape[-2] % 2:
        raise ValueError(f"latents of {latents.shape[-2]}x{latents.shape[-1]}: sides must be even")
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens to latents, the inverse of pack: (B, hw/4, 4C) -> (B, C, h, w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (h // 2, w // 2)), 2)


def position_ids(h: int, w: int, index: int = 0, shift: int = 0) -> Tensor:
    """(index, row, column + shift) of the 2x2 patches of (h, w) latents -> ((h/2)(w/2), 3) fp32."""
    # Deviation: always fp32. Released code casts them to bf16, which is exact only up to 256.
    row, column = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2) + shift, indexing="ij")
    return torch.stack([torch.full_like(row, index), row, column], -1).flatten(0, 1).float()


def reference_ids(sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Position ids of all references, native ones first, from their latent sizes (h, w).

    The first has index 1, the next 2; columns start where those of the references before end.
    """
    ids, shift = [], 0
    for i, (h, w) in enumerate(sizes, start=1):
        ids.append(position_ids(h, w, i, shift))         # (hw/4, 3)
        shift += w // 2
    return ids


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
    """Rotation table for position ids (S, 3) -> (S, d/2) complex: cos + i sin of the angles."""
    places = ids.cpu().double()                          # some devices have no fp64
    by_axis = [places[:, i, None] * theta ** -(torch.arange(0, dim, 2, device="cpu").double() / dim)
               for i, dim in enumerate(axes)]            # each (S, dim/2)
    angle = torch.cat(by_axis, dim=1)                    # (S, d/2)
    return torch.complex(angle.cos().float(), angle.sin().float()).to(ids.device)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Turn neighbouring channel pairs by their angles, in fp32. x (B, N, S, d), pe (S, d/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))          # (B, N, S, d/2)
    return torch.view_as_real(pairs * pe).flatten(-2).to(x.dtype)


def sinusoid(value: Tensor, channels: int = 256) -> Tensor:
    """Embed value * 1000, (B,) -> (B, channels) fp32: cosines, then sines."""
    # Quirk: frequencies are taken in fp32; in fp64 outputs of the released model move by 5e-5.
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
        self.guidance_embedder = MLPEmbedder(256, c.width) if c.guidance_embeds else None
        self.text_embedder = MLPEmbedder(c.pooled_projection_dim, c.width)

    def forward(self, t: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        vec = self.timestep_embedder(sinusoid(t).to(pooled.dtype))           # (B, D)
        if self.guidance_embedder is not None:
            vec = vec + self.guidance_embedder(sinusoid(guidance).to(pooled.dtype))
        return vec + self.text_embedder(pooled)


class ModulationOut(NamedTuple):
    shift: Tensor                                        # each (B, 1, D)
    scale: Tensor
    gate: Tensor | None = None                           # on what a sublayer adds


class Modulation(nn.Module):
    """vec -> one (shift, scale, gate) per sublayer. The checkpoint calls these layers norms."""

    def __init__(self, width: int, sublayers: int):
        super().__init__()
        self.sublayers = sublayers
        self.linear = nn.Linear(width, 3 * sublayers * width)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        parts = self.linear(F.silu(vec))[:, None].chunk(3 * self.sublayers, dim=-1)      # (B, 1, D)
        return [ModulationOut(*parts[i:i + 3]) for i in range(0, len(parts), 3)]


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    """LayerNorm without learned scale, then the scale and shift of the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod.scale) + mod.shift


class FeedForward(nn.Module):
    """linear, GELU (tanh), linear. The names net.0.proj and net.2 are the checkpoint's."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(width, 4 * width)}),
                                  nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:              # (B, S, D) -> (B, S, D)
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))


class Attention(nn.Module):
    """Projections of the stream's tokens; in double blocks also of text, under names with `add`."""

    def __init__(self, c: DiTConfig, double: bool):
        super().__init__()
        D, d, self.heads = c.width, c.attention_head_dim, c.num_attention_heads
        self.norm_q, self.norm_k = (nn.RMSNorm(d, 1e-6) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        if double:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(d, 1e-6) for _ in range(2))
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(D, D)]), nn.Linear(D, D)

    def by_head(self, x: Tensor) -> Tensor:              # (B, S, D) -> (B, N, S, d)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.by_head(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v         # each (B, N, S, d)

    def added_qkv(self, txt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.by_head(layer(txt))
                   for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return self.norm_added_q(q), self.norm_added_k(k), v                 # each (B, N, T, d)


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, rotate: Callable = rotate) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with rotary positions; q may hold fewer, leading, tokens than k.

    q (B, N, S', d), k, v (B, N, S, d), pe (S, d/2) -> (B, S', D). rotate: how pe turns x.
    """
    q, k = rotate(q, pe[:q.shape[2]]), rotate(k, pe)
    out = F.scaled_dot_product_attention(q, k, v)        # (B, N, S', d)
    return out.transpose(1, 2).flatten(2)                # (B, S', D)


def limit(x: Tensor) -> Tensor:
    """Keep fp16 finite, where some layers of the released model overflow; other types pass."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class DoubleBlock(nn.Module):
    """Text and image have their own weights, and meet in attention; conditions use the image's."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(c.width, 2), Modulation(c.width, 2)
        self.attn = Attention(c, double=True)
        self.attend = attend                             # devices.ready() may put another form here
        self.ff, self.ff_context = FeedForward(c.width), FeedForward(c.width)

    def forward(self, txt: Tensor, streams: list[Tensor], vecs: list[Tensor],
                pe: Tensor) -> tuple[Tensor, list[Tensor]]:
        """txt (B, T, D); streams img (B, I+R, D) and perhaps cond (B, Q, D), each with its vec."""
        txt_mod, mods = self.norm1_context(vecs[0]), [self.norm1(vec) for vec in vecs]
        qkv = [self.attn.added_qkv(modulate(txt, txt_mod[0])),
               *(self.attn.qkv(modulate(x, mod[0])) for x, mod in zip(streams, mods))]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*qkv))           # (B, N, S, d)
        sizes = [part[0].shape[2] for part in qkv]       # T, I+R and perhaps Q
        txt_out, *outs = self.attend(q, k, v, pe).split(sizes, dim=1)        # each (B, ., D)

        txt = txt + txt_mod[0].gate * self.attn.to_add_out(txt_out)          # (B, T, D)
        txt = txt + txt_mod[1].gate * self.ff_context(modulate(txt, txt_mod[1]))
        streams = [x + mod[0].gate * self.attn.to_out[0](out)
                   for x, mod, out in zip(streams, mods, outs)]
        streams = [x + mod[1].gate * self.ff(modulate(x, mod[1])) for x, mod in zip(streams, mods)]
        return limit(txt), streams                       # only the text's overflow


class SingleBlock(nn.Module):
    """Attention and MLP side by side, on all tokens alike."""

    def __init__(self, c: DiTConfig):
        super().__init__()
        self.norm = Modulation(c.width, 1)
        self.attn = Attention(c, double=False)
        self.attend = attend
        self.proj_mlp = nn.Linear(c.width, 4 * c.width)
        self.proj_out = nn.Linear(5 * c.width, c.width)

    def forward(self, streams: list[Tensor], vecs: list[Tensor], pe: Tensor,
                last: bool) -> list[Tensor]:
        """streams: text with img (B, T+I+R, D), perhaps cond (B, Q, D), each with its vec."""
        mods = [self.norm(vec)[0] for vec in vecs]
        inputs = [modulate(x, mod) for x, mod in zip(streams, mods)]
        q, k, v = zip(*(self.attn.qkv(x) for x in inputs))       # of each stream (B, N, ., d)
        q = q[:1] if last else q                         # the last block reads cond, and gives none
        sizes = [part.shape[2] for part in q]            # T+I+R and perhaps Q tokens
        q, k, v = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in (q, k, v))
        outs = self.attend(q, k, v, pe).split(sizes, dim=1)      # each (B, ., D)
        return [limit(x + mod.gate * self.combine(x_in, out))
                for x, mod, x_in, out in zip(streams, mods, inputs, outs)]

    def combine(self, x_in: Tensor, out: Tensor) -> Tensor:
        mlp = F.gelu(self.proj_mlp(x_in), approximate="tanh")                # (B, ., 4D)
        return self.proj_out(torch.cat([out, mlp], dim=-1))                  # (B, ., D)


class FinalModulation(nn.Module):
    """LayerNorm, then scale and shift from vec."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        # Quirk: scale comes before shift here, the reverse of every block.
        scale, shift = self.linear(F.silu(vec))[:, None].chunk(2, dim=-1)
        return modulate(x, ModulationOut(shift, scale))  # (B, ., D)


class FluxTransformer(nn.Module):
    """The whole transformer, at any size. Raises: ValueError for axes that do not fit the head."""

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

    @property
    def blocks(self) -> list[nn.Module]:                 # of both kinds, in order
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def forward(self, img: Tensor, txt: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor,
                img_ids: Tensor, cond: Tensor | None = None, cond_ids: Tensor | None = None,
                run: Callable = call) -> Tensor:
        """Velocity of the target (and of the native references, which callers drop).

        Shapes: img (B, I+R, P), txt (B, T, T5 width), pooled (B, CLIP width), t and guidance (B,),
        img_ids (I+R, 3), cond (B, Q, P), cond_ids (Q, 3) -> (B, I+R, P).
        Units: t in [0, 1], 1 = pure noise; guidance is the scale itself, usually 2.5.
        run(block, *args) calls one block; others than the default recompute, or move weights about.
        Reference: arXiv 2506.15742; clean conditions: arXiv 2512.21788.
        """
        txt_ids = img_ids.new_zeros(txt.shape[1], 3)     # words have no place
        ids, streams = [txt_ids, img_ids], [self.x_embedder(img)]            # (B, I+R, D)
        vecs = [self.time_text_embed(t, guidance, pooled)]                   # (B, D)
        if cond is not None:                             # a second stream, as at t = 0
            ids.append(cond_ids)
            streams.append(self.x_embedder(cond))        # (B, Q, D)
            vecs.append(self.time_text_embed(torch.zeros_like(t), guidance, pooled))
        pe = rope(torch.cat(ids), self.config.axes_dims_rope)                # (S, d/2)
        txt = self.context_embedder(txt)                 # (B, T, D)
        for block in self.transformer_blocks:
            txt, streams = run(block, txt, streams, vecs, pe)
        streams = [torch.cat([txt, streams[0]], dim=1), *streams[1:]]        # (B, T+I+R, D)
        for block in self.single_transformer_blocks:
            streams = run(block, streams, vecs, pe, block is self.single_transformer_blocks[-1])
        img = self.norm_out(streams[0][:, txt.shape[1]:], vecs[0])           # (B, I+R, D)
        return self.proj_out(img)                        # (B, I+R, P)
