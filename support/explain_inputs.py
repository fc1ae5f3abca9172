"""Stages 1, 2, 4 and 5 of an explained edit: what is asked, and what it becomes before a step.

explain.explain() calls each with an Edit.

Key: B = 1 picture; C latent channels; h, w latent grid; P = 4 C packed; T, I, R, Q tokens of text,
target, references, clean conditions; D a width.
"""
import torch
import torch.nn.functional as F

import dit
from support.adapters import mixtures
from support.attention import Grid
from support.explain_edit import (Edit, figure, heat_strip, lines, Parts, Piece, pieces_of, scale,
                                  shape, shapes)
from support.figures import channels, chart, heat, picture, text
from support.implied import RELEASED
from support.origin import ROUTED_BY
from support.passages import from_here, passage
from support.words import counted

CUT = 100                                                # lost pieces that are shown, at most
WIDEST = 512                                             # channels of T5 that are shown, at most
PADDING = 22                                             # rows of T5's that are shown, at most
RULED = 32                                               # tokens on a side, at most, between lines
MOST = 64                                                # latents on a side that are shown, at most
FACTS = ("size", "steps", "guidance", "seed", "given", "model", "adapters", "dtype")
LETTERS = {"text": "T", "target": "I", "reference": "R", "condition": "Q"}


def model(edit: Edit) -> str:
    """How large this transformer is, and how large the released one."""
    dit_, adapter = edit.trace.pipe.dit, edit.trace.pipe.adapter
    own = len(dit_.transformer_blocks), len(dit_.single_transformer_blocks), dit_.config.width
    added = {id(p): p.numel() for p in adapter.tensors().values()} if adapter else {}
    frozen = sum(p.numel() for p in dit_.parameters() if id(p) not in added)
    told = (f"The transformer of this run has {own[0]} double and {own[1]} single blocks of width "
            f"{own[2]:,}, {frozen / 1e6:,.1f} million numbers")
    told += f"; its adapter adds {sum(added.values()) / 1e6:,.1f} million. " if added else ". "
    released = RELEASED.num_layers, RELEASED.num_single_layers, RELEASED.width
    if own != released:
        told += "<strong>It is a toy</strong>: " if own[2] < released[2] else ""
        told += "the released FLUX.1-Kontext has {} + {} blocks of width {:,}. ".format(*released)
    return (f"<p>{told}A double block has weights apart for text and for pictures, which meet in "
            "its attention; a single block has one set for all tokens.</p>")


def letters(edit: Edit) -> str:
    """The letters on the page, each with its value here."""
    trace, pipe = edit.trace, edit.trace.pipe
    counts, (C, h, w), c = edit.counts, trace.noise[0].shape, pipe.dit.config
    rows = [("B", "1", "pictures made at once"),
            *((LETTERS[kind], f"{n:,}", f"tokens of {said}") for (kind, n), said in zip(
                counts.items(), ("text", "target", "native references", "clean conditions"))),
            ("S", f"{sum(counts.values()):,}", "tokens, all of them"),
            ("D", f"{c.width:,}", "width of a token"),
            ("N, d", f"{c.num_attention_heads}, {c.attention_head_dim}", "heads, and their size"),
            ("C", f"{C}", "latent channels"), ("h, w", f"{h}, {w}", "latent grid")]
    for layer in mixtures(pipe.adapter)[:1]:             # all have as many
        own = layer.config
        rows.append(("E, k, r", f"{own.experts}, {own.top_k}, {own.rank}",
                     "experts, kept ones, rank"))
    return shapes(*rows)


def asked(edit: Edit) -> Parts:
    """Stage 1."""
    number = len(edit.images)
    shown = [figure(picture(one, name), text(name))
             for one, name in zip(edit.images, edit.names)]
    shown += [figure(picture(one, name), f"{text(name)}, as it is read")
              for one, name in zip(edit.given[number:], edit.names[number:])]
    info = edit.picture.info | {"model": from_here(edit.trace.pipe.model)}
    facts = "".join(f"<tr><th>{name}</th><td>{text(info[name])}</td></tr>"
                    for name in (*FACTS, ROUTED_BY) if name in info)
    command = (f'<p>This page is made again by</p><pre class="command" tabindex="0">'
               f"{text(edit.command)}</pre>" if edit.command else "")
    return {"instruction": text(edit.instruction), "command": command,
            "model": model(edit), "letters": letters(edit),
            "figures": f'<div class="row">{"".join(shown) or "<p>No picture was given.</p>"}</div>'
                       f'<table class="facts">{facts}</table>',
            "lines": lines(passage(edit.pipeline.condition))}


