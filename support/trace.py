"""What happens within one edit: the tensors of its steps, where attention looks, what experts do.

sample.edits(watch=Trace(...)) has the steps of one picture looked at, beside what computes them, so
that the picture stays the ordinary one, to the byte. What an adapter does to each block is found in
further passes, with the adapter beside the weights: support/explain.py asks for them.

Key: C latent channels; h, w latent grid; T text, I target, R native reference tokens; S all of
them; D width. All that is kept is in the computer's memory, and fp32.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import call
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dit
from mole import MoLELinear
from support import offload
from support.attention import ASKED, ASKING, attention, Grid, grids_of, spread
from support.export import at_work, frozen
from support.pictures import to_pixels
from support.routing_maps import last_weights
from support.streaming import visiting

STEPS = 8                                                # of a run, at most, are looked at
BLOCKS = 9                                               # of the transformer, at most
WEIGHTS = 600_000                                        # of attention, kept of a step, at most


@dataclass
class Step:
    """One step that is looked at; latents are (C, h, w)."""
    number: int                                          # from 1 on
    t: float
    t_next: float
    xt: Tensor                                           # before it
    velocity: Tensor
    args: tuple                                          # what the transformer was called with
    attention: dict[int, Tensor] = field(default_factory=dict)       # by block, as attention()

    @property
    def x0(self) -> Tensor:
        """The end of the straight line that starts at xt: what the model expects now."""
        return self.xt - self.t * self.velocity


class Effect(NamedTuple):
    """What an adapter does at one step; one number for each block."""
    change: list[float]                                  # |whole - frozen| / |frozen - input|
    experts: list[float]                                 # |whole - no experts| / |whole - frozen|
    off: float                                           # from the run's velocity, at most
    weights: dict[str, Tensor]                           # w of each layer with experts


@contextmanager
def instead(layers: dict[nn.Module, nn.Module]) -> Iterator[None]:
    """Within the `with`, who calls a layer calls the other one."""
    for layer, other in layers.items():
        layer.forward = other.forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Trace:
    """Watches the steps of one picture: call it in the place of denoise().

    denoise, encode: sample.denoise and sample.encode_text, which stand above this room.
    Keeps: steps; latents (C, h, w), the last ones; times; grids, of the pictures in the order of
    their tokens; blocks, the numbers of those whose attention is kept; what denoise() was given;
    merged, whether the adapter was; weights, w of each layer with experts, as last computed.
    Raises: ValueError for a second picture, and for a batch.
    """

    def __init__(self, denoise: Callable[..., Iterator[Tensor]],
                 encode: Callable[..., tuple[Tensor, Tensor]]):
        self.denoise, self.encode, self.steps = denoise, encode, list[Step]()
        self.latents: Tensor | None = None               # until all steps are done

    def __call__(self, pipe: object, noise: Tensor, given: object, steps: int, guidance: float,
                 run: Callable = call, hold: Callable | None = None) -> Iterator[Tensor]:
        """What denoise() yields for the same arguments; some of its steps are kept."""
        if self.steps or len(noise) != 1:
            raise ValueError("a Trace watches one picture; give each a Trace of its own")
        self.pipe, self.given, self.noise, self.hold = pipe, given, noise, hold
        self.number, self.guidance = steps, guidance     # of steps
        self.merged = pipe.adapter is not None and not pipe.adapter.routings
        h, w = noise.shape[-2:]
        self.grids = [Grid("target", 0, h // 2, w // 2, 0), *grids_of(given.ref_ids, "reference"),
                      *grids_of(given.cond_ids, "condition")]
        self.times = dit.schedule(steps, h * w // 4).tolist()
        down, across = self.target.cells(ASKING)
        of_block = down * across * (int(self.asked().max()) + 1)
        self.blocks = spread(len(pipe.dit.blocks), min(BLOCKS, max(1, WEIGHTS // of_block)))
        x, shown = noise[0].float(), spread(steps, STEPS)
        stepping = self.denoise(pipe, noise, given, steps, guidance, run, hold)
        for i in range(steps):
            with self.watching(i, x) if i in shown else nullcontext():
                latents = next(stepping)
            x = latents[0].cpu()                         # (C, h, w)
            yield latents
        self.latents, self.weights = x, last_weights(pipe.adapter)

    @property
    def texts(self) -> int:
        return self.given.txt.shape[1]                   # T

    @property
    def target(self) -> Grid:
        return self.grids[0]

    def sizes(self) -> list[tuple[int, int]]:
        """(W, H) of the pictures that were read, references first."""
        side = 2 * self.pipe.vae.config.factor           # pixels of a token
        return [(grid.columns * side, grid.rows * side) for grid in self.grids[1:]]

    def asked(self) -> Tensor:
        """The cell of every token as a key, (S,): each word, then each picture's cells."""
        found = [torch.arange(self.texts)]
        for grid in self.grids:
            found.append(grid.cell_of(ASKED) + 1 + found[-1].max())
        return torch.cat(found)

    def latents_of(self, v: Tensor) -> Tensor:
        """Of the transformer's output (1, I+R, P), the target's, (C, h, w)."""
        target = self.target
        return dit.unpack(v[:, :target.tokens].float().cpu(), 2 * target.rows,
                          2 * target.columns)[0]

    def target_in(self, block: nn.Module, tokens: tuple | list) -> Tensor:
        """The target's tokens (1, I, D) among a block's arguments, or what it gives."""
        if isinstance(block, dit.DoubleBlock):
            return tokens[1][0][:, :self.target.tokens].float()      # (txt, [img, cond], ...)
        streams = tokens[0] if isinstance(tokens, tuple) else tokens         # ([txt and img, ...])
        return streams[0][:, self.texts:self.texts + self.target.tokens].float()

    @contextmanager
    def watching(self, i: int, x: Tensor) -> Iterator[None]:
        """Keep step i, whose latents are x (C, h, w), as the transformer computes it."""
        model, rows = self.pipe.dit, range(self.texts, self.texts + self.target.tokens)
        asking, asked = self.target.cell_of(ASKING), self.asked()
        plain = {number: model.blocks[number].attend for number in self.blocks}
        found: dict[int, Tensor] = {}

        def beside(number: int) -> Callable:
            def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, *rest: object) -> Tensor:
                found[number] = attention(q, k, pe, rows, asking, asked)
                return plain[number](q, k, v, pe, *rest)
            return attend

        def keep(_: nn.Module, args: tuple, v: Tensor) -> None:
            self.steps.append(Step(i + 1, self.times[i], self.times[i + 1], x, self.latents_of(v),
                                   args, found))
        hook = model.register_forward_hook(keep)
        try:
            for number in self.blocks:
                model.blocks[number].attend = beside(number)
            yield
        finally:
            hook.remove()
            for number, attend in plain.items():
                model.blocks[number].attend = attend

    # ------------------------------------------------------------------------------ further passes

    def latents_given(self) -> list[Tensor]:
        """Of the references and the clean conditions, each (C, h, w)."""
        tokens = [t for t in (self.given.ref, self.given.cond) if t is not None]
        if not tokens:
            return []
        sizes = [grid.tokens for grid in self.grids[1:]]
        return [dit.unpack(own.float(), 2 * grid.rows, 2 * grid.columns)[0].cpu()
                for own, grid in zip(torch.cat(tokens, 1).split(sizes, dim=1), self.grids[1:])]

    def decode(self, latents: Tensor) -> np.ndarray:
        """(C, h, w) -> (H, W, 3) uint8, as sample.generate() does."""
        pipe = self.pipe
        with pipe.lock, torch.no_grad(), offload.on_device(pipe.vae, pipe.device):
            return to_pixels(pipe.vae.decode(latents[None].to(pipe.device, pipe.dtype)).float())[0]

    def again(self, routed_by: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The latents (C, h, w) of the same run without adapter, or routed by another text's."""
        pipe, layers = self.pipe, self.pipe.adapter.layers.values()
        with (pipe.lock, visiting(pipe.dit, pipe.device, pipe.run) as run,
              at_work(pipe.dit, pipe.adapter, *routed_by, pipe.device, run) if routed_by
              else instead({layer: frozen(layer) for layer in layers})):
            *_, latents = self.denoise(pipe, self.noise, self.given, self.number, self.guidance,
                                       run, self.hold)
        return latents[0].cpu()

    def effects(self) -> list[Effect]:
        """What the adapter does at each of the steps, beside the weights instead of merged."""
        pipe, given = self.pipe, self.given
        with (pipe.lock, torch.no_grad(), visiting(pipe.dit, pipe.device, pipe.run) as run,
              pipe.adapter.serve(*given.routed_by)):
            return [self.effect(step, run) for step in self.steps]

    def effect(self, step: Step, run: Callable) -> Effect:
        """Each block is computed once more without the adapter, and without its experts alone."""
        pipe, change, experts = self.pipe, list[float](), list[float]()

        def compare(block: nn.Module, args: tuple, out: object) -> None:
            layers = [layer for layer in block.modules() if layer in adapted]
            mixed = [layer for layer in layers if isinstance(layer, MoLELinear)]
            with instead({layer: frozen(layer) for layer in layers}):
                bare = self.target_in(block, block.forward(*args))
            with instead({layer: layer.base for layer in mixed}):
                fewer = self.target_in(block, block.forward(*args))
            whole, before = self.target_in(block, out), self.target_in(block, args)
            change.append(((whole - bare).norm() / (bare - before).norm()).item())
            experts.append(((whole - fewer).norm() / (whole - bare).norm().clamp(1e-12)).item())
        adapted = set(pipe.adapter.layers.values())
        with ExitStack() as hooks:
            for block in pipe.dit.blocks:
                hooks.callback(block.register_forward_hook(compare).remove)
            v = pipe.dit(*step.args, run=run)            # (1, I+R, P)
        off = (self.latents_of(v) - step.velocity).abs().max().item()
        return Effect(change, experts, off, last_weights(pipe.adapter))
