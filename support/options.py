"""The commands' options, one function for each command.

main() of sample.py, evaluate.py and weights.py begins with its own; train.py's are many, and stand
in support/training_options.py.
"""
import argparse
from collections.abc import Iterable
from pathlib import Path

from support import adapters, layouts
from support.commands import (ANSWERS, COUNT, FOLDER, GUIDANCE, NEW_FOLDER, NOT_NEGATIVE,
                              STEPS, STRENGTH, Parser, checked, size, workers)

EMBEDDED = Path(__file__).parent.parent / "tiny/model"
SOURCE = ("a folder (metadata.jsonl, .csv or .json, or pictures with .txt), such a file, or a "
          "public set: ")


# ------------------------------------------------------------------------------ shared by several

def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, where its parts are, and on what it runs."""
    parser.add_argument("--model", type=Path, default=EMBEDDED,
                        help="FLUX Kontext folder, or a file with its transformer or all of it")
    for part, what in (("vae", "autoencoder"), ("text_encoder_2", "T5 text encoder"),
                       ("text_encoder", "CLIP text encoder")):
        parser.add_argument(layouts.OPTIONS[part], dest=part, type=Path, metavar="PATH",
                            help=f"file or folder with the {what}, where --model has none")
    parser.add_argument("--tokenizers", type=Path, metavar="FOLDER",
                        help="holds tokenizer/ and tokenizer_2/, where --model is a file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "bfloat16", "float16"],
                        help="of the model; an adapter is fp32")
    parser.add_argument("--matmul", choices=["fp8"], help="multiply tokens with the transformer's "
                        "weights in 8 bits, where the device can: faster, slightly other pictures")


def model_of(args: argparse.Namespace) -> dict[str, Path | str | None]:
    """What add_model() asked for, as sample.load_pipeline() takes it."""
    return {name: getattr(args, name) for name in ("model", "vae", "text_encoder", "text_encoder_2",
                                                   "tokenizers", "device", "dtype", "matmul")}


def only_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """The (W, H) of all its pictures, before a weight is read; None where it takes any."""
    return layouts.only_size(args.vae or args.model)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", action="append", metavar="FILE[:STRENGTH]",
                        help="adapter file or folder, or none; by default adapter.safetensors "
                        "beside the model; may be repeated: one with experts, any number without")


def adapters_of(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """As sample.load_pipeline() takes them. Raises: as adapters.chosen() does."""
    return adapters.chosen(args.adapter or "auto", args.model)


def not_empty(text: str) -> str:
    """An option's type."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a text, or leave it out")
    return text


def add_route_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--route-by", type=not_empty, metavar="TEXT", help="choose the experts by "
                        "this text, not by the instruction, to see what routing decides")


