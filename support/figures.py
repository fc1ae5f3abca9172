"""Pictures and small charts for a page, as text that stands within it.

explain.explain() and the stages of its page call these. Charts are SVG whose colours the page's own
style gives, so that they fit light and dark; what is pixels is PNG, or JPEG where large.
"""
import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

EXACT = 128                                              # pixels on a side that stay as they are
LONGEST = 384                                            # of what is larger, as it is shown
COLD, WARM = (52, 104, 168), (190, 82, 38)               # negative, positive
VEIL = (118, 122, 130)                                   # over what is not attended to
WIDE, HIGH = 560, 200                                    # of a chart, in its own units


def text(value: object) -> str:
    """As text within HTML, never as markup, in an attribute too."""
    return html.escape(str(value), quote=True)


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=85, optimize=True)    # each kind minds its own
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def img(source: str, alt: str, kind: str = "") -> str:
    return f'<img src="{source}" alt="{text(alt)}" class="{kind}">'


def picture(pixels: np.ndarray | Image.Image, alt: str, kind: str = "") -> str:
    """An <img> of (H, W, 3) uint8: pixel by pixel where it is small, else shrunk to LONGEST."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if max(image.size) <= EXACT:
        return img(data_uri(image), alt, f"{kind} pixels")
    if max(image.size) > LONGEST:
        image = image.copy()
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return img(data_uri(image, "JPEG"), alt, kind)


def fullest(values: np.ndarray) -> float:
    """The size from which on heat() shows no stronger colour; one in a hundred is larger."""
    return max(float(np.quantile(np.abs(values), 0.99)), 1e-12)


def heat(values: np.ndarray, alt: str, kind: str) -> str:
    """Numbers (rows, columns) as colours: clear at 0, full at fullest()."""
    strength = np.clip(np.abs(values) / fullest(values), 0, 1)[..., None]
    colour = np.where(values[..., None] < 0, COLD, WARM)
    pixels = np.concatenate([colour, 255 * strength], -1).round().astype(np.uint8)
    return img(data_uri(Image.fromarray(pixels)), alt, f"{kind} pixels heat")


def channels(latents: np.ndarray, alt: str) -> str:
    """Latents (C, h, w) as C small pictures, eight side by side, with a gap, each clear at 0."""
    (C, h, w), across = latents.shape, 8
    gap = max(1, w // 8)
    down = -(-C // across)
    sheet = np.zeros((down * (h + gap) - gap, across * (w + gap) - gap))
    for i, channel in enumerate(latents):
        top, left = i // across * (h + gap), i % across * (w + gap)
        sheet[top:top + h, left:left + w] = channel
    return heat(sheet, alt, "channels")


def veil(weights: np.ndarray) -> str:
    """What lies over a picture, (rows, columns) of weights: nothing over the largest one."""
    hidden = 1 - weights / max(float(weights.max()), 1e-12)
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = VEIL, (225 * hidden).round()
    return data_uri(Image.fromarray(pixels))


def chart(lines: dict[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, alt: str,
          marked: Sequence[tuple[float, float]] = (), y_most: float = 1.0,
          dots: bool = False) -> str:
    """Lines through points, x from the least to the largest, y from 0 to y_most, with a legend.

    marked: points with a ring; dots: one at each point of the lines, and its x below the axis.
    """
    xs = [x for points in lines.values() for x, _ in points]
    least, span = min(xs), max(max(xs) - min(xs), 1e-12)
    left, top, bottom = 50, 24, HIGH - 40

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (x - least) / span * (WIDE - left - 12),
                bottom - min(y / y_most, 1) * (bottom - top))
    parts = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" class="chart">'
             f"<title>{text(alt)}</title>"]
    for y in (0, y_most / 2, y_most):
        height = at(least, y)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDE - 12}" y1="{height:.1f}" '
                     f'y2="{height:.1f}"/><text x="{left - 6}" y="{height + 4:.1f}" '
                     f'text-anchor="end">{y:.2g}</text>')
    ticks = sorted(set(xs)) if dots else sorted({least, *(x for x, _ in marked), max(xs)})
    parts += [f'<text x="{at(x, 0)[0]:.1f}" y="{bottom + 17}" text-anchor="middle">{x:g}</text>'
              for x in ticks]
    for i, (_, points) in enumerate(lines.items()):
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line{i}" points="{path}"/>')
        parts += [f'<circle class="dot line{i}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                  for x, y in places] * dots
    parts += [f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
              for x, y in (at(*point) for point in marked)]
    parts.append(f'<text x="{WIDE - 12}" y="{HIGH - 4}" text-anchor="end">{text(x_label)}</text>'
                 f'<text x="0" y="12">{text(y_label)}</text></svg>')
    keys = "".join(f'<span class="key line{i}">{text(name)}</span>'
                   for i, name in enumerate(lines))
    return f'<div>{"".join(parts)}<p class="keys">{keys}</p></div>'


def bars(rows: dict[str, dict[str, float]], alt: str) -> str:
    """One bar for each row, of parts that sum to 1; below, what they are. Names are classes too."""
    found = []
    for label, parts in rows.items():
        told = ", ".join(f"{name} {part:.0%}" for name, part in parts.items())
        pieces = "".join(f'<i class="{name}" style="width:{100 * part:.2f}%" '
                         f'title="{name}: {part:.1%}"></i>' for name, part in parts.items())
        found.append(f'<div class="bar" role="img" aria-label="{text(f"{label}: {told}")}">'
                     f"<b>{text(label)}</b><span>{pieces}</span></div>")
    keys = "".join(f'<span class="key {name}">{name}</span>' for name in next(iter(rows.values())))
    return (f'<div role="group" aria-label="{text(alt)}">{"".join(found)}'
            f'<p class="keys">{keys}</p></div>')
