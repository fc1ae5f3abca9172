"""Stages 6 and 9 of an explained edit: the steps, and the result.

explain.explain() calls each with an Edit.
"""
import math

import numpy as np

from support.explain_edit import Edit, figure, lines, Parts, shape, shapes
from support.figures import chart, picture, text
from support.passages import passage
from support.scores import psnr, shrunk

SETTLED = 0.1                                            # of what there is to know


def still_open(edit: Edit) -> dict[str, list[tuple[float, float]]]:
    """By step, how far x0 differs from the last one: in layout, in detail.

    Layout: means over each token's pixels; detail: what is left without them. Root mean squares,
    in parts of the last one's own spread: 0 is there already, 1 is as far as a flat picture.
    """
    side = 2 * edit.trace.pipe.vae.config.factor

    def parts(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means = shrunk(pixels, side)
        return means, pixels - np.kron(means, np.ones((side, side, 1)))
    last = parts(edit.x0[edit.trace.steps[-1].number])
    spreads = [max((part - part.mean((0, 1))).std(), 1.0) for part in last]
    found: dict[str, list[tuple[float, float]]] = {"layout": [], "detail": []}
    for number, pixels in edit.x0.items():
        for points, part, end, spread in zip(found.values(), parts(pixels), last, spreads):
            points.append((float(number), float(np.sqrt(((part - end) ** 2).mean()) / spread)))
    return found


def since(open_: dict[str, list[tuple[float, float]]]) -> dict[str, int]:
    """The step from which on the layout, and the detail, stay near the end."""
    found = {}
    for name, points in open_.items():
        late = [number for number, lacks in points if lacks > SETTLED]
        after = [number for number, _ in points if not late or number > late[-1]]    # not empty
        found[name] = int(after[0])
    return found


def settled(open_: dict[str, list[tuple[float, float]]]) -> str:
    """How near x0 is at first, and from which step on layout and detail stay near the end."""
    if len(open_["layout"]) < 2:
        return "<p>Only one step was made: there is nothing to compare it with.</p>"
    layout, detail = (points[0][1] for points in open_.values())
    from_layout, from_detail = since(open_).values()
    return (f"<p>At step 1 x0 differs from the final x0 by {layout:.0%} in layout and by "
            f"{detail:.0%} in detail (0%: the same, 100%: as far off as a plain field). The layout "
            f"is within {SETTLED:.0%} of its final state from step {from_layout}, the detail from "
            f"step {from_detail}, as far as the steps shown can tell.</p>")


def regrown(moved: list[float]) -> str:
    """Why x0 moves more at the end than before, where it does."""
    if len(moved) < 2 or moved[-1] <= min(moved):
        return ""
    return (" Here it grows again towards the end: the finest part of the latents is written last, "
            "and shows little in the pixels.")


def steps(edit: Edit) -> Parts:
    """Stage 6."""
    trace, open_, shown = edit.trace, still_open(edit), []
    before, ways = None, list[float]()
    for step in trace.steps:
        moved = ""
        if before is not None:
            ways.append(((step.x0 - before).square().mean() ** 0.5).item())
            moved = f", moved by {ways[-1]:.3f}"
        before, at = step.x0, f"step {step.number}, t = {step.t:.3f}"
        row = [figure(picture(trace.decode(latents), f"{name} at {at}"), said)
               for name, said, latents in (("x_t", "x<sub>t</sub>", step.xt),
                                           ("velocity", "velocity v", step.velocity))]
        row.append(figure(picture(edit.x0[step.number], f"x0 as expected at {at}", "x0"), "x0"))
        shown.append(f'<li><h3>step {step.number} of {trace.number}</h3>'
                     f"{''.join(row)}<p>t = {step.t:.3f} to {step.t_next:.3f}{moved}</p></li>")
    top = max(y for points in open_.values() for _, y in points)
    differs = chart(open_, "step", "how far x0 differs from the final x0", "how far the expected "
                    "picture differs from the last one, by step, in layout and in detail",
                    y_most=max(1, math.ceil(2 * top) / 2), dots=True)
    parts = {"figures": '<ol class="strip" tabindex="0" aria-label="the steps, side by side">'
                        f'{"".join(shown)}</ol>{differs if len(shown) > 1 else ""}',
             "told": settled(open_), "regrown": regrown(ways),
             "shapes": shapes(("x", shape(trace.steps[0].xt[None]), "B, C, h, w"),
                              ("velocity", shape(trace.steps[0].velocity[None]), "the same"),
                              ("pixels", f"1 x 3 x {edit.made.shape[0]} x {edit.made.shape[1]}",
                               "B, 3, H, W: decoded")),
             "lines": lines(passage(trace.denoise, "for t, t_next", "yield"),
                            passage(type(trace.pipe.vae).decode))}
    if len(shown) > 1:
        layout, detail = since(open_).values()
        parts["finding"] = (f"The layout is within {SETTLED:.0%} of its final state from step "
                            f"{layout} of {trace.number}, the detail from step {detail}.")
    return parts


def result(edit: Edit) -> Parts:
    """Stage 9."""
    shown = [figure(picture(one, f"given: {name}"), f"given: {text(name)}")
             for one, name in zip(edit.given, edit.names)]
    shown.append(figure(picture(edit.picture, "the result"), "the result"))
    found = {}
    if edit.truth is None:
        told = "<p>Which picture would have been right, nobody has said; judge yourself.</p>"
    else:
        shown.append(figure(picture(edit.truth, "the right answer"), "the right answer"))
        near = f"result {psnr(np.asarray(edit.picture), edit.truth):.1f} dB"
        if edit.images:
            near += f", given picture {psnr(edit.given[0], edit.truth):.1f} dB"
        found["finding"] = f"PSNR to the right answer: {near} (higher is nearer)."
        told = f"<p>{found['finding']} 60 is the most that is counted.</p>"
    if edit.trace.hold:
        told += ("<p>A mask held a part of the picture: there, after each step, the latents were "
                 "put back to the given picture's at that t, and at the end its pixels.</p>")
    return found | {
        "figures": f'<div class="row">{"".join(shown)}</div>', "told": told,
        "shapes": shapes(("picture", f"{edit.picture.height} x {edit.picture.width} x 3",
                          "H, W, and uint8 colours")),
        "lines": lines(passage(edit.pipeline.generate, "with pipe.lock, torch.no_grad(), off",
                               "return"))}
