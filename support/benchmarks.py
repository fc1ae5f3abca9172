"""What the paper's three benchmarks share: prompts, and making the pictures that are missing.

evaluate.run_benchmark() calls in turn first_of_each(), missing(), check_same(), make(); the rooms
xversebench, omnicontext and spatial read() the prompts; benchmark_table has the pictures scored.
"""
import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from support import options, origin
from support.commands import NO_FOLDER, is_first, may_hold
from support.pictures import open_picture, pictures_in, save_picture
from support.texts import unread
from support.words import counted, duration, note, say
from text_encoder import T5Tokenizer

COUNTED = 1.0                                            # seconds from one count of all to the next
# What all pictures must say alike, and the options that it comes from.
SAME = {"model": {"model"}, "adapters": {"adapter"}, "steps": {"steps"}, "guidance": {"guidance"},
        "benchmark": {"native", "size"}, "dtype": {"dtype"}}


@dataclass
class Inputs:
    """What a prompt comes with."""
    references: list[Image.Image]
    size: tuple[int, int]                                # (W, H) of what is to be made
    truth: Image.Image | None = None                     # the picture that was described


@dataclass
class Prompt:
    """A prompt of a benchmark, and where its picture goes."""
    part: str                                            # its list, task or condition
    name: str                                            # by which answers call it
    text: str
    out: Path                                            # one picture, or a grid of several
    seeds: range                                         # of each picture
    given: Callable[[], Inputs]                          # read when asked for
    truth: Path | None = None                            # where the truth goes, for scorers
    about: object = None                                 # what answers are checked by

    @property
    def files(self) -> list[Path]:
        """All that is made of it."""
        return [self.out, self.truth] if self.truth else [self.out]


# ------------------------------------------------------------------------------- what is to be made

