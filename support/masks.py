"""A mask: where a picture may change. White may, black stays as it is to the byte, grey is between.

plans.plan() has it checked before any weight is read; sample.edits() has the latents held at each
step, and lays the picture that was given over the one that was made.
"""
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

import dit
from support.pictures import Given, given_picture, resize

COLOURED = 32                                            # of 255: a JPEG's greys differ by less
NEAR = 16                                                # of 255: a JPEG's black and white, too


def read_mask(source: Given, images: list[Image.Image], blur: float, where: str = "mask"
              ) -> Image.Image:
    """A mask for the first picture, in grey; blur: pixels in which its edge fades inwards.

    Raises: FileNotFoundError; ValueError when it is no mask, or for another picture.
    """
    if not images:
        raise ValueError(f"{where}: needs the picture that it lies over, the first --image (in a "
                         "table or a call: images)")
    picture, (width, height) = given_picture(source), images[0].size
    if picture.size != (width, height):
        raise ValueError(f"{where}: is {picture.width}x{picture.height}, the picture to edit "
                         f"{width}x{height}; a mask needs the very size of that picture")
    colours = np.asarray(picture, dtype=np.int16)
    if (colours.max(-1) - colours.min(-1)).max() > COLOURED:
        raise ValueError(f"{where}: has colours; a mask is white where the picture may change, and "
                         "black elsewhere")
    levels = np.array(picture.convert("L"))
    levels[levels < NEAR], levels[levels > 255 - NEAR] = 0, 255
    mask = Image.fromarray(levels)
    if blur:                                             # what was black stays so: 1/2 becomes 0
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(blur)), dtype=np.int16)
        mask = Image.fromarray(np.clip(2 * soft - 255, 0, levels).astype(np.uint8))
    if not mask.getbbox():
        why = " once its edge is blurred" if blur else ""
        raise ValueError(f"{where}: is black all over{why}, so nothing may change; paint white "
                         "what may")
    return mask


def held(mask: Image.Image, size: tuple[int, int], ref: Tensor, noise: Tensor
         ) -> Callable[[Tensor, float], Tensor]:
    """What denoise() does to its tokens at each time: outside they are the given picture's.

    A latent is free where any of its 8 x 8 pixels may change.
    Shapes: ref (B, R, P), of which the first I tokens are the picture to edit, at the (W, H) that
    is made; noise (B, C, h, w). Eq.: outside, x_t = (1 - t) x0 + t noise.
    """
    open_pixels = torch.from_numpy(np.array(scaled(mask, size))).float()     # (H, W)
    open_latents = F.max_pool2d(open_pixels[None, None], 8) > 0              # (1, 1, h, w)
    free = dit.pack(open_latents.expand(noise.shape)).to(ref.device)         # (B, I, P)
    noise = dit.pack(noise.float().to(ref.device))       # (B, I, P)
    x0 = ref[:, :noise.shape[1]].float()                 # (B, I, P)
    return lambda x, t: torch.where(free, x, (1 - t) * x0 + t * noise)


def scaled(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def laid_over(made: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
    """What was made where the mask is white; where it is black, the given picture's bytes.

    All at the size that was made; the given picture's own bytes where that is its size.
    """
    share = np.asarray(scaled(mask, made.size), dtype=np.uint32)[..., None]  # (H, W, 1)
    mixed = (np.asarray(made) * share + resize(picture, made.size) * (255 - share) + 127) // 255
    return Image.fromarray(mixed.astype(np.uint8))
