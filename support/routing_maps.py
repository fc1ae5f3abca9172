"""Which experts an instruction chooses, and how alike they are: in a line, numbers, a picture.

sample.py asks for the line and for --routing, train.previews() for the pictures of a run.

Key: B instructions; E experts; k kept; p a router's shares before the top k are kept.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mole import Adapter, MoLELinear, inner_products
from support import devices, report
from support.adapters import mixtures, routed
from support.pictures import save_picture
from support.record import Log
from support.words import counted


def check_routed(adapter: Adapter | None, asked: str) -> None:
    """Raises: ValueError when an instruction routes no layer."""
    if not routed(adapter):
        raise ValueError(f"{asked}: no layer here is routed by the instruction; name an adapter "
                         "with experts that is")


def last_weights(adapter: Adapter | None) -> dict[str, Tensor]:
    """w of the last call of each layer with experts, by its name: (B, E), by token (..., E).

    Named here: a layer that named itself while it computes would be compiled anew for each name.
    """
    return {layer.name: layer.last_weights for layer in mixtures(adapter)
            if layer.last_weights is not None}


def experts_line(adapter: Adapter | None) -> str:
    """The experts that the last instruction chose, by mean weight over the layers it routes."""
    layers = routed(adapter)
    if not layers:
        return ""
    mean = torch.stack([layer.last_weights[0] for layer in layers]).mean(0)              # (E,)
    top = mean.argsort(descending=True)[:4].tolist()
    return (f"; experts (mean weight over {len(layers)} layers) "
            + ", ".join(f"{e}: {mean[e]:.2f}" for e in top))


class Shares(NamedTuple):
    """What a layer's router gives each of B instructions."""
    p: Tensor                                            # (B, E), before the top k are kept
    kept: Tensor                                         # (B, E), True for those that serve


def shares(adapter: Adapter, txt: Tensor, pooled: Tensor) -> dict[str, Shares]:
    """Of each layer that instructions route, by its name; for an adapter in eval mode."""
    with torch.no_grad(), adapter.serve(txt, pooled) as routing:
        return {layer.name: Shares(layer.logits(routing.z).softmax(-1),
                                   layer.routing_weights(routing.z, routing)[0] > 0)
                for layer in routed(adapter)}


def together(each: list[dict[str, Shares]]) -> dict[str, Shares]:
    """What shares() gives for several instructions, from what it gave for each."""
    return {name: Shares(torch.cat([one[name].p for one in each]),
                         torch.cat([one[name].kept for one in each])) for name in each[0]}


def distance(p: Tensor, q: Tensor) -> float:
    """Half the sum of |p - q| over the experts, (..., E), a mean over all else.

    That is the part that would have to move: 0 where the two are equal, 1 where they share nothing.
    """
    return 0.5 * (p - q).abs().sum(-1).mean().item()


def measures(use: dict[str, dict[str, Shares]]) -> dict[str, float]:
    """What shares() found, by task, in numbers; none where nothing is routed.

    from_even: distance of p from 1 / E; it is 1 - 1 / E where one expert has all.
    between: distance of an instruction's p from the mean of all; this and the next for several.
    changing: the part of the kept experts that an instruction does not share with another one.
    """
    layers = list(zip(*(found.values() for found in use.values())))      # of each, Shares by task
    if not layers:
        return {}
    p, kept = (torch.stack([torch.cat([by_task[i] for by_task in layer]) for layer in layers])
               for i in range(2))                                            # (layers, B, E)
    found = {"from_even": distance(p, torch.full_like(p, 1 / p.shape[-1]))}
    if (number := p.shape[1]) > 1:
        often = kept.float().sum(1)                      # (layers, E): how many keep the expert
        pairs = (often * (number - often)).sum(-1) / (often.sum(-1) * (number - 1))
        found |= {"between": distance(p, p.mean(1, keepdim=True)), "changing": pairs.mean().item()}
    return found


def told(found: dict[str, float]) -> str:
    """The numbers of measures() in words."""
    words = f"shares are {found['from_even']:.3f} from even (half the sum of |p - 1/E|)"
    if "between" in found:
        words += (f", {found['between']:.3f} between instructions; of the kept experts "
                  f"{found['changing']:.0%} change from one instruction to another")
    return words


def show(adapter: Adapter | None, encode: Callable[[list[str]], tuple[Tensor, Tensor]],
         jobs: list, file: Path) -> None:
    """Draw which experts each layer chose for the jobs' instructions, a panel for each task.

    encode: instructions -> T5 tokens, pooled; called for one at a time, as a large T5 has no room
    for many. Raises: ValueError when none routes a layer.
    """
    check_routed(adapter, f"--routing {file}")
    by_task: dict[str, list[dict[str, Shares]]] = {}
    for job in jobs:
        by_task.setdefault(job.task, []).append(shares(adapter, *encode([job.instruction])))
    use = {task: together(each) for task, each in by_task.items()}
    words = told(measures(use))
    save_picture(report.draw_routing(use, words), file)
    print(f"{file}: the experts that {counted(len(jobs), 'instruction')} chose; {words}")


def cosines(H: Tensor, B: Tensor, experts: int) -> Tensor:
    """Cosines of the experts' outputs, (E, E), as mole.inner_products() takes them.

    Zero outputs give exactly zero.
    """
    inner = inner_products(H, B, experts)
    norm = inner.diagonal().clamp(min=1e-24).sqrt()
    return inner / (norm[:, None] * norm)


def expert_similarity(adapter: Adapter, forward: Callable[[], object]) -> Tensor | None:
    """|cosine| of the experts' outputs in a pass, (E, E), or None.

    A mean over the layers and calls where both have an output; NaN where nowhere.
    """
    found = []

    def compare(layer: MoLELinear, args: tuple, _: Tensor) -> None:
        H = args[0].to(layer.experts_A.dtype) @ layer.experts_A              # (..., E r)
        found.append(cosines(H, layer.experts_B, layer.config.experts).abs())
    hooks = [layer.register_forward_hook(compare) for layer in mixtures(adapter)]
    if not hooks:
        return None
    with torch.no_grad(), devices.uncompiled():          # what is compiled minds no new hook
        forward()
    for hook in hooks:
        hook.remove()
    every = torch.stack(found)                           # (calls, E, E)
    alive = every.diagonal(dim1=1, dim2=2) > 0.99        # (calls, E); less: zero, or next to it
    both = alive[:, :, None] & alive[:, None]            # (calls, E, E)
    return ((every * both).sum(0) / both.sum(0)).cpu()


def of_run(log: Log, step: int, use: dict[str, dict[str, Shares]],
           similarity: Tensor | None) -> dict[str, np.ndarray]:
    """Log measures() after a step; -> the run's plots, by name; of experts where there are some."""
    found = measures(use)
    if found:
        log.add({"step": step - 1} | {name: round(value, 6) for name, value in found.items()})
    if not report.can_draw():
        return {}
    plots = {"loss": report.draw_losses(log.steps())}
    if found:
        plots["routing"] = report.draw_routing(use, told(found))
    if similarity is not None:
        plots["experts"] = report.draw_similarity(similarity)
    return plots
