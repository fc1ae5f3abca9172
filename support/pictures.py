"""Pictures: read as a person sees them, resized, turned into tensors, written.

Whoever has to do with picture files comes here: data.py and the public sets, sample.py, the jobs.
All pictures are (H, W, 3) uint8 arrays until to_tensor() maps them to [-1, 1].
"""
import io
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from support.colours import as_rgb, check_single, levels
from support.files import replacing

warnings.filterwarnings("ignore", module="PIL")          # large photographs are welcome, and what
logging.getLogger("PIL").setLevel(logging.CRITICAL)      # is broken is an error in one line
HEIF = (".heic", ".heif", ".hif")                        # a phone's; Pillow alone reads none
PICTURES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", *HEIF,
            ".bmp", ".dib", ".tif", ".tiff", ".gif", ".tga", ".ppm", ".pgm", ".pnm", ".qoi")
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".avif", ".avifs", ".gif")    # when written
BEST = {"quality": 95, "subsampling": "4:4:4", "lossless": True}
LONGEST = 512                                            # side in training, if not said otherwise
Given = str | Path | Image.Image | np.ndarray            # what a Python caller names or holds
ORIENTATION = 274                                        # EXIF's tag; its other values turn nothing
TURNING = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")      # what may hold it
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
                        Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                        Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), 2))
ADDRESS = re.compile(r"\b(?!canny:)[a-z][a-z0-9+.-]+:/|\bdata:image/", re.I)  # Path leaves one /


@contextmanager
def open_picture(source: str | Path | io.BytesIO, where: str = "") -> Iterator[Image.Image]:
    """Open a picture file, or its bytes; only its header is read. where: names its row, for errors.

    Raises: FileNotFoundError, or ValueError when the file is no readable picture.
    """
    path, is_file = where, not isinstance(source, io.BytesIO)
    if is_file:
        path = f"{where}: {source}" if where else str(source)
        if not os.path.isfile(source):                   # Path.is_file minds names too long
            raise FileNotFoundError(f"{path}: {missing(str(source))}")
    try:
        if str(source).lower().endswith(HEIF):
            read_heif()
        with Image.open(source) as image:
            if max(image.size) >= 2 ** 16:               # no camera's: a broken or a hostile head
                raise ValueError(f"it claims to have {image.width} x {image.height} pixels")
            yield image
    except (OSError, SyntaxError, ValueError, RuntimeError, TypeError, AttributeError,
            struct.error, Image.DecompressionBombError) as error:    # Pillow has no class for all
        why = str(error).partition(" <")[0]              # without an object's address
        if isinstance(error, UnidentifiedImageError):    # its words name the path once more
            empty = is_file and not os.path.getsize(source)
            why = "it is empty" if empty else "cannot identify what it is"
        raise ValueError(f"{path}: cannot be read as a picture ({why})") from None


