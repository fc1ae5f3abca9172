"""How a picture was made: texts that its PNG carries along, and what they tell.

sample.edits() lays them in each picture, pictures.save_picture() writes them, and python weights.py
PICTURE reads them. No date is among them, so that the same command gives the same file; of the
pictures given, how many there were. Files of other kinds, as JPEG, are written without texts.
"""
import hashlib
from pathlib import Path

import torch

from support import devices
from support.adapters import files_in
from support.pictures import open_picture
from support.words import counted

FIELDS = ("instruction", "seed", "steps", "guidance", "size", "given", "model", "adapters", "dtype",
          "torch")
ROUTED_BY = "routed by"                                  # a further one, where it is said


def digest(path: Path) -> str:
    """The start of the SHA-256 of an adapter's file, or of a folder's files one after another."""
    whole, files = hashlib.sha256(), files_in(path)
    devices.announce(f"reading {path}", sum(file.stat().st_size for file in files))
    for file in files:
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: whole)
    return whole.hexdigest()[:16]


def names(model: Path, adapters: list[tuple[Path, float]], dtype: torch.dtype,
          matmul: str | None) -> dict[str, str]:
    """What a pipeline was loaded from and as: names without folders, what tells adapters apart."""
    told = [path.resolve().name + (f":{strength:g}" if strength != 1 else "")
            + f" (sha256 {digest(path)})" for path, strength in adapters]
    return {"model": model.resolve().name, "adapters": ", ".join(told) or "none",
            "dtype": str(dtype).removeprefix("torch.") + (f", {matmul} products" if matmul else ""),
            "torch": torch.__version__}


def texts(names: dict[str, str], instruction: str, seed: int, steps: int, guidance: float,
          size: tuple[int, int], given: dict[str, int], routed_by: str | None = None
          ) -> dict[str, str]:
    """All fields, and before them one text for people, in the form that picture viewers know.

    given: how many pictures of each kind; routed_by: another text, if it chose the experts.
    """
    found = {"instruction": instruction, "seed": str(seed), "steps": str(steps),
             "guidance": f"{guidance:g}", "size": f"{size[0]}x{size[1]}",
             "given": ", ".join(counted(n, kind) for kind, n in given.items() if n) or "nothing",
             **names, **({ROUTED_BY: routed_by} if routed_by is not None else {})}
    line = ", ".join(f"{name.capitalize()}: {text}" for name, text in found.items()
                     if name != "instruction")
    return {"parameters": f"{instruction}\n{line}", **found}


def texts_of(file: Path) -> dict[str, str]:
    """How a picture says it was made; nothing, where it was not made here."""
    with open_picture(file) as image:
        if FIELDS[0] not in image.info:
            image.load()                                 # a PNG's texts may stand at its end
        return dict(image.info)


def describe(path: Path) -> str:
    """What a picture says of how it was made, in lines. Raises: ValueError when it is none."""
    with open_picture(path) as image:
        image.load()                                     # a PNG's texts may stand at its end
        told, kind = image.info, image.format
        what = f"{path}: a picture ({kind}, {image.width}x{image.height})"
    if not all(isinstance(told.get(name), str) for name in FIELDS):
        return f"{what}; it holds nothing of how it was made, which sample.py writes into a .png"
    named = [name for name in (*FIELDS, ROUTED_BY) if name in told]
    return "\n".join([f"{what}, made by sample.py", *(f"{name}: {told[name]}" for name in named)])
