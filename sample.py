"""The pipeline: an instruction and some pictures -> a picture.

    x = noise;  for t, t_next in the schedule:  x = x + (t_next - t) * velocity(x, t)

Read condition() -> denoise() -> generate(): what is given becomes tokens once, Euler steps lead
from noise to latents, the autoencoder makes a picture of them.

Key: B batch; H, W pixels; h, w latent grid; C = 16 latent channels; P = 64 packed; T text,
I target, R native reference, Q clean condition tokens; D width of T5, D' of CLIP.

Run: python sample.py --instruction "make the green circle blue" --image tiny/examples/before.png
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # what is imported now takes seconds
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import call
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dit
import weights
from dit import FluxTransformer
from mole import Adapter
from support import (adapters, caching, devices, export, jobs, layouts, offload, options,
                     routing_maps)
from support.files import files_of
from support.fp8 import check_device
from support.pictures import fitted, load_image, resize, save_picture, to_tensor
from text_encoder import CLIPEncoder, CLIPTokenizer, T5Encoder, T5Tokenizer
from vae import AutoEncoder

# Sizes of about one megapixel that the released model was trained on: width, height.
PREFERRED = [(672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248),
             (880, 1184), (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832),
             (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)]


@dataclass
class Pipeline:
    """Everything between a text, some pictures, and a picture."""
    dit: FluxTransformer
    vae: AutoEncoder
    t5: T5Encoder
    clip: CLIPEncoder
    t5_tokens: T5Tokenizer
    clip_tokens: CLIPTokenizer
    adapter: Adapter | None
    device: torch.device
    dtype: torch.dtype
    paths: dict[str, Path]                               # of each part
    cache: caching.Cache | None = None                   # of what the encoders gave before
    longest: int = 512                                   # side of a condition, as in training


@dataclass
class Conditioning:
    """What the transformer is told besides the noisy target. All of one batch."""
    txt: Tensor                                          # (B, T, D)
    pooled: Tensor                                       # (B, D')
    ref: Tensor | None                                   # (B, R, P) native references
    ref_ids: Tensor | None                               # (R, 3)
    cond: Tensor | None                                  # (B, Q, P) clean conditions
    cond_ids: Tensor | None                              # (Q, 3)


def load_pipeline(model: str | Path, adapter: str | Path | list[tuple[Path, float]] | None = None,
                  device: str = "auto", dtype: str = "auto", encoders_stay: bool = False,
                  weightless: bool = False, **others: Path | None) -> Pipeline:
    """Read a model and any adapter given, or several, each with its strength (1: as trained).

    others: as layouts.model_paths() takes them.

    A model too large for the device stays in the computer's memory, mapped from disk; its parts
    visit the device in turn. encoders_stay: text encoders and autoencoder do so even where all
    fits. weightless: shapes alone, on "meta". Raises: FileNotFoundError, ValueError.
    """
    paths = layouts.model_paths(Path(model), **others)
    tokenizers = T5Tokenizer(paths["tokenizer_2"]), CLIPTokenizer(paths["tokenizer"])
    device = devices.choose_device(device)
    files = {file for part in weights.PARTS for file in files_of(paths[part])}
    stored = sum(file.stat().st_size for file in files)
    dtype = devices.choose_dtype(dtype, device, stored)
    memory, needed = devices.memory(device), stored * dtype.itemsize / 2     # stored: 2 bytes each
    home = device if needed < devices.ROOM * memory else torch.device("cpu")
    home = torch.device("meta") if weightless else home
    encoders_home = torch.device("cpu") if encoders_stay else home
    narrow = device.type == "cpu" and needed >= memory / 2       # where wide ones would not fit
    pipe = Pipeline(
        weights.load("transformer", paths["transformer"], home, dtype, narrow),
        weights.load("vae", paths["vae"], encoders_home, dtype),
        weights.load("text_encoder_2", paths["text_encoder_2"], encoders_home, dtype, narrow),
        weights.load("text_encoder", paths["text_encoder"], encoders_home, dtype),
        *tokenizers, adapter=None, device=device, dtype=dtype, paths=paths)
    for part in (pipe.dit, pipe.vae, pipe.t5, pipe.clip):        # wherever it is, it visits
        check_device({t.dtype for t in offload.weights_of(part)}, device, model)
    devices.ready(pipe.dit, pipe.vae, device, dtype)
    chosen = adapter if isinstance(adapter, list) else [(Path(adapter), 1.0)] if adapter else []
    if chosen:
        pipe.adapter = weights.load_adapters(pipe.dit, chosen)
        pipe.longest = adapters.longest(path for path, _ in chosen)
        for p in pipe.adapter.tensors().values():        # not the model's weights in its layers
            p.data = p.data.to(device)
    return pipe


# ----------------------------------------------------------------------------------- what is given

def encode_text(pipe: Pipeline, instructions: list[str]) -> tuple[Tensor, Tensor]:
    """B texts -> T5's tokens (B, T, D) and CLIP's pooled vectors (B, D')."""
    def compute(texts: list[str]) -> tuple[Tensor, Tensor]:
        where = pipe.device if offload.fits(pipe.t5, pipe.device) else torch.device("cpu")
        with torch.no_grad(), offload.on_device(pipe.t5, where):
            txt = pipe.t5(pipe.t5_tokens(texts).to(where)).to(pipe.device)           # (B, T, D)
        with torch.no_grad(), offload.on_device(pipe.clip, pipe.device):
            return txt, pipe.clip(pipe.clip_tokens(texts).to(pipe.device))           # (B, D')
    return caching.cached(pipe.cache, instructions, compute, pipe.device)


def encode_picture(pipe: Pipeline, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the raw latents, each (B, C, h, w)."""
    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), offload.on_device(pipe.vae, pipe.device):
            return pipe.vae.moments(pictures.to(pipe.device, pipe.dtype))
    return caching.cached(pipe.cache, pictures, compute, pipe.device)


def condition(pipe: Pipeline, instructions: list[str], images: list[Tensor],
              conds: list[Tensor]) -> Conditioning:
    """Encode instructions and pictures, once for all steps.

    Shapes: instructions B texts; images, conds: each picture of the batch (B, 3, H, W), native
    references and clean conditions, any number of each. Units: pictures in [-1, 1].
    """
    txt, pooled = encode_text(pipe, instructions)        # (B, T, D), (B, D')
    latents = [pipe.vae.latents(*encode_picture(pipe, p)) for p in (*images, *conds)]
    return as_tokens(txt, pooled, latents, len(images))


def as_tokens(txt: Tensor, pooled: Tensor, latents: list[Tensor], natives: int) -> Conditioning:
    """Latents (B, C, h, w) as tokens with their positions; the first ones are native references."""
    sizes = [one.shape[-2:] for one in latents]          # (h, w)
    ids = [own.to(txt.device) for own in dit.reference_ids(sizes)]           # each (hw/4, 3)
    tokens = [dit.pack(one.to(txt.dtype)) for one in latents]                # each (B, hw/4, P)

    def joined(parts: list[Tensor], dim: int) -> Tensor | None:
        return torch.cat(parts, dim) if parts else None
    return Conditioning(txt, pooled, joined(tokens[:natives], 1), joined(ids[:natives], 0),
                        joined(tokens[natives:], 1), joined(ids[natives:], 0))


# ---------------------------------------------------------------------------------------- sampling

def velocity(model: FluxTransformer, xt: Tensor, t: Tensor, guidance: Tensor, given: Conditioning,
             h: int, w: int, run: Callable = call) -> Tensor:
    """Velocity of the target alone: xt (B, I, P); t, guidance (B,); grid h x w -> (B, I, P)."""
    img, ids = xt, dit.position_ids(h, w).to(xt.device)                      # (B, I, P), (I, 3)
    if given.ref is not None:
        img = torch.cat([img, given.ref], dim=1)           # (B, I+R, P)
        ids = torch.cat([ids, given.ref_ids])                                # (I+R, 3)
    v = model(img, given.txt, given.pooled, t, guidance, ids, given.cond, given.cond_ids, run=run)
    return v[:, :xt.shape[1]]                            # the references' velocities mean nothing


def denoise(pipe: Pipeline, noise: Tensor, given: Conditioning, steps: int, guidance: float,
            run: Callable = call) -> Iterator[Tensor]:
    """Euler steps from noise to latents, in fp32; yields the latents after each step.

    Shapes: noise (B, C, h, w) -> (B, C, h, w), steps times. When there is an adapter, call within
    `with pipe.adapter.serve(...)` or `with export.merged(...)`; run: as the transformer takes it.
    """
    h, w = noise.shape[-2:]
    x = dit.pack(noise.float().to(pipe.device))          # (B, I, P)
    guidances = torch.full((len(x),), guidance, device=pipe.device)          # (B,)
    times = dit.schedule(steps, x.shape[1]).tolist()     # 1 = pure noise, ..., 0
    for t, t_next in zip(times, times[1:]):
        t_now = torch.full((len(x),), t, device=pipe.device)                 # (B,)
        with torch.no_grad():
            v = velocity(pipe.dit, x.to(pipe.dtype), t_now, guidances, given, h, w, run)
        if t == times[0]:
            check_finite(v, "the transformer", pipe)
        x = x + (t_next - t) * v.float()
        yield dit.unpack(x, h, w)                        # (B, C, h, w)


def check_finite(given: Tensor, part: str, pipe: Pipeline) -> None:
    """Raises: ValueError where numbers are lost, of which a flat picture would be made."""
    if not given.isfinite().all():
        wider = "try --dtype bfloat16, " if pipe.dtype == torch.float16 else ""
        raise ValueError(f"{part} gives numbers that are not finite: {wider}the adapter may be too "
                         "strong, or a file of the model damaged")


def seeded_noise(seeds: list[int], size: tuple[int, int], channels: int = 16) -> Tensor:
    """Standard normal (B, C, H / 8, W / 8), drawn on the CPU: a seed means the same everywhere.

    size: (W, H).
    """
    shape = (1, channels, size[1] // 8, size[0] // 8)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                      for seed in seeds])


def generate(pipe: Pipeline, given: Conditioning, noise: Tensor, steps: int = 28,
             guidance: float = 2.5, bar: bool = False) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Pictures for what condition() encoded, and the routing weights of each layer with experts.

    Shapes: noise (B, C, h, w) -> (B, H, W, 3) uint8; layer name -> (B, E), by token (..., E).
    """
    visit = offload.on_device if offload.fits(pipe.dit, pipe.device) else offload.stream
    with torch.no_grad(), visit(pipe.dit, pipe.device) as run, merged_or_served(pipe, given):
        *_, latents = tqdm(denoise(pipe, noise, given, steps, guidance, run), desc="steps",
                           total=steps, disable=not bar, leave=False)        # (B, C, h, w)
    with torch.no_grad(), offload.on_device(pipe.vae, pipe.device):
        pixels = pipe.vae.decode(latents.to(pipe.dtype)).float()             # (B, 3, H, W)
    check_finite(pixels, "the autoencoder", pipe)
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()              # in 0..255, rounded
    return pixels.permute(0, 2, 3, 1).cpu().numpy(), routing_maps.last_weights(pipe.adapter)


def merged_or_served(pipe: Pipeline, given: Conditioning) -> AbstractContextManager:
    """A `with` in which the adapter does its work: merged into the weights where it can be."""
    if pipe.adapter is None:
        return nullcontext()
    if export.mergeable(pipe.adapter, len(given.pooled), pipe.device):
        return export.merged(pipe.dit, pipe.adapter, given.txt, given.pooled)
    return pipe.adapter.serve(given.txt, given.pooled)


# ------------------------------------------------------------------------------------------- sizes

def output_size(pipe: Pipeline, images: list[Image.Image],
                wanted: tuple[int, int] | None) -> tuple[int, int]:
    """(W, H): as wanted, else the preferred size nearest in aspect to the picture to edit.

    Without a picture, the nearest to a square.
    """
    # Deviation: diffusers makes 1024x1024 by default, whatever the reference: crops, zooms, drift.
    if wanted is not None:
        return wanted
    side = pipe.vae.config.sample_size
    sizes = PREFERRED if side >= 512 else [(side, side)]
    aspect = images[0].width / images[0].height if images else 1
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1] / aspect)))