def pieces_row(pieces: list[Piece], padding: int, title: str) -> str:
    """Tokens of a text with their ids; those that are cut are struck through."""
    kept, cut = ([p for p in pieces if p.cut == lost] for lost in (False, True))
    shown = [f"<span><b>{text(p.text)}</b><small>{p.id}</small></span>" for p in kept]
    shown += [f"<span><s>{text(p.text)}</s><small>{p.id}</small></span>" for p in cut[:CUT]]
    told = f"{len(kept)} tokens, then {padding} of padding."
    if cut:
        told += f" The end of the text is cut: nobody reads its {len(cut)} tokens."
    if len(cut) > CUT:
        told += f" The first {CUT} of them are shown."
    return f'<h3>{title}</h3><p class="pieces">{"".join(shown)}</p><p class="note">{told}</p>'


def words(edit: Edit) -> Parts:
    """Stage 2."""
    trace, pipe = edit.trace, edit.trace.pipe
    txt, pooled = trace.given.txt, trace.given.pooled
    rows = txt[0, :edit.read + PADDING].float().cpu()    # (T or fewer, D)
    alike = ""
    if min(edit.read, len(rows) - edit.read) > 1:
        cosines = [F.cosine_similarity(part[:, None], part[None], dim=-1)[
            ~torch.eye(len(part), dtype=torch.bool)].mean()
            for part in (rows[edit.read:], rows[:edit.read])]
        alike = (f" Look at the lowest rows: two of padding have a cosine of {cosines[0]:.2f} on "
                 f"average, two of words {cosines[1]:.2f}.")
    told = (f"T5's output: a row for each of {len(rows)} tokens, a column for each of "
            f"{rows.shape[1]} channels")
    if len(rows) < trace.texts:
        told += f"; {trace.texts - len(rows)} more rows of padding are left out"
    if rows.shape[1] > WIDEST:
        rows = F.adaptive_avg_pool1d(rows, WIDEST)
        told += f"; means of neighbours, {WIDEST} columns are shown"
    figures = [pieces_row(*edit.pieces, "T5 reads"),
               pieces_row(*pieces_of(pipe.clip_tokens, edit.instruction), "CLIP reads"),
               figure(heat(rows.numpy(), told, "wide"),
                      f"{told}; {scale(rows.numpy())}{alike}"),
               heat_strip(pooled, "CLIP's vector")]
    return {"figures": "".join(figures),
            "shapes": shapes(("ids", f"1 x {trace.texts}", "B, T: numbers of T5's tokens"),
                             ("txt", shape(txt), "B, T, D: a vector for each"),
                             ("pooled", shape(pooled), "B, D&prime;: one for all")),
            "lines": lines(passage(edit.pipeline.encode_text),
                           passage(type(pipe.t5).forward, "x = self.shared", "return"),
                           passage(type(pipe.clip).forward, "end = self.config", "return"))}


# ------------------------------------------------------------------------------------- the tokens

def tokens_of(grid: Grid, latents: torch.Tensor, name: str, shown: str) -> str:
    """A picture under the grid of its tokens, and its latent channels beside it."""
    last = f"({grid.index}, {grid.rows - 1}, {grid.columns - 1 + grid.shift})"
    rules = ""
    if max(grid.rows, grid.columns) <= RULED:
        rules = f'<i class="lines" style="--r:{grid.rows};--c:{grid.columns}"></i>'
    cells = (f'<div class="map tokens" tabindex="0" role="application" data-grid="{grid.index},'
             f'{grid.rows},{grid.columns},{grid.shift}" aria-label="{text(name)}: {grid.rows} rows '
             f'of {grid.columns} tokens; arrow keys move">{shown}{rules}</div>')
    told = (f"{text(name)}: {grid.rows} x {grid.columns} tokens, from ({grid.index}, 0, "
            f'{grid.shift}) to {last}. <output></output>')
    h, w = (min(side, MOST) for side in latents.shape[1:])
    number = f"{len(latents)} latent channels"
    less = "" if (h, w) == latents.shape[1:] else f", as means in {h} x {w} cells"
    sheet = channels(F.adaptive_avg_pool2d(latents, (h, w)).numpy(), f"the {number} of {name}")
    return f'<div class="pair">{figure(cells, told)}{figure(sheet, f"its {number}{less}")}</div>'


