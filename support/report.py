"""Plots of a training run, with matplotlib: losses, routing, how alike the experts are.

routing_maps.of_run() asks for them each time that train.py has a checkpoint due; sample.py
--routing draws one.
"""
import textwrap
from importlib.util import find_spec

import numpy as np
from torch import Tensor

from support.words import note


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def tell_missing() -> None:
    """Say what a run will lack without matplotlib."""
    if not can_draw():
        note("loss.png, routing.png and experts.png are drawn by matplotlib, which is not "
             "installed")


def pixels(figure: "matplotlib.figure.Figure") -> np.ndarray:    # noqa: F821
    """-> (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_losses(entries: list[dict]) -> np.ndarray:
    """What log.jsonl says of every step, a panel for each kind -> (height, width, 3) uint8.

    Beside the flow loss stands that on held-out samples, of the source that was named last.
    """
    from matplotlib.figure import Figure
    steps = [entry for entry in entries if "flow" in entry]
    checks = [entry for entry in entries if "validation" in entry]
    checks = [entry for entry in checks if entry["source"] == checks[-1]["source"]]
    smooth = max(1, len(steps) // 50)                    # steps in a running mean
    figure, numbers = Figure((9, 6), layout="constrained"), [step["step"] for step in steps]
    for panel, name in zip(figure.subplots(2, 2).flat,
                           ("flow", "balance", "orthogonality", "norm")):
        values = [step[name] for step in steps]
        panel.plot(numbers, values, alpha=0.3)
        panel.plot(numbers[smooth - 1:], np.convolve(values, np.ones(smooth) / smooth, "valid"))
        if name == "flow" and checks:
            panel.plot([entry["step"] for entry in checks],
                       [entry["validation"] for entry in checks], "o-", color="black",
                       markersize=3, label="validation")
            panel.legend()
        panel.set(title="norm of the gradients" if name == "norm" else f"{name} loss",
                  xlabel="step")
        panel.xaxis.get_major_locator().set_params(integer=True)
    return pixels(figure)


def draw_routing(use: dict[str, dict[str, tuple[Tensor, Tensor]]], words: str) -> np.ndarray:
    """Map of routing_maps.shares() by task: a panel each, layers down, experts across.

    Colours say the shares p before top k, white where they are even, on one scale for all pictures;
    dots say which experts are kept, by their area how often. -> (height, width, 3) uint8.
    """
    from matplotlib.figure import Figure
    layers = list(next(iter(use.values())))
    experts = next(iter(use.values()))[layers[0]][0].shape[1]
    figure = Figure((3.5 + 2 * len(use), 2 + 0.2 * len(layers)), layout="constrained")
    panels = figure.subplots(1, len(use), sharey=True, squeeze=False)[0]
    for panel, (task, found) in zip(panels, use.items()):
        p, kept = (np.stack([both[i].float().mean(0).cpu().numpy() for both in found.values()])
                   for i in range(2))                                        # (layers, E)
        image = panel.imshow(p, "RdBu_r", vmin=0, vmax=2 / experts, aspect="auto")
        row, column = np.indices(kept.shape)
        panel.scatter(column, row, 80 * kept, "black", linewidths=0)
        panel.set(title=task, xlabel="expert")
        panel.set_xticks(range(experts))
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    bar = figure.colorbar(image, ax=panels, label="share before top k, mean", extend="max")
    bar.set_ticks([0, 1 / experts, 2 / experts], labels=["0", f"1/{experts}, even", f"2/{experts}"])
    figure.suptitle(textwrap.fill(f"{words}; dots: kept, their area how often", 40 + 30 * len(use)),
                    fontsize=9)
    return pixels(figure)


def draw_similarity(similarity: Tensor) -> np.ndarray:
    """routing_maps.expert_similarity() as a heat map -> (height, width, 3) uint8."""
    from matplotlib.figure import Figure
    figure = Figure((5, 4), layout="constrained")
    panel = figure.subplots()
    panel.set_facecolor("lightgrey")                     # what NaN leaves free
    image = panel.imshow(similarity.numpy(), vmin=0, vmax=1)
    panel.set(title="how alike the experts' outputs are", xlabel="expert", ylabel="expert")
    figure.colorbar(image, label="|cosine|, mean of the layers; grey: still zero")
    return pixels(figure)
