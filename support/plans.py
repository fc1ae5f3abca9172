"""What sample.py is asked to make, by its options or a --batch file.

sample.main() calls plan(), which checks all that was given before any weight is read.
"""
import argparse
import os
import sys
from dataclasses import replace
from itertools import count
from numbers import Integral, Real
from pathlib import Path

from tqdm import tqdm

from support import devices, options, report, texts
from support.commands import (GUIDANCE, STEPS, check_folder, check_new, may_hold,
                              nearest_side)
from support.conditions import check_cond
from support.jobs import Job, batch_file, check_mask, read_batch
from support.pictures import LOSSY, is_picture, load_image
from support.tables import checked_text
from support.words import note
from text_encoder import T5Tokenizer


def check_pictures(option: str, files: list[Path], given: list[Path]) -> None:
    """Files to be made, of one folder and one ending.

    Raises: ValueError where they cannot be written, or one of them is given, too.
    """
    folder = next(filter(Path.is_dir, files), None)
    if folder or not is_picture(files[0]):
        raise ValueError(f"{option} {folder or files[0]}: {'is a folder; ' if folder else ''}"
                         "name a picture file, for example out.png")
    check_folder(option, files[0])
    for file in filter(Path.exists, files):
        if any(map(file.samefile, given)):
            raise ValueError(f"{option} {file}: is a picture that is given; name another file")


def check_not_made(routing: Path, outs: list[Path]) -> None:
    """Raises: ValueError where the map of --routing and a picture would be one file."""
    if os.path.abspath(routing) in map(os.path.abspath, outs):
        raise ValueError(f"--routing {routing}: --out makes that file too; name another")


def check_lora(args: argparse.Namespace) -> None:
    """Raises: ValueError when --export-lora cannot be done."""
    if args.batch:
        raise ValueError(f"--export-lora {args.export_lora}: needs one --instruction")
    check_new("--export-lora", args.export_lora)


def check_adapter(args: argparse.Namespace) -> None:
    """Raises: ValueError where an option needs an adapter, and there is none."""
    asked = [name for name in ("export_lora", "routing", "route_by") if getattr(args, name)]
    if asked and not options.adapters_of(args):
        raise ValueError(f"--{asked[0].replace('_', '-')}: needs an adapter; name one with "
                         "--adapter")


def check_page(args: argparse.Namespace, makes: bool) -> None:
    """Raises: ValueError when --explain cannot be done."""
    page = args.explain
    for wrong, why in ((args.batch, "explains one picture; give --instruction instead of --batch"),
                       (args.num > 1, f"explains one picture; leave out --num {args.num}"),
                       (not makes, "explains a picture, and without --out none is made here"),
                       (args.compile, "looks into the blocks as they stand; leave out --compile"),
                       (page.suffix.lower() not in (".html", ".htm"),
                        "its name must end in .html, for example out.html"),
                       (page.is_dir(), "is a folder; name a file")):
        if wrong:
            raise ValueError(f"--explain {page}: {why}")
    check_folder("--explain", page)


def check_instruction(text: object, name: str) -> None:
    """Raises: ValueError where it is empty, or no text. name: for errors."""
    if not isinstance(text, str):
        raise ValueError(f"{name} {text!r}: must be a text")
    if not checked_text(text, name).strip():
        raise ValueError(f"{name} is empty: say what to show, or what to change")


def checked_seed(seed: object) -> int:
    """Raises: ValueError for what the command would not take, either."""
    if not isinstance(seed, Integral) or not 0 <= seed < 2 ** 63:
        raise ValueError(f"seed {seed!r}: must be a whole number from 0 to 2^63 - 1")
    return int(seed)


def check_call(tokens: T5Tokenizer, instruction: str, steps: int, guidance: float,
               size: tuple[int, int] | None) -> None:
    """What is asked of sample.edits(), by whomever. Raises: ValueError.

    What the model does not read of the instruction is said.
    """
    check_instruction(instruction, "instruction")
    for name, value, kind, limits in (("steps", steps, Integral, STEPS),
                                      ("guidance", guidance, Real, GUIDANCE)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} {value!r}: must be a {'whole ' * (kind is Integral)}number")
        try:
            limits(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name} {error}") from None
    if size is not None and (len(size) != 2 or any(
            not isinstance(side, Integral) or side != nearest_side(side) for side in size)):
        raise ValueError(f"size {size}: must be width and height, multiples of 16, up to 8192")
    for line in texts.unread([instruction], tokens):
        tqdm.write(f"note: {line}", file=sys.stderr)     # above any bar


