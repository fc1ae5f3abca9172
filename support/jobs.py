"""What sample.py is asked to make, by its options or a --batch file.

sample.main() calls plan(), which checks all that was given before any weight is read.
"""
import argparse
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from support import devices
from support.names import ours, read_name
from support.pictures import is_picture, load_image
from support.tables import checked_path, checked_text, read_rows, row_paths, row_text


@dataclass
class Job:
    """An instruction, and the pictures to make by it."""
    instruction: str
    images: list[Path]
    conds: list[Path]
    task: str                                            # a name for a group of instructions
    outs: list[tuple[int, Path]]                         # seed, file


def read_batch(file: Path, folder: Path, seed: int) -> list[Job]:
    """Jobs of a .jsonl file: instruction, optionally images, conds (paths), task, seed, out (name).

    A row of training data will do: its target is what would be made, and is not looked at.
    Everything is checked before anything is made; what is in the folder already is left out.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--batch {file}: no such file")
    jobs, names, targets = [], set(), 0
    for where, line in read_rows(file):
        row, rest = ours(line, where)
        if unknown := rest.keys() - {"seed", "out"}:
            raise ValueError(f"{where}: unknown entry {min(unknown)!r}; a line may hold "
                             "instruction, images, conds, task, seed, out")
        check_target(line, row, where)
        targets += "target" in row
        name = rest.get("out", f"{where.rpartition(' ')[2]:0>4}.png")
        own_seed = rest.get("seed", seed)
        if not isinstance(name, str) or Path(name).name != name or not is_picture(name):
            raise ValueError(f"{where}: \"out\" must be a picture's file name, without a folder")
        if type(own_seed) is not int or not 0 <= own_seed < 2 ** 63:
            raise ValueError(f"{where}: \"seed\" must be a whole number from 0 to 2^63 - 1")
        images, conds = ([file.parent / checked_path(path, where)
                          for path in row_paths(row, key, where)] for key in ("images", "conds"))
        for path in (*images, *conds):
            load_image(path, where)
        if name in names:
            raise ValueError(f"{where}: a line before it has the same \"out\", {name}")
        names.add(name)
        jobs.append(Job(row_text(row, "instruction", where), images, conds,
                        str(row.get("task", "")),
                        [] if (folder / name).exists() else [(own_seed, folder / name)]))
    if not jobs:
        raise ValueError(f"{file}: holds no rows")
    if targets:
        print(f"note: {file}: {targets} rows name a target; it is not looked at", file=sys.stderr)
    return jobs


def check_target(line: dict, row: dict, where: str) -> None:
    """Raises: ValueError when what may be a target may be the picture to edit too."""
    own = [name for name in line if read_name(name)[2] == "own"]
    if own and "images" not in row and line[own[0]] is not None:
        raise ValueError(f"{where}: {own[0]!r} may be the picture to edit or the one that is "
                         "wanted; call it 'images' or 'target'")


def check_folder(option: str, file: Path) -> None:
    """Raises: ValueError when no file can be made there."""
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option} {file}: its folder does not exist or may not be written to")


def check_pictures(option: str, files: list[Path], given: list[Path]) -> None:
    """Of one folder and ending. Raises: ValueError when they cannot be, or one is given."""
    if not is_picture(files[0]) or any(map(Path.is_dir, files)):
        raise ValueError(f"{option} {files[0]}: name a picture file, for example out.png")
    check_folder(option, files[0])
    for file in filter(Path.exists, files):
        if any(map(file.samefile, given)):
            raise ValueError(f"{option} {file}: is a picture that is given; name another file")


def check_lora(args: argparse.Namespace) -> None:
    """Raises: ValueError when --export-lora cannot be done."""
    lora = args.export_lora
    for wrong, why in ((args.batch, "needs one --instruction"),
                       (args.adapter == ["none"], "needs an adapter"),
                       (lora.suffix != ".safetensors", "its name must end in .safetensors"),
                       (lora.exists(), "exists already; name another file")):
        if wrong:
            raise ValueError(f"--export-lora {lora}: {why}")
    check_folder("--export-lora", lora)


def plan(args: argparse.Namespace) -> list[Job]:
    """What is to be made. Raises: ValueError, FileNotFoundError for anything that cannot be."""
    if (args.instruction is None) == (args.batch is None):
        raise ValueError("give either --instruction TEXT or --batch FILE.jsonl")
    if args.compile:
        devices.check_compiler()
    if args.export_lora:
        check_lora(args)
    if args.routing and not find_spec("matplotlib"):
        raise ValueError(f"--routing {args.routing}: needs matplotlib: pip install matplotlib")
    make = args.out is not None or not (args.export_lora or args.routing)
    if args.num > 1 and not make:
        raise ValueError(f"--num {args.num}: without --out no picture is made")
    return (plan_batch if args.batch else plan_one)(args, make)


def plan_batch(args: argparse.Namespace, make: bool) -> list[Job]:
    """The jobs of --batch; make: whether pictures are wanted."""
    if args.image or args.cond or args.num > 1:
        raise ValueError("--batch: pictures and seeds stand in the file; "
                         "leave out --image, --cond and --num")
    out = args.out or Path("out")
    jobs = read_batch(args.batch, out, args.seed)
    if args.routing:
        check_pictures("--routing", [args.routing], [
            path for job in jobs for path in (*job.images, *job.conds)])
    if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
        raise ValueError(f"--out {out}: with --batch this must be a folder to write to")
    if not make:
        return [replace(job, outs=[]) for job in jobs]
    if made := sum(not job.outs for job in jobs):
        print(f"{args.batch}: {made} of {len(jobs)} pictures are in {out} by their names "
              "already, and are not made again")
    return jobs


def plan_one(args: argparse.Namespace, make: bool) -> list[Job]:
    """The job of --instruction; make: whether pictures are wanted."""
    if args.keep_size and not args.image:
        raise ValueError("--keep-size: there is no --image whose size could be kept")
    if not args.instruction.strip():
        raise ValueError("--instruction is empty: say what to show, or what to change")
    checked_text(args.instruction, "--instruction")
    given, out = [*args.image, *args.cond], args.out or Path("out.png")
    for path in given:
        load_image(path)
    if args.routing:
        check_pictures("--routing", [args.routing], given)
    outs = [out] if args.num == 1 else [out.with_stem(f"{out.stem}_{i}") for i in range(args.num)]
    if make:
        check_pictures("--out", outs, given)
        if args.routing in outs:
            raise ValueError(f"--routing {args.routing}: --out makes that file too; name another")
    return [Job(args.instruction, args.image, args.cond, "",
                list(enumerate(outs, args.seed)) if make else [])]
