"""Scores on held-out samples: success and PSNR per task of the tiny world.

A picture is a success when its mean squared error to the exact drawing is below 0.03 (pixels in
[-1, 1]) and it is nearer to that drawing than to every picture that was given and to the drawing of
every scene that differs in one attribute: a colour, a shape, a place, a missing or surplus object,
the background. PSNR = 10 log10(4 / mse). Beside each score: that of copying the first input.

Run: python evaluate.py --bench tiny --number 64         # two minutes on two cores
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # what is imported now takes seconds
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from data import Sample, stack
from sample import Pipeline, condition, generate, load_pipeline, seeded_noise
from support import options
from support.files import replacing, write_json
from support.pictures import grid, save_picture
from tiny import world
from tiny.world import BASE_TASKS, EDITS, NEW_TASKS

THRESHOLD = 0.03                                         # of the mean squared error


@dataclass
class Score:
    """What was measured on one task."""
    task: str
    number: int
    success: float                                       # share of the pictures, 0..1
    psnr: float                                          # mean over the pictures, dB
    copy_success: float | None                           # of the first picture given; None if none
    copy_psnr: float | None


def pictures_given(sample: Sample) -> list[np.ndarray]:
    """All pictures that a sample comes with."""
    return [*sample.images, *sample.conds]


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of two uint8 pictures, in units of [-1, 1]."""
    return float(np.square((a.astype(np.float32) - b) / 127.5).mean())


def success(picture: np.ndarray, sample: Sample) -> bool:
    """Whether a picture (H, W, 3) uint8 is what a tiny-world sample asks for."""
    error = squared_error(picture, sample.target)
    near = map(world.draw, world.neighbours(sample.scene))
    others = chain(pictures_given(sample),
                   (p for p in near if not np.array_equal(p, sample.target)))
    return error < THRESHOLD and all(squared_error(picture, p) > error for p in others)


def psnr(picture: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 60."""
    return float(10 * np.log10(4 / max(squared_error(picture, target), 4e-6)))


def measure(task: str, pictures: list[np.ndarray], samples: list[Sample]) -> Score:
    """Score pictures against their samples, of one task; and the first picture given, if any."""
    scores = np.array([[(success(p, s), psnr(p, s.target)) for p in (made, *pictures_given(s)[:1])]
                       for made, s in zip(pictures, samples)])   # (samples, 1 or 2, 2)
    means = scores.mean(0).tolist()
    return Score(task, len(samples), *means[0], *(means[1] if len(means) > 1 else (None, None)))


def make_pictures(pipe: Pipeline, samples: list[Sample], steps: int, guidance: float,
                  batch_size: int = 64) -> list[np.ndarray]:
    """The model's pictures for samples of one task; sample number i starts from seed i."""
    pictures = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start:start + batch_size]
        given = condition(pipe, [s.instruction for s in batch], stack(s.images for s in batch),
                          stack(s.conds for s in batch))
        noise = seeded_noise(list(range(start, start + len(batch))), (world.SIZE, world.SIZE),
                             pipe.vae.config.latent_channels)
        pictures += list(generate(pipe, given, noise, steps, guidance)[0])
    return pictures


def table(scores: list[Score]) -> str:
    """A Markdown table, with the means of the edits and of the tasks that the base never saw."""
    rows = list(scores)
    for name, tasks in (("mean of edits", EDITS), ("mean of new tasks", NEW_TASKS)):
        part = [s for s in scores if s.task in tasks]
        if len(part) == len(tasks):
            means = (float(np.mean([getattr(s, key) for s in part]))
                     for key in ("success", "psnr", "copy_success", "copy_psnr"))
            rows.append(Score(name, sum(s.number for s in part), *means))
    lines = ["| task | pictures | success | copying the input | PSNR | of the copy |",
             "|---|---|---|---|---|---|"]
    for s in rows:
        copied = (("–", "–") if s.copy_success is None else
                  (f"{s.copy_success:.1%}", f"{s.copy_psnr:.1f} dB"))
        lines.append(f"| {s.task} | {s.number} | {s.success:.1%} | {copied[0]} "
                     f"| {s.psnr:.1f} dB | {copied[1]} |")
    return "\n".join(lines)


def contact_sheet(results: dict[str, tuple[list[Sample], list[np.ndarray]]],
                  each: int = 4) -> np.ndarray:
    """Given / result / truth for the first samples of each task; failures have a red frame."""
    shown = [(s, p) for samples, pictures in results.values()
             for s, p in list(zip(samples, pictures))[:each]]
    return grid([[*pictures_given(s), p, s.target] for s, p in shown],
                [s.instruction for s, _ in shown], min(each, len(shown) // len(results)),
                lines=2, gap=4, failed=[not success(p, s) for s, p in shown])


def bench_tiny(pipe: Pipeline, tasks: list[str], number: int, steps: int, guidance: float,
               out: Path) -> list[Score]:
    """Score every task, and write scores.json, table.md and sheet.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    results, scores = {}, []
    for task in tasks:
        samples = world.tiny_test(task, number)
        results[task] = samples, make_pictures(pipe, samples, steps, guidance)
        scores.append(measure(task, results[task][1], samples))
        print(f"{task:12} {scores[-1].success:6.1%}  {scores[-1].psnr:5.1f} dB", flush=True)
    write_json(out / "scores.json", [vars(score) for score in scores])
    with replacing(out / "table.md") as aside:
        aside.write_text(table(scores) + "\n", encoding="utf-8")
    save_picture(contact_sheet(results), out / "sheet.png")
    return scores


def main() -> None:
    args = options.evaluate_options(list(BASE_TASKS + NEW_TASKS))
    pipe = load_pipeline(adapter=options.adapters_of(args), **options.model_of(args))
    if pipe.vae.config.sample_size != world.SIZE:
        raise ValueError(f"--bench tiny needs a model for {world.SIZE}x{world.SIZE} pictures; "
                         f"{args.model} is for {pipe.vae.config.sample_size}")
    tasks = list(dict.fromkeys(args.tasks))              # each once
    scores = bench_tiny(pipe, tasks, args.number, args.steps, args.guidance, args.out)
    print(f"\n{table(scores)}\n\n{args.out}/sheet.png: given, instruction, result, truth")


if __name__ == "__main__":
    commands.run(main)
