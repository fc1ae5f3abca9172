"""Plots of a training run, with matplotlib: losses, routing, how alike the experts are.

train.previews() calls draw_run() each time that a checkpoint is due; sample.py --routing draws one.
"""
import sys
from importlib.util import find_spec

import numpy as np
from torch import Tensor


def can_draw() -> bool:
    """Whether matplotlib is installed; says what will be missing without it."""
    if find_spec("matplotlib"):
        return True
    print("note: loss.png, routing.png and experts.png are drawn by matplotlib, which is not "
          "installed", file=sys.stderr)
    return False


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
    return pixels(figure)


def draw_routing(use: dict[str, dict[str, Tensor]]) -> np.ndarray:
    """Heat map of routing_maps.expert_use() by task: a panel each, layers down, experts across.

    -> (height, width, 3) uint8.
    """
    from matplotlib.figure import Figure
    layers = list(next(iter(use.values())))
    top = max(w.max().item() for found in use.values() for w in found.values())
    figure = Figure((3.5 + 2 * len(use), 1.5 + 0.2 * len(layers)), layout="constrained")
    panels = figure.subplots(1, len(use), sharey=True, squeeze=False)[0]
    for panel, (task, found) in zip(panels, use.items()):
        w = np.stack([mean.cpu().numpy() for mean in found.values()])        # (layers, E)
        image = panel.imshow(w, vmin=0, vmax=top, aspect="auto")
        panel.set(title=task, xlabel="expert")
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    figure.colorbar(image, ax=panels, label="mean weight")
    return pixels(figure)


def draw_similarity(similarity: Tensor) -> np.ndarray:
    """routing_maps.expert_similarity() as a heat map -> (height, width, 3) uint8."""
    from matplotlib.figure import Figure
    figure = Figure((5, 4), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(similarity.numpy(), vmin=0, vmax=1)
    panel.set(title="how alike the experts' outputs are", xlabel="expert", ylabel="expert")
    figure.colorbar(image, label="|cosine|, mean of the layers")
    return pixels(figure)


def draw_run(steps: list[dict], use: dict[str, dict[str, Tensor]],
             similarity: Tensor | None) -> dict[str, np.ndarray]:
    """All plots of a run, by name; those of experts only where there are some."""
    plots = {"loss": draw_losses(steps)}
    if any(use.values()):
        plots["routing"] = draw_routing(use)
    if similarity is not None:
        plots["experts"] = draw_similarity(similarity)
    return plots
