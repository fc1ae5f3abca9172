"""What the encoders gave before, kept in a folder: train.py --cache.

sample.encode_text() and encode_picture() ask cached(); train.py fills the cache before its steps.
"""
import argparse
import hashlib
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support import commands, offload, resume
from support.configs import read_json
from support.files import read_tensors, write_json, write_tensors
from support.pictures import to_tensor

SHARD = 256 * 2 ** 20                                    # bytes


class Cache:
    """Tensors that are computed once, by key, in a folder of safetensors shards.

    about: all that the values depend on, but for the key. Several processes may share the folder.
    Raises: ValueError when it was made with something else.
    """

    def __init__(self, folder: Path, about: dict):
        self.folder, self.new = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "about.json"
        if not note.is_file():
            write_json(note, about)
        before = read_json(note)
        for name in sorted(about.keys() | before.keys()):
            if about.get(name) != before.get(name):
                raise ValueError(f"--cache {folder}: was made with {name} {before.get(name)}, not "
                                 f"{about.get(name)}; name another folder")
        self.reread()

    def reread(self) -> None:
        """See what all processes have written."""
        self.found: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            self.found |= read_tensors([file])

    def through(self, keys: list[str], compute: Callable[[int], tuple[Tensor, ...]]
                ) -> tuple[Tensor, ...]:
        """What compute gives: several tensors with one row for each key.

        compute gives the row of a number, asked once for each key; its result is kept. In a batch
        values would depend, in the last bit, on what else is in it.
        """
        for i, key in enumerate(keys):
            if f"{key}.0" not in self.new and f"{key}.0" not in self.found:
                self.new |= {f"{key}.{j}": t[0].cpu().clone() for j, t in enumerate(compute(i))}
        if sum(t.nbytes for t in self.new.values()) > SHARD:
            self.save()
        known = ChainMap(self.new, self.found)
        parts = next(j for j in count() if f"{keys[0]}.{j}" not in known)
        return tuple(torch.stack([known[f"{key}.{j}"] for key in keys]) for j in range(parts))

    def save(self) -> None:
        """Write what is new to a shard."""
        if self.new:
            file = self.folder / f"{uuid4().hex}.safetensors"                # no other's name
            write_tensors(self.new, file)
            self.new = {}
            self.found |= read_tensors([file])


def key_of(item: str | Tensor) -> str:
    """What tells a text, or a picture (3, H, W) on the CPU, from all others."""
    content = item.encode() if isinstance(item, str) else (
        str(item.shape).encode() + item.numpy().tobytes())
    return hashlib.sha256(content).hexdigest()


def cached(cache: Cache | None, items: list[str] | Tensor, compute: Callable,
           device: torch.device) -> tuple[Tensor, ...]:
    """compute(items), several tensors with a row for each item, from the cache if there is one."""
    if cache is None:
        return compute(items)
    found = cache.through([key_of(item) for item in items], lambda i: compute(items[i:i + 1]))
    return tuple(t.to(device) for t in found)


def check_ends(names: list[str], sources: list) -> None:
    """sources: (source, weight) pairs. Raises: ValueError for a source without end."""
    for name, (source, _) in zip(names, sources):
        if not hasattr(source, "all"):
            raise ValueError(f"--cache: {name} has no end; there is nothing to encode once")


def fill(args: argparse.Namespace, pipe: object, sources: list, identity: dict,
         encode_text: Callable, encode_picture: Callable) -> None:
    """Give a sample.Pipeline the cache in the folder of --cache.

    All that can be drawn is encoded at once, unless a run is resumed, by sample.py's encode_text()
    and encode_picture(): of all samples this process's share.
    identity: what tells the model from others. sources: with their weights. Raises: ValueError.
    """
    about = {part: value for part, value in identity.items() if part != "transformer"}
    rank, workers = commands.rank(), commands.workers()
    if rank > 0:
        dist.barrier()                                   # the first process makes it
    pipe.cache = Cache(args.cache, about)
    if rank == 0 and workers > 1:
        dist.barrier()
    if not (args.resume and resume.holds_checkpoint(args.out)):
        encode_all(pipe, (sample for source, _ in sources for sample in source.all(rank, workers)),
                   encode_text, encode_picture)
    if workers > 1:
        dist.barrier()
        pipe.cache.reread()


def encode_all(pipe: object, samples: Iterator, encode_text: Callable, encode_picture: Callable
               ) -> None:
    """Fill the cache with what a process's samples need, a few at a time."""
    encoders, device = nn.ModuleList((pipe.t5, pipe.clip, pipe.vae)), pipe.device
    visit = offload.on_device(encoders, device) if offload.fits(encoders, device) else nullcontext()
    with visit, tqdm(desc="encoding", unit=" samples", disable=not commands.is_first()) as bar:
        while some := list(islice(samples, 4)):          # few: pictures are large on their way
            encode_text(pipe, [s.instruction for s in some] + [""])          # "" for dropout
            for picture in (p for s in some for p in (s.target, *s.given)):
                encode_picture(pipe, to_tensor([picture]))
            bar.update(len(some))
    pipe.cache.save()
