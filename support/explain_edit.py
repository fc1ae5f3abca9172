"""What the stages of an explained edit tell of, computed once, and the forms that they share.

explain.explain() makes an Edit, and hands it to each stage; a stage gives HTML by name, for its
places in explain.html.
"""
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.attention import ASKED, ASKING
from support.figures import fullest, heat
from support.origin import ROUTED_BY
from support.passages import listing, Passage
from support.tables import read_rows
from support.trace import Effect, Step, Trace

Parts = dict[str, str]                                   # of a stage, by name: HTML
OTHERS = Path(__file__).parent.parent / "tiny/examples/tasks.jsonl"
NUMBER = 6                                               # of other instructions, at most


class Piece(NamedTuple):
    """A token of the text."""
    text: str
    id: int
    cut: bool                                            # so that no model reads it


def pieces_of(tokens: Callable, instruction: str) -> tuple[list[Piece], int]:
    """What a tokenizer makes of a text, padding left out, and how much padding follows."""
    found = tokens.model.encode(instruction)
    read = [Piece(piece, i, False) for piece, i, real
            in zip(found.tokens, found.ids, found.attention_mask) if real]
    lost = [Piece(piece, i, True) for part in found.overflowing for piece, i, special
            in zip(part.tokens, part.ids, part.special_tokens_mask) if not special]
    return read + lost, tokens.length - len(read)


def shape(t: Tensor) -> str:
    return " x ".join(map(str, t.shape))


def shapes(*rows: tuple[str, str, str]) -> str:
    """A table of tensors: name, shape, and what that is."""
    return '<table class="shapes">' + "".join(
        f"<tr><th><code>{name}</code></th><td><code>{size}</code></td><td>{what}</td></tr>"
        for name, size, what in rows) + "</table>"


def figure(shown: str, caption: str) -> str:
    """A picture and a caption, which is HTML."""
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def scale(values: np.ndarray) -> str:
    """What the colours of heat() mean."""
    return (f"from {values.min():.2g} to {values.max():.2g}; warm is positive, cold is negative; "
            f"the fullest colours are at {fullest(values):.2g}, clear is 0.")


def heat_strip(vector: Tensor, name: str) -> str:
    """A vector (1, channels) as colours, with their scale."""
    values = vector.float().cpu().numpy()
    return figure(heat(values, name, "wide strip"),
                  f"{name}, {values.shape[1]} channels, {scale(values)}")


def lines(*passages: Passage) -> str:
    """The source, below a stage."""
    return ("<details open><summary>The lines that did it</summary>"
            f"{''.join(map(listing, passages))}</details>")


@dataclass
class Edit:
    """One edit. Pictures: given are as the autoencoder read them, (H, W, 3) uint8."""
    trace: Trace
    picture: Image.Image
    images: list[Image.Image]                            # at their own size
    given: list[np.ndarray]                              # references, then conditions
    names: list[str]                                     # of given
    truth: np.ndarray | None
    command: str
    data: dict = field(default_factory=dict)             # what the page's script reads

    @property
    def instruction(self) -> str:
        return self.picture.info["instruction"]

    @property
    def routing_text(self) -> str:
        """What the routers saw: the instruction, or another text."""
        return self.picture.info.get(ROUTED_BY, self.instruction)

    @cached_property
    def others(self) -> list[str]:
        """Instructions to compare with: the first of each task in the embedded model's examples."""
        first: dict[str, str] = {}
        for _, row in read_rows(OTHERS) if OTHERS.is_file() else []:
            if row["instruction"] != self.routing_text:
                first.setdefault(row["task"], row["instruction"])
        return list(first.values())[:NUMBER]

    @property
    def pipeline(self) -> ModuleType:
        """sample.py, which stands above this room: its lines are shown, none of it is called."""
        return inspect.getmodule(self.trace.denoise)

    @property
    def counts(self) -> dict[str, int]:
        """Tokens by kind."""
        return {"text": self.trace.texts} | {
            kind: sum(grid.tokens for grid in self.trace.grids if grid.kind == kind)
            for kind in ("target", "reference", "condition")}

    @property
    def blocks(self) -> list[str]:
        """Names of the transformer's blocks."""
        model = self.trace.pipe.dit
        return [*(f"double {i}" for i in range(len(model.transformer_blocks))),
                *(f"single {i}" for i in range(len(model.single_transformer_blocks)))]

    @cached_property
    def pieces(self) -> tuple[list[Piece], int]:
        """Of T5: all tokens but padding, and the number of those."""
        return pieces_of(self.trace.pipe.t5_tokens, self.instruction)

    @cached_property
    def x0(self) -> dict[int, np.ndarray]:
        """What the model expects at each step, decoded, by the step's number."""
        return {step.number: self.trace.decode(step.x0) for step in self.trace.steps}

    @cached_property
    def made(self) -> np.ndarray:
        """The picture as it was decoded: before a mask or another size."""
        return self.trace.decode(self.trace.latents)

    @cached_property
    def bare(self) -> np.ndarray:
        """As made, without the adapter."""
        return self.trace.decode(self.trace.again())

    def apart(self, other: np.ndarray) -> np.ndarray:
        """How far another picture is from the one that was made, (H, W, 3)."""
        return np.abs(other.astype(float) - self.made)

    @cached_property
    def effects(self) -> list[Effect]:
        """Of the adapter, at each step; none where there is none."""
        return self.trace.effects() if self.trace.pipe.adapter else []

    # ----------------------------------------------------------------------------------- attention

    @cached_property
    def words(self) -> list[str]:
        """What attention may go to in the text: the pieces that are read, and padding as one."""
        pieces, padding = self.pieces
        found = [p.text for p in pieces if not p.cut]
        return [*found, f"padding, sum of {padding}"] if padding else found

    @property
    def many(self) -> list[int]:
        """How many tokens each of the words is."""
        return [1] * self.read + [self.pieces[1]] * bool(self.pieces[1])

    @property
    def read(self) -> int:
        """How many of the words are no padding."""
        return len(self.words) - bool(self.pieces[1])

    @property
    def entries(self) -> list[str]:
        """Names of what attention() gives: a mean, then each block that is watched."""
        watched = self.trace.blocks
        return [f"mean of {len(watched)} blocks", *(self.blocks[i] for i in watched)]

    def attention(self, step: Step) -> Tensor:
        """(entries, cells of the target, words and cells of all pictures); rows sum to 1."""
        blocks = torch.stack([step.attention[i] for i in self.trace.blocks])
        text, rest = blocks[..., :self.trace.texts], blocks[..., self.trace.texts:]
        columns = [text[..., :self.read], rest]
        if self.pieces[1]:                               # padding, as one
            columns.insert(1, text[..., self.read:].sum(-1, keepdim=True))
        found = torch.cat(columns, -1)
        return torch.cat([found.mean(0, keepdim=True), found])

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where attention() has the words, and then each picture's cells."""
        sizes = [len(self.words), *(math.prod(grid.cells(ASKED)) for grid in self.trace.grids)]
        return list(pairwise(accumulate(sizes, initial=0)))

    @cached_property
    def changed(self) -> int:
        """The target's cell in which most changes: from the picture given, else from step 1."""
        before = self.given[0] if self.images else next(iter(self.x0.values()))
        change = np.abs(self.made.astype(float) - before).mean(-1)           # (H, W)
        down, across = self.trace.target.cells(ASKING)
        sums = [[part.mean() for part in np.array_split(row, across, axis=1)]
                for row in np.array_split(change, down)]
        return int(np.argmax(sums))
