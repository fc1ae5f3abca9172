"""At what size pictures are made and read.

sample.edits() asks, with the only size that a model knows (VAEConfig.only_size), or None: the
released one knows many.
"""
import numpy as np
from PIL import Image
from torch import Tensor

from support.pictures import LONGEST, fitted, resize, to_tensor

# Sizes of about one megapixel that the released model was trained on: width, height.
PREFERRED = [(672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248),
             (880, 1184), (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832),
             (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)]


def output_size(only: tuple[int, int] | None, images: list[Image.Image],
                wanted: tuple[int, int] | None) -> tuple[int, int]:
    """(W, H): as wanted, else the preferred size nearest in aspect to the picture to edit.

    Without a picture, the nearest to a square.
    """
    # Deviation: diffusers makes 1024x1024 by default, whatever the reference: crops, zooms, drift.
    if wanted is not None:
        return wanted
    sizes = [only] if only else PREFERRED
    aspect = images[0].width / images[0].height if images else 1
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1] / aspect)))


def cond_size(only: tuple[int, int] | None, size: tuple[int, int],
              longest: int = LONGEST) -> tuple[int, int]:
    """(W, H) that a condition takes: its aspect, the longer side at most `longest`, as trained."""
    return only or fitted(size, longest)


def prepare(only: tuple[int, int] | None, images: list[Image.Image], conds: list[Image.Image],
            size: tuple[int, int], longest: int = LONGEST) -> tuple[list[Tensor], list[Tensor]]:
    """Resize what is given, to (1, 3, H, W) tensors in [-1, 1].

    The picture to edit takes the output's size, so that the grids coincide.
    """
    refs = [resize(image, size if i == 0 else output_size(only, [image], None))
            for i, image in enumerate(images)]
    clean = [resize(image, cond_size(only, image.size, longest)) for image in conds]
    return [to_tensor([p]) for p in refs], [to_tensor([p]) for p in clean]
