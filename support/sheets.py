"""Sheets: pictures in rows, with their texts.

train.py, evaluate.py and the rooms that show samples lay them out here.
"""
import textwrap
from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, which knows English alone; for other letters the machine's, if it has one."""
    if not text.isascii():
        for name in ("Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf"):
            with suppress(OSError):                      # not on this machine
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def grid(rows: list[list[np.ndarray]], texts: list[str], across: int = 1, lines: int = 1,
         gap: int = 0, failed: list[bool] | None = None) -> np.ndarray:
    """Pictures in rows, aligned at the right, on grey, a text below each -> (H, W, 3) uint8.

    across: rows side by side; lines: of a text; gap: pixels beside a picture, twice as many beside
    a row. failed: whether a row's last but one picture, the result, gets a red frame.
    """
    side = max(side for row in rows for picture in row for side in picture.shape[:2])
    columns, cell = max(map(len, rows)), side + gap
    width, height = columns * cell + gap, side + 14 * lines                  # of a row
    sheet = Image.new("RGB", (across * width, -(-len(rows) // across) * height), "grey")
    pen = ImageDraw.Draw(sheet)
    for i, (row, text) in enumerate(zip(rows, texts)):
        left, top = i % across * width, i // across * height
        for column, picture in enumerate(row, columns - len(row)):
            sheet.paste(Image.fromarray(picture), (left + column * cell, top))
        if failed and failed[i]:
            edge = left + (columns - 2) * cell
            pen.rectangle([edge, top, edge + side - 1, top + side - 1], outline="red", width=3)
        words = textwrap.wrap(text, width // 5, max_lines=lines, placeholder=" ...")
        pen.multiline_text((left + 2, top + side), "\n".join(words), "white",
                           font=font_for(text, 10), spacing=1)
    return np.asarray(sheet)
