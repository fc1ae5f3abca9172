"""The pipeline: an instruction and some pictures -> a picture.

    x = noise;  for t, t_next in the schedule:  x = x + (t_next - t) * velocity(x, t)

Read condition() -> denoise() -> generate(): what is given becomes tokens once, Euler steps lead
from noise to latents, the autoencoder makes a picture of them. From Python:

    import sample
    pipe = sample.load_pipeline("tiny/model")
    picture = sample.edit(pipe, "make the green circle blue", "tiny/examples/before.png")

Key: B batch; H, W pixels; h, w latent grid; C = 16 latent channels; P = 64 packed; T text,
I target, R native reference, Q clean condition tokens; D width of T5, D' of CLIP.

Run: python sample.py --instruction "make the green circle blue" --image tiny/examples/before.png
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # what is imported now takes seconds
import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import call
from pathlib import Path
from threading import RLock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dit
import weights
from mole import Adapter
from support import (adapters, caching, devices, export, jobs, layouts, masks, offload, options,
                     origin, plans, routing_maps)
from support.conditions import read_cond
from support.files import files_of
from support.fp8 import check_device
from support.pictures import LONGEST, Given, each, given_picture, load_image, resize, to_pixels
from support.resolutions import cond_size, output_size, prepare
from support.streaming import visiting
from support.trace import Trace
from text_encoder import CLIPEncoder, CLIPTokenizer, T5Encoder, T5Tokenizer
from vae import AutoEncoder


@dataclass
class Pipeline:
    """Everything between a text, some pictures, and a picture. Threads use it one at a time."""
    dit: dit.FluxTransformer
    vae: AutoEncoder
    t5: T5Encoder
    clip: CLIPEncoder
    t5_tokens: T5Tokenizer
    clip_tokens: CLIPTokenizer
    adapter: Adapter | None
    device: torch.device
    dtype: torch.dtype
    model: Path                                          # as its user names it
    paths: dict[str, Path]                               # of each part
    names: dict[str, str] = field(default_factory=dict)  # what its pictures will say of it
    cache: caching.Cache | None = None                   # of what the encoders gave before
    run: Callable | None = None                          # calls blocks, while training streams them
    lock: RLock = field(default_factory=RLock)           # weights move and merge while one works
    longest: int = LONGEST                               # side of a condition, as in training


@dataclass
class Conditioning:
    """What the transformer is told besides the noisy target. All of one batch."""
    txt: Tensor                                          # (B, T, D)
    pooled: Tensor                                       # (B, D')
    ref: Tensor | None                                   # (B, R, P) native references
    ref_ids: Tensor | None                               # (R, 3)
    cond: Tensor | None                                  # (B, Q, P) clean conditions
    cond_ids: Tensor | None                              # (Q, 3)
    routed_by: tuple[Tensor, Tensor]                     # txt and pooled of the text that routes


def load_pipeline(model: str | Path, adapter: str | Path | list | None = "auto",
                  device: str = "auto", dtype: str = "auto", matmul: str | None = None,
                  at_home: bool = False, weightless: bool = False,
                  **others: str | Path | None) -> Pipeline:
    """Read a model, and adapters as adapters.chosen() takes them: by default the one beside it.

    adapter: None, FILE, "FILE:STRENGTH", or a list of such or of (FILE, strength). others: where a
    part lies that the model lacks: vae, text_encoder, text_encoder_2, tokenizers.

    A model too large for the device stays in the computer's memory, mapped from disk; its parts
    visit the device in turn. at_home: it stays there even where it fits. weightless: shapes alone,
    on "meta". matmul: "fp8", where the device multiplies so.
    Raises: FileNotFoundError, ValueError.
    """
    paths = layouts.model_paths(Path(model), **others)
    chosen = adapters.chosen(adapter, Path(model))
    tokenizers = T5Tokenizer(paths["tokenizer_2"]), CLIPTokenizer(paths["tokenizer"])
    device = devices.choose_device(device, matmul)
    files = {file for part in weights.PARTS for file in files_of(paths[part])}
    stored = sum(file.stat().st_size for file in files)
    dtype = devices.choose_dtype(dtype, device, stored)
    home, narrow = devices.home(device, stored * dtype.itemsize // 2)        # taken as 2 bytes each
    home = torch.device("cpu") if at_home else home
    home = torch.device("meta") if weightless else home
    devices.announce(f"loading {model}, {stored / 1e9:.1f} GB", 0 if weightless else stored)
    pipe = Pipeline(
        weights.load("transformer", paths["transformer"], home, dtype, narrow),
        weights.load("vae", paths["vae"], home, dtype),
        weights.load("text_encoder_2", paths["text_encoder_2"], home, dtype, narrow),
        weights.load("text_encoder", paths["text_encoder"], home, dtype),
        *tokenizers, adapter=None, device=device, dtype=dtype, model=Path(model), paths=paths)
    layouts.check_widths(pipe.dit.config, pipe.vae.config, pipe.t5.config, pipe.clip.config)
    for part in (pipe.dit, pipe.vae, pipe.t5, pipe.clip):        # wherever it is, it visits
        check_device({t.dtype for t in offload.weights_of(part)}, device, model)
    devices.ready(pipe.dit, pipe.vae, device, dtype, matmul)
    pipe.names = origin.names(Path(model), chosen, dtype, matmul)
    if chosen:
        pipe.adapter = weights.load_adapters(pipe.dit, chosen)
        pipe.longest = adapters.longest(path for path, _ in chosen)
        offload.move(pipe.adapter.tensors().values(), device)    # not the model's in its layers
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
    with pipe.lock:
        return caching.cached(pipe.cache, instructions, compute, pipe.device)


def encode_picture(pipe: Pipeline, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the raw latents, each (B, C, h, w)."""
    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), offload.on_device(pipe.vae, pipe.device):
            return pipe.vae.moments(pictures.to(pipe.device, pipe.dtype))
    with pipe.lock:
        return caching.cached(pipe.cache, pictures, compute, pipe.device)


