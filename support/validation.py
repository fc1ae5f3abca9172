"""How training does on samples that it never learns from: train.py --validate.

train.main() calls open_held_out(), and summary.tell() says what was understood; train.previews()
has the samples checked each time that a checkpoint is due.
"""
import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch

import dit
from support import options
from support.bad_rows import Bad
from support.pictures import to_tensor
from support.record import Log, fingerprint
from support.scores import psnr
from support.sheets import grid
from support.summary import rows_in, understood
from support.texts import unread
from support.words import counted, note
from text_encoder import T5Tokenizer

MOST = 32                                                # samples that are looked at
SHOWN = 8                                                # of these on the sheet
TIMES = (0.125, 0.375, 0.625, 0.875)                     # t: the middles of four equal parts


@contextmanager
def noted(missing: str) -> Iterator[None]:
    """Say what is missing because of a ValueError, and go on."""
    try:
        yield
    except ValueError as error:
        note(f"{missing}: {error}")


def some(source: object) -> list:
    """Up to MOST samples, the same each time: over all of a folder's rows, else the first."""
    if not hasattr(source, "all"):                       # samples without end
        return [sample for i in range(MOST) for sample in source.draw(
            np.random.default_rng([1, i]), 1, np.random.default_rng([1, i]))]
    rows = rows_in(source) if hasattr(source, "checked_rows") else 0     # else: read few
    return list(islice(source.all(0, max(1, rows // MOST)), MOST))


def some_of_each(sources: list[tuple], seed: int) -> list:
    """Eight samples of the sources in turn, each target once: what training shows on its way."""
    samples = {}
    for i, (source, _) in enumerate((sources * 8)[:8]):
        rng = np.random.default_rng([seed, 2 ** 32 + i])
        sample, = source.draw(rng, 1, rng)
        samples.setdefault(sample.target.tobytes(), sample)
    return list(samples.values())


class HeldOut:
    """A few samples of the source that --validate names, by its name there; without it, none."""

    def __init__(self, name: str | None, source: object = None):
        self.name, self.source = name, source
        self.samples = some(source) if name else []
        if name and not self.samples:
            raise ValueError(f"--validate {name}: holds no row that can be used")

    def about(self, tokens: T5Tokenizer, trained: list[object]) -> list[str]:
        """Lines about what was understood. trained: the sources of --data."""
        if not self.name:
            return []
        rows = (counted(rows_in(self.source), "row") if hasattr(self.source, "contents")
                else "samples without end")
        lines = [f"--validate {self.name}: {rows}; loss on {len(self.samples)} of them, at "
                 f"{len(TIMES)} times each; shown: {min(SHOWN, len(self.samples))}"]
        lines += [f"  {line}" for line in understood(self.source)]
        own = fingerprint(self.source)
        if own and own in map(fingerprint, trained):
            lines.append("  note: this is trained on too; its loss will not say when to stop")
        of_these = unread((s.instruction for s in self.samples), tokens)
        return lines + [f"  of these, {line}" for line in of_these]

    def check(self, log: Log, step: int, pipe: object, condition: Callable,
              encode_picture: Callable, matching_loss: Callable,
              answer: Callable) -> dict[str, np.ndarray]:
        """Log the loss, and give a sheet, by its name; what fails is a note.

        step: how many are done. The functions are sample.condition() and encode_picture(),
        train.matching_loss() and answer(); the adapter is in eval mode.
        """
        pictures: dict[str, np.ndarray] = {}
        if self.samples:
            with noted(f"no validation loss after step {step}"), torch.no_grad():
                log.check(step - 1, self.loss(pipe, condition, encode_picture, matching_loss),
                          self.name)
            with noted(f"no validation is shown after step {step}"):
                pictures[f"validation_{step:06d}"] = self.sheet(lambda s: answer(pipe, s))
        return pictures

    def loss(self, pipe: object, condition: Callable, encode_picture: Callable,
             matching_loss: Callable) -> float:
        """The mean flow loss of the samples at TIMES, each with noise of its own, nothing dropped.

        Raises: ValueError when it is no number.
        """
        found = []
        for i, s in enumerate(self.samples):
            images, conds = ([to_tensor([p]) for p in given] for given in (s.images, s.conds))
            given = condition(pipe, [s.instruction], images, conds)
            latents = pipe.vae.latents(*encode_picture(pipe, to_tensor([s.target])))
            x0 = dit.pack(latents.float())                                   # (1, I, P)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i)).to(x0)
            for t in TIMES:
                losses = matching_loss(pipe, given, x0, noise, x0.new_full((1,), t),
                                       latents.shape[-2:], recompute=False)
                found.append(losses["flow"].item())
        if not np.isfinite(found).all():
            raise ValueError("it is no number")
        return float(np.mean(found))

    def sheet(self, answer: Callable[[object], np.ndarray]) -> np.ndarray:
        """What was given, what answer() makes of it, with its PSNR, and what was wanted."""
        rows, texts = [], []
        for s in self.samples[:SHOWN]:
            picture = answer(s)
            rows.append([*s.given, picture, s.target])
            texts.append(f"{psnr(picture, s.target):.1f} dB: {s.instruction}")
        return grid(rows, texts)


def open_held_out(args: argparse.Namespace, open_one: Callable, tiny: type,
                  public: dict[str, Callable], bad: Bad | None) -> HeldOut:
    """What --validate names. open_one, tiny: data.open_one() and the TinyWorld.

    Raises: FileNotFoundError, ValueError, as open_one() does.
    """
    if not args.validate:
        return HeldOut(None)
    return HeldOut(args.validate, open_one(
        args.validate, {"tiny": lambda: tiny(held_out=True)}, public,
        options.only_size(args), args.data_root, bad,
        longest=args.longest, option="--validate"))