def tell_size(wanted: tuple[int, int] | None, only: tuple[int, int] | None) -> None:
    """Say when a model that knows only one size is asked for another."""
    if wanted and only and wanted != only:
        note(f"this model has learnt from pictures of {only[0]}x{only[1]} alone; expect little of "
             f"--size {wanted[0]}x{wanted[1]}")


def plan(args: argparse.Namespace) -> list[Job]:
    """What is to be made. Raises: ValueError, FileNotFoundError for anything that cannot be."""
    if (args.instruction is None) == (args.batch is None):
        raise ValueError("give either --instruction TEXT or --batch FILE.jsonl")
    if args.compile:
        devices.check_compiler()
    if args.export_lora:
        check_lora(args)
    if args.routing and not report.can_draw():
        raise ValueError(f"--routing {args.routing}: needs matplotlib: pip install matplotlib")
    make = args.out is not None or not (args.export_lora or args.routing)
    if args.explain:
        check_page(args, make)
    check_adapter(args)
    if args.route_by and args.routing:
        raise ValueError("--routing: draws what instructions choose; leave out --route-by")
    if args.mask_blur and not (args.mask or args.batch):
        raise ValueError("--mask-blur: there is no --mask whose edge could be blurred")
    if args.num > 1 and not make:
        raise ValueError(f"--num {args.num}: without --out no picture is made")
    jobs = (plan_batch if args.batch else plan_one)(args, make)
    lossy = next((out for job in jobs if job.mask for _, out in job.outs
                  if out.suffix.lower() in LOSSY), None)
    if lossy:
        note(f"{lossy}: a {lossy.suffix} file changes all pixels a little, those that a mask keeps "
             "too; a .png does not")
    return jobs


def plan_batch(args: argparse.Namespace, make: bool) -> list[Job]:
    """The jobs of --batch; make: whether pictures are wanted."""
    for name in ("image", "cond", "mask"):
        if getattr(args, name):
            raise ValueError(f"--batch: pictures stand in the file; leave out --{name}")
    if args.num > 1:
        raise ValueError(f"--batch: makes one picture a line; leave out --num {args.num}, and give "
                         'a line to each, with its "seed"')
    out = args.out or Path("out")
    jobs = read_batch(batch_file(args.batch), out, args.seed, args.mask_blur)
    if not may_hold(out) or (is_picture(out) and not out.is_dir()):
        raise ValueError(f"--out {out}: with --batch this must be a folder to write to")
    if args.routing:
        masks = [job.mask for job in jobs if job.mask]
        check_pictures("--routing", [args.routing], [*masks, *(
            path for job in jobs for path in (*job.images, *map(check_cond, job.conds)))])
        if make:
            check_not_made(args.routing, [job.there or job.outs[0][1] for job in jobs])
    return jobs if make else [replace(job, outs=[], there=None) for job in jobs]


def plan_one(args: argparse.Namespace, make: bool) -> list[Job]:
    """The job of --instruction; make: whether pictures are wanted."""
    if args.keep_size and not args.image:
        raise ValueError("--keep-size: there is no --image whose size could be kept")
    check_instruction(args.instruction, "--instruction")
    for path in args.image:
        load_image(path)
    given = [*args.image, *map(check_cond, args.cond)]
    check_mask(args.mask, args.image, args.mask_blur, "--mask")
    given += [args.mask] if args.mask else []
    if args.routing:
        check_pictures("--routing", [args.routing], given)
    outs = outs_of(args) if make else []
    if make:
        check_pictures("--out", outs, given)
        if args.routing:
            check_not_made(args.routing, outs)
    return [Job(args.instruction, args.image, args.cond, args.mask, "",
                list(enumerate(outs, args.seed)))]


def outs_of(args: argparse.Namespace) -> list[Path]:
    """Where pictures of --instruction go: what --out names is written over, nothing else is.

    With --num, a.png names a_0.png, a_1.png, ...
    """
    def named(out: Path) -> list[Path]:
        several = [out.with_stem(f"{out.stem}_{i}") for i in range(args.num)]
        return several if args.num > 1 else [out]
    outs = named(args.out or Path("out.png"))
    taken = [] if args.out else list(filter(Path.exists, outs))
    if taken:
        others = (named(Path(f"out_{i}.png")) for i in count(1))
        outs = next(files for files in others if not any(map(Path.exists, files)))
        note(f"{taken[0]} is there already; the next free name is {outs[0]} (--out out.png would "
             "write over it)")
    return outs