def condition(pipe: Pipeline, instructions: list[str], images: list[Tensor],
              conds: list[Tensor], route_by: str | None = None) -> Conditioning:
    """Encode instructions and pictures, once for all steps.

    Shapes: instructions B texts; images, conds: for each native reference and each clean condition
    one tensor (B, 3, H, W). Units: pictures in [-1, 1]. route_by: the text that chooses the
    experts, if not the instruction. Raises: ValueError where no text can.
    """
    txt, pooled = encode_text(pipe, instructions)        # (B, T, D), (B, D')
    latents = [pipe.vae.latents(*encode_picture(pipe, p)) for p in (*images, *conds)]
    given = as_tokens(txt, pooled, latents, len(images))
    if route_by is not None:
        routing_maps.check_routed(pipe.adapter, f"--route-by {route_by!a}")
        given.routed_by = encode_text(pipe, [route_by] * len(instructions))
    return given


def as_tokens(txt: Tensor, pooled: Tensor, latents: list[Tensor], natives: int) -> Conditioning:
    """Latents (B, C, h, w) as tokens with their positions; the first ones are native references."""
    sizes = [one.shape[-2:] for one in latents]          # (h, w)
    ids = [own.to(txt.device) for own in dit.reference_ids(sizes)]           # each (hw/4, 3)
    tokens = [dit.pack(one.to(txt.dtype)) for one in latents]                # each (B, hw/4, P)

    def joined(parts: list[Tensor], dim: int) -> Tensor | None:
        return torch.cat(parts, dim) if parts else None
    return Conditioning(txt, pooled, joined(tokens[:natives], 1), joined(ids[:natives], 0),
                        joined(tokens[natives:], 1), joined(ids[natives:], 0), (txt, pooled))


# ---------------------------------------------------------------------------------------- sampling

