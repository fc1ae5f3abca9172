"""Train an adapter (InstructMoLE, plain LoRA, ...) on a frozen FLUX Kontext model.

    loss = mean((velocity - (noise - x0))^2) + c(step) * sum(balance + orthogonality losses)

c falls from 1 to 1e-5 along a cosine over the run. Everything random in a micro-batch (samples,
noise, times, dropout, router noise) is a function of the seed and the micro-batch's number alone:
the same command gives the same file, and a resumed run goes on as if it had not stopped.

Key: B batch; H, W pixels; h, w latent grid; C = 16 latent channels; I target tokens; P = 64 packed.

Run: python train.py --data tiny --steps 20 --out runs/try
"""
import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import baselines
import data
import dit
import mole
import weights
from data import Sample, stack, to_tensor
from mole import AdapterConfig
from sample import (ROOM, Given, Pipeline, add_model_options, arranged, check_compiler,
                    choose_device, compile_blocks, condition, draw_routing, drawn, encode_picture,
                    encode_text, expert_use, fits, generate, memory, model_options, model_paths,
                    open_model, put_adapter, save_picture, seeded_noise, velocity, visiting,
                    weights_of)
from tiny.world import TinyWorld
from vae import VAEConfig

INSTRUCTION_DROPOUT = 0.1                                # chance that a micro-batch has empty texts
CONDITION_DROPOUT = 0.05                                 # chance that a clean condition is left out
CHECKPOINTS = ("checkpoint.pt", "checkpoint_before.pt")  # the newest, and what it replaced
GB = 10 ** 9                                             # bytes, in what --dry-run says
GUIDANCE = 1.0                                           # what the model is told while training