def add_compile(parser: argparse.ArgumentParser, first: str) -> None:
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks: "
                        f"{first} more at first, then faster steps")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How pairs are read, by training and by scoring."""
    parser.add_argument("--data-root", type=FOLDER, metavar="FOLDER", help="that no path in the "
                        "data may leave; by default the folder of the file that names it")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave bad lines out, one in ten at most; list them at the end")


# --------------------------------------------------------------------------------- of one command

def sample_options() -> argparse.Namespace:
    parser = Parser(description="Edit or make a picture by instruction.",
                    usage="python sample.py --instruction TEXT [options]")
    parser.add_argument("--instruction", help="what to do, in words")
    parser.add_argument("--image", type=Path, action="append", default=[],
                        help="picture to edit; may be repeated")
    parser.add_argument("--cond", type=Path, action="append", default=[],
                        help="further condition (edges, depth, pose, subject), or canny:FILE, "
                        "the edges of a photograph; may be repeated")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="for the first --image, of its "
                        "size: white may change, black stays to the byte, grey is between")
    parser.add_argument("--mask-blur", type=NOT_NEGATIVE, default=0, metavar="PIXELS",
                        help="in which the mask's edge fades, inwards; %(default)s")
    add_model(parser)
    add_adapter(parser)
    parser.add_argument("--out", type=Path,
                        help="picture (the next free name from out.png on), or with --batch a "
                        "folder (out); a .png tells how it was made: python weights.py out.png")
    parser.add_argument("--batch", type=Path,
                        help="a .jsonl file, or a folder with metadata.jsonl: one instruction, "
                        "with images, conds and mask, per line; a picture whose name is in --out "
                        "already is not made again")
    parser.add_argument("--seed", type=checked(int, lambda n: 0 <= n < 2 ** 63 - 10_000,
                        "must be from 0 to 2^63 - 10,001"),
                        default=0, help="of the noise: the same makes the same")
    parser.add_argument("--steps", type=STEPS, default=28,
                        help="from noise to picture; %(default)s")
    parser.add_argument("--guidance", type=GUIDANCE, default=2.5, help="%(default)s; more follows "
                        "the words more closely")
    parser.add_argument("--size", type=size,
                        help="WIDTHxHEIGHT; else that of --image, at the model's scale")
    parser.add_argument("--keep-size", action="store_true",
                        help="give the result the size of the first --image")
    add_compile(parser, "half a minute")
    parser.add_argument("--num", type=STEPS, default=1,
                        help="pictures, with --seed, --seed + 1, ...")
    add_route_by(parser)
    parser.add_argument("--export-lora", type=Path, metavar="FILE.safetensors",
                        help="write the adapter, as this instruction routes it, as a plain LoRA; "
                        "a picture too only with --out")
    parser.add_argument("--explain", type=Path, metavar="FILE.html",
                        help="write a page too that shows the edit from within: its tensors, "
                        "beside the lines of the source that made them")
    parser.add_argument("--routing", type=Path, metavar="PICTURE",
                        help="draw the experts' shares in each layer, and which are kept, for "
                        "--instruction or, by task, for a --batch; pictures too only with --out")
    return parser.parse_args()


def evaluate_options(tasks: list[str], public: Iterable[str],
                     benches: Iterable[str]) -> argparse.Namespace:
    """tasks: of the tiny world; public, benches: names of the public sets and benchmarks.

    What is returned has, as .given, the names of the options that the command line holds.
    """
    parser = Parser(description="Score a model and an adapter.",
                    usage="python evaluate.py (--bench NAME | --data SOURCE) [options]")
    parser.add_argument("--bench", choices=["tiny", *benches],
                        help="tiny: the drawn world of the embedded model; the others: the paper's "
                        "benchmarks, from the files that --data names")
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="pairs of your own, held out "
                        f"of training: {SOURCE}{'=PATH, '.join(public)}=PATH; with --bench: xverse "
                        "and omnicontext a folder, spatial canny=PATH depth=PATH pose=PATH")
    add_reading(parser)
    add_model(parser)
    add_adapter(parser)
    parser.add_argument("--tasks", nargs="+", choices=tasks, metavar="TASK",
                        help=f"of --bench tiny, by default all: {', '.join(tasks)}")
    parser.add_argument("--number", type=COUNT, help="samples per task, by default 256; of --data "
                        "the first rows, by default all")
    parser.add_argument("--steps", type=STEPS, help="from noise to picture; by default 28, as "
                        "sample.py, with --bench tiny 12")
    parser.add_argument("--guidance", type=GUIDANCE, default=2.5, help="%(default)s")
    add_route_by(parser)
    parser.add_argument("--out", type=NEW_FOLDER, default=Path("runs/evaluate"),
                        help="takes scores.json, table.md and sheet.png, and a benchmark's "
                        "pictures, of which those that are there are not made again; %(default)s")
    parser.add_argument("--overwrite", action="store_true",
                        help="put these in the place of others in --out")
    add_benchmark(parser)
    args = parser.parse_args()
    check_scoring(args, list(benches))
    args.steps = args.steps or (12 if args.bench == "tiny" else 28)
    args.given = parser.given | ({"adapter"} if args.adapter else set())     # not by default
    return args


def check_scoring(args: argparse.Namespace, benches: list[str]) -> None:
    """Raises: ValueError for what does not go together."""
    if (args.bench == "tiny") == (args.data is not None):
        raise ValueError(f"give either --bench tiny or --data SOURCE, or --bench "
                         f"{', '.join(benches)} with the --data that it is read from")
    if args.data == ["tiny"]:
        raise ValueError("--data tiny: the tiny world has scores of its own: --bench tiny")
    if args.data and len(args.data) > 1 and args.bench != "spatial":
        raise ValueError(f"--data {' '.join(args.data)}: name one; only --bench spatial takes more")
    if args.bench not in benches and workers() > 1:
        raise ValueError("torchrun: only the paper's benchmarks are shared by several processes; "
                         "score this by one")
    only = {"tasks": ["tiny"], "number": ["tiny", None], "route_by": ["tiny", None],
            "data_root": [None], "skip_bad": [None],     # None: of --data without --bench
            **dict.fromkeys(("limit", "scores", "native", "size"), benches)}
    for name, scored in only.items():
        value = getattr(args, name)
        is_set = value is not None and value is not False        # 0 is set, too
        if is_set and args.bench not in scored:
            raise ValueError(f"--{name.replace('_', '-')}: not together with "
                             f"{f'--bench {args.bench}' if args.bench else '--data'}")


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """What goes with the paper's benchmarks alone."""
    parser.add_argument("--limit", type=COUNT, metavar="N", help="of a benchmark the first N "
                        "prompts of each list, task or map, and what all would take")
    parser.add_argument("--scores", type=ANSWERS, nargs="+", metavar="FILE", help="answers of a "
                        "benchmark's own scorers, for the table, or a folder that they lie in or "
                        "below; by default those of the last time")
    parser.add_argument("--native", type=checked(int, lambda n: n in (0, 1), "must be 0 or 1"),
                        help="how many of a prompt's pictures are native references; by default "
                        "0, with omnicontext 1")
    parser.add_argument("--size", type=size, metavar="WIDTHxHEIGHT",
                        help="of a benchmark's pictures; by default its own")


def weights_options() -> argparse.Namespace:
    parser = Parser(description="Say what a checkpoint is.",
                    usage="python weights.py PATH [options]")
    parser.add_argument("path", type=Path, help="a FLUX Kontext folder, a .safetensors file, or a "
                        "picture that sample.py has made")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--to-research", type=Path, metavar="FOLDER",
                         help="write an adapter in the form of the paper's code")
    written.add_argument("--to-bf16", type=Path, metavar="FILE.safetensors",
                         help="write an adapter of train.py's in half the bytes")
    parser.add_argument("--strength", type=STRENGTH, metavar="S", help="with --to-bf16: write it "
                        "at so much of its strength, as FILE:STRENGTH does in sampling")
    args = parser.parse_args()
    if args.strength is not None and not args.to_bf16:
        raise ValueError("--strength is for --to-bf16; in sampling, write --adapter FILE:STRENGTH")
    return args