def prepare(pipe: Pipeline, images: list[Image.Image], conds: list[Image.Image],
            size: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Resize what is given, to (1, 3, H, W) tensors in [-1, 1].

    The picture to edit takes the output's size, so that the grids coincide. Conditions keep their
    aspect, the longer side at most as in training; a model for small squares takes only those.
    """
    side = pipe.vae.config.sample_size
    refs = [resize(image, size if i == 0 else output_size(pipe, [image], None))
            for i, image in enumerate(images)]
    clean = [resize(image, fitted(image.size, pipe.longest) if side >= 512 else (side, side))
             for image in conds]
    return [to_tensor([p]) for p in refs], [to_tensor([p]) for p in clean]


# ----------------------------------------------------------------------------------------- command

def make(pipe: Pipeline, job: jobs.Job, args: argparse.Namespace) -> None:
    """Make, save and report one job's pictures."""
    start = time.time()
    if pipe.t5_tokens.cuts(job.instruction):
        print(f"note: the model reads {pipe.t5_tokens.length} tokens of text; the end of this "
              f"instruction is lost: {job.instruction}", file=sys.stderr)
    images, conds = ([load_image(path) for path in paths] for paths in (job.images, job.conds))
    width, height = output_size(pipe, images, args.size)
    given = condition(pipe, [job.instruction], *prepare(pipe, images, conds, (width, height)))
    for seed, out in job.outs:
        out.parent.mkdir(parents=True, exist_ok=True)
        noise = seeded_noise([seed], (width, height), pipe.vae.config.latent_channels)
        pictures, routing = generate(pipe, given, noise, args.steps, args.guidance, bar=True)
        picture, told = pictures[0], f"{width}x{height}"
        if args.keep_size and images:
            picture = resize(Image.fromarray(picture), images[0].size)
            told = f"{images[0].width}x{images[0].height}, made at {told}"
        elif images and images[0].size != (width, height):
            told += f" (the picture to edit: {images[0].width}x{images[0].height})"
        save_picture(picture, out)
        print(f"{out}: {told}, {args.steps} steps, seed {seed}, {time.time() - start:.1f} s"
              f"{routing_maps.experts_line(pipe.adapter, routing)}")
        start = time.time()


def main() -> None:
    args = options.sample_options()
    todo = jobs.plan(args)
    if not (args.export_lora or args.routing or any(job.outs for job in todo)):
        return
    pipe = load_pipeline(adapter=options.adapters_of(args), **options.model_of(args))
    if args.compile:
        devices.compile_blocks(pipe.dit)
    if args.export_lora:
        export.write_instruction(pipe.adapter, *encode_text(pipe, [args.instruction]),
                                 args.export_lora)
    if args.routing:
        routing_maps.show(pipe.adapter, lambda texts: encode_text(pipe, texts), todo, args.routing)
    for job in todo:
        if job.outs:
            make(pipe, job, args)


if __name__ == "__main__":
    commands.run(main)
