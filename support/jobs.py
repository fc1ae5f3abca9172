"""Jobs, each an instruction and the pictures to make by it, and tables of many: --batch.

support/plans.py reads them for sample.py, before any weight is read.
"""
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from support.conditions import check_cond
from support.folders import TABLES, metadata_of, tables_in
from support.masks import read_mask
from support.names import ours, pictures_named, read_name
from support.origin import texts_of
from support.pictures import is_picture, load_image, save_picture
from support.tables import checked_path, read_rows, row_paths, row_text
from support.words import counted, note, some_of


@dataclass
class Job:
    """An instruction, and the pictures to make by it."""
    instruction: str
    images: list[Path]
    conds: list[Path]                                    # or canny:FILE
    mask: Path | None
    task: str                                            # a name for a group of instructions
    outs: list[tuple[int, Path]]                         # seed, file
    there: Path | None = None                            # made before, so that it is skipped


def batch_file(path: Path) -> Path:
    """The file of --batch, or its folder's table; others in it are said to be left out.

    Raises: FileNotFoundError.
    """
    file = metadata_of(path)
    if file is None:
        raise FileNotFoundError(f"--batch {path}: " + (
            f"holds none of {', '.join(TABLES)} (one JSON list)" if path.is_dir() else
            "no such file"))
    for other in tables_in(path)[1:]:
        note(f"{path}: {other.name} is left out, as {file.name} is there")
    return file


def read_batch(file: Path, folder: Path, seed: int, blur: float = 0) -> list[Job]:
    """Jobs of a table, a line each: instruction; images, conds, mask (paths), task, seed, out.

    All but the first may be absent or null; out is a name in the folder. A row of training data
    will do: its target is what would be made, and is not looked at. Everything is checked before
    anything is made; what is in the folder already is left out.
    """
    jobs, names, targets, unread = [], set(), 0, Counter[str]()
    for where, line in read_rows(file):
        row, rest = ours(line, where)
        rest = {name: value for name, value in rest.items() if value is not None}
        check_target(line, row, where)
        targets += "target" in row
        unknown = sorted(rest.keys() - {"seed", "out", "mask"})
        for name in unknown:
            if pictures_named(rest[name]):
                raise ValueError(f"{where}: unknown entry {name!r}; a line may hold instruction, "
                                 "images, conds, mask, task, seed, out")
        unread.update(unknown)
        name = rest.get("out", f"{where.rpartition(' ')[2]:0>4}.png")
        if not isinstance(name, str) or Path(name).name != name or not is_picture(name):
            raise ValueError(f"{where}: \"out\" must be a picture's file name, as a.png, without "
                             "a folder")
        if name in names:
            raise ValueError(f"{where}: a line before it has the same \"out\", {name}")
        names.add(name)
        out = folder / name
        job = Job(row_text(row, "instruction", where, unknown),
                  *read_paths(row, rest, file, where, blur), str(row.get("task", "")),
                  [(row_seed(rest, seed, where), out)])
        jobs.append(replace(job, outs=[], there=out) if out.exists() else job)
    if not jobs:
        raise ValueError(f"{file}: holds no rows")
    if targets:
        note(f"{file}: {counted(targets, 'row')} with a target; it is not looked at")
    if unread:
        told = ", ".join(f"{name[:60]!a} (in {counted(rows, 'row')})"
                         for name, rows in unread.items())
        note(f"{file}: entries without a known name are left unread: {told}")
    return jobs


def row_seed(rest: dict, seed: int, where: str) -> int:
    """A row's own seed, in a .csv a text; else the command's. Raises: ValueError."""
    own = rest.get("seed", seed)
    own = int(own) if isinstance(own, str) and own.isdecimal() else own
    if type(own) is not int or not 0 <= own < 2 ** 63:
        raise ValueError(f"{where}: \"seed\" must be a whole number from 0 to 2^63 - 1")
    return own


def read_paths(row: dict, rest: dict, file: Path, where: str, blur: float
               ) -> tuple[list[Path], list[Path], Path | None]:
    """A row's images, conds and mask, relative to its file. Raises: ValueError, FileNotFoundError.

    Each picture is read once, to be sure.
    """
    def paths(given: dict, name: str) -> list[Path]:
        found = row_paths(given, name, where)
        for path in found:                               # canny:/PATH is no address
            checked_path(path.removeprefix("canny:"), where)
        return [file.parent / path for path in found]
    images, conds, masks = paths(row, "images"), paths(row, "conds"), paths(rest, "mask")
    if len(masks) > 1:
        raise ValueError(f"{where}: 'mask' must be one path")
    mask = masks[0] if masks else None
    for path in images:
        load_image(path, where)
    for path in conds:
        check_cond(path, where)
    check_mask(mask, images, blur, f"{where}: mask")
    return images, conds, mask


def check_mask(mask: Path | None, images: list[Path], blur: float, where: str) -> None:
    """Raises: ValueError, FileNotFoundError for a mask that lies over nothing, or cannot."""
    if mask:
        pictures = [load_image(path) for path in images[:1]]
        read_mask(load_image(mask, where), pictures, blur, f"{where} {mask}")


def check_target(line: dict, row: dict, where: str) -> None:
    """Raises: ValueError when what may be a target may be the picture to edit too."""
    own = [name for name, value in line.items()
           if value not in (None, []) and read_name(name)[2] == "own"]
    if own and "images" not in row:
        raise ValueError(f"{where}: {own[0]!r} may be the picture to edit or the one that is "
                         "wanted; call it 'images' or 'target'")


def advancing(bar: tqdm, steps: int) -> Callable[[int, Tensor], None]:
    """What sample.edits() calls after each step; the bar is over the steps of all pictures."""
    def advance(step: int, latents: Tensor) -> None:
        bar.set_description(f"picture {bar.n // steps + 1} of {bar.total // steps}", refresh=False)
        bar.update()
    return advance


def save(picture: Image.Image, out: Path, over: bool) -> Path:
    """Write a picture with its texts; -> where to.

    over: whether what stands in `out` is written over; else, where another run has taken that name
    since it was chosen, the picture goes beside it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not over:
        others = (out.with_stem(f"{out.stem}_{i}") for i in count(1))
        out = next(other for other in others if not other.exists())
    save_picture(picture, out, picture.info)
    return out


def size_told(made: Image.Image, images: list[Image.Image]) -> str:
    """The size of what edits() made, and another one that its user may wonder about."""
    told, made_at = f"{made.width}x{made.height}", made.info["size"]
    if told != made_at:
        return f"{told}, made at {made_at}"
    if images and images[0].size != made.size:
        return f"{told} (the picture to edit: {images[0].width}x{images[0].height})"
    return told


def tell_skipped(jobs: list[Job]) -> None:
    """Say at the end what a batch did not make, as it is there."""
    there = {job.there: job.instruction for job in jobs if job.there}
    if there:
        print(f"skipped: {len(there)} of {len(jobs)} pictures are in {next(iter(there)).parent} by "
              f"their names already ({some_of([path.name for path in there])})")
    other = [path.name for path, text in there.items() if instruction_of(path) not in (None, text)]
    if other:
        note(f"made of other instructions than their lines have now: {some_of(other)}; where you "
             "remove a picture, the same command makes it anew")


def instruction_of(file: Path) -> str | None:
    """What a picture says it was made of; None where it says nothing, or is none."""
    try:
        return texts_of(file).get("instruction")
    except (ValueError, OSError):                        # or it is gone by now
        return None