def cosine(step: int, steps: int) -> float:
    """From 1 at the start to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def auxiliary_factor(step: int, steps: int) -> float:
    """c(step): from 1 at the start to 1e-5 at the end, along a cosine."""
    return 1e-5 + (1 - 1e-5) * cosine(step, steps)


def adapter_config(kind: str, file: Path | None) -> AdapterConfig:
    """An adapter kind's configuration: that of the file (else the published one), with its routing.

    Raises: FileNotFoundError, ValueError.
    """
    values = {} if file is None else weights.read_json(file)
    if values.keys() & {"lora_config", "moe_config"}:    # the research code's own
        values = weights.from_research(values, file)
    c = weights.config_from(AdapterConfig, values, file or "adapter", whole=True)
    return baselines.configure(kind, c)


def shard(pipe: Pipeline) -> None:
    """Leave each process its part of every block's frozen weights; a block is whole while it runs.

    The adapter is not split: every process has all of it.
    """
    own = set(pipe.adapter.tensors().values())
    for block in (*pipe.dit.transformer_blocks, *pipe.dit.single_transformer_blocks):
        fully_shard(block.to(pipe.device), ignored_params=own)   # one at a time on the device
    for part in (pipe.adapter.instruction, *pipe.dit.children()):
        if part is not None and not isinstance(part, nn.ModuleList):
            part.to(pipe.device)


# -------------------------------------------------------------------------------------- one step

def recomputed(adapter: mole.Adapter, routing: mole.Routing) -> Callable:
    """A `run` for the transformer: keep each block's inputs only, compute again in backward.

    The second computation is routed like the first; what it adds to the losses is thrown away.
    """
    def contexts() -> tuple:                             # around the first, and the second
        return nullcontext(), adapter.use(replace(routing, again=True))
    return lambda block, *args: checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def flow_loss(pipe: Pipeline, samples: list[Sample], seed: int, checkpointing: bool = False,
              shift: float = 1.0) -> dict[str, Tensor]:
    """Flow matching and auxiliary losses of one micro-batch; sets torch's random state.

    -> {"flow", "balance", "orthogonality"}, scalars with gradients to the adapter.
    """
    torch.manual_seed(seed)
    drop = torch.rand(1 + len(samples[0].conds))
    instructions = ["" if drop[0] < INSTRUCTION_DROPOUT else s.instruction for s in samples]
    images = stack(s.images for s in samples)            # each (B, 3, H, W)
    conds = [cond for cond, chance in zip(stack(s.conds for s in samples), drop[1:])
             if chance >= CONDITION_DROPOUT]
    # Deviation: a dropped condition's tokens go, not only its ids, as in the research code.
    given = condition(pipe, instructions, images, conds)
    mean, logvar = encode_picture(pipe, to_tensor([s.target for s in samples]))    # (B, C, h, w)
    h, w = mean.shape[-2:]
    x0 = pipe.vae.latents(mean, logvar, torch.randn(mean.shape).to(mean))
    x0 = dit.pack(x0.float())                            # (B, I, P)
    noise = torch.randn(x0.shape).to(pipe.device)        # drawn on the CPU: the same everywhere
    t = torch.rand(len(x0)).to(pipe.device)              # (B,), 1 = pure noise
    t = shift * t / (1 + (shift - 1) * t)                # shift > 1: more of them near 1
    return matching_loss(pipe, given, x0, noise, t, (h, w), checkpointing)


def matching_loss(pipe: Pipeline, given: Given, x0: Tensor, noise: Tensor, t: Tensor,
                  grid: tuple[int, int], checkpointing: bool) -> dict[str, Tensor]:
    """What flow_loss() gives, for x0 and noise (B, I, P), t (B,) and a latent grid (h, w)."""
    xt = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise              # (B, I, P)
    with pipe.adapter.serve(given.txt, given.pooled, losses=True) as routing:
        run = recomputed(pipe.adapter, routing) if checkpointing else dit.call
        guidance = torch.full_like(t, GUIDANCE)
        v = velocity(pipe.dit, xt.to(pipe.dtype), t, guidance, given, *grid, run)
    return {"flow": F.mse_loss(v.float(), noise - x0), "balance": routing.balance,
            "orthogonality": routing.orthogonality}


def accumulate(pipe: Pipeline, micro_batches: list[tuple[int, list[Sample]]], factor: float,
               checkpointing: bool = False, shift: float = 1.0) -> dict[str, float]:
    """Add the gradients of the sum of the micro-batches' losses; -> the mean of each part.

    micro_batches: (seed, samples) each. Auxiliary losses belong to the micro-batch they come from.
    """
    totals: dict[str, float] = {}
    for seed, samples in micro_batches:
        parts = flow_loss(pipe, samples, seed, checkpointing, shift)
        loss = parts["flow"] + factor * (parts["balance"] + parts["orthogonality"])
        loss.backward()
        for name, value in (parts | {"loss": loss}).items():
            totals[name] = totals.get(name, 0.0) + value.item() / len(micro_batches)
    return totals


def average(adapter: mole.Adapter, losses: dict[str, float], passes: int) -> dict[str, float]:
    """Gradients and losses: from sums over a process's micro-batches to means over all of them.

    What follows the batch without a gradient (Expert Race's thresholds) is averaged too.
    """
    workers = dist.get_world_size() if dist.is_initialized() else 1
    values = torch.tensor(list(losses.values()), dtype=torch.float64)
    for p in adapter.tensors().values():
        value = p.grad if p.requires_grad else p.data
        if workers > 1 and value is not None:
            dist.all_reduce(value)
            value /= workers
        if p.grad is not None:
            p.grad /= passes
    if workers > 1:
        dist.all_reduce(values)
    return dict(zip(losses, (values / workers).tolist()))


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1. (n, a, b) -> (n, a, b)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):                                   # an odd polynomial of the singular values
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: every direction of a hidden matrix is learned at one pace.

        M <- 0.95 M + 0.05 G                                             G: the gradient
        W <- W - lr * 0.2 sqrt(max(a, b)) * orthogonal(0.05 G + 0.95 M)  W is (a, b)

    The factor gives the step the size that AdamW's has. Each of several processes makes orthogonal
    its share of the matrices. torch.optim.Muon computes in bf16 alone, slow on many processors.
    Source: Jordan et al., 2024, "Muon"; the factor: Liu et al., arXiv 2502.16982.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        (group,), together = self.param_groups, dist.is_initialized()
        rank, workers = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        stacks: dict[torch.Size, list[Tensor]] = {}      # matrices of one shape are one batch
        for p in group["params"]:
            stacks.setdefault(p.shape, []).append(p)
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            self.state[p]["momentum"].lerp_(p.grad, 0.05)
        for shape, stack in stacks.items():
            steps = stack[0].new_zeros(len(stack), *shape)
            ahead = [p.grad.lerp(self.state[p]["momentum"], 0.95) for p in stack[rank::workers]]
            if ahead:
                steps[rank::workers] = orthogonal(torch.stack(ahead))
            if together:
                dist.all_reduce(steps)
            for p, step in zip(stack, steps):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(step, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def make_optimizers(adapter: mole.Adapter, lr: float, router_lr: float,
                    kind: str = "adamw") -> list[torch.optim.Optimizer]:
    """AdamW; the routers have their own rate. All states are fp32, as the adapter is.

    kind "muon": Muon at twice the rate for the matrices A and B, AdamW for the rest. A group's
    "initial_lr" is what its "lr" is counted from.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "routers": [], "others": []}
    for name, p in adapter.tensors().items():
        groups["routers" if name.endswith("router.weight") else
               "matrices" if name.endswith(("_A", "_B")) and kind == "muon" else "others"].append(p)
    adamw = [{"params": groups[name], "lr": rate}
             for name, rate in (("others", lr), ("routers", router_lr)) if groups[name]]
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4,
                                    fused=True)] if adamw else []
    optimizers += [Muon(groups["matrices"], 2 * lr, 1e-4)] if groups["matrices"] else []
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def fill(pipe: Pipeline, sources: list[tuple[data.Source, float]], rank: int, workers: int) -> None:
    """Encode all that can be drawn, once, into the pipeline's cache: this process's share."""
    samples = (sample for source, _ in sources for sample in source.all(rank, workers))
    encoders = nn.ModuleList((pipe.t5, pipe.clip, pipe.vae))
    with visiting(encoders, pipe.device) if fits(encoders, pipe.device) else nullcontext():
        bar = tqdm(desc="encoding", unit=" samples", disable=rank > 0)
        while some := list(islice(samples, 4)):          # few: pictures are large on their way
            bar.update(len(some))
            encode_text(pipe, [s.instruction for s in some] + [""])
            for picture in (p for s in some for p in (s.target, *s.images, *s.conds)):
                encode_picture(pipe, to_tensor([picture]))
        bar.close()
    pipe.cache.save()
    if workers > 1:
        dist.barrier()
        pipe.cache.open()


