"""Where a block's attention looks: its weights, which the fused operation never holds, in cells.

trace.Trace computes them beside the blocks of a run, for the target's tokens.

Key: T text, I target, R native reference, Q clean condition tokens; S all of them; N heads; d head
size.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit import rotate

ASKING, ASKED = 8, 16                                    # cells of a picture on a side, at most
CHUNK = 2 ** 23                                          # weights held at once


class Grid(NamedTuple):
    """The tokens of one picture, row by row."""
    kind: str                                            # target, reference, condition
    index: int                                           # of its positions
    rows: int
    columns: int
    shift: int                                           # of its columns

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def cells(self, most: int) -> tuple[int, int]:
        """Rows and columns of cells, where a side has at most so many."""
        return min(self.rows, most), min(self.columns, most)

    def cell_of(self, most: int) -> Tensor:
        """The cell that each token lies in, (rows columns,) int64."""
        down, across = self.cells(most)
        row = torch.arange(self.rows) * down // self.rows
        column = torch.arange(self.columns) * across // self.columns
        return (row[:, None] * across + column).flatten()


def spread(number: int, most: int) -> list[int]:
    """Up to `most` of range(number), evenly, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, number - 1, min(most, number)).tolist()})


def grids_of(ids: Tensor | None, kind: str) -> list[Grid]:
    """The pictures whose position ids (S, 3) stand one after another."""
    found = []
    for index in ids[:, 0].unique().tolist() if ids is not None else []:
        own = ids[ids[:, 0] == index].long()
        (_, top, left), (_, bottom, right) = own.amin(0).tolist(), own.amax(0).tolist()
        found.append(Grid(kind, int(index), bottom - top + 1, right - left + 1, left))
    return found


def attention(q: Tensor, k: Tensor, pe: Tensor, rows: range, asking: Tensor,
              asked: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of some rows, a mean over heads, in cells -> (cells, cells of keys).

    A mean over the tokens of a cell that ask, a sum over those of a cell that are asked: each row
    sums to 1. Shapes: q (1, N, S', d), k (1, N, S, d), not rotated yet, pe (S, d/2), as
    dit.attend() takes them; asking (rows,) and asked (S,): the cell of each token.
    """
    heads, S, d = k.shape[1:]
    asking, asked = asking.to(k.device), asked.to(k.device)
    part, sizes = slice(rows.start, rows.stop), asking.bincount()
    found = torch.zeros(len(sizes), int(asked.max()) + 1, device=k.device)
    for head in range(heads):
        keys = rotate(k[:, head:head + 1], pe)[0, 0].float()             # (S, d)
        queries = rotate(q[:, head:head + 1, part], pe[part])[0, 0].float()      # (rows, d)
        for some in torch.arange(len(queries), device=k.device).split(max(1, CHUNK // S)):
            weights = (queries[some] @ keys.T / math.sqrt(d)).softmax(-1)    # (some, S)
            by_cell = found.new_zeros(len(some), found.shape[1]).index_add_(1, asked, weights)
            found.index_add_(0, asking[some], by_cell)
    return (found / (heads * sizes[:, None])).cpu()