def velocity(model: dit.FluxTransformer, xt: Tensor, t: Tensor, guidance: Tensor,
             given: Conditioning, h: int, w: int, run: Callable = call) -> Tensor:
    """Velocity of the target alone: xt (B, I, P); t, guidance (B,); grid h x w -> (B, I, P)."""
    img, ids = xt, dit.position_ids(h, w).to(xt.device)                      # (B, I, P), (I, 3)
    if given.ref is not None:
        img = torch.cat([img, given.ref], dim=1)         # (B, I+R, P)
        ids = torch.cat([ids, given.ref_ids])                                # (I+R, 3)
    v = model(img, given.txt, given.pooled, t, guidance, ids, given.cond, given.cond_ids, run=run)
    return v[:, :xt.shape[1]]                            # the references' velocities mean nothing


def denoise(pipe: Pipeline, noise: Tensor, given: Conditioning, steps: int, guidance: float,
            run: Callable = call, hold: Callable | None = None) -> Iterator[Tensor]:
    """Euler steps from noise to latents, in fp32; yields the latents after each step.

    Shapes: noise (B, C, h, w) -> (B, C, h, w), steps times. When there is an adapter, call within
    `with pipe.adapter.serve(...)` or `with export.merged(...)`; run: as the transformer takes it;
    hold(x, t): x with what a mask keeps of the given picture, noised to t (masks.held).
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
            devices.check_finite(v, "the transformer", pipe.dtype)
        x = x + (t_next - t) * v.float()
        x = hold(x, t_next) if hold else x
        yield dit.unpack(x, h, w)                        # (B, C, h, w)


def seeded_noise(seeds: list[int], size: tuple[int, int], channels: int = 16) -> Tensor:
    """Standard normal (B, C, H / 8, W / 8) of a size (W, H); drawn on the CPU, alike everywhere."""
    shape = (1, channels, size[1] // 8, size[0] // 8)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                      for seed in seeds])


def generate(pipe: Pipeline, given: Conditioning, noise: Tensor, steps: int = 28,
             guidance: float = 2.5, hold: Callable | None = None, watch: Callable = denoise,
             callback: Callable[[int, Tensor], object] = lambda step, latents: None
             ) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Pictures for what condition() encoded, and the routing weights of each layer with experts.

    Shapes: noise (B, C, h, w) -> (B, H, W, 3) uint8; layer name -> (B, E), by token (..., E).
    watch: called in the place of denoise(), whose steps it may look at (trace.Trace).
    callback: called after each step with its number, from 1 on, and the latents (B, C, h, w).
    """
    with (pipe.lock, torch.no_grad(), visiting(pipe.dit, pipe.device, pipe.run) as run,
          export.at_work(pipe.dit, pipe.adapter, *given.routed_by, pipe.device, run)):
        for step, latents in enumerate(watch(pipe, noise, given, steps, guidance, run, hold), 1):
            callback(step, latents)                      # (B, C, h, w)
        routing = routing_maps.last_weights(pipe.adapter)
    with pipe.lock, torch.no_grad(), offload.on_device(pipe.vae, pipe.device):
        pixels = pipe.vae.decode(latents.to(pipe.dtype)).float()             # (B, 3, H, W)
    devices.check_finite(pixels, "the autoencoder", pipe.dtype)
    return to_pixels(pixels), routing


