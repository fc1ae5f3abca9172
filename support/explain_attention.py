"""Stage 7 of an explained edit: where the target looks.

explain.explain() calls it with an Edit; its numbers go to the page's script too, in Edit.data.
"""
import base64

import numpy as np

import dit
from support.attention import ASKED, ASKING
from support.explain_edit import Edit, figure, lines, Parts, shapes
from support.figures import bars, picture, text, veil
from support.passages import passage
from support.words import counted

PLAIN = 8                                                # of 255: pixels that hardly vary


def word_chips(edit: Edit, weights: np.ndarray, chosen: int) -> str:
    """The words, shaded by attention to them; the script lets one be chosen."""
    many = np.array(edit.many)                           # tokens: padding is one chip
    each = weights / many
    most = max(float(each[:edit.read].max()), 1e-12)
    return "".join(f'<button type="button" class="word" aria-pressed="{str(i == chosen).lower()}" '
                   f'style="--a:{min(shade / most, 1):.2f}">{text(word)} <small>{weight:.1%}'
                   "</small></button>" for i, (word, weight, shade) in enumerate(
                       zip(edit.words, weights.tolist(), each.tolist())))


def overlaid(shown: str, weights: np.ndarray, cells: tuple[int, int], name: str, told: str) -> str:
    """A picture, and over it a veil that is thin where there is attention."""
    layer = f'<img class="veil pixels" alt="" src="{veil(weights.reshape(cells))}">'
    return figure(f'<div class="map" data-map="{name}">{shown}{layer}</div>', told)


def totals(edit: Edit, weights: np.ndarray) -> dict[str, float]:
    """Attention (words and cells,) summed by what it goes to."""
    kinds = ["words", "padding", *(grid.kind for grid in edit.trace.grids)]
    read, end = edit.read, len(edit.words)
    found: dict[str, float] = {}
    for kind, (start, stop) in zip(kinds, [(0, read), (read, end), *edit.spans[1:]]):
        if stop > start:
            found[kind] = found.get(kind, 0.0) + float(weights[start:stop].sum())
    return found


