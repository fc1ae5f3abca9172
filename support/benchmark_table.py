"""The one table of a benchmark: our numbers beside the published ones, and what is left open.

evaluate.run_benchmark() asks earlier() and answers_of() before anything is made, and report() at
the end; what a room like xversebench has score()d comes as a Scored.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from support.benchmarks import SAME, Prompt
from support.commands import is_first
from support.configs import read_json
from support.files import write_text
from support.origin import texts_of
from support.pictures import fitted, load_image, resize
from support.results import SCORING, markdown, write
from support.sheets import grid
from support.words import as_typed, say

SHOWN = 12                                               # prompts on the sheet
SHRUNK = 256                                             # longer side of a picture there, pixels
PROTOCOL = {"steps": "28", "guidance": "2.5"}            # of all three benchmarks


@dataclass
class Scored:
    """What was measured, for the table."""
    header: list[str]
    rows: list[list[str]]
    values: dict                                         # ours, not rounded
    published: dict                                      # others', in the same order
    left_open: list[str]                                 # what is not scored
    notes: list[str]                                     # sources, and what is ours


def earlier(args: argparse.Namespace) -> dict:
    """What --out records of this benchmark; nothing, where scores.json is another's or is gone."""
    try:
        record = read_json(args.out / "scores.json")
    except (FileNotFoundError, ValueError):              # no JSON object: not from here
        return {}
    return record if record.get("bench") == args.bench else {}


def heading(done: int, whole: int, left_open: list[str]) -> str:
    """A table's first line: whether it has holes, and which."""
    holes = [f"{whole - done:,} of {whole:,} prompts have no picture"] if done < whole else []
    holes += [f"not scored: {', and '.join(left_open)}"] if left_open else []
    if holes:
        return f"A table with holes: {'; '.join(holes)}."
    return f"Complete: all {whole:,} prompts, all scores."


def sheet_of(done: list[Prompt]) -> np.ndarray:
    """References and result of prompts from all over the benchmark, shrunk, each with its text."""
    rows, texts = [], []
    for i in np.linspace(0, len(done) - 1, min(SHOWN, len(done))).round().astype(int):
        shown = [*done[i].given().references, load_image(done[i].out)]
        rows.append([resize(image, fitted(image.size, SHRUNK, 1)) for image in shown])
        texts.append(f"{done[i].part} {done[i].name}: {done[i].text}")
    return grid(rows, texts, lines=2, gap=4)


def report(args: argparse.Namespace, bench: ModuleType, prompts: list[Prompt]) -> None:
    """Score what is there, and write results.FILES and scoring.md into --out.

    Raises: ValueError, FileNotFoundError for answers of --scores that do not fit.
    """
    done = [prompt for prompt in prompts if prompt.out.exists()]
    found = bench.score(done, args)
    first = texts_of(done[0].out)
    told = {name: first[name] for name in (*SAME, "size", "torch") if name in first}
    notes = ["Made with " + (", ".join(f"{name} {text}" for name, text in told.items()) or
                             "what its pictures do not say") + ".", *found.notes]
    off = [f"{name} {told[name]}, not {text}" for name, text in PROTOCOL.items()
           if told.get(name, text) != text]
    notes += [f"Not by the protocol: {'; '.join(off)}."] if off else []
    text = "\n".join([heading(len(done), len(prompts), found.left_open), "",
                      markdown(found.header, found.rows), "", *(f"- {note}" for note in notes)])
    record = {"bench": args.bench, "prompts": len(prompts), "made": len(done),
              "left_open": found.left_open, "settings": told,
              "answers": [str(file) for file in args.scores], "scores": found.values,
              "published": found.published, "notes": notes}
    write(args.out, record, text, sheet_of(done))
    write_text(args.out / SCORING, bench.scorers(args) + "\n")
    print(f"{args.out}/{SCORING}: what scores the rest; {args.out}/sheet.png: references, result")


def answers_in(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """A file of answers, or those in a folder and below it. Raises: ValueError for none."""
    if not path.is_dir():
        return [path]
    found = sorted(file for pattern in patterns for file in path.rglob(pattern))
    if not found:
        raise ValueError(f"--scores {path}: neither in it nor below it is a file called "
                         f"{' or '.join(patterns)}")
    return found


def answers_of(args: argparse.Namespace, bench: ModuleType, record: dict) -> list[Path]:
    """The files of --scores; without it those that the table in --out was made with.

    record: what earlier() gives. Raises: FileNotFoundError, ValueError.
    """
    if args.scores is not None:
        return [file for path in args.scores for file in answers_in(path, bench.ANSWERS)]
    before = [Path(path) for path in record.get("answers", [])]
    for path in before:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {args.out}/scores.json was made "
                                    "with its answers; name the files anew with --scores")
    if before and is_first():
        say(f"answers, as before: {', '.join(map(str, before))}")
    return before


def command_again(*more: object) -> str:
    """The command as it was given, for a shell: without its --scores, and with more at its end."""
    words, left_out = ["python", "evaluate.py"], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            left_out = word.startswith("--sc")           # argparse takes --scores cut short, too
        if not left_out:
            words.append(word)
    return as_typed([*words, *more])
