"""Scores: success in the tiny world, nearness on pairs of one's own, the paper's benchmarks.

--bench tiny: success and PSNR per task. A picture is a success when its mean squared error to the
exact drawing is below 0.03 (pixels in [-1, 1]) and it is nearer to that drawing than to every
picture that was given and to the drawing of every scene that differs in one attribute: a colour, a
shape, a place, a missing or surplus object, the background.
--data SOURCE: PSNR, SSIM and MS-SSIM of the model's picture for each row, to the row's target.
Beside each score of these: that of copying the first picture given. Definitions: support/scores.py.
--bench xverse, omnicontext, spatial: what each asks and how it scores stands in its room,
support/xversebench.py, omnicontext.py, spatial.py. A killed run goes on where it was.

Run: python evaluate.py --bench tiny --number 64         # two minutes on two cores
     python evaluate.py --data tiny/examples/own         # seconds
     python evaluate.py --bench xverse --data XVerse --limit 2 --out runs/xverse
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # what is imported now takes seconds
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from data import Sample, open_one, stack
from sample import Pipeline, condition, generate, load_pipeline, prepare, seeded_noise
from support import (benchmark_table, benchmarks, distributed, omnicontext, options, origin,
                     routing_maps, spatial, xversebench)
from support.bad_rows import Bad, tell_skipped
from support.pairs import open_pairs, score_source
from support.public_sets import PUBLIC
from support.results import cell, check_out, markdown, write
from support.scores import psnr, squared_error
from support.sheets import grid
from tiny import world
from tiny.world import BASE_TASKS, EDITS, NEW_TASKS

THRESHOLD = 0.03                                         # of the mean squared error
BENCHES = {"xverse": xversebench, "omnicontext": omnicontext, "spatial": spatial}


def make_pictures(pipe: Pipeline, samples: list[Sample], steps: int, guidance: float,
                  first: int = 0, batch_size: int = 64,
                  route_by: str | None = None) -> list[np.ndarray]:
    """The model's pictures for samples of one kind; sample number i starts from seed first + i.

    route_by: the text that chooses the experts, by default each sample's instruction.
    """
    pictures, size = [], samples[0].target.shape[1::-1]
    for start in range(0, len(samples), batch_size):
        batch = samples[start:start + batch_size]
        given = condition(pipe, [s.instruction for s in batch], stack(s.images for s in batch),
                          stack(s.conds for s in batch), route_by)
        seeds = list(range(first + start, first + start + len(batch)))
        noise = seeded_noise(seeds, size, pipe.vae.config.latent_channels)
        pictures += list(generate(pipe, given, noise, steps, guidance)[0])
    return pictures


# ---------------------------------------------------------------------------------- the tiny world

@dataclass
class Score:
    """What was measured on one task."""
    task: str
    number: int
    success: float                                       # share of the pictures, 0..1
    psnr: float                                          # mean over the pictures, dB
    copy_success: float | None                           # of the first picture given; None if none
    copy_psnr: float | None


def success(picture: np.ndarray, sample: Sample) -> bool:
    """Whether a picture (H, W, 3) uint8 is what a tiny-world sample asks for."""
    error = squared_error(picture, sample.target)
    near = map(world.draw, world.neighbours(sample.scene))
    others = chain(sample.given, (p for p in near if not np.array_equal(p, sample.target)))
    return error < THRESHOLD and all(squared_error(picture, p) > error for p in others)


def measure(task: str, pictures: list[np.ndarray], samples: list[Sample]) -> Score:
    """Score pictures against their samples, of one task; and the first picture given, if any."""
    def means(made: list[np.ndarray]) -> list[float]:
        marks = [(success(p, s), psnr(p, s.target)) for p, s in zip(made, samples, strict=True)]
        return np.mean(marks, axis=0).tolist()           # of success, of PSNR
    first = [s.given[0] for s in samples if s.given]     # of all, or of none
    of_copies = means(first) if first else (None, None)
    return Score(task, len(samples), *means(pictures), *of_copies)


def table(found: list[Score]) -> str:
    """A Markdown table, with the means of the edits and of the tasks that the base never saw."""
    rows = list(found)
    for name, tasks in (("mean of edits", EDITS), ("mean of new tasks", NEW_TASKS)):
        part = [s for s in found if s.task in tasks]
        if len(part) == len(tasks):
            averages = (float(np.mean([getattr(s, key) for s in part]))
                        for key in ("success", "psnr", "copy_success", "copy_psnr"))
            rows.append(Score(name, sum(s.number for s in part), *averages))
    return markdown(
        ["task", "pictures", "success", "copying the input", "PSNR", "of the copy"],
        ([s.task, str(s.number), cell(s.success, "{:.1%}"), cell(s.copy_success, "{:.1%}"),
          cell(s.psnr, "{:.1f} dB"), cell(s.copy_psnr, "{:.1f} dB")] for s in rows))


def contact_sheet(results: dict[str, tuple[list[Sample], list[np.ndarray]]],
                  each: int = 4) -> np.ndarray:
    """Given / result / truth for the first samples of each task; failures have a red frame."""
    shown = [(s, p) for samples, pictures in results.values()
             for s, p in list(zip(samples, pictures))[:each]]
    return grid([[*s.given, p, s.target] for s, p in shown],
                [s.instruction for s, _ in shown], min(each, len(shown) // len(results)),
                lines=2, gap=4, failed=[not success(p, s) for s, p in shown])


def bench_tiny(pipe: Pipeline, tasks: list[str], number: int, steps: int, guidance: float,
               out: Path, route_by: str | None = None) -> list[Score]:
    """Score every task, and write results.FILES into `out`."""
    results, found = {}, []
    for task in tasks:
        samples = world.tiny_test(task, number)
        pictures = make_pictures(pipe, samples, steps, guidance, route_by=route_by)
        results[task] = samples, pictures
        found.append(measure(task, pictures, samples))
        print(f"{task:12} {found[-1].success:6.1%}  {found[-1].psnr:5.1f} dB", flush=True)
    about = {**pipe.names, "steps": steps, "guidance": guidance, "route_by": route_by}
    write(out, about | {"scores": [vars(score) for score in found]}, table(found),
          contact_sheet(results), route_by)
    return found


# --------------------------------------------------------------------------- the paper's benchmarks

def benchmark_pictures(pipe: Pipeline, prompt: benchmarks.Prompt, inputs: benchmarks.Inputs,
                       args: argparse.Namespace, callback: Callable) -> list[Image.Image]:
    """A prompt's pictures, one for each seed; each says in .info how it was made."""
    natives, conds = inputs.references[:args.native], inputs.references[args.native:]
    given = condition(pipe, [prompt.text], *prepare(pipe.vae.config.only_size, natives, conds,
                                                    inputs.size, pipe.longest))
    pictures = []
    for seed in prompt.seeds:
        noise = seeded_noise([seed], inputs.size, pipe.vae.config.latent_channels)
        made, _ = generate(pipe, given, noise, args.steps, args.guidance, callback=callback)
        pictures.append(Image.fromarray(made[0]))
        pictures[-1].info = origin.texts(
            pipe.names, prompt.text, seed, args.steps, args.guidance, inputs.size,
            {"reference": len(natives), "condition": len(conds)})
    return pictures