def first_of_each(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` of each part, or all."""
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        seen[prompt.part] += 1
        if limit is None or seen[prompt.part] <= limit:
            chosen.append(prompt)
    return chosen


def is_whole(file: Path) -> bool:
    """Whether a picture is there; one that is broken is taken away, with a word."""
    if not file.exists():
        return False
    try:
        with open_picture(file) as image:
            image.verify()                               # to its end, without unpacking it
        return True
    except ValueError as error:
        note(f"{error}: it is made again")
        file.unlink()
        return False


def missing(prompts: list[Prompt]) -> list[Prompt]:
    """Prompts that have no picture yet; the first process looks, for all that torchrun started.

    Raises: ValueError where a picture could not be written.
    """
    found: list = [None]
    if is_first():
        found = [[i for i, prompt in enumerate(prompts) if not all(map(is_whole, prompt.files))]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    todo = [prompts[i] for i in found[0]]
    for folder in {file.parent for prompt in todo for file in prompt.files}:
        if not may_hold(folder):
            raise ValueError(f"--out: {folder} {NO_FOLDER}")
    return todo


def protocol(args: argparse.Namespace) -> str:
    """What else two pictures of a benchmark must have in common, for their texts."""
    size = "x".join(map(str, args.size)) if args.size else "its own"
    return f"{args.bench}, size {size}, {counted(args.native, 'native reference')}"


def asked(args: argparse.Namespace, making: bool) -> dict[str, str]:
    """What the pictures that are there should say, as far as it is known without a model.

    All settings where more are to be made, else those that the command names: scoring alone needs
    neither them nor the model. Raises: FileNotFoundError, ValueError for such an adapter.
    """
    names = [name for name, given in SAME.items() if making or given & args.given]
    if args.dtype == "auto" and "dtype" in names:
        names.remove("dtype")
    adapters = options.adapters_of(args) if "adapters" in names else []
    dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    told = {"steps": str(args.steps), "guidance": f"{args.guidance:g}", "benchmark": protocol(args),
            **origin.names(args.model, adapters, dtype, args.matmul)}
    return {name: told[name] for name in names}


def check_same(done: list[tuple[Prompt, dict[str, str]]], wanted: dict[str, str]) -> None:
    """Raises: ValueError where a picture that was made here, and its texts, say another thing."""
    for prompt, told in done:
        for name, ours in (wanted | {"instruction": prompt.text}).items():
            if "benchmark" in told and told.get(name) != ours:
                raise ValueError(f"{prompt.out}: was made with {name} {told.get(name)!a}, not "
                                 f"{ours!a}; name another --out, or the same settings")


def tell_foreign(prompts: list[Prompt], done: list[tuple[Prompt, dict[str, str]]]) -> None:
    """Say which pictures were not made here, and which are of none of all the prompts."""
    foreign = [prompt.out for prompt, told in done if "benchmark" not in told]
    if foreign:
        note(f"{counted(len(foreign), 'picture')} in --out, as {foreign[0].name}, do not say how "
             "they were made; they are taken as they are")
    own = {file for prompt in prompts for file in prompt.files}
    stray = [file for folder in sorted({file.parent for file in own})
             for file in pictures_in(folder) if file not in own]
    if stray:
        note(f"beside the benchmark's own: {counted(len(stray), 'picture')} of no prompt, the "
             f"first {stray[0]}; take such away before a scorer looks there")


# ------------------------------------------------------------------------------------------- making

def as_grid(pictures: list[Image.Image]) -> Image.Image:
    """One picture, or several of one size in two columns, row by row."""
    width, height = pictures[0].size
    columns = min(2, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def make_one(prompt: Prompt, pictures_of: Callable, args: argparse.Namespace, bar: tqdm) -> None:
    """Make and save what a prompt lacks: its truth, its picture, each whole or not at all.

    pictures_of: as make() takes it.
    """
    given, number = prompt.given(), count()
    for file in prompt.files:
        file.parent.mkdir(parents=True, exist_ok=True)
    if prompt.truth:
        save_picture(given.truth, prompt.truth)
    if prompt.out.exists():                              # perhaps another tool's
        return

    def advance(step: int, latents: object) -> None:
        done = next(number) // args.steps + 1
        bar.set_postfix_str(f"picture {done} of {len(prompt.seeds)}, step {step} of {args.steps}",
                            refresh=False)
        bar.update(0)
    pictures = pictures_of(prompt, given, args, advance)
    told = {name: text for name, text in pictures[0].info.items() if name != "parameters"}
    told["benchmark"] = protocol(args)
    if len(pictures) > 1:
        told["seed"] = f"{prompt.seeds[0]} to {prompt.seeds[-1]}"
    save_picture(as_grid(pictures), prompt.out, told)


def make(todo: list[Prompt], share: tuple[int, int], pictures_of: Callable,
         args: argparse.Namespace) -> float:
    """Make this process's share of the pictures that are missing -> seconds that all took.

    share: its rank, and of how many processes. One bar tells of all. pictures_of: a Prompt, its
    Inputs, args, what generate() calls after each step -> pictures, one for each seed.
    """
    start = last_count = time.time()
    rank, workers = share
    with tqdm(desc="prompts", total=len(todo), unit="prompt", disable=rank > 0) as bar:
        for prompt in todo[rank::workers]:
            make_one(prompt, pictures_of, args, bar)
            if rank == 0 and time.time() - last_count >= COUNTED:        # the others' too
                bar.update(sum(prompt.out.exists() for prompt in todo) - bar.n)
                last_count = time.time()
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1))              # the others may have some to make yet
        bar.update(len(todo) - bar.n)
    return time.time() - start


def tell(args: argparse.Namespace, there: int, left: int, whole: int) -> None:
    """Say at the start what is there and what is to be made; the first process speaks."""
    if is_first():
        limit = f", of which --limit {args.limit} takes {there + left:,}" if args.limit else ""
        say(f"--bench {args.bench}: {counted(whole, 'prompt')}{limit}; {there:,} made before, "
            f"{left:,} to make")


def tell_unread(todo: list[Prompt], tokens: T5Tokenizer) -> None:
    """Say what the model does not read of the prompts."""
    for line in unread((prompt.text for prompt in todo), tokens):
        note(line)


def tell_cost(seconds: float, made: int, whole: int, workers: int) -> None:
    """Say what the pictures took, and what all of the benchmark takes here."""
    if not is_first():
        return
    each = seconds / made
    by = f", by {workers} processes" if workers > 1 else ""
    say(f"{counted(made, 'prompt')} in {duration(seconds)}{by}: {each:.2f} s each; all {whole:,} "
        f"take about {duration(each * whole)} here")
