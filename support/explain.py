"""One edit, explained: a page of HTML with the tensors of a run beside the lines that made them.

sample.py --explain has it written, and tiny/pages.py for pictures whose right answer is known. From
Python:

    trace = Trace(sample.denoise, sample.encode_text)
    picture = sample.edit(pipe, "make it red", "photo.png", watch=trace)
    page = explain(trace, picture, "photo.png")

The page stands by itself: pictures, style and script lie within it (explain.html is its frame). Its
nine stages get their figures from explain_inputs, _adapter, _steps, _attention and _effect.
"""
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import (devices, explain_adapter, explain_attention, explain_effect, explain_inputs,
                     explain_steps, jobs)
from support.conditions import read_cond
from support.explain_edit import Edit
from support.figures import text
from support.files import write_text
from support.pictures import Given, each, given_picture, resize
from support.trace import Trace
from support.words import as_typed

FRAME = Path(__file__).with_name("explain.html")
STAGES = {"asked": explain_inputs.asked, "words": explain_inputs.words,
          "routing": explain_adapter.routing, "tokens": explain_inputs.tokens,
          "schedule": explain_inputs.schedule, "steps": explain_steps.steps,
          "attention": explain_attention.attention, "effect": explain_effect.effect,
          "result": explain_steps.result}                # from the page's top to its end


def names_of(sources: Iterable[Given], word: str) -> list[str]:
    """What each picture is called: what it is, and its file's name or its number."""
    return [f"{word} {Path(one).name if isinstance(one, (str, Path)) else i}"
            for i, one in enumerate(sources, 1)]


def explain(trace: Trace, picture: Image.Image, images: Given | Iterable[Given] = (),
            conds: Given | Iterable[Given] = (), *, truth: np.ndarray | None = None,
            command: str = "") -> str:
    """A page of HTML about an edit that was watched; nothing in it is loaded from elsewhere.

    picture: what sample.edits() gave, with its texts; images, conds: what it was given. truth: the
    right answer, (H, W, 3) uint8, where it is known. command: what makes this page again.
    Raises: ValueError when nothing was watched, or the picture is not from sample.edits().
    """
    if trace.latents is None:
        raise ValueError("this Trace has seen no picture; give it to sample.edit(watch=...)")
    if "instruction" not in picture.info:
        raise ValueError("explain() takes the picture that sample.edit() gave, with its texts")
    images, conds = each(images), each(conds)
    sizes = iter(trace.sizes())
    given = [resize(given_picture(one), size) for one, size in zip(images, sizes)]
    given += [resize(read_cond(one, lambda _, size=size: size), size)
              for one, size in zip(conds, sizes)]
    edit = Edit(trace, picture, [given_picture(one) for one in images], given,
                [*names_of(images, "reference"), *names_of(conds, "condition")], truth, command)
    parts, findings = {"title": text(edit.instruction)}, []
    for number, (name, stage) in enumerate(STAGES.items(), 1):
        found = stage(edit)
        parts |= {f"{name}.{part}": shown for part, shown in found.items()}
        if "finding" in found:
            findings.append(f'<li>{found["finding"]} <a href="#{name}">{number}</a></li>')
    parts["findings"] = "".join(findings)
    parts["data"] = json.dumps(edit.data).replace("<", "\\u003c")           # no tag ends it
    return re.sub(r"\{\{([\w.]+)\}\}", lambda place: parts[place[1]], FRAME.read_text("utf-8"))


def write(file: Path, trace: Trace, picture: Image.Image, job: jobs.Job) -> None:
    """Write the page of a command's one picture, and say so."""
    devices.announce("explaining, in further passes", sum(
        p.nbytes for p in trace.pipe.dit.parameters()))
    page = explain(trace, picture, job.images, job.conds,
                   command=as_typed(["python", "sample.py", *sys.argv[1:]]))
    write_text(file, page)
    tqdm.write(f"{file}: this edit, explained on a page of {len(page.encode()) / 1e6:.1f} MB")
