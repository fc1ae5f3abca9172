"""Train an adapter (InstructMoLE, plain LoRA, ...) on a frozen FLUX Kontext model.

    xt   = (1 - t) x0 + t noise
    loss = mean((velocity - (noise - x0))^2) + c(step) * sum(balance + orthogonality losses)

c falls from 1 to 1e-5 along a cosine over the run. Read flow_loss() (samples become x0, noise and
t), matching_loss() (xt, velocity, losses), accumulate() (a step's gradients), train() (the loop).

Everything random in a micro-batch (samples, noise, times, dropout, router noise) is a function of
the seed and the micro-batch's number alone: the same command gives the same file, and a resumed run
goes on as if it had not stopped.

Key: B batch; H, W pixels; h, w latent grid; C = 16 latent channels; I target tokens; P = 64 packed.

Run: python train.py --data tiny --steps 20 --out runs/try
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # what is imported now takes seconds
import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from operator import call

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import baselines
import data
import dit
import weights
from data import Sample, Source, stack
from mole import Adapter, AdapterConfig
from sample import (Conditioning, Pipeline, as_tokens, condition, encode_picture, encode_text,
                    generate, load_pipeline, seeded_noise, velocity)
from support import (adapters, caching, devices, distributed, methods, offload, options, record,
                     report, resume, routing_maps, stopping, streaming, summary)
from support.bad_rows import Bad, tell_skipped
from support.casts import casting
from support.fp8 import to_fp8
from support.muon import Muon
from support.pictures import save_picture, to_tensor
from support.public_sets import PUBLIC
from support.recompute import recomputing, sparing, when_compiled
from support.resume import Optimizers
from support.sheets import grid
from support.training_options import train_options
from support.validation import HeldOut, noted, open_held_out, some_of_each
from tiny.world import TinyWorld

INSTRUCTION_DROPOUT = 0.1                                # chance that a micro-batch has empty texts
CONDITION_DROPOUT = 0.05                                 # chance that a clean condition is left out
GUIDANCE = 1.0                                           # what the model is told while training
Sources = list[tuple[Source, float]]                     # each with its weight


# ---------------------------------------------------------------------------------------- the loss

def flow_loss(pipe: Pipeline, samples: list[Sample], seed: int, recompute: bool = False,
              shift: float = 1.0) -> dict[str, Tensor]:
    """Flow matching and auxiliary losses of one micro-batch; sets torch's random state.

    -> {"flow", "balance", "orthogonality"}, scalars with gradients to the adapter.
    """
    torch.manual_seed(seed)
    instructions = [s.instruction for s in samples]
    images = stack(s.images for s in samples)            # each (B, 3, H, W) in [-1, 1]
    conds = stack(s.conds for s in samples)              # each (B, 3, H, W)
    drawn = torch.rand(1 + len(conds))                   # uniform, for the dropouts
    if drawn[0] < INSTRUCTION_DROPOUT:
        instructions = [""] * len(samples)
    # Deviation: a dropped condition's tokens go too; the research code drops its ids alone.
    conds = [cond for cond, u in zip(conds, drawn[1:]) if u >= CONDITION_DROPOUT]
    given = condition(pipe, instructions, images, conds)
    mean, logvar = encode_picture(pipe, to_tensor([s.target for s in samples]))
    latents = pipe.vae.latents(mean, logvar, torch.randn(mean.shape).to(mean))     # (B, C, h, w)
    x0 = dit.pack(latents.float())                       # (B, I, P)
    noise = torch.randn(x0.shape).to(pipe.device)        # drawn on the CPU: the same everywhere
    t = torch.rand(len(x0)).to(pipe.device)              # (B,), 1 = pure noise
    t = shift * t / (1 + (shift - 1) * t)                # shift > 1: more of them near 1
    return matching_loss(pipe, given, x0, noise, t, latents.shape[-2:], recompute)


def matching_loss(pipe: Pipeline, given: Conditioning, x0: Tensor, noise: Tensor, t: Tensor,
                  size: tuple[int, int], recompute: bool) -> dict[str, Tensor]:
    """What flow_loss() gives, for x0 and noise (B, I, P), t (B,) and the latents' size (h, w)."""
    xt = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise              # (B, I, P)
    guidance = torch.full_like(t, GUIDANCE)                                  # (B,)
    with pipe.adapter.serve(given.txt, given.pooled, losses=True) as routing:
        run = casting(pipe.dtype, pipe.run or call)      # calls each block, in its type
        run = recomputing(pipe.adapter, routing, run) if recompute else run
        v = velocity(pipe.dit, xt.to(pipe.dtype), t, guidance, given, *size, run)  # (B, I, P)
    return {"flow": F.mse_loss(v.float(), noise - x0), "balance": routing.balance,
            "orthogonality": routing.orthogonality}


