"""What memory a training will need, before any weight is read: train.py --dry-run.

train.py hands over how to put the adapter on the model and how to compute a step's loss; both are
run with tensors that have shapes and types, and hold nothing.
"""
import argparse
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit
from mole import Adapter
from support import commands, devices, offload
from support.resume import Optimizers
from support.words import counted

GB, MB = 10 ** 9, 10 ** 6                                # bytes
MANY = 64                                                # times the batch; a few need less each


class LiveBytes(TorchDispatchMode):
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


def step_bytes(loss_of: Callable[[int], Tensor], batch: int, adapter: Adapter,
               optimizers: Optimizers, accumulate: int, live: LiveBytes) -> tuple[int, int]:
    """Most bytes alive in a step's passes, and in its update, for `batch` samples."""
    if accumulate > 1:                                   # the passes after the first have them
        for p in adapter.tensors().values():
            p.grad = torch.empty_like(p) if p.requires_grad else None
    live.most = live.now
    loss_of(batch).backward()
    passes, live.most = live.most, live.now
    nn.utils.clip_grad_norm_(adapter.tensors().values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return passes, live.most


def largest(batches: Iterator[list]) -> object:
    """Of 16 batches' first samples the one with most pixels."""
    found = max((next(batches)[0] for _ in range(16)), key=lambda s: sum(
        picture.size for picture in (s.target, *s.given)))
    batches.close()
    return found


def empty_loss(pipe: object, like: object, as_tokens: Callable, matching_loss: Callable,
               batch: int, recompute: bool) -> Tensor:
    """The loss of `batch` such samples, from tensors that have shapes and types alone.

    pipe: a sample.Pipeline; as_tokens: sample.py's; matching_loss: train.py's.
    """
    c = pipe.dit.config
    x0, *latents = (torch.empty(batch, c.in_channels // 4, p.shape[0] // 8, p.shape[1] // 8)
                    for p in (like.target, *like.given))
    txt = torch.empty(batch, pipe.t5_tokens.length, c.joint_attention_dim, dtype=pipe.dtype)
    pooled = torch.empty(batch, c.pooled_projection_dim, dtype=pipe.dtype)
    given = as_tokens(txt, pooled, [z.to(pipe.dtype) for z in latents], len(like.images))
    tokens, t = dit.pack(x0), torch.empty(batch)         # x0 and noise (B, I, P), times (B,)
    return sum(matching_loss(pipe, given, tokens, tokens, t, x0.shape[-2:], recompute).values())


def in_words(size: int) -> str:
    """Bytes, in megabytes where there are few."""
    return f"{size / GB:7.2f} GB" if size >= GB / 10 else f"{size / MB:7.2f} MB"


class Needs(NamedTuple):
    """Bytes that one process needs on its device."""
    base: int                                            # the frozen transformer's that are there
    own: int                                             # the adapter's; its gradients have as many
    states: int                                          # the optimizers'
    passes: dict[int, int]                               # most in a step's passes, by its samples
    update: int                                          # most in its update
    stay: int                                            # text encoders and autoencoder
    streamed: bool                                       # whether the blocks visit it in turn

    def together(self, batch: int) -> int:
        return max(self.passes[batch], self.update) + self.stay


def count(args: argparse.Namespace, pipe: object, adapt: Callable, loss_of: Callable,
          room: float) -> Needs:
    """What a device with so much room needs, counted as on a CPU; the others: as tell() has them.

    For one sample, for the batch that is asked for, and for MANY of it.
    """
    model, batch = pipe.dit, args.batch_size
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model.to_empty(device="cpu")
        base = live.now
        blocks = [*map(offload.bytes_of, model.blocks)]
        encoders = offload.bytes_of(pipe.t5, pipe.clip, pipe.vae)
        adapter, optimizers = adapt()
        own = live.now - base
        fits, beside = offload.room_for(base // (commands.workers() if args.shard else 1),
                                        offload.training_bytes(adapter, args.optimizer), encoders,
                                        room)            # as offload.settle() asks
        if args.dry_run:                                 # an accelerator's form, not this CPU's
            for block in model.blocks:
                block.attend = dit.attend
        elif pipe.device.type == "cpu":
            fits = beside = True                         # all is there, whatever it comes to
        streamed = not (fits or args.shard)
        loss_of = partial(loss_of, recompute=streamed or args.recompute == "on")
        first, _ = step_bytes(loss_of, 1, adapter, optimizers, args.accumulate, live)
        states = live.now - base - own                   # the optimizers made them at its end
        passes = {1: first + states}
        for n in (MANY * batch, batch):
            passes[n], update = step_bytes(loss_of, n, adapter, optimizers, args.accumulate, live)
    away = 0
    if args.shard or streamed:                           # but for two: at work, and on its way
        share = 1 - 1 / commands.workers() if args.shard else 1
        away = int(max(0, sum(blocks) - 2 * max(blocks)) * share)
    return Needs(base - away, own, states, {n: size - away for n, size in passes.items()},
                 update - away, encoders if beside and not args.cache else 0, streamed)


def largest_batch(needs: Needs, batch: int, room: float) -> int:
    """How many samples a step may have, by what `batch` and one or many need; 0: not even one."""
    if needs.together(1) > room:
        return 0
    low, high = (batch, MANY * batch) if needs.together(batch) <= room else (1, batch)
    each = (needs.passes[high] - needs.passes[low]) / max(1, high - low)     # bytes a sample
    return low + int((room - needs.stay - needs.passes[low]) // each)


def tell(args: argparse.Namespace, pipe: object, adapt: Callable[[], tuple[Adapter, Optimizers]],
         loss_of: Callable[..., Tensor], sample: object) -> None:
    """Print what memory training will need, counted as on a CPU, for one process.

    pipe: a sample.Pipeline without weights. adapt() puts a new adapter on its model; loss_of(n,
    recompute=whether) is the loss of n such samples.
    """
    room, batch = args.dry_run * GB or devices.memory(pipe.device), args.batch_size
    needs = count(args, pipe, adapt, loss_of, room)
    whole = needs.together(batch)
    height, width = sample.target.shape[:2]
    given = [counted(len(pictures), what) for pictures, what in (
        (sample.images, "reference"), (sample.conds, "condition")) if pictures]
    print(f"memory for a batch of {batch}, {width}x{height}, "
          f"{' and '.join(given) or 'nothing given'}; the largest of 16 samples:")
    if needs.streamed:
        print("  the transformer has no room: its blocks visit the device, and are recomputed")
    activations = whole - needs.base - 2 * needs.own - needs.states - needs.stay
    for name, size in (("transformer, frozen", needs.base), ("adapter, fp32", needs.own),
                       ("gradients", needs.own), ("optimizer", needs.states),
                       ("activations", activations), ("text encoders, autoencoder", needs.stay),
                       ("together", whole)):
        if size:
            print(f"  {name:27}{in_words(size)}")
    print(f"  largest batch in {in_words(room).strip()}: {largest_batch(needs, batch, room):,}")
    if args.recompute == "auto" and not needs.streamed and whole > room:
        print("  that is without recomputing, to which a CUDA device turns by itself; --recompute "
              "counts with it")