def open_cache(folder: Path, about: dict, rank: int, workers: int) -> weights.Cache:
    """The folder's cache, made by the first process. Raises: ValueError."""
    if rank > 0:
        dist.barrier()
    cache = weights.Cache(folder, about)
    if rank == 0 and workers > 1:
        dist.barrier()
    return cache


def identity(args: argparse.Namespace, pipe: Pipeline) -> dict[str, str]:
    """What tells a model from others: a digest of each part's files, and the type.

    Of a file of gigabytes a thousand pieces are looked at.
    """
    found = {"dtype": str(pipe.dtype)}
    for part, path in model_paths(args.model, **model_options(args)).items():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                size = file.stat().st_size
                digest.update(f"{file.name} {size}".encode())
                pieces, length = (1, size) if size < 2 ** 30 else (1024, 4096)
                with file.open("rb") as opened:
                    for i in range(pieces):
                        opened.seek(size * i // pieces)
                        digest.update(opened.read(length))
        found[part] = digest.hexdigest()
    return found


# ----------------------------------------------------------------------------------------- memory

class Live(TorchDispatchMode):
    """Bytes of the tensors that operations within the `with` made and that live: now, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()                     # storages; several tensors may share one

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def forget(self, storage: int, size: int) -> None:
        self.known.remove(storage)
        self.now -= size


def play(pipe: Pipeline, sample: Sample, batch: int, optimizers: list[torch.optim.Optimizer],
         args: argparse.Namespace, live: Live) -> tuple[int, int]:
    """Most bytes alive in a step's passes, and in its update, for `batch` such samples."""
    c, adapter = pipe.dit.config, pipe.adapter
    x0, *latents = (torch.empty(batch, c.in_channels // 4, p.shape[0] // 8, p.shape[1] // 8)
                    for p in (sample.target, *sample.images, *sample.conds))
    txt = torch.empty(batch, pipe.t5_tokens.length, c.joint_attention_dim, dtype=pipe.dtype)
    pooled = torch.empty(batch, c.pooled_projection_dim, dtype=pipe.dtype)
    given = arranged(txt, pooled, [z.to(pipe.dtype) for z in latents], len(sample.images))
    tokens, t = dit.pack(x0), torch.empty(batch)
    if args.accumulate > 1:                              # the passes after the first have them
        for p in adapter.tensors().values():
            p.grad = torch.empty_like(p) if p.requires_grad else None
    live.most = live.now
    losses = matching_loss(pipe, given, tokens, tokens, t, x0.shape[-2:], args.checkpoint)
    sum(losses.values()).backward()
    passes, live.most = live.most, live.now
    nn.utils.clip_grad_norm_(adapter.tensors().values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return passes, live.most


def dry_run(args: argparse.Namespace, config: AdapterConfig, sources: list) -> None:
    """Say what memory training will need, by a step played with tensors that hold nothing.

    They have shapes and types alone, so no weight is read. Counted as on a CPU, for one process.
    """
    pipe = open_model(args, None, weightless=True)
    if args.base_dtype == "fp8":
        weights.to_fp8(pipe.dit)
    batches = data.batches(sources, 1, args.seed)
    sample = max((next(batches)[0] for _ in range(16)), key=lambda s: sum(
        picture.size for picture in (s.target, *s.images, *s.conds)))
    batches.close()
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        pipe.dit.to_empty(device="cpu")
        base, blocks = live.now, [sum(t.nbytes for t in weights_of(block)) for block in (
            *pipe.dit.transformer_blocks, *pipe.dit.single_transformer_blocks)]
        pipe.adapter = put_adapter(pipe.dit, config)
        own = live.now - base
        optimizers = make_optimizers(pipe.adapter, args.lr, args.lr, args.optimizer)
        first, _ = play(pipe, sample, 1, optimizers, args, live)
        states = live.now - base - own                   # the optimizers made them at their end
        second, update = play(pipe, sample, 2, optimizers, args, live)
    first += states
    room = args.dry_run * GB or memory(pipe.device)
    if args.shard:                                       # but for two: at work, and on its way
        elsewhere = (sum(blocks) - 2 * max(blocks)) * (1 - 1 / int(os.environ["WORLD_SIZE"]))
        base, first, second, update = (int(size - elsewhere) for size in
                                       (base, first, second, update))
    encoders = 0 if args.cache else sum(
        t.nbytes for part in (pipe.t5, pipe.clip, pipe.vae) for t in weights_of(part))
    stay = encoders if base + encoders < ROOM * room else 0      # as load_pipeline() decides
    passes = first + (args.batch_size - 1) * (second - first)
    whole = max(passes, update)
    height, width = sample.target.shape[:2]
    print(f"memory for a batch of {args.batch_size}, {width}x{height}, {len(sample.images)} "
          f"references, {len(sample.conds)} conditions; the largest of 16 samples:")
    for name, size in (("transformer, frozen", base), ("adapter, fp32", own), ("gradients", own),
                       ("optimizer", states), ("activations", whole - base - 2 * own - states),
                       ("text encoders, autoencoder", stay), ("together", whole + stay)):
        print(f"  {name:27}{size / GB:7.2f} GB")
    most = 1 + int((room - stay - first) // (second - first)) if update + stay < room else 0
    print(f"  largest batch in {room / GB:.1f} GB: {max(0, most)}")


# ------------------------------------------------------------------------------------------ files

def fingerprint(source: data.Source) -> str | None:
    """Tells a source's data from others by names, texts and sizes; None if it has no end."""
    if not hasattr(source, "contents"):
        return None
    digest = hashlib.sha256()
    for entry in source.contents():
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:16]


def save_record(args: argparse.Namespace, settings: dict) -> None:
    """run.json: all that is needed to do it again."""
    record = {"arguments": {name: value if isinstance(value, (list, int, float, bool, type(None)))
                            else str(value) for name, value in vars(args).items()},
              "settings": settings | {name: json.loads(settings[name])
                                      for name in ("config", "fingerprints")},
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "numpy": np.__version__}}
    with weights.replacing(args.out / "run.json") as aside:
        aside.write_text(json.dumps(record, indent=2) + "\n")


def save_checkpoint(out: Path, adapter: mole.Adapter, optimizers: list[torch.optim.Optimizer],
                    step: int, number: int, settings: dict) -> None:
    """adapter.safetensors for use, checkpoint.pt to go on from; the checkpoint before is kept.

    Both are written aside; then the adapter is renamed, the old checkpoint, and last the new one.
    """
    state = {"step": step, "number": number, "settings": json.dumps(settings),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "adapter": {name: p.detach() for name, p in adapter.tensors().items()}}
    with weights.replacing(out / CHECKPOINTS[0]) as last:       # renamed last: all is there then
        torch.save(state, last)
        with weights.replacing(out / "adapter.safetensors") as first:
            mole.save(adapter, first, step=str(step), settings=state["settings"])
        if (out / CHECKPOINTS[0]).is_file():
            (out / CHECKPOINTS[0]).replace(out / CHECKPOINTS[1])


def read_checkpoint(out: Path) -> dict | None:
    """The last checkpoint in `out` that can be read, or None if none is. Raises: ValueError."""
    broken = []
    for file in (out / name for name in CHECKPOINTS):
        if file.is_file():
            try:
                state = weights.unpickled(file)
                if not isinstance(state, dict) or not state.keys() >= {
                        "settings", "adapter", "optimizers", "step", "number"}:
                    raise ValueError(f"{file}: is no checkpoint")
                state["settings"] = weights.parse_json(state["settings"], file)
                for line in broken:
                    print(f"{line}; going on from the one before it", file=sys.stderr)
                return state
            except ValueError as error:
                broken.append(str(error))
    if broken:
        raise ValueError(f"{broken[0]}; name another --out")
    return None


def load_checkpoint(out: Path, adapter: mole.Adapter, optimizers: list[torch.optim.Optimizer],
                    settings: dict) -> tuple[int, int]:
    """Take up the run in `out`; -> next step, next micro-batch. Raises: ValueError if another's."""
    state = read_checkpoint(out)
    if state is None:
        return 0, 0
    before = state["settings"]
    changed = [name for name in settings               # what old runs do not name was not asked for
               if settings[name] != before.get(name, "None")]
    for name in changed:                                 # more processes, more data: may go on
        told = f"{out} began with {name} = {before.get(name)}, not {settings[name]}"
        if name not in ("micro_batches", "fingerprints"):
            raise ValueError(f"--resume: {told}")
        print(f"note: {told}", file=sys.stderr)
    adapter.fill(state["adapter"])
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
    return state["step"], state["number"]


def sample_sheet(pipe: Pipeline, samples: list[Sample]) -> np.ndarray:
    """One row per sample: what was given, what the model makes of it, what was wanted."""
    rows = []
    for sample in samples:
        height, width = sample.target.shape[:2]
        noise = seeded_noise([0], (width, height), pipe.vae.config.latent_channels)
        given = condition(pipe, [sample.instruction], stack([sample.images]), stack([sample.conds]))
        result, _ = generate(pipe, given, noise, steps=12)
        rows.append([*sample.images, *sample.conds, result[0], sample.target])
    return data.grid(rows, [sample.instruction for sample in samples])


def expert_similarity(pipe: Pipeline, sample: Sample) -> Tensor | None:
    """|cosine| of the experts' outputs on one sample, a mean over the layers: (E, E), or None."""
    found = []

    def look(layer: mole.MoLELinear, args: tuple, _: Tensor) -> None:
        H = args[0].to(layer.experts_A.dtype) @ layer.experts_A              # (..., E r)
        found.append(mole.similarity(H, layer.experts_B, layer.config.experts).abs())
    hooks = [layer.register_forward_hook(look) for layer in pipe.adapter.layers.values()
             if isinstance(layer, mole.MoLELinear)]
    with torch.no_grad():
        flow_loss(pipe, [sample], 0)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean(0).cpu() if found else None


def draw_losses(log: Path) -> np.ndarray:
    """What log.jsonl says of every step, a panel for each kind -> (height, width, 3) uint8."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    smooth = max(1, len(rows) // 50)                     # steps in a running mean
    figure, steps = Figure((9, 6), layout="constrained"), [row["step"] for row in rows]
    for panel, name in zip(figure.subplots(2, 2).flat,
                           ("flow", "balance", "orthogonality", "norm")):
        values = [row[name] for row in rows]
        panel.plot(steps, values, alpha=0.3)
        panel.plot(steps[smooth - 1:], np.convolve(values, np.ones(smooth) / smooth, "valid"))
        panel.set(title="norm of the gradients" if name == "norm" else f"{name} loss",
                  xlabel="step")
    return drawn(figure)


def draw_similarity(cosines: Tensor) -> np.ndarray:
    """expert_similarity() as a heat map -> (height, width, 3) uint8."""
    from matplotlib.figure import Figure
    figure = Figure((5, 4), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(cosines.numpy(), vmin=0, vmax=1)
    panel.set(title="how alike the experts' outputs are", xlabel="expert", ylabel="expert")
    figure.colorbar(image, label="|cosine|, mean of the layers")
    return drawn(figure)


def report(pipe: Pipeline, samples: list[Sample], seen: dict[str, deque[str]], log: Path | None,
           step: int) -> dict[str, np.ndarray]:
    """Pictures of how training goes, by name; those that matplotlib draws only with a log.

    seen: some instructions of each task.
    """
    pipe.adapter.eval()
    pictures = {f"samples_{step:06d}": sample_sheet(pipe, samples)}
    cosines = expert_similarity(pipe, samples[0])
    if log:
        pictures["loss"] = draw_losses(log)
        use = {task: expert_use(pipe, list(texts)) for task, texts in sorted(seen.items())}
        if any(use.values()):
            pictures["routing"] = draw_routing(use)
        if cosines is not None:
            pictures["experts"] = draw_similarity(cosines)
    pipe.adapter.train()
    return pictures


# --------------------------------------------------------------------------------------- the loop

@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM writes to, so that a step ends before the run does.

    A second Ctrl-C does not wait.
    """
    asked: list[int] = []

    def note(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def update(args: argparse.Namespace, adapter: mole.Adapter,
           optimizers: list[torch.optim.Optimizer], step: int, loss: float) -> float:
    """Follow the gradients, clipped to a norm of 1; -> their norm. Raises: ValueError."""
    norm = nn.utils.clip_grad_norm_(adapter.tensors().values(), 1.0).item()
    if not math.isfinite(loss + norm):
        raise ValueError(f"step {step}: the loss is no number any more; the last checkpoint, if "
                         f"any, is in {args.out}. Try a smaller --lr")
    decay = cosine(step, args.steps) if args.schedule == "cosine" else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * decay
        optimizer.step()
        optimizer.zero_grad()
    return norm


def start_of(args: argparse.Namespace, adapter: mole.Adapter,
             optimizers: list[torch.optim.Optimizer], settings: dict,
             workers: int) -> tuple[int, int]:
    """Step and micro-batch to begin with, the same in all processes. Raises: ValueError."""
    own = load_checkpoint(args.out, adapter, optimizers, settings) if args.resume else (0, 0)
    places = [own] * workers
    if workers > 1:
        dist.all_gather_object(places, own)
    if len(set(places)) > 1:
        raise ValueError(f"--resume: processes found {set(places)} (step, micro-batch) in "
                         f"{args.out}; it must be a folder that all machines see")
    return own


def train(args: argparse.Namespace, pipe: Pipeline, sources: list, settings: dict,
          rank: int, workers: int) -> None:
    """Run the steps that are left. Of the micro-batches, this process takes every workers-th."""
    adapter, out = pipe.adapter.train(), args.out
    optimizers = make_optimizers(adapter, args.lr, args.lr / 2 if args.router_lr is None else
                                 args.router_lr, args.optimizer)
    start, number = start_of(args, adapter, optimizers, settings, workers)
    plots = rank == 0 and find_spec("matplotlib") is not None
    log_file = out / "log.jsonl" if rank == 0 else Path(os.devnull)
    if rank == 0:
        save_record(args, settings)
        done = log_file.read_text().splitlines(True) if log_file.is_file() else []
        with weights.replacing(log_file) as aside:       # what came after the checkpoint is redone
            aside.write_text("".join(done[:start]))
        if not plots:
            print("note: loss.png, routing.png and experts.png are drawn by matplotlib, which is "
                  "not installed", file=sys.stderr)
    preview = [source.draw(np.random.default_rng([args.seed, 2 ** 32 + i]), 1)[0] for i, (source, _)
               in enumerate(sources * -(-8 // len(sources)) if rank == 0 or args.shard else [])][:8]
    preview = list({s.target.tobytes(): s for s in preview}.values())        # each picture once
    batches = data.batches(sources, args.batch_size, args.seed, number + rank, workers)
    seen: dict[str, deque[str]] = {}                     # some instructions of each task
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.adapter,
               mininterval=2, disable=rank > 0)
    with log_file.open("a") as log, signals() as asked:
        for step in bar:
            began = time.time()
            micro = [(args.seed * 2 ** 32 + i, next(batches)) for i in
                     range(number + rank, number + args.accumulate * workers, workers)]
            number += args.accumulate * workers          # of the next step's first micro-batch
            losses = accumulate(pipe, micro, auxiliary_factor(step, args.steps), args.checkpoint,
                                args.shift)
            losses = average(adapter, losses | {"asked": len(asked)}, args.accumulate)
            leave = losses.pop("asked") > 0              # processes leave together
            norm = update(args, adapter, optimizers, step, losses["loss"])
            together = [s for _, samples in micro for s in samples]
            for s in together:
                seen.setdefault(s.task, deque(maxlen=8)).append(s.instruction)
            log.write(json.dumps({
                "step": step, **{name: round(value, 6) for name, value in losses.items()},
                "norm": round(norm, 4), "tasks": sorted({s.task for s in together}),
                "seconds": round(time.time() - began, 3)}) + "\n")
            bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
            due = (step + 1) % args.save_every == 0 or step + 1 == args.steps
            if rank == 0 and (due or leave):
                log.flush()
                save_checkpoint(out, adapter, optimizers, step + 1, number, settings)
            if due and (rank == 0 or args.shard):        # blocks in parts need all processes
                pictures = report(pipe, preview, seen, log_file if plots else None, step + 1)
                for name, picture in pictures.items() if rank == 0 else ():
                    save_picture(picture, out / f"{name}.png")
            if leave and step + 1 < args.steps:
                if workers > 1:
                    dist.barrier()                       # until the first one has saved
                bar.close()
                if rank == 0:
                    print(f"stopped after {step + 1} steps; --resume goes on", file=sys.stderr)
                sys.exit(130)


def join(args: argparse.Namespace) -> tuple[int, int]:
    """This process's rank and how many torchrun started: (0, 1) without it. Each has its GPU."""
    rank, workers = (int(os.environ.get(name, alone)) for name, alone in
                     (("RANK", 0), ("WORLD_SIZE", 1)))
    if workers > 1:
        cuda = args.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
            torch.cuda.set_device(choose_device(args.device))
        elif args.device not in ("auto", "cpu"):
            raise ValueError(f"--device {args.device}: with several processes write auto, cuda "
                             "(one GPU each) or cpu")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(days=1))       # some encode longer than others
    return rank, workers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an adapter on a frozen model.",
                                     usage="python train.py --data SOURCE[:weight] ... [options]")
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE[:weight]",
                        help="tiny, a folder (metadata.jsonl or .csv, or pictures with .txt), a "
                        ".jsonl or .csv file, or a public set: "
                        f"{'=PATH, '.join(data.PUBLIC)}=PATH; one drawn per batch")
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="that no path in the data "
                        "may leave; by default the folder of the file that names it")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave bad lines out, one in ten at most; list them at the end")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="encode every text and "
                        "picture once, before training, and keep that here")
    parser.add_argument("--cache-draws", type=int, metavar="N", help="with --cache: ways "
                        "to draw a row of a public set (wording, conditions, boxes); else one")
    add_model_options(parser)
    parser.add_argument("--adapter", default="instructmole",
                        choices=["instructmole", "pooled", "lora", *list(baselines.KINDS)[1:]],
                        help="pooled: routed by CLIP's vector alone; lora: no experts; the others: "
                        "baselines.py")
    parser.add_argument("--config", type=Path, help="JSON with fields of mole.AdapterConfig; "
                        "by default adapter.json beside the model, if any")
    parser.add_argument("--steps", type=int, default=100_000, help="%(default)s; the auxiliary "
                        "losses fade over the run, so it cannot be made longer later")
    parser.add_argument("--batch-size", type=int, default=4,
                        help="%(default)s, or as many as there are")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate; %(default)s")
    parser.add_argument("--router-lr", type=float, help="by default half of --lr")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"],
                        help="muon: for the matrices A and B, at twice the rate; the rest by adamw")
    parser.add_argument("--schedule", default="constant", choices=["constant", "cosine"],
                        help="of the learning rates")
    parser.add_argument("--shift", type=float, default=1.0, help="of the times: above 1, more are "
                        "near 1, where layout is decided; 1, as in the paper: uniform")
    parser.add_argument("--checkpoint", action="store_true",
                        help="recompute each block in backward: less memory, same gradients")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks: "
                        "minutes more at first, then faster steps")
    parser.add_argument("--base-dtype", choices=["fp8"], help="keep the transformer's frozen "
                        "layers in 8 bits, widened where they are used: half of bf16's memory")
    parser.add_argument("--shard", action="store_true", help="with torchrun: split the frozen "
                        "blocks over the processes, where a device cannot hold them")
    parser.add_argument("--dry-run", type=float, nargs="?", const=0, metavar="GB", help="only say "
                        "what memory this will need, and the largest batch for so many GB (else "
                        "for this device)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS",
                        help="between checkpoints, and pictures of how it goes; %(default)s")
    parser.add_argument("--out", type=Path, help="by default runs/ADAPTER")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the last checkpoint in --out, if there is one")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises: ValueError for what cannot be, before anything is read."""
    if args.cache_draws is not None and not args.cache:
        raise ValueError("--cache-draws belongs to --cache FOLDER")
    for name in ("steps", "batch_size", "accumulate", "save_every", "lr", "shift", "cache_draws"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name in ("router_lr", "dry_run"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be a number from 0 up")
    if not 0 <= args.seed < 2 ** 31:
        raise ValueError(f"--seed {args.seed}: must be from 0 to 2^31 - 1")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file, not a folder")
    if not args.resume and args.dry_run is None and any(
            (args.out / name).exists() for name in (*CHECKPOINTS, "adapter.safetensors")):
        raise ValueError(f"{args.out} holds a run; add --resume to go on, or name another --out")
    if args.data_root and not args.data_root.is_dir():
        raise ValueError(f"--data-root {args.data_root}: no such folder")
    if args.compile:
        check_compiler()
    if args.compile and args.shard:
        raise ValueError("--compile: not together with --shard")
    if args.shard and "WORLD_SIZE" not in os.environ:
        raise ValueError("--shard: splits the model over processes; start them with torchrun")


def settings_of(args: argparse.Namespace, config: AdapterConfig, model: dict[str, str],
                sources: list[tuple[data.Source, float]], workers: int) -> dict[str, str]:
    """What a run may not change when it is resumed, and what it may but is told of."""
    digest = hashlib.sha256(json.dumps(model).encode()).hexdigest()[:16]
    return {name: str(getattr(args, name)) for name in
            ("data", "adapter", "steps", "batch_size", "lr", "router_lr", "optimizer", "schedule",
             "shift", "seed", "base_dtype", "cache_draws")} | {
        "model": f"{args.model.resolve().name} {digest}",        # not where it lies
        "config": json.dumps(asdict(config)), "dtype": model["dtype"],
        "fingerprints": json.dumps([fingerprint(source) for source, _ in sources]),
        "micro_batches": str(args.accumulate * workers)}         # in each step


def main() -> None:
    args = parse()
    args.out = args.out or Path("runs") / args.adapter
    check(args)
    args.cache_draws = args.cache_draws or (1 if args.cache else None)
    beside = args.model.parent / "adapter.json"
    config = adapter_config(args.adapter, args.config or (beside if beside.is_file() else None))
    vae = (args.vae or args.model / "vae") / "config.json"
    side = (weights.config_from(VAEConfig, weights.read_json(vae), vae) if vae.is_file() else
            VAEConfig).sample_size
    bad: list[str] | None = [] if args.skip_bad else None
    sources = [data.open_source(text, {"tiny": TinyWorld}, (side, side) if side < 512 else None,
                                args.data_root, bad, args.cache_draws) for text in args.data]
    endless = [text for text, (source, _) in zip(args.data, sources) if not hasattr(source, "all")]
    if args.cache and endless:
        raise ValueError(f"--cache: {endless[0]} has no end; there is nothing to encode once")
    if args.dry_run is not None:
        if int(os.environ.get("RANK", 0)) == 0:          # one speaks for all
            dry_run(args, config, sources)
        return
    rank, workers = join(args)
    if args.base_dtype == "fp8":
        weights.check_device([torch.float8_e4m3fn], choose_device(args.device), "--base-dtype fp8")
    pipe = open_model(args, None, encoders_stay=args.cache is not None)
    model = identity(args, pipe)
    if args.cache:
        encoders = {part: value for part, value in model.items() if part != "transformer"}
        pipe.cache = open_cache(args.cache, encoders, rank, workers)
        if not (args.resume and any((args.out / name).is_file() for name in CHECKPOINTS)):
            fill(pipe, sources, rank, workers)
    if args.base_dtype == "fp8":
        weights.to_fp8(pipe.dit)
    torch.manual_seed(args.seed)                         # the adapter's first weights
    if not args.shard:
        pipe.dit.to(pipe.device)                         # the other parts may only visit it
    pipe.adapter = put_adapter(pipe.dit, config)
    if args.shard:
        shard(pipe)
    if args.compile:
        compile_blocks(pipe.dit)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        train(args, pipe, sources, settings_of(args, config, model, sources, workers), rank,
              workers)
    finally:
        if bad:
            print(f"bad lines of the data, skipped: {len(bad)}", *bad, sep="\n  ",
                  file=sys.stderr)
    if rank == 0:
        print(f"{args.out / 'adapter.safetensors'}: "
              f"{sum(p.numel() for p in pipe.adapter.tensors().values()):,} parameters, "
              f"{args.steps} steps")
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    weights.run(main)