# ---------------------------------------------------------------------------------------- one step

def cosine(step: int, steps: int) -> float:
    """From 1 at the start to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def auxiliary_factor(step: int, steps: int) -> float:
    """c(step): from 1 at the start to 1e-5 at the end, along a cosine."""
    return 1e-5 + (1 - 1e-5) * cosine(step, steps)


def accumulate(pipe: Pipeline, micro_batches: list[tuple[int, list[Sample]]], factor: float,
               recompute: bool = False, shift: float = 1.0) -> dict[str, float]:
    """Add the gradients of the sum of the micro-batches' losses; -> the mean of each part.

    micro_batches: (seed, samples) each. Auxiliary losses belong to the micro-batch they come from.
    """
    totals: dict[str, float] = {}
    for seed, samples in micro_batches:
        parts = flow_loss(pipe, samples, seed, recompute, shift)
        loss = parts["flow"] + factor * (parts["balance"] + parts["orthogonality"])
        loss.backward()
        for name, value in (parts | {"loss": loss}).items():
            totals[name] = totals.get(name, 0.0) + value.item() / len(micro_batches)
    return totals


def make_optimizers(adapter: Adapter, lr: float, router_lr: float,
                    kind: str = "adamw") -> Optimizers:
    """AdamW; the routers have their own rate. All states are fp32, as the adapter is.

    kind "muon": Muon at twice the rate for the matrices A and B, AdamW for the rest. A group's
    "initial_lr" is what its "lr" is counted from.
    """
    groups: dict[str, list[nn.Parameter]] = {"others": [], "routers": [], "matrices": []}
    for name, p in adapter.tensors().items():
        if name.endswith("router.weight"):
            groups["routers"].append(p)
        elif name.endswith(("_A", "_B")) and kind == "muon":
            groups["matrices"].append(p)
        else:
            groups["others"].append(p)
    adamw = [{"params": groups[name], "lr": rate, "initial_lr": rate}
             for name, rate in (("others", lr), ("routers", router_lr)) if groups[name]]
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4,
                                    fused=True)] if adamw else []
    return optimizers + ([Muon(groups["matrices"], 2 * lr, 1e-4)] if groups["matrices"] else [])


def update(args: argparse.Namespace, adapter: Adapter, optimizers: Optimizers, step: int,
           loss: float) -> float:
    """Follow the gradients, clipped to a norm of 1; -> their norm before. Raises: ValueError."""
    norm = nn.utils.clip_grad_norm_(adapter.tensors().values(), 1.0).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(f"step {step}: the loss is no number any more; the last checkpoint, if "
                         f"any, is in {args.out}. Try a smaller --lr")
    decay = cosine(step, args.steps) if args.schedule == "cosine" else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * decay
        optimizer.step()
        optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------------------------- the loop

def micro_batches(args: argparse.Namespace, sources: Sources, first: int, stride: int
                  ) -> Iterator[list[tuple[int, list[Sample]]]]:
    """Each step's, from number `first` on every stride-th, as accumulate() takes them."""
    batches = data.batches(sources, args.batch_size, args.seed, first, stride)
    seeded = zip((args.seed * 2 ** 32 + i for i in count(first, stride)), batches)
    while True:
        yield list(islice(seeded, args.accumulate))


