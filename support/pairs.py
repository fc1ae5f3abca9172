"""Scores of a model on pairs of one's own, held out of training: evaluate.py --data SOURCE.

evaluate.main() calls open_pairs() before any weight is read, then score_source(), each with the
functions from above that it needs.
"""
import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import adapters, options, summary
from support.bad_rows import Bad
from support.pictures import resize
from support.public_sets import PUBLIC
from support.results import HOLE, cell, markdown, write
from support.scores import SMALLEST, mean, ms_ssim, psnr, ssim
from support.sheets import grid
from support.texts import unread
from support.words import counted, note, say

SHOWN = 16                                               # rows on the sheet
COLUMNS = {"psnr": ("PSNR", "{:.1f} dB"), "ssim": ("SSIM", "{:.3f}"),
           "ms_ssim": ("MS-SSIM", "{:.3f}")}             # of a table: title, form


def number_of(source: object) -> int:
    """Samples that source.all() gives, at most: one for a row, or for each number of conditions."""
    return summary.rows_in(source) * len(getattr(source, "conditions", [1]))


def open_pairs(args: argparse.Namespace, bad: Bad | None, open_one: Callable) -> object:
    """The source of --data; says what was understood of it. open_one: data.open_one().

    Raises: as it does.
    """
    size = options.only_size(args)
    longest = adapters.longest(path for path, _ in options.adapters_of(args))
    source = open_one(args.data[0], {}, PUBLIC, size, args.data_root, bad, longest)
    number = number_of(source)
    less = f"; scored: the first {args.number:,}" if number > (args.number or number) else ""
    say(f"{args.data[0]}: {counted(number, 'sample')}{less}")
    for line in summary.understood(source):
        say(f"  {line}")
    return source


def read_all(source: object, places: list[str]) -> Iterator:
    """A source's samples; of a folder, where rows have names, those are added to places."""
    if not hasattr(source, "checked_rows"):
        yield from source.all()
        return
    for row in source.checked_rows:
        for sample in source.read_good(row):             # none, if it has gone bad
            places.append(row.where)
            yield sample


def score_pairs(make: Callable, samples: Iterable, total: int) -> tuple[list[dict], np.ndarray]:
    """Score a picture for every sample -> rows of scores.json, the sheet of the first.

    make: sample, its place -> the model's picture.
    """
    rows, shown, texts = [], [], []
    with tqdm(samples, desc="pictures", total=total) as bar:     # closed before an error is told
        for place, s in enumerate(bar):
            picture = make(s, place)
            about = {"place": place, "instruction": s.instruction, "task": s.task,
                     "size": list(s.target.shape[1::-1])}
            rows.append(about | compare(picture, s.target, s.given))
            if place < SHOWN:
                shown.append([*s.given, picture, s.target])
                texts.append(f"{place}, {rows[-1]['model']['psnr']:.1f} dB: {s.instruction}")
    if not rows:
        raise ValueError("--data: holds no row that can be used")
    return rows, grid(shown, texts, lines=2, gap=4)


def score_source(args: argparse.Namespace, source: object, pipe: object, make: Callable) -> None:
    """Score the pairs of --data, all or the first --number, and write results.FILES into --out.

    make: as score_pairs() takes it. Raises: ValueError when there are none.
    """
    total = min(number_of(source), args.number or sys.maxsize)
    places: list[str] = []
    rows, sheet = score_pairs(make, islice(read_all(source, places), total), total)
    for row, where in zip(rows, places):
        row["where"] = where
    write(args.out, {
        "data": args.data[0], "model": str(args.model), "steps": args.steps,
        "adapters": [f"{file}:{strength:g}" for file, strength in options.adapters_of(args)],
        "guidance": args.guidance, "route_by": args.route_by, "means": means(rows), "rows": rows},
        pairs_table(rows), sheet, args.route_by)
    for line in left_open(rows) + unread((row["instruction"] for row in rows), pipe.t5_tokens):
        note(line)
    print(f"{args.out}/sheet.png: given, result, truth of the first {min(SHOWN, len(rows))}")


# ---------------------------------------------------------------------------------------- tables

def scores(picture: np.ndarray, target: np.ndarray) -> dict[str, float | None]:
    """All of a table's columns, by name; None: not defined for pictures so small."""
    return {"psnr": psnr(picture, target), "ssim": ssim(picture, target),
            "ms_ssim": ms_ssim(picture, target)}


def compare(picture: np.ndarray, target: np.ndarray, given: list[np.ndarray]
            ) -> dict[str, dict[str, float | None] | None]:
    """Scores of the model's picture and of copying the first one given; None where none is."""
    size = target.shape[1::-1]                           # (W, H), which the copy takes
    return {"model": scores(picture, target),
            "copy": scores(resize(Image.fromarray(given[0]), size), target) if given else None}


def means(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """Of each score, for the model and for the copy: over the rows that have one; None if none."""
    found: dict[str, dict[str, float | None]] = {"model": {}, "copy": {}}
    for who, own in found.items():
        for name in COLUMNS:
            own[name] = mean([row[who][name] for row in rows
                              if row[who] and row[who][name] is not None])
    return found


def pairs_table(rows: list[dict]) -> str:
    """A Markdown table: means of each task, where there are several, and of all."""
    tasks, parts = sorted({row["task"] for row in rows}), []
    for task in tasks if len(tasks) > 1 else []:
        own = [row for row in rows if row["task"] == task]
        parts.append((task.replace("|", "/") or HOLE, own))
    header, lines = ["task", "pictures"], []
    for title, _ in COLUMNS.values():
        header += [title, "of the copy"]
    for called, own in (*parts, ("mean of all", rows)):
        found, line = means(own), [called, str(len(own))]
        for name, (_, shape) in COLUMNS.items():
            line += [cell(found["model"][name], shape), cell(found["copy"][name], shape)]
        lines.append(line)
    return markdown(header, lines)


def left_open(rows: list[dict]) -> list[str]:
    """What is left open, and in how many rows."""
    small = sum(row["model"]["ms_ssim"] is None for row in rows)
    bare = sum(row["copy"] is None for row in rows)
    lines = []
    if small:
        lines.append(f"MS-SSIM needs {SMALLEST} pixels on the shorter side; {small:,} of "
                     f"{len(rows):,} pictures have fewer, and no MS-SSIM")
    if bare:
        lines.append(f"{bare:,} of {len(rows):,} rows give no picture that could be copied")
    return lines
