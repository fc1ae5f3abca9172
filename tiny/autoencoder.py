"""The embedded model's autoencoder, trained on all pictures that the tiny world holds.

tiny/pretrain.py asks for it after the tokenizers.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import weights
from support import devices
from support.conditions import pick
from support.configs import config_from
from support.files import replacing, unpickled, write_part
from support.pictures import to_tensor
from tiny import world
from vae import AutoEncoder, VAEConfig

NUMBER = 256                                             # pictures of a kind, to measure
FAST = torch.bfloat16 if devices.FAST_BF16 else torch.float32

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [32, 64, 64, 64],
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
       "force_upcast": True, "in_channels": 3, "out_channels": 3, "latent_channels": 16,
       "latents_mean": None, "latents_std": None, "layers_per_block": 1,
       "mid_block_add_attention": True, "norm_num_groups": 2, "sample_size": 64,
       "scaling_factor": 1.0, "shift_factor": 0.0, "use_post_quant_conv": False,
       "use_quant_conv": False}
# What the autoencoder is to draw: a task's target or its condition, and how often.
KINDS = {"scene": ("t2i", "target", 3), "figure": ("pose", "target", 2),
         "edges": ("canny", "cond", 3), "depth map": ("depth", "cond", 1),
         "skeleton": ("pose", "cond", 2),
         "box": ("fill", "cond", 1), "subject": ("subject", "cond", 1)}


def schedule(step: int, steps: int, warmup: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 0."""
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def vae_picture(rng: np.random.Generator, kind: str, held_out: bool = False) -> np.ndarray:
    """(H, W, 3) uint8, a picture of one of KINDS."""
    task, part, _ = KINDS[kind]
    sample = world.tiny_sample(rng, task, held_out)
    return sample.target if part == "target" else sample.conds[0]


def vae_pictures(step: int, size: int) -> Tensor:
    """(size, 3, H, W) pictures of all kinds."""
    rng = np.random.default_rng([1, step])
    kinds = [kind for kind, (_, _, often) in KINDS.items() for _ in range(often)]
    return to_tensor([vae_picture(rng, pick(rng, kinds)) for _ in range(size)])


def build_vae() -> AutoEncoder:
    """First weights: residual branches start at zero, latents almost without noise."""
    torch.manual_seed(0)
    model = AutoEncoder(config_from(VAEConfig, VAE, "pretrain"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):
                nn.init.zeros_(module.weight)
    nn.init.constant_(model.encoder.conv_out.bias[VAE["latent_channels"]:], -6)  # log-variances
    return model


def crops(step: int, number: int, side: int) -> Tensor:
    """(number, 3, side, side) windows, two of each picture unless they are whole."""
    each = 2 if side < world.SIZE else 1
    rng, pictures = np.random.default_rng([5, step]), vae_pictures(step, number // each)
    corners = rng.integers(0, world.SIZE - side + 1, (number, 2))
    return torch.stack([pictures[i // each, :, y:y + side, x:x + side]
                        for i, (y, x) in enumerate(corners)])


def train_vae(out: Path, work: Path, steps: int, batch: int = 32, lr: float = 2e-3) -> None:
    """L1 + MSE + 1e-4 KL; then the shift and scale for latents of zero mean, unit variance.

    It sees quarters of pictures, and in the last quarter of the steps a quarter as many whole ones.
    """
    if (out / "vae" / "config.json").is_file():
        return
    model = build_vae()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4,
                                  fused=True)
    checkpoint, begin = work / "vae.pt", 0
    if checkpoint.is_file():
        state = unpickled(checkpoint)
        begin = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    bar = trange(begin, steps, initial=begin, total=steps, desc="vae", mininterval=10)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, 100)
        whole = step >= 0.75 * steps
        img = crops(step, batch // 4 if whole else batch, world.SIZE if whole else world.SIZE // 2)
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST == torch.bfloat16):
            mean, logvar = (part.float() for part in model.moments(img))
            noise = torch.randn(mean.shape, generator=generator)
            out_img = model.decoder(mean + (0.5 * logvar).exp() * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = F.mse_loss(out_img, img)
        loss = F.l1_loss(out_img, img) + error + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(psnr=f"{10 * math.log10(4 / error.item()):.1f} dB",
                        kl=f"{kl.item():.2f}", refresh=False)
        if step % 250 == 249 or step + 1 == steps:
            with replacing(checkpoint) as aside:
                torch.save({"step": step + 1, "model": model.state_dict(),
                            "optimizer": optimizer.state_dict()}, aside)
    with torch.no_grad():
        latents = torch.cat([model.encode(vae_pictures(10**6 + i, 64)) for i in range(8)])
    config = VAE | {"scaling_factor": round(1 / latents.std().item(), 4),
                    "shift_factor": round(latents.mean().item(), 4)}
    write_part(model.state_dict(), config, out / "vae",
               "diffusion_pytorch_model.safetensors", torch.bfloat16)
    report_vae(out)


def report_vae(out: Path) -> None:
    """Reconstruction of pictures of scenes that were not trained on: mean of each one's PSNR."""
    model = weights.load("vae", out / "vae", dtype=torch.float32)
    rng = np.random.default_rng(7)
    for kind in KINDS:
        img = to_tensor([vae_picture(rng, kind, held_out=True) for _ in range(NUMBER)])
        with torch.no_grad():
            error = (model.decode(model.encode(img)).clamp(-1, 1) - img).square().mean((1, 2, 3))
        print(f"autoencoder, {kind}: {(10 * (4 / error).log10()).mean():.2f} dB")