def at_own_place(edit: Edit, weights: np.ndarray) -> np.ndarray:
    """Whether a cell looks in the first reference most at its own place, (cells,) bool."""
    start, end = edit.spans[2]
    (down, across), grid = edit.trace.target.cells(ASKING), edit.trace.grids[1].cells(ASKED)
    most = weights[:, start:end].argmax(1)               # (cells,)
    row, column = (most // grid[1] + 0.5) / grid[0], (most % grid[1] + 0.5) / grid[1]
    there = (row * down).astype(int) * across + (column * across).astype(int)
    return there == np.arange(len(weights))


def told_parts(edit: Edit, first: np.ndarray) -> str:
    """What attention goes to, as a mean over blocks and all of the target."""
    return ", ".join(f"{name} {part:.0%}" for name, part in totals(edit, first[0].mean(0)).items())


def looked(edit: Edit, first: np.ndarray) -> str:
    """What attention's numbers say, in words. first: of step 1, (entries, cells, ...)."""
    cells, blocks = first.shape[1], counted(len(first) - 1, "block")
    told = (f"<p>At the first step, as a mean over {blocks} and all of the target, attention goes "
            f"to {told_parts(edit, first)}.</p>")
    if not edit.counts["reference"]:
        return told
    places = [int(at_own_place(edit, block).sum()) for block in first[1:]]
    best = int(np.argmax(places))
    return told + (
        "<p>By its position a token of the target can find its own place in the reference. In "
        f"block {edit.entries[1 + best]}, {places[best]} of {cells} do: of the reference they read "
        "most what stands at their own row and column (by chance it would be 1). As a mean over "
        f"these blocks it is {np.mean(places):.1f}.</p>") + read_first(edit, first)


def opened(edit: Edit, first: np.ndarray) -> int:
    """The entry that the page opens on: where the asking token reads the references most."""
    spans = [span for span, grid in zip(edit.spans[1:], edit.trace.grids)
             if grid.kind == "reference"]
    if not spans:
        return 0                                         # the mean
    read = first[1:, edit.changed, spans[0][0]:spans[-1][1]].sum(1)
    return 1 + int(read.argmax())


def read_first(edit: Edit, first: np.ndarray) -> str:
    """What the asking token reads most in the first reference, in the block that is opened."""
    entry, (start, end) = opened(edit, first), edit.spans[2]
    part = first[entry, edit.changed, start:end]
    grid = edit.trace.grids[1].cells(ASKED)
    place = int(part.argmax())
    row, column = divmod(place, grid[1])
    H, W, _ = edit.given[0].shape
    cell = edit.given[0][row * H // grid[0]:(row + 1) * H // grid[0],
                         column * W // grid[1]:(column + 1) * W // grid[1]]
    spread = cell.astype(float).std((0, 1)).mean()
    own = at_own_place(edit, first[entry])[edit.changed]
    where = "its own place" if own else "another place"
    plain = ", which is empty there: its pixels hardly vary" if spread < PLAIN else ""
    return (f"<p>Below, a token first asks in block {edit.entries[entry]}, where it reads the "
            f"references most: {part.sum():.0%} of its attention goes to the first one, and there "
            f"most to {where}, row {row}, column {column}{plain}.</p>")


def by_block(edit: Edit, every: list[np.ndarray]) -> str:
    """What each block reads, a mean over the target, at the first and at the last step."""
    shown = []
    for step, weights in ((edit.trace.steps[i], every[i]) for i in (0, -1)):
        rows = {name: totals(edit, block.mean(0))
                for name, block in zip(edit.entries[1:], weights[1:])}
        told = f"What the target's tokens read, by block, at step {step.number}"
        shown.append(f"<figure><h3>{told}</h3>{bars(rows, told)}</figure>")
    return f'<div class="row even">{"".join(shown)}</div>'


def asking(edit: Edit, target: str) -> str:
    """The target, on which a token is chosen."""
    down, across = edit.trace.target.cells(ASKING)
    row, column = divmod(edit.changed, across)
    box = (f'<i class="cell" style="left:{column / across:.2%};top:{row / down:.2%};'
           f'width:{1 / across:.2%};height:{1 / down:.2%}"></i>')
    return figure('<div class="map" id="asks" tabindex="0" role="application" aria-label="choose a '
                  f'token of the target; arrow keys move">{target}{box}</div>',
                  '<span class="js">Choose the </span>token that asks: '
                  f"<output>row {row}, column {column}</output>")


def maps(edit: Edit, now: np.ndarray, word: int) -> str:
    """What edit.changed reads, and where a word is read. now: (cells, words and cells)."""
    trace = edit.trace
    target = picture(edit.x0[trace.steps[0].number], "the target, as the model expects it")
    shown = [target, *(picture(one, name) for one, name in zip(edit.given, edit.names))]
    names = ["the target", *edit.names]
    found = [asking(edit, target)]
    for i, (start, end) in enumerate(edit.spans[1:]):
        part = now[edit.changed, start:end]
        found.append(overlaid(shown[i], part, trace.grids[i].cells(ASKED), f"{i}",
                              f"{text(names[i])} <output>{part.sum():.1%}</output>"))
    found.append(overlaid(target, now[:, word], trace.target.cells(ASKING), "word",
                          f"where <output>{text(edit.words[word])}</output> is read"))
    return f'<div class="row">{"".join(found)}</div>'


def for_the_script(edit: Edit, packed: np.ndarray, entry: int, word: int) -> dict:
    """All of attention, in steps of 1/65535, and what it is of. packed: (steps, entries, ., .)."""
    trace = edit.trace
    whole = np.rint(packed * 65535).astype("<u2").tobytes()
    return {"shape": packed.shape, "attention": base64.b64encode(whole).decode(),
            "spans": edit.spans, "cells": [grid.cells(ASKED) for grid in trace.grids],
            "asking": trace.target.cells(ASKING), "read": edit.read, "words": edit.words,
            "many": edit.many, "steps": [step.number for step in trace.steps],
            "cell": edit.changed, "entry": entry, "word": word}


def attention(edit: Edit) -> Parts:
    """Stage 7."""
    trace = edit.trace
    every = [edit.attention(step).numpy() for step in trace.steps]   # (entries, cells, keys)
    entry = opened(edit, every[0])
    now = every[0][entry]                                # (cells, keys): first step
    to_words = now[:, :len(edit.words)]
    word = int((to_words.max(0) / to_words.mean(0).clip(1e-12)).argmax())    # the least even one
    edit.data = for_the_script(edit, np.stack(every), entry, word)
    chips = word_chips(edit, to_words[edit.changed], word)
    c, S = trace.pipe.dit.config, len(trace.asked())
    return {"figures": f'{controls(edit, entry)}<p class="note js">Click a word to see, in the '
                       'last picture, where it is read.</p>'
                       '<div class="words-row" role="group" aria-label="words">'
                       f"{chips}</div>{maps(edit, now, word)}{by_block(edit, every)}",
            "told": looked(edit, every[0]), "cells": reduced(edit),
            "finding": "At the first step the target's attention goes to "
                       f"{told_parts(edit, every[0])}.",
            "shapes": shapes(
                ("q, k, v", f"1 x {c.num_attention_heads} x {S} x {c.attention_head_dim}",
                 "B, N, S, d"),
                ("weights", f"{now.shape[0]} x {now.shape[1]}",
                 "of the target's cells: words, then cells of each picture")),
            "lines": lines(passage(trace.pipe.dit.blocks[0].attend),
                           passage(dit.DoubleBlock.forward, "q, k, v =", "txt_out"))}


def controls(edit: Edit, chosen: int) -> str:
    """What the script needs: which step, which block."""
    options = "".join(f'<option value="{i}"{" selected" * (i == chosen)}>{name}</option>'
                      for i, name in enumerate(edit.entries))
    last = len(edit.trace.steps) - 1
    return ('<p class="controls js"><label>step <input type="range" id="step" min="0" '
            f'max="{last}" value="0"> <output id="at">{edit.trace.steps[0].number}</output></label>'
            f'<label>block <select id="entry">{options}</select></label></p>')


def reduced(edit: Edit) -> str:
    """What is left out of attention, or averaged, in words."""
    trace = edit.trace
    told = ["Weights are means over the heads."]
    if (total := len(trace.pipe.dit.blocks)) > len(trace.blocks):
        told.append(f"Of {total} blocks {len(trace.blocks)} are watched.")
    if trace.target.cells(ASKING) != trace.target[2:4]:
        down, across = trace.target.cells(ASKING)
        told.append(f"The target's tokens ask in {down} x {across} cells, each a mean.")
    if any(grid.cells(ASKED) != grid[2:4] for grid in trace.grids):
        told.append(f"What is asked is summed in cells, at most {ASKED} on a side.")
    return " ".join(told)