def edits(pipe: Pipeline, instruction: str, images: Given | Iterable[Given] = (),
          conds: Given | Iterable[Given] = (), seeds: Iterable[int] = (0,), *, steps: int = 28,
          guidance: float = 2.5, size: tuple[int, int] | None = None, keep_size: bool = False,
          mask: Given | None = None, mask_blur: float = 0, route_by: str | None = None,
          watch: Callable = denoise,
          callback: Callable[[int, Tensor], object] = lambda step, latents: None
          ) -> Iterator[Image.Image]:
    """What an instruction makes of some pictures: one for each seed, as soon as it is there.

    images, conds: one or several files, PIL pictures or arrays; conds also "canny:FILE". size:
    (W, H); keep_size: the result takes that of the first picture. mask: of the first picture, white
    where it may change, fading over mask_blur pixels. route_by: the text that chooses the experts,
    if not the instruction. watch, callback: as generate() takes them. In .info are texts of how it
    was made, for pictures.save_picture(). Raises: ValueError, FileNotFoundError.
    """
    plans.check_call(pipe.t5_tokens, instruction, steps, guidance, size)
    only, images = pipe.vae.config.only_size, [given_picture(one) for one in each(images)]
    conds = [read_cond(one, partial(cond_size, only, longest=pipe.longest)) for one in each(conds)]
    mask = masks.read_mask(mask, images, mask_blur) if mask is not None else None
    made_at = output_size(only, images, size)
    given = condition(pipe, [instruction], *prepare(only, images, conds, made_at, pipe.longest),
                      route_by)
    for seed in map(plans.checked_seed, seeds):
        noise = seeded_noise([seed], made_at, pipe.vae.config.latent_channels)
        hold = masks.held(mask, made_at, given.ref, noise) if mask else None
        made, _ = generate(pipe, given, noise, steps, guidance, hold, watch, callback)
        picture = Image.fromarray(made[0])
        if keep_size and images:
            picture = Image.fromarray(resize(picture, images[0].size))
        if mask:
            picture = masks.laid_over(picture, images[0], mask)
        picture.info = origin.texts(pipe.names, instruction, seed, steps, guidance, made_at, {
            "reference": len(images), "condition": len(conds), "mask": bool(mask)}, route_by)
        yield picture


def edit(pipe: Pipeline, instruction: str, images: Given | Iterable[Given] = (),
         conds: Given | Iterable[Given] = (), seed: int | Sequence[int] = 0, **settings: object
         ) -> Image.Image | list[Image.Image]:
    """The picture that edits() makes, or for several seeds a list; settings: its further ones."""
    one = np.ndim(seed) == 0
    seeds = [*map(plans.checked_seed, [seed] if one else seed)]              # before any is made
    made = list(edits(pipe, instruction, images, conds, seeds, **settings))
    return made[0] if one else made


# ----------------------------------------------------------------------------------------- command

def make(pipe: Pipeline, job: jobs.Job, args: argparse.Namespace, bar: tqdm) -> None:
    """Make, save and report one job's pictures. bar: over all steps of all jobs."""
    start, images = time.time(), [load_image(path) for path in job.images]
    bar.set_description("encoding")
    watch = Trace(denoise, encode_text) if args.explain else denoise
    made = edits(pipe, job.instruction, images, job.conds, [seed for seed, _ in job.outs],
                 steps=args.steps, guidance=args.guidance, size=args.size,
                 keep_size=args.keep_size, mask=job.mask, mask_blur=args.mask_blur,
                 route_by=args.route_by, watch=watch, callback=jobs.advancing(bar, args.steps))
    for (seed, out), picture in zip(job.outs, made):
        out = jobs.save(picture, out, over=bool(args.out or args.batch))
        bar.write(f"{out}: {jobs.size_told(picture, images)}, {args.steps} steps, seed {seed}, "
                  f"{time.time() - start:.1f} s{routing_maps.experts_line(pipe.adapter)}")
        if args.explain:
            from support import explain                  # imports much that a picture does without
            explain.write(args.explain, watch, picture, job)
        start = time.time()


def main() -> None:
    args = options.sample_options()
    todo = plans.plan(args)
    number = sum(len(job.outs) for job in todo)
    if args.export_lora or args.routing or number:
        pipe = load_pipeline(adapter=options.adapters_of(args), **options.model_of(args))
        plans.tell_size(args.size, pipe.vae.config.only_size)
        if args.compile:
            devices.compile_blocks(pipe.dit)
        export.write_asked(args, pipe, partial(encode_text, pipe), todo)
        with tqdm(desc="encoding", total=number * args.steps, unit="step", leave=False,
                  disable=not number) as bar:
            for job in todo:
                if job.outs:
                    make(pipe, job, args, bar)
    jobs.tell_skipped(todo)


if __name__ == "__main__":
    commands.run(main)
