"""Stage 8 of an explained edit: what the adapter does, to the picture and to each block.

explain.explain() calls it with an Edit. The blocks are compared in passes with the adapter beside
the weights, made for the page.
"""
import math

import numpy as np

from support import export
from support.adapters import mixtures
from support.explain_adapter import EQUATIONS, NO_ADAPTER
from support.explain_edit import Edit, figure, lines, Parts, shapes
from support.figures import picture, text
from support.passages import passage
from support.scores import psnr

CHANGE, EXPERTS = "change = | w - f | / | f - x |", "experts = | w - e | / | w - f |"


def effect_table(edit: Edit, mixed: bool) -> str:
    """Of each block, means over the steps: how much changes, and how much of it is the experts'."""
    change, experts = (np.array([getattr(effect, name) for effect in edit.effects]).mean(0)
                       for name in ("change", "experts"))                    # (blocks,)
    kinds = ("change", "experts")[:1 + mixed]
    rows = []
    for name, *values in zip(edit.blocks, change, experts):
        bars = [f'<td><i class="{kind}" style="width:{70 * min(value, 1):.1f}%"></i> {value:.0%}'
                "</td>" for kind, value in zip(kinds, values)]
        rows.append(f'<tr data-change="{values[0]:.6f}" data-experts="{values[1]:.6f}"><th>{name}'
                    f"</th>{''.join(bars)}</tr>")
    heads = "".join(f"<th>{kind}</th>" for kind in kinds)
    return ('<div class="scroll" tabindex="0" role="region" aria-label="what is changed">'
            f'<table class="effects"><tr><th>block</th>{heads}</tr>{"".join(rows)}</table></div>')


def how_it_was_found(edit: Edit, mixed: bool) -> str:
    """What was computed for this stage, and what its columns mean."""
    if edit.trace.merged:
        told = ("<p>The run itself had the adapter merged into the weights, so that it cost "
                "nothing per step. ")
    else:
        told = "<p>The run itself had the adapter beside the weights. "
    asked = "as it is, and without the adapter"
    if mixed:
        asked = "as it is, without the adapter, and without its experts alone"
    told += (f"For this stage each block was computed with one input {asked}.</p><p><strong>Change"
             "</strong>: how far the adapter moves the block's output, relative to what the frozen "
             "block adds to its input (100%: as much as the block itself). ")
    if mixed:
        told += ("<strong>Experts</strong>: how much of that move vanishes without the experts. "
                 "The parts need not sum to 100%, as a block is not linear. ")
    told += "Both are lengths, over the target's tokens, and means over the steps shown. "
    outside = [name.replace("/", ".") for name in edit.trace.pipe.adapter.layers
               if "transformer_blocks/" not in name]
    if outside:
        told += f"What is adapted outside the blocks ({text(', '.join(outside))}) is not counted."
    return f"{told}</p>"


def without_it(edit: Edit) -> tuple[str, str]:
    """The pictures without and with the adapter, and their difference: in words, and as HTML."""
    apart = edit.apart(edit.bare)                        # (H, W, 3)
    factor = 2 ** max(0, math.floor(math.log2(255 / max(apart.max(), 1))))
    larger = (apart * factor).round().astype(np.uint8)
    told = ("<p>Without the adapter the same noise leads to the picture on the left: values differ "
            f"by {apart.mean():.1f} of 255 on average, by {apart.max():.0f} at most.")
    if edit.truth is not None and edit.truth.shape == edit.made.shape:
        told += (f" PSNR to the right answer (higher is nearer): {psnr(edit.bare, edit.truth):.1f} "
                 f"dB without it, {psnr(edit.made, edit.truth):.1f} dB with it.")
    enlarged = f", enlarged {factor} times" if factor > 1 else ""
    shown = [figure(picture(edit.bare, "made without the adapter"), "without the adapter"),
             figure(picture(edit.made, "made with the adapter"), "with it"),
             figure(picture(larger, f"the difference{enlarged}"), f"the difference{enlarged}")]
    told += (" What the adapter moves inside the blocks, below, need not come out as much: later "
             "blocks and steps may take it back.</p>")
    return told, f'<div class="row">{"".join(shown)}</div>'


def effect(edit: Edit) -> Parts:
    """Stage 8."""
    adapter = edit.trace.pipe.adapter
    if adapter is None:
        return {"told": NO_ADAPTER, "equation": EQUATIONS["none"], "letters": "", "figures": "",
                "shapes": "", "lines": ""}
    layers, experts = list(adapter.layers.values()), mixtures(adapter)
    told, shown = without_it(edit)
    off = max(found.off for found in edit.effects)
    size = max(step.velocity.abs().max().item() for step in edit.trace.steps)
    told += how_it_was_found(edit, bool(experts)) + (
        f'<p class="note">The passes for the table had the adapter beside the weights, at the '
        f"{len(edit.effects)} steps that are shown; their velocities differ from the run's own by "
        f"{off:.1g} at most (the largest velocity is {size:.1f}).</p>")
    width = edit.trace.pipe.dit.config.width
    used = [passage(type((experts or layers)[0]).forward)]
    letters, equation = "w whole; f frozen, that is without the adapter", CHANGE
    if experts:
        letters, equation = f"{letters}; e without the experts", f"{CHANGE}<br>{EXPERTS}"
    return {"told": told, "figures": shown + effect_table(edit, bool(experts)),
            "equation": equation,
            "letters": f"<p>What a block puts out for the input x: {letters}.</p>",
            "shapes": shapes(("block", f"1 x {edit.trace.target.tokens} x {width}",
                              "B, I, D: the target's tokens, compared")),
            "lines": lines(*used, *[passage(export.merged)] * edit.trace.merged)}