def train(args: argparse.Namespace, pipe: Pipeline, sources: Sources, held_out: HeldOut,
          settings: dict, rank: int, workers: int) -> None:
    """Run the steps that are left. Of the micro-batches, this process takes every workers-th."""
    adapter = pipe.adapter.train()
    router_lr = args.lr / 2 if args.router_lr is None else args.router_lr
    optimizers = make_optimizers(adapter, args.lr, router_lr, args.optimizer)
    start, number = resume.start(args.out, adapter, optimizers, settings, args.resume)
    if rank == 0:
        record.write_run(args, settings)
        report.tell_missing()
    watching = rank == 0 or args.shard                   # --shard: a pass needs all processes
    shown = some_of_each(sources, args.seed) if watching else []
    drawn = micro_batches(args, sources, number + rank, workers)
    spared = sparing(accumulate, args.recompute)         # done again where memory runs out
    log, began = record.Log(args.out, start, rank), time.time()
    with stopping.stop_signals() as asked, tqdm(
            range(start, args.steps), initial=start, total=args.steps, desc=args.method,
            mininterval=2, disable=rank > 0) as bar:
        for step, micro in zip(bar, stopping.one_ahead(drawn, asked)):
            number += args.accumulate * workers          # of the next step's first micro-batch
            if step == 0 and rank == 0:
                record.show_batch(args.out, micro[0][1], pipe.t5_tokens)
            losses = spared(pipe, micro, auxiliary_factor(step, args.steps), args.shift)
            distributed.average(adapter.tensors().values(), args.accumulate)     # the gradients
            losses, stop = distributed.agree(losses, stop=len(asked) > 0)
            norm = update(args, adapter, optimizers, step, losses["loss"])
            log.write(step, losses, norm, [s for _, batch in micro for s in batch],
                      time.time() - began)
            last = step + 1 == args.steps
            due = last or (step + 1) % args.save_every == 0
            if rank == 0 and (due or stop):
                resume.save_checkpoint(args.out, adapter, optimizers, step + 1, number, settings,
                                       args.keep)
            if due and watching:
                pictures = previews(pipe, shown, held_out, log, step + 1)
                if rank == 0:
                    for name, picture in pictures.items():
                        save_picture(picture, args.out / f"{name}.png")
            bar.set_postfix(log.told(losses), refresh=False)
            if stop and not last:
                bar.close()
                stopping.leave(step + 1, asked)
            began = time.time()
    if rank == 0:
        record.tell_end(args, adapter, start)


def answer(pipe: Pipeline, s: Sample) -> np.ndarray:
    """What the model makes of a sample, (H, W, 3) uint8."""
    given = condition(pipe, [s.instruction], stack([s.images]), stack([s.conds]))
    noise = seeded_noise([0], s.target.shape[1::-1], pipe.vae.config.latent_channels)
    return generate(pipe, given, noise, steps=12)[0][0]


def sample_sheet(pipe: Pipeline, samples: list[Sample]) -> np.ndarray:
    """One row per sample: what was given, what the model makes of it, what was wanted."""
    return grid([[*s.given, answer(pipe, s), s.target] for s in samples],
                [s.instruction for s in samples], lines=2)


def previews(pipe: Pipeline, samples: list[Sample], held_out: HeldOut, log: record.Log,
             step: int) -> dict[str, np.ndarray]:
    """Pictures of how training goes, by name, and plots; the held-out loss is logged."""
    pipe.adapter.eval()
    pictures = held_out.check(log, step, pipe, condition, encode_picture, matching_loss, answer)
    with noted(f"no samples are shown after step {step}"):
        pictures[f"samples_{step:06d}"] = sample_sheet(pipe, samples)
    similarity = routing_maps.expert_similarity(         # with --shard a pass of all processes
        pipe.adapter, lambda: flow_loss(pipe, samples[:1], 0))
    if log.rank == 0:
        use = {task: routing_maps.shares(pipe.adapter, *encode_text(pipe, list(texts)))
               for task, texts in sorted(log.instructions.items())}
        pictures |= routing_maps.of_run(log, step, use, similarity)
    pipe.adapter.train()
    return pictures


