"""What colours a picture's numbers mean: profiles, depths and modes become 8-bit sRGB.

pictures.load_image() asks levels() before, and as_rgb() after a picture is turned upright.
"""
import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from support.words import note

SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}    # a profile's word: Pillow's mode
SAME = 2                                                 # of 255; so near is sRGB by another name
PHOTOMETRIC, BITS, REDUCED = 262, 258, 254               # tags of a TIFF
MOVING = ("GIF", "WEBP", "PNG", "AVIF")                  # of other kinds, cameras' have thumbnails


def check_single(image: Image.Image) -> None:
    """Raises: ValueError when a file holds several pictures, of which nobody knows which is meant.

    A TIFF's smaller copies of its first page are none.
    """
    if image.format in MOVING and getattr(image, "is_animated", False):
        raise ValueError("it moves; save the one picture that is meant")
    if image.format == "TIFF":
        for page in range(1, image.n_frames):
            image.seek(page)
            if image.tag_v2.get(REDUCED, 0) & 0b101 == 0:        # neither smaller, nor a mask
                raise ValueError("it has several pages; save the one that is meant")
        image.seek(0)


def levels(image: Image.Image) -> tuple[int, int]:
    """What black and white are in a grey picture of 16 bits. Raises: ValueError if nobody knows."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        kind = "floats" if image.mode == "F" else "numbers of 32 bits or with a sign"
        raise ValueError(f"it holds {kind}; save it with 8 or 16 bits")
    most = 4095 if tags.get(BITS) == (12,) else 65535
    return (most, 0) if tags.get(PHOTOMETRIC) == 0 else (0, most)


def in_8_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    """A grey picture of 16 bits in 8, with alpha where one of its greys means transparent."""
    values = np.asarray(image, dtype=np.float64)
    grey = np.clip(np.rint((values - black) / (white - black) * 255), 0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if clear is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(values == clear, 0, 255).astype(np.uint8)], -1))


def as_rgb(image: Image.Image, profile: bytes | None, black: int, white: int) -> Image.Image:
    """A picture of any mode in sRGB, alpha laid on white. profile: its ICC profile.

    Raises: ValueError.
    """
    if image.mode.startswith("I"):
        image = in_8_bits(image, black, white)
    space = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK", "LAB": "LAB"}.get(image.mode, "RGB")
    clear = image.has_transparency_data
    seen = image.convert("RGBA") if clear else image
    way = None
    if space == "LAB":
        way = from_lab()
    elif profile:
        way = to_srgb(profile, space)
    flat = ImageCms.applyTransform(seen.convert(space), way) if way else seen.convert("RGB")
    if clear:
        flat.putalpha(seen.getchannel("A"))
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat).convert("RGB")
    return flat


@lru_cache(maxsize=32)
def to_srgb(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None for sRGB itself, another space's, or a broken one."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if SPACES.get(own.profile.xcolor_space) != space:
            return None                                  # viewers go without it, too
        way = ImageCms.buildTransform(
            own, ImageCms.createProfile("sRGB"), space, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC)
    except (ImageCms.PyCMSError, OSError, ValueError):   # told once, as the answer is kept
        note("a picture's colour profile is broken, and is not used")
        return None
    if space == "CMYK":
        return way
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    probe = Image.fromarray(steps[None] if space == "L" else np.stack(
        np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3))
    change = np.asarray(ImageCms.applyTransform(probe, way), int) - np.asarray(probe.convert("RGB"))
    return way if np.abs(change).max() > SAME else None


@lru_cache(maxsize=1)
def from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                   "LAB", "RGB")
