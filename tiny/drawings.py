"""What the experiment has found, as figures: python -m tiny.findings draws them.

A test compares those that a page shows with what is drawn here from the JSON of tiny/results.
"""
from functools import partial

import numpy as np

from support import report
from tiny import conflict
from tiny.design import COMPARED, FIRST
from tiny.leads import by_variant, choosing, interference, means, success, with_routing
from tiny.world import EDITS, NEW_TASKS


def draw_variants() -> np.ndarray:
    """Success by variant: a dot for each seed, a stroke at their mean -> (height, width, 3)."""
    from matplotlib.figure import Figure
    table, figure = by_variant(), Figure((8, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (what, tasks) in zip(panels, (("new tasks", NEW_TASKS), ("edits", EDITS))):
        for row, results in enumerate(table.values()):
            values = [success(result, tasks) for result in results]
            panel.plot(values, [row] * len(values), "o", color="C0", alpha=0.5)
            panel.plot(np.mean(values), row, "|", color="black", markersize=16)
        panel.set(title=f"success on the {what}, %")
        panel.set_yticks(range(len(table)), table)
    panels[0].invert_yaxis()
    figure.supxlabel("dots: seeds; strokes: their means", fontsize=9)
    return report.pixels(figure)


def draw_interference() -> np.ndarray:
    """Success by the number of tasks trained together, a line for each task."""
    from matplotlib.figure import Figure
    figure = Figure((8, 4), layout="constrained")
    values = interference()
    for panel, variant in zip(figure.subplots(1, 2, sharey=True), COMPARED["interference"]):
        numbers = values.get(variant, {})
        for task in NEW_TASKS:
            there = [number for number in sorted(numbers) if task in numbers[number]]
            panel.plot([str(number) for number in there],
                       [np.mean(numbers[number][task]) for number in there], "o-", label=task)
        panel.set(title=variant, xlabel="tasks trained together", ylabel="success, %")
    figure.supxlabel("the more tasks, the fewer steps for most of them", fontsize=9)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center")
    return report.pixels(figure)


def draw_tasks(stage: str = "table", tasks: tuple[str, ...] = EDITS + NEW_TASKS) -> np.ndarray:
    """Success by variant and task, a mean over the seeds, in percent."""
    from matplotlib.figure import Figure
    table = by_variant(stage)
    values = [means(results, tasks) for results in table.values()]
    figure = Figure((9, 4), layout="constrained")
    panel = figure.subplots()
    panel.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        panel.text(column, row, f"{value:.0f}", ha="center", va="center",
                   color="black" if value > 60 else "white")
    panel.set_xticks(range(len(tasks)), tasks, rotation=45)
    panel.set_yticks(range(len(table)), table)
    panel.set(title="success, %")
    if tasks == EDITS + NEW_TASKS:
        panel.axvline(len(EDITS) - 0.5, color="white", linewidth=3)
    return report.pixels(figure)


def draw_routing(stage: str = "table") -> np.ndarray:
    """What an expert's being kept tells of the task, by layer; which are kept, where it tells most.

    Left: each variant in its first seed, and its shuffled tasks, dotted. Right: that of FIRST, in
    the table InstructMoLE.
    """
    from matplotlib.figure import Figure
    routed = {name: results[0]["routing"] for name, results in choosing(stage).items()}
    figure = Figure((9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, routing in routed.items():
        line, = left.plot(list(routing["information"].values()), label=name)
        left.plot(list(routing["information of shuffled tasks"].values()), ":",
                  color=line.get_color())
    left.set(xlabel="layer", ylim=0)
    left.set_title("bits that an expert's being kept\ntells of the task, in the first seed\n"
                   "(dotted: by chance)", fontsize=9)
    figure.legend(loc="outside left center", fontsize=8)
    name = next((name for name in FIRST[stage] if name in routed), next(iter(routed)))
    routing = routed[name]
    told, tasks = routing["information"], list(routing["right"]["as trained"])
    layer = max(told, key=told.get)
    image = right.imshow(routing["kept"][layer], vmin=0, vmax=1, cmap="viridis")
    right.set_yticks(range(len(tasks)), tasks)
    right.set(xlabel="expert")
    right.set_title(f"{name},\nlayer {[*told].index(layer)}, where it tells most\n({layer})",
                    fontsize=9)
    figure.colorbar(image, label="share of pictures that keep the expert")
    return report.pixels(figure)


def draw_cosines() -> np.ndarray:
    """Mean |cosine| of two experts' outputs, a dot for each seed."""
    from matplotlib.figure import Figure
    table = {name: [result["cosine"] for result in results]
             for name, results in with_routing().items()}
    figure = Figure((6, 3), layout="constrained")
    panel = figure.subplots()
    for row, values in enumerate(table.values()):
        panel.plot(values, [row] * len(values), "o", color="C0", alpha=0.5)
        panel.plot(np.mean(values), row, "|", color="black", markersize=16)
    panel.set(title="mean |cosine| of two experts' outputs", xlim=0)
    panel.set_yticks(range(len(table)), table)
    panel.invert_yaxis()
    return report.pixels(figure)


FIGURES = {                                              # name: of what, and what draws it
    "variants": (by_variant, draw_variants),
    "tasks": (by_variant, draw_tasks),
    "routing": (choosing, draw_routing),
    "cosines": (with_routing, draw_cosines),
    "interference": (interference, draw_interference),
    "conflict": (partial(by_variant, "conflict"), partial(draw_tasks, "conflict", conflict.TASKS)),
    "conflict_routing": (partial(choosing, "conflict"), partial(draw_routing, "conflict"))}
