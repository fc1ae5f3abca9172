"""Which experts an instruction chooses, and how alike they are: in a line, numbers, a picture.

sample.py asks for the line and for --routing, train.previews() for the pictures of a run.
"""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mole import Adapter, MoLELinear, inner_products
from support import report
from support.pictures import save_picture


def routed(adapter: Adapter | None) -> list[MoLELinear]:
    """The layers that an instruction routes."""
    layers = adapter.layers.values() if adapter else []
    return [layer for layer in layers if isinstance(layer, MoLELinear) and not layer.by_token]


def last_weights(adapter: Adapter | None) -> dict[str, Tensor]:
    """w of the last call of each layer with experts, by its name: (B, E), by token (..., E).

    Named here: a layer that named itself while it computes would be compiled anew for each name.
    """
    layers = adapter.layers.values() if adapter else []
    return {layer.name: layer.last_weights for layer in layers
            if isinstance(layer, MoLELinear) and layer.last_weights is not None}


def experts_line(adapter: Adapter | None, weights: dict[str, Tensor]) -> str:
    """The experts an instruction chose, by mean weight over the layers it routes."""
    layers = routed(adapter)
    if not layers:
        return ""
    mean = torch.stack([weights[layer.name][0] for layer in layers]).mean(0)             # (E,)
    top = mean.argsort(descending=True)[:4].tolist()
    return (f"; experts (mean weight over {len(layers)} layers) "
            + ", ".join(f"{e}: {mean[e]:.2f}" for e in top))


def expert_use(adapter: Adapter, txt: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    """Mean weight of each expert, (E,), in each layer that instructions route, by its name."""
    with torch.no_grad(), adapter.serve(txt, pooled) as routing:
        return {layer.name: layer.routing_weights(routing.z, routing)[0].mean(0)
                for layer in routed(adapter)}


def show(adapter: Adapter | None, encode: Callable[[list[str]], tuple[Tensor, Tensor]],
         jobs: list, file: Path) -> None:
    """Draw which experts each layer chose for the jobs' instructions, a panel for each task.

    encode: instructions -> T5 tokens, pooled. Raises: ValueError when none routes a layer.
    """
    if not routed(adapter):
        raise ValueError(f"--routing {file}: no layer here is routed by the instruction")
    use = {task: expert_use(adapter, *encode([j.instruction for j in jobs if j.task == task]))
           for task in dict.fromkeys(j.task for j in jobs)}
    save_picture(report.draw_routing(use), file)
    print(f"{file}: the experts that {len(jobs)} instruction{'s'[:len(jobs) - 1]} chose")


def cosines(H: Tensor, B: Tensor, experts: int, scale: float = 1.0) -> Tensor:
    """Cosines of the experts' outputs, (E, E), as mole.inner_products() takes them.

    Zero outputs give exactly zero.
    """
    inner = inner_products(H, B, experts)
    norm = inner.diagonal().clamp(min=1e-24 / scale ** 2).sqrt()
    return inner / (norm[:, None] * norm)


def expert_similarity(adapter: Adapter, forward: Callable[[], object]) -> Tensor | None:
    """|cosine| of the experts' outputs in a pass, a mean over layers and calls: (E, E), or None."""
    found = []

    def compare(layer: MoLELinear, args: tuple, _: Tensor) -> None:
        H = args[0].to(layer.experts_A.dtype) @ layer.experts_A              # (..., E r)
        found.append(cosines(H, layer.experts_B, layer.config.experts).abs())
    hooks = [layer.register_forward_hook(compare) for layer in adapter.layers.values()
             if isinstance(layer, MoLELinear)]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean(0).cpu() if found else None