def tokens(edit: Edit) -> Parts:
    """Stage 4."""
    trace = edit.trace
    noise, img, cond = trace.noise[0].float().cpu(), trace.steps[0].args[0], trace.given.cond
    parts = [tokens_of(trace.target, noise, "the target, at first noise",
                       picture(trace.decode(noise), "noise, decoded"))]
    for grid, latents, name, given in zip(trace.grids[1:], trace.latents_given(), edit.names,
                                          edit.given):
        parts.append(tokens_of(grid, latents, name, picture(given, name)))
    counts = edit.counts
    bar = "".join(f'<i class="{kind}" style="flex-grow:{n}"><b>{LETTERS[kind]}</b> {n:,}</i>'
                  for kind, n in counts.items() if n)
    told = ", ".join(f"{n} of {kind}" for kind, n in counts.items() if n)
    rows = [("noise", shape(trace.noise), "B, C, h, w"),
            ("packed", f"1 x {counts['target']} x {img.shape[2]}", "B, I, P = 4 C"),
            ("img", shape(img), "B, I + R, P: target, then references")]
    rows += [("cond", shape(cond), "B, Q, P: a stream of its own")] if cond is not None else []
    rows.append(("S", f"{sum(counts.values()):,}", "tokens that attend to each other"))
    return {"figures": f'<div class="sequence" role="img" aria-label="one sequence: {told}">{bar}'
                       f'</div>{"".join(parts)}',
            "references": references(edit), "key": ", ".join(
                f"{LETTERS[kind]} {kind}" for kind, n in counts.items() if n),
            "sequence": " | ".join(LETTERS[kind] for kind, n in counts.items() if n),
            "shapes": shapes(*rows),
            "lines": lines(passage(dit.pack), passage(dit.position_ids),
                           passage(dit.reference_ids), passage(edit.pipeline.velocity))}


def references(edit: Edit) -> str:
    """How the pictures that are given get into the one that is made, as far as there are any."""
    counts = edit.counts
    numbers = [sum(grid.kind == kind for grid in edit.trace.grids)
               for kind in ("reference", "condition")]
    told = ["<p>A picture can be given in two ways. A <strong>native reference</strong> R, as the "
            "picture to edit, shares the target's stream and its time t. A <strong>clean condition"
            "</strong> Q (edges, depth, a pose, a subject) goes through the same weights, but is "
            "modulated as at t = 0, since it is never noise, and leaves no output. This run has "
            "{} and {}.</p>".format(*map(counted, numbers, ("reference", "condition")))]
    if counts["reference"]:
        told.append(
            "<p><strong>So a reference gets into the picture</strong> not through a layer made for "
            f"it, but as {counts['reference']:,} more tokens. They stand behind the "
            "target's, with the same rows and another index, and in every block the target may "
            "read them (7). The first reference has the target's columns too; those of the next "
            "begin where its own end. What the transformer says of the references' own velocity "
            "is thrown away.</p>")
    if counts["condition"]:
        told.append(
            f"<p>The conditions' {counts['condition']:,} tokens are a stream of their own: in "
            "every block the target may read them too.</p>")
    if not sum(numbers):
        told.append("<p>No picture was given: the words alone decide.</p>")
    return "".join(told)


def schedule(edit: Edit) -> Parts:
    """Stage 5."""
    trace, number = edit.trace, edit.trace.number
    target = trace.target.tokens
    bent = [(float(i), t) for i, t in enumerate(trace.times)]
    even = [(float(i), 1 - i / number) for i in range(number + 1)]
    marked = [(float(step.number - 1), step.t) for step in trace.steps]
    above, evenly = (sum(t > 0.5 for _, t in points[:-1]) for points in (bent, even))
    return {"counts": f"here {above} of the {number} steps begin above t = 0.5; of even steps it "
                      f"would be {evenly}",
            "tokens": f"{target:,}", "mu": f"{0.5 + 0.65 * (target - 256) / 3840:.3f}",
            "figures": chart({"t of this run": bent, "even steps": even}, "step", "t",
                             f"t over {number} steps, beside a straight line", marked)
            + f'<p class="note">Dots: the {len(marked)} steps that this page looks at.</p>',
            "shapes": shapes(("times", f"{number + 1}", "the end, 0, included"),
                             ("I", f"{target:,}", "target tokens")),
            "lines": lines(passage(dit.schedule))}