# ----------------------------------------------------------------------------------------- command

def tell_memory(args: argparse.Namespace, config: AdapterConfig, sources: Sources) -> None:
    """Say what memory a step will need, by tensors that have shapes and types and hold nothing."""
    from support import dry_run                          # imports much that training does not use
    pipe = load_pipeline(adapter=None, weightless=True, **options.model_of(args))
    if args.base_dtype == "fp8":
        to_fp8(pipe.dit)
    largest = dry_run.largest(data.batches(sources, 1, args.seed))

    def adapt() -> tuple[Adapter, Optimizers]:
        pipe.adapter = weights.new_adapter(pipe.dit, config)
        return pipe.adapter, make_optimizers(pipe.adapter, args.lr, args.lr, args.optimizer)

    loss_of = partial(dry_run.empty_loss, pipe, largest, as_tokens, matching_loss)
    dry_run.tell(args, pipe, adapt, loss_of, largest)


def open_sources(args: argparse.Namespace, bad: Bad | None) -> Sources:
    """What --data names; bad takes what is wrong with rows. Raises: as data.open_source() does."""
    size = options.only_size(args)
    sources = [data.open_source(
        text, {"tiny": TinyWorld}, PUBLIC, size=size, root=args.data_root, bad=bad,
        longest=args.longest, draws=args.cache_draws) for text in args.data]
    if args.cache:
        caching.check_ends(args.data, sources)
    return sources


def run_training(args: argparse.Namespace, config: AdapterConfig, first: dict[str, Tensor] | None,
                 sources: Sources, held_out: HeldOut) -> None:
    """Load the model, put an adapter on it, new or with `first` weights, and train that."""
    devices.keep_freed_memory()
    rank, workers = distributed.join(args)
    pipe = load_pipeline(adapter=None, at_home=True, **options.model_of(args))
    identity = record.identity(pipe.paths, pipe.dtype)
    if args.cache:
        caching.fill(args, pipe, sources, identity, encode_text, encode_picture)
    if args.base_dtype == "fp8":
        to_fp8(pipe.dit, pipe.device)
    torch.manual_seed(args.seed)                         # the adapter's first weights: of the CPU
    pipe.adapter = weights.new_adapter(pipe.dit, config)
    if first:
        adapters.fill_in(pipe.adapter, first, args.init)
    streamed = not offload.settle(args, pipe) and not args.shard
    if args.shard:
        distributed.shard(pipe.dit, pipe.adapter, pipe.device)
    elif streamed:
        args.recompute = "on"
        streaming.tell(pipe.device)
    if args.compile:
        args.recompute = when_compiled(pipe.adapter, args.recompute)
        devices.compile_blocks(pipe.dit)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = record.settings_of(args, config, identity, sources)
    with (resume.alone(args.out, args.resume),
          streaming.stream(pipe.dit, pipe.device) if streamed else nullcontext() as run):
        pipe.run = run
        train(args, pipe, sources, held_out, settings, rank, workers)
    distributed.leave()


def main() -> None:
    args = train_options(baselines.METHODS, PUBLIC)
    config, first = methods.chosen(args, baselines.KINDS)
    bad: Bad | None = {} if args.skip_bad else None
    sources = open_sources(args, bad)
    held_out = open_held_out(args, data.open_one, TinyWorld, PUBLIC, bad)
    try:
        summary.tell(args, sources, held_out)
        if args.dry_run is None:
            run_training(args, config, first, sources, held_out)
        elif commands.is_first():
            tell_memory(args, config, sources)
    finally:
        tell_skipped(bad)


if __name__ == "__main__":
    commands.run(main)
