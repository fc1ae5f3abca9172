"""Make the embedded base model from nothing: tokenizers, autoencoder, then transformer and text encoders.

Every stage may be interrupted and started again: it goes on from its last checkpoint in --work, and a
finished stage is skipped. The base learns text to image and edits with a native reference only; what
else the tiny world holds is left for adapters. The autoencoder sees all of its pictures.

Run: python -m tiny.pretrain                             # about four hours on two cores
     python -m tiny.pretrain --vae-steps 2 --steps 2 --work /tmp/w --out /tmp/m      # a minute
"""
import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import data
import weights
from vae import AutoEncoder, VAEConfig, load_vae

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [16, 32, 64, 64],
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
       "force_upcast": True, "in_channels": 3, "out_channels": 3, "latent_channels": 16, "latents_mean": None,
       "latents_std": None, "layers_per_block": 1, "mid_block_add_attention": True, "norm_num_groups": 4,
       "sample_size": 64, "scaling_factor": 1.0, "shift_factor": 0.0, "use_post_quant_conv": False,
       "use_quant_conv": False}


def schedule(step: int, steps: int, warmup: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 0."""
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def save_state(path: Path, **state: object) -> None:
    """Write a checkpoint aside and rename it, so that a kill leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_state(path: Path) -> dict:
    return torch.load(path, weights_only=True, mmap=False) if path.is_file() else {"step": 0}


# -------------------------------------------------------------------------------------- autoencoder

def vae_pictures(step: int, size: int) -> Tensor:
    """(size, 3, H, W) pictures of all kinds: targets, references, maps, subjects."""
    rng = np.random.default_rng([1, step])
    samples = [data.tiny_sample(rng, data.pick(rng, list(data.WORDINGS))) for _ in range(size)]
    return data.to_tensor([data.pick(rng, [s.target, *s.images, *s.conds]) for s in samples])


def train_vae(out: Path, work: Path, steps: int, batch: int = 16, lr: float = 3e-3) -> None:
    """L1 + MSE + 1e-4 KL; at the end the shift and scale that bring latents to zero mean, unit variance."""
    if (out / "vae" / "config.json").is_file():
        return
    torch.manual_seed(0)
    model = AutoEncoder(weights.config_from(VAEConfig, VAE, "pretrain"))
    with torch.no_grad():
        model.encoder.conv_out.bias[VAE["latent_channels"]:] -= 6            # begin almost without noise
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    state = load_state(work / "vae.pt")
    if state["step"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    bar = trange(state["step"], steps, desc="vae", mininterval=10)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, 100)
        img = vae_pictures(step, batch)                  # (B, 3, H, W)
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
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
        bar.set_postfix(psnr=f"{10 * math.log10(4 / error.item()):.1f} dB", kl=f"{kl.item():.2f}", refresh=False)
        if step % 250 == 249 or step + 1 == steps:
            save_state(work / "vae.pt", step=step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
    with torch.no_grad():
        latents = torch.cat([model.encode(vae_pictures(10**6 + i, 64)) for i in range(8)])
    config = VAE | {"scaling_factor": round(1 / latents.std().item(), 4), "shift_factor": round(latents.mean().item(), 4)}
    weights.save_part(model, config, out / "vae", "diffusion_pytorch_model.safetensors", torch.bfloat16)
    model = load_vae(out / "vae", dtype=torch.float32)
    with torch.no_grad():
        img = vae_pictures(10**7, 256)
        error = (model.decode(model.encode(img)).clamp(-1, 1) - img).square().mean((1, 2, 3))
    print(f"autoencoder: {(10 * (4 / error).log10()).mean():.2f} dB, {config['scaling_factor']=}, {config['shift_factor']=}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded base model.")
    parser.add_argument("--out", type=Path, default=Path("tiny/model"))
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="checkpoints")
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=12000, help="of the transformer and text encoders")
    args = parser.parse_args()
    train_vae(args.out, args.work, args.vae_steps)


if __name__ == "__main__":
    weights.run(main)