def run_benchmark(args: argparse.Namespace, bench: ModuleType) -> None:
    """Make the pictures of a benchmark that are not in --out yet, and its table of all of them.

    bench: its room. Several processes share what is to be made. Raises: ValueError,
    FileNotFoundError, as the room's read() and score() do.
    """
    share = distributed.join(args)
    try:
        before = benchmark_table.earlier(args)
        check_out(args, kept=bool(before))
        args.native = bench.NATIVE if args.native is None else args.native
        whole = bench.read(args, options.only_size(args))
        args.scores = benchmark_table.answers_of(args, bench, before)
        prompts = benchmarks.first_of_each(whole, args.limit)
        todo = benchmarks.missing(prompts)
        benchmarks.tell(args, len(prompts) - len(todo), len(todo), len(whole))
        done = [(one, origin.texts_of(one.out)) for one in whole if one.out.exists()]
        benchmarks.check_same(done, benchmarks.asked(args, bool(todo)))
        benchmarks.tell_foreign(whole, done)
        if todo:
            pipe = load_pipeline(adapter=options.adapters_of(args), **options.model_of(args))
            benchmarks.check_same(done, {"dtype": pipe.names["dtype"]})      # of "auto", known now
            benchmarks.tell_unread(todo, pipe.t5_tokens)
            seconds = benchmarks.make(todo, share, partial(benchmark_pictures, pipe), args)
            benchmarks.tell_cost(seconds, len(todo), len(whole), share[1])
        if commands.is_first():
            benchmark_table.report(args, bench, whole)
    finally:
        distributed.leave()


# ----------------------------------------------------------------------------------------- command

def main() -> None:
    args = options.evaluate_options(list(BASE_TASKS + NEW_TASKS), PUBLIC, BENCHES)
    if args.bench in BENCHES:
        run_benchmark(args, BENCHES[args.bench])
        return
    check_out(args)
    bad: Bad | None = {} if args.skip_bad else None
    source = open_pairs(args, bad, open_one) if args.data else None
    pipe = load_pipeline(adapter=options.adapters_of(args), **options.model_of(args))
    if args.route_by:                                    # before any picture is begun
        routing_maps.check_routed(pipe.adapter, f"--route-by {args.route_by!a}")
    if source:
        try:
            score_source(args, source, pipe, lambda s, place: make_pictures(
                pipe, [s], args.steps, args.guidance, place, route_by=args.route_by)[0])
        finally:
            tell_skipped(bad)
        return
    if pipe.vae.config.sample_size != world.SIZE:
        raise ValueError(f"--bench tiny needs a model for {world.SIZE}x{world.SIZE} pictures; "
                         f"{args.model} is for {pipe.vae.config.sample_size}")
    tasks = list(dict.fromkeys(args.tasks or BASE_TASKS + NEW_TASKS))        # each once
    bench_tiny(pipe, tasks, args.number or 256, args.steps, args.guidance, args.out, args.route_by)
    print(f"{args.out}/sheet.png: given, instruction, result, truth")


if __name__ == "__main__":
    commands.run(main)