def read_heif() -> None:
    """Have Pillow read .heic files. Raises: ValueError."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("it needs pillow-heif: pip install pillow-heif; or save it as .jpg or "
                         ".png") from None
    register_heif_opener()


def missing(path: str) -> str:
    """Why there is no picture file at a path, in words."""
    if os.path.isdir(path):
        return "is a folder; name one picture"
    if ADDRESS.search(path):
        return "is an address; save that picture as a file, and name the file"
    if "\\" in path and os.sep == "/":
        return "no such picture file; write folders with /, not with \\"
    folder, (stem, _) = os.path.dirname(path), os.path.splitext(path)
    if folder and not os.path.isdir(folder):
        return f"no such picture file; there is no folder {os.path.basename(folder)}/"
    for other in (f"{stem}{ending}" for ending in PICTURES):
        if os.path.isfile(other):
            return f"no such picture file; there is {os.path.basename(other)}"
    return "no such picture file"


def load_image(source: str | Path | io.BytesIO, where: str = "") -> Image.Image:
    """Read any picture as a person would see it, in RGB. Raises: as open_picture() does.

    EXIF rotation is applied, colours become sRGB of 8 bits (support/colours.py), alpha is laid on
    white. What holds several pictures is refused.
    """
    with open_picture(source, where) as image:
        return as_seen(image)


def as_seen(image: Image.Image) -> Image.Image:
    """An opened picture as load_image() gives it. Raises: ValueError."""
    return as_rgb(*upright(image))


def given_picture(source: Given) -> Image.Image:
    """A file, PIL picture or array, as load_image() gives it.

    Arrays: (H, W) or (H, W, 3 or 4), uint8. Raises: as load_image() does.
    """
    if isinstance(source, np.ndarray):
        fits = source.ndim > 1 and source.shape[2:] in ((), (3,), (4,))
        if source.dtype != np.uint8 or not fits:
            raise ValueError("a picture as an array must be uint8 in 0..255, (H, W) or (H, W, 3 or "
                             f"4); this one is {source.dtype}, {source.shape}")
        source = Image.fromarray(source)
    if not isinstance(source, Given):
        raise ValueError(f"{source!r} is no picture: give a file, a PIL picture or an array")
    return as_seen(source) if isinstance(source, Image.Image) else load_image(source)


def each(some: Given | Iterable[Given] | None) -> list[Given]:
    """One picture, or several, or none, as a list."""
    if some is None:
        return []
    return [some] if isinstance(some, Given) or not isinstance(some, Iterable) else list(some)


def upright(image: Image.Image) -> tuple[Image.Image, bytes | None, int, int]:
    """An opened picture, whole and turned, and what as_rgb() asks of its colours."""
    check_single(image)
    black, white = levels(image)
    profile = image.info.get("icc_profile")
    image.load()                                         # a TIFF is turned as it is loaded
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    whole = image.copy() if turn is None else image.transpose(turn)
    for name in TURNING:                                 # lest it be turned once more
        whole.info.pop(name, None)
    return whole, profile, black, white


def checked_size(path: Path, where: str = "") -> tuple[int, int]:
    """(W, H) of what load_image() would give. Raises: as it does; all but colours is looked at."""
    with open_picture(path, where) as image:
        whole, *colours = upright(image)
        as_rgb(whole.crop((0, 0, 1, 1)), *colours)       # one pixel says whether it can be done
        return whole.size


def fitted(size: tuple[int, int], longest: int = LONGEST, multiple: int = 16) -> tuple[int, int]:
    """(W, H) shrunk to `longest` on the longer side (never enlarged), each side to `multiple`."""
    scale = min(1.0, longest / max(size))
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return width, height


def resize(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture of that (W, H), as (H, W, 3) uint8."""
    return np.asarray(image if image.size == size else
                      image.resize(size, Image.Resampling.LANCZOS))


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Stack pictures of one size. (H, W, 3) uint8 in 0..255 -> (B, 3, H, W) float32 in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)     # (B, 3, H, W)
    return batch.float().contiguous() / 127.5 - 1


def to_pixels(batch: torch.Tensor) -> np.ndarray:
    """What is decoded as pictures: (B, 3, H, W) float32, cut to [-1, 1] -> (B, H, W, 3) uint8."""
    pixels = ((batch.clamp(-1, 1) + 1) * 127.5).round().byte()               # in 0..255, rounded
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, in order; none where there is no such folder."""
    return sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in PICTURES)


def is_picture(name: str | Path) -> bool:
    """Whether Pillow can write an RGB picture to a file of this name."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower())
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind or "")
    except (OSError, KeyError, ValueError):
        return False
    return True


def save_picture(picture: np.ndarray | Image.Image, path: Path,
                 about: Mapping[str, str] = {}) -> None:
    """about: texts that a .png carries along, by name; other kinds of file do without."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    texts = PngInfo()
    for name, text in about.items():                     # Latin-1 as tEXt, all else as iTXt
        texts.add_text(name, text)
    with replacing(path) as aside:
        image.save(aside, pnginfo=texts, **BEST)         # a kind takes of it what it knows
