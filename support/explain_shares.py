"""The routers' shares, as a table, beside those of other instructions, and in words.

explain_adapter.routing() calls this, for stage 3 of an explained edit.

Key: E experts; k kept; p a router's shares before the top k are kept.
"""
import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from support.explain_edit import Edit
from support.figures import text
from support.routing_maps import distance, Shares, shares

NEARLY_EVEN = 0.05                                       # distance of p from 1 / E
HARDLY, LITTLE = 0.1, 0.3                                # parts of the kept experts that change
NEAR = 0.7                                               # of what changes by chance: near it
TIES = 0.05                                              # of 1 / E: a margin that is hardly one


def short(name: str) -> str:
    """A layer's name as it is said on the page: its block, and its name within."""
    name = re.sub(r"^single_transformer_blocks\.(\d+)\.", r"single \1 ", name)
    return re.sub(r"^transformer_blocks\.(\d+)\.", r"double \1 ", name)


def tied(own: dict[str, Shares]) -> bool:
    """Whether, to four digits, a share that is kept equals one that is not."""
    return any(f"{p[kept].min():.4f}" == f"{p[~kept].max():.4f}"
               for p, kept in own.values() if not kept.all())


def shares_table(own: dict[str, Shares]) -> str:
    """p of each layer and expert; colour: distance from 1/E; a dot at those that are kept."""
    even = 1 / next(iter(own.values())).p.shape[-1]
    most = max(max((found.p - even).abs().max().item() for found in own.values()), 1e-9)
    unit = 10.0 ** (math.floor(math.log10(most)) - 1)
    rows, ties = [], tied(own)
    for name, (p, kept) in own.items():
        cells = []
        for share, serves in zip(p[0].tolist(), kept[0].tolist()):
            kind = ("warm" if share > even else "cold") + " kept" * serves
            said = f"{(share - even) / unit:+.1f}" if ties else f"{share:.4f}"
            cells.append(f'<td class="{kind}" data-p="{share:.6f}" '
                         f'style="--a:{abs(share - even) / most:.2f}">{said}</td>')
        rows.append(f'<tr data-layer="{text(name)}"><th>{text(short(name))}</th>'
                    f"{''.join(cells)}</tr>")
    head = "".join(f"<th>{e}</th>" for e in range(round(1 / even)))
    what = "The shares p before the top k are kept"
    if ties:
        what += f", as p - 1/E in units of {unit:.0e}: written out, some would look equal"
    return ('<div class="scroll tall" tabindex="0" role="region" aria-label="shares of experts in '
            f'each layer"><table class="shares"><tr><th>layer, expert</th>{head}</tr>'
            f'{"".join(rows)}</table></div><p class="note">{what}; bold with a dot: kept. Warm: '
            f"above the even share 1/E = {even:g}; cold: below; the fullest colour is {most:.4f} "
            "away from it.</p>")


def kept_map(own: dict[str, Shares], other: dict[str, Shares], told: str) -> str:
    """Small squares, a row for each layer: kept by both, by this or by the other alone."""
    kinds = {(True, True): "both", (True, False): "own", (False, True): "other"}
    found = []
    for row, (mine, theirs) in enumerate(zip(own.values(), other.values())):
        for e, pair in enumerate(zip(mine.kept[0].tolist(), theirs.kept[0].tolist())):
            if pair in kinds:
                found.append(f'<rect class="{kinds[pair]}" x="{10 * e + 1}" y="{6 * row + 1}" '
                             'width="8" height="4"/>')
    width = 10 * next(iter(own.values())).p.shape[-1]
    return (f'<svg class="compared" viewBox="0 0 {width} {6 * len(own)}" role="img"><title>'
            f'{text(told)}</title><rect class="ground" width="100%" height="100%"/>'
            f'{"".join(found)}</svg>')


def stacked(found: dict[str, Shares]) -> tuple[Tensor, Tensor]:
    """p and kept of one instruction, each (layers, E)."""
    p, kept = zip(*found.values())
    return torch.cat(p), torch.cat(kept)


