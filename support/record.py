"""What a run was made with, so that it can be made again, and is not resumed with something else.

train.py writes run.json and log.jsonl here, and asks what identifies its model and its data.
"""
import argparse
import hashlib
import json
import platform
import re
from collections import deque
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from mole import Adapter, AdapterConfig
from support.commands import workers
from support.files import write_json, write_text
from support.pictures import LONGEST, save_picture
from support.sheets import grid
from support.words import counted
from text_encoder import T5Tokenizer

ASKED_FOR = "longest", "init", "matmul"                  # recorded only where the user gave them,
UNSAID = None, LONGEST                                   # so that older runs go on; else these
SHOWN = 16                                               # samples of a batch, at most
TASKS = 24                                               # of which routing is looked at, at most


def identity(paths: dict[str, Path], dtype: torch.dtype) -> dict[str, str]:
    """What tells a model from others: a digest of each part's files, and the type.

    Of a file of gigabytes a thousand pieces are looked at.
    """
    return {"dtype": str(dtype)} | {part: digest_of(path) for part, path in paths.items()}


def digest_of(path: Path) -> str:
    """Of a file, or of all in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name[0] != ".":       # a Finder's, a download's
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            pieces, length = (1, size) if size < 2 ** 30 else (1024, 4096)
            with file.open("rb") as opened:
                for i in range(pieces):
                    opened.seek(size * i // pieces)
                    digest.update(opened.read(length))
    return digest.hexdigest()


def fingerprint(source: object) -> str | None:
    """Tells a source's data from others by names, texts and sizes; None if it has no end."""
    if not hasattr(source, "contents"):
        return None
    digest = hashlib.sha256()
    for entry in source.contents():
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:16]


def settings_of(args: argparse.Namespace, config: AdapterConfig, identity: dict[str, str],
                sources: list) -> dict[str, str]:
    """What is compared at --resume: it must be equal, or, of resume.MAY_CHANGE, is told."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    values = vars(args) | {"adapter": args.method}       # as runs have called it since the first
    values["init"] = args.init and f"{args.init.name} {digest_of(args.init)[:16]}"
    return {name: str(values[name]) for name in
            ("data", "adapter", "steps", "batch_size", "lr", "router_lr", "optimizer", "schedule",
             "shift", "seed", "base_dtype", "cache_draws")} | {
        "model": f"{args.model.resolve().name} {digest}",        # not where it lies
        "config": json.dumps(asdict(config)), "dtype": identity["dtype"],
        "fingerprints": json.dumps([fingerprint(source) for source, _ in sources]),
        "micro_batches": str(args.accumulate * workers())} | {   # in each step
        name: str(values[name]) for name in ASKED_FOR if values[name] not in UNSAID}


def write_run(args: argparse.Namespace, settings: dict) -> None:
    """run.json: all that is needed to do it again."""
    record = {"arguments": {name: value if isinstance(value, (list, int, float, bool, type(None)))
                            else str(value) for name, value in vars(args).items()},
              "settings": settings | {name: json.loads(settings[name])
                                      for name in ("config", "fingerprints")},
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "numpy": np.__version__}}
    write_json(args.out / "run.json", record)


def tell_end(args: argparse.Namespace, adapter: Adapter, start: int) -> None:
    """Say what a run has left; start: the step it began with."""
    file = args.out / "adapter.safetensors"
    if start == args.steps:
        print(f"{file}: finished already, at step {start}; nothing to do")
    else:
        count = sum(p.numel() for p in adapter.tensors().values())
        print(f"{file}: {count:,} parameters, {counted(args.steps, 'step')}")


def show_batch(out: Path, samples: list, tokens: T5Tokenizer) -> None:
    """data.png: pictures of a batch as the model gets them, the target last, and their texts.

    What the model does not read of a text stands behind a bar.
    """
    texts, samples = [], samples[:SHOWN]
    for s in samples:
        read = tokens.model.encode(s.instruction)
        end = max(end for _, end in read.offsets) if read.overflowing else len(s.instruction)
        rest = s.instruction[end:]
        texts.append(s.instruction[:end] + (f" | not read: {rest}" if rest else ""))
    rows = [[*s.given, s.target] for s in samples]
    save_picture(grid(rows, texts, lines=4, gap=2), out / "data.png")


class Log:
    """log.jsonl: a line for each step, check, and look at the routing; the first process writes.

    done: steps that a resumed run has behind it; what the file says beyond them is done anew.
    """

    def __init__(self, out: Path, done: int, rank: int):
        self.file, self.rank = out / "log.jsonl", rank
        self.instructions: dict[str, deque[str]] = {}    # the last ones of each of the last TASKS
        self.checked: dict[str, float] = {}              # the last loss on held-out samples
        if rank == 0:
            before = self.file.read_text().splitlines(True) if self.file.is_file() else []
            steps = [re.fullmatch(r'{"step": (\d+), .*}\n', line) for line in before]  # or torn
            write_text(self.file, "".join(found[0] for found in steps
                                          if found and int(found[1]) < done))

    def write(self, step: int, losses: dict[str, float], norm: float, samples: list,
              seconds: float) -> None:
        """What a step drew and gave. norm: of the gradients, before they are clipped."""
        for s in samples:
            known = self.instructions.pop(s.task, deque(maxlen=8))           # becomes the last
            self.instructions[s.task] = known
            known.append(s.instruction)
        for task in [*self.instructions][:-TASKS]:
            del self.instructions[task]
        self.add({"step": step, **{name: round(v, 6) for name, v in losses.items()},
                  "norm": round(norm, 4), "tasks": sorted({s.task for s in samples}),
                  "seconds": round(seconds, 3)})

    def check(self, step: int, loss: float, source: str) -> None:
        """The loss on held-out samples of a source, after a step."""
        self.checked = {"validation": loss}
        self.add({"step": step, "validation": round(loss, 6), "source": source})

    def add(self, entry: dict) -> None:
        if self.rank == 0:
            with self.file.open("a") as log:
                log.write(json.dumps(entry) + "\n")

    def told(self, losses: dict[str, float]) -> dict[str, str]:
        """What the progress line says: a step's losses, and the last one on held-out samples."""
        return {name: f"{value:.4f}" for name, value in (losses | self.checked).items()}

    def steps(self) -> list[dict]:
        """All steps that were written, and what stands between them."""
        return [json.loads(line) for line in self.file.read_text().splitlines()]
