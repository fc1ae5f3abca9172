"""The autoencoder of FLUX: pictures <-> latents, eight times smaller on a side.

    latents = scaling_factor * (mean(encoder(pixels)) - shift_factor)         # what the DiT sees
    pixels = decoder(latents / scaling_factor + shift_factor)

Key: B batch; H, W pixels; h, w latent grid (H / 8, W / 8), in a layer its own level's grid;
C = 16 latent channels.
Module names are the keys of the Hugging Face folder's vae/.
Source: Rombach et al. 2022, arXiv 2112.10752; sizes, weights: black-forest-labs/FLUX.1-Kontext-dev.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """The entries of vae/config.json that the model depends on."""
    block_out_channels: tuple[int, ...]                  # widths, from pixels to latents
    layers_per_block: int                                # residual blocks a level (decoder: 1 more)
    latent_channels: int                                 # C
    norm_num_groups: int                                 # of every GroupNorm
    scaling_factor: float                                # brings latents to about unit variance
    shift_factor: float                                  # and to about zero mean
    sample_size: int = 1024                              # the picture size it was made for

    @property
    def factor(self) -> int:
        """Pixels per latent position: every level but the last one halves the grid."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def only_size(self) -> tuple[int, int] | None:       # (W, H) of a small model; None: any
        return (self.sample_size, self.sample_size) if self.sample_size < 512 else None


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = (nn.Conv2d(width_in, width, 1) if width_in != width else
                              nn.Identity())

    def forward(self, x: Tensor) -> Tensor:              # (B, width_in, h, w) -> (B, width, h, w)
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        return out + self.conv_shortcut(x)


class Attention(nn.Module):
    """One head over all positions of the grid."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:              # (B, width, h, w)
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)               # (B, h w, width)
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]                  # (B, h w, width)
        return x + self.to_out[0](out).transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """Residual blocks at one resolution, then a convolution that halves or doubles the grid."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, resize: str | None):
        super().__init__()
        self.resize = resize
        self.resnets = nn.ModuleList(
            ResnetBlock(width_in if i == 0 else width, width, groups) for i in range(blocks))
        if resize == "down":
            conv = nn.Conv2d(width, width, 3, stride=2)
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])
        elif resize == "up":
            conv = nn.Conv2d(width, width, 3, padding=1)
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": conv})])

    def forward(self, x: Tensor) -> Tensor:              # (B, width_in, h, w)
        for block in self.resnets:
            x = block(x)                                 # (B, width, h, w)
        if self.resize == "down":                        # zeros on the right and at the bottom only
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))      # (B, width, h/2, w/2)
        if self.resize == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")           # (B, width, 2h, 2w)
            return self.upsamplers[0]["conv"](x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pictures to the parameters of a Gaussian over latents."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], c.layers_per_block, groups,
                  "down" if i + 1 < len(widths) else None)
            for i in range(len(widths)))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)                         # (B, widths[0], H, W)
        for level in self.down_blocks:
            x = level(x)                                 # at last (B, widths[-1], h, w)
        x = self.mid_block(x)                            # (B, widths[-1], h, w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))   # (B, 2C, h, w): mean, log-variance


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups       # coarsest first
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], c.layers_per_block + 1, groups,
                  "up" if i + 1 < len(widths) else None)
            for i in range(len(widths)))
        self.mid_block = MidBlock(widths[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, raw: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(raw))            # (B, widths[0], h, w)
        for level in self.up_blocks:
            x = level(x)                                 # at last (B, widths[-1], H, W)
        return self.conv_out(F.silu(self.conv_norm_out(x)))   # (B, 3, H, W)


class AutoEncoder(nn.Module):
    """The autoencoder. encode and decode speak the transformer's (shifted, scaled) latents.

    Raises: ValueError when the norms' groups do not divide every width.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        groups, widths = config.norm_num_groups, config.block_out_channels
        if groups < 1 or any(width % groups for width in widths):
            raise ValueError(f"norm_num_groups {groups} must divide block_out_channels {widths}")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> raw mean and log-variance, each (B, C, h, w).

        Raises: ValueError when H or W is not divisible by config.factor.
        """
        height, width = pixels.shape[-2:]
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(f"picture of {width}x{height}: "
                             f"sides must be multiples of {self.config.factor}")
        raw = self.encoder(pixels).contiguous()          # (B, 2C, h, w); channels may lie last
        mean, logvar = raw.chunk(2, dim=1)               # each (B, C, h, w)
        return mean, logvar.clamp(-30, 20)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """The transformer's latents, from moments() and noise, all (B, C, h, w)."""
        raw = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return self.config.scaling_factor * (raw - self.config.shift_factor)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures to latents.

        Shapes: pixels (B, 3, H, W), noise (B, C, h, w) -> (B, C, h, w).
        Units: pixels in [-1, 1]; latents of about unit variance. noise, standard normal, draws a
        sample; without it the mean is taken, as references and inference do.
        Raises: ValueError when H or W is not divisible by config.factor.
        """
        return self.latents(*self.moments(pixels), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W), in [-1, 1] but for overshoot."""
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)