@dataclass
class Comparison:
    """Other instructions in the same layers; a number for each."""
    moved: list[float] = field(default_factory=list)     # distance of p
    changing: list[float] = field(default_factory=list)  # part of the kept experts
    shown: str = ""                                      # as HTML


def comparison(edit: Edit, own: dict[str, Shares]) -> Comparison:
    """Those of edit.others with this routing."""
    p, kept = stacked(own)
    rows, all_of_them = [], Comparison()
    for other in edit.others:
        found = shares(edit.trace.pipe.adapter, *edit.trace.encode(edit.trace.pipe, [other]))
        q, theirs = stacked(found)
        moved, changing = distance(p, q), ((kept & ~theirs).sum() / kept.sum()).item()
        all_of_them.moved.append(moved)
        all_of_them.changing.append(changing)
        rows.append(f'<tr data-moved="{moved:.6f}" data-changing="{changing:.6f}"><td>'
                    f"{kept_map(own, found, f'experts kept for: {other}')}</td><td>{text(other)}"
                    f"</td><td>{moved:.4f}</td><td>{changing:.0%}</td></tr>")
    if rows:
        all_of_them.shown = (
            '<div class="scroll" tabindex="0" role="region" aria-label="other instructions"><table '
            'class="others"><tr><th>kept experts</th><th>another instruction</th><th>shares that '
            f"move</th><th>kept that change</th></tr>{''.join(rows)}</table></div>"
            '<p class="note">Shares that move: half the sum of |p - p&prime;| over the experts, a '
            "mean over the layers; 0 is equal, 1 would share nothing. Small maps: rows are layers, "
            'columns experts; <span class="key both">kept for both</span> <span class="key own">'
            'for the edit of this page alone</span> <span class="key other">for the other alone'
            "</span></p>")
    return all_of_them


def verdict(p: Tensor, kept: Tensor, others: Comparison) -> str:
    """What the numbers say of the routing, in words. p, kept (layers, E)."""
    experts, k = p.shape[1], int(kept[0].sum())
    even, order = distance(p, torch.full_like(p, 1 / experts)), p.sort(-1, descending=True).values
    told = (f"<p>The shares lie {even:.3f} from even (half the sum of |p - 1/E|, a mean over the "
            f"layers: 0 is even, {1 - 1 / experts:.3f} is one expert for all). ")
    if even < NEARLY_EVEN:
        told += ("They are nearly even, so what a router decides is less how much than which: "
                 f"{k} of {experts} experts serve. ")
    else:
        told += f"So some experts count clearly more than others; {k} of {experts} serve. "
    ties = False
    if k < experts:
        gap = (order[:, k - 1] - order[:, k]).mean().item()
        ties = gap < TIES / experts
        told += (f"The others are silent, and what is kept is not made to sum to 1 again: here it "
                 f"is {(p * kept).sum(-1).mean():.3f}. Between the smallest share that is kept and "
                 f"the largest that is not lie {gap:.4f}" + (", next to nothing." if ties else "."))
    told += "</p>"
    if not others.moved:
        return f"{told}<p>There is no other instruction to compare with.</p>"
    if k == experts:
        return f"{told}<p>All serve, so for other instructions none changes.</p>"
    changing, chance = (sum(others.changing) / len(others.changing), 1 - k / experts)
    if changing < HARDLY:
        how = "The choice hardly differs between instructions."
    elif ties and changing > NEAR * chance:
        how = ("That is near chance, and the margins are next to ties, so these numbers do not "
               "say that the choice means much.")
    elif changing < LITTLE:
        how = "The choice differs a little between instructions."
    else:
        how = "The choice differs clearly between instructions."
    moved = sum(others.moved) / len(others.moved)
    return (f"{told}<p>For the instructions below, {changing:.0%} of the kept experts are others, "
            f"and {moved:.4f} of the shares move; {k} of {experts} drawn by chance would be others "
            f"by {chance:.0%} (1 - k/E). <strong>{how}</strong></p>")
