"""The options of train.py, and which of them go together.

train.main() calls train_options() before all else.
"""
import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from support import devices, resume
from support.commands import (COUNT, NEW_FOLDER, NOT_NEGATIVE, POSITIVE, Parser, checked,
                              source_and_weight, workers)
from support.fp8 import check_device
from support.options import SOURCE, add_compile, add_model, add_reading, only_size
from support.pictures import LONGEST

STEPS_OF_A_RUN = 100_000


def add_data(parser: argparse.ArgumentParser, public: Iterable[str]) -> None:
    """What train.py draws from. public: names of the public sets."""
    parser.add_argument("--data", nargs="+", required=True, metavar="SOURCE[:weight]",
                        help=f"{SOURCE}{'=PATH, '.join(public)}=PATH, or tiny, the embedded "
                        "model's drawn world, without end; one is drawn per batch")
    add_reading(parser)
    parser.add_argument("--longest", type=checked(
        int, lambda n: n > 0 and n % 16 == 0, "must be a multiple of 16"), metavar="PIXELS",
        help=f"longer side of the pictures, at most; {LONGEST}. Larger ones are shrunk")
    parser.add_argument("--cache", type=NEW_FOLDER, metavar="FOLDER", help="encode every text and "
                        "picture once, before training, and keep that here")
    parser.add_argument("--cache-draws", type=COUNT, metavar="N", help="with --cache: ways "
                        "to draw a row of a public set (wording, conditions, boxes); else one")
    parser.add_argument("--validate", metavar="SOURCE", help="at each --save-every, the loss and a "
                        "sheet of pictures on these held-out pairs; a source as for --data")


def add_trained(parser: argparse.ArgumentParser, methods: list[str]) -> None:
    """Which adapter is trained; support/methods.py reads them."""
    parser.add_argument("--method", choices=methods, help=f"{methods[0]} (if not said); pooled: "
                        "routed by CLIP's vector alone; lora: no experts; the others: baselines.py")
    parser.add_argument("--config", type=Path, help="JSON with fields of mole.AdapterConfig to "
                        "change; the others as in adapter.json beside the model, if any, or as "
                        "published")
    parser.add_argument("--rank", type=COUNT, metavar="N", help="of each expert; with --method "
                        "lora, of the LoRA; its alpha follows")
    parser.add_argument("--experts", type=COUNT, metavar="N", help="in each layer that has some")
    parser.add_argument("--init", type=Path, metavar="FILE", help="begin with this adapter: its "
                        "method, sizes and weights")


def train_options(methods: list[str], public: Iterable[str],
                  words: list[str] | None = None) -> argparse.Namespace:
    """methods: what may be trained, the default first; public: names of public sets; words: the
    arguments, by default those of the command line.
    """
    parser = Parser(description="Train an adapter on a frozen model.",
                    usage="python train.py --data SOURCE[:weight] ... [options]")
    add_data(parser, public)
    add_model(parser)
    add_trained(parser, methods)
    parser.add_argument("--steps", type=COUNT, help=f"{STEPS_OF_A_RUN:,} (if not said); the "
                        "auxiliary losses fade over the run, so it cannot be made longer later")
    parser.add_argument("--batch-size", type=COUNT, default=4,
                        help="%(default)s, or as many as there are")
    parser.add_argument("--accumulate", type=COUNT, default=1, help="micro-batches per step")
    parser.add_argument("--lr", type=POSITIVE, default=1e-4, help="learning rate; %(default)s")
    parser.add_argument("--router-lr", type=NOT_NEGATIVE, help="by default half of --lr")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"],
                        help="muon: for the matrices A and B, at twice the rate; the rest by adamw")
    parser.add_argument("--schedule", default="constant", choices=["constant", "cosine"],
                        help="of the learning rates")
    parser.add_argument("--shift", type=POSITIVE, default=1.0, help="of the times: above 1, "
                        "more are near 1, pure noise, where layout is decided; 3, for example. 1, "
                        "as in the paper: uniform")
    parser.add_argument("--recompute", nargs="?", const="on", default="auto",
                        choices=["auto", "on", "off"], help="recompute each block in backward: "
                        "less memory, same gradients; auto, if not said: once there is none else")
    add_compile(parser, "minutes")
    parser.add_argument("--base-dtype", choices=["fp8"], help="keep the transformer's frozen "
                        "layers in 8 bits, widened where they are used: half of bf16's memory")
    parser.add_argument("--shard", action="store_true", help="with torchrun: split the frozen "
                        "blocks over the processes, where a device cannot hold them")
    parser.add_argument("--dry-run", type=POSITIVE, nargs="?", const=0, metavar="GB",
                        help="only say what memory this will need, and the largest batch for so "
                        "many GB (else for this device)")
    parser.add_argument("--seed", type=checked(int, lambda n: 0 <= n < 2 ** 31,
                        "must be from 0 to 2^31 - 1"),
                        default=0, help="of all that is random: the same makes the same adapter")
    parser.add_argument("--save-every", type=COUNT, default=500, metavar="STEPS",
                        help="between checkpoints, and pictures of how it goes; %(default)s")
    parser.add_argument("--keep", type=checked(int, lambda n: n >= 0, "must be 0 or more"),
                        default=0, metavar="N", help="keep the last N saved adapters too, as "
                        "adapter_STEP.safetensors; %(default)s")
    parser.add_argument("--out", type=NEW_FOLDER, help="by default runs/METHOD")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the last checkpoint in --out, if there is one")
    older = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--adapter", dest="method", choices=methods, **older)
    parser.add_argument("--checkpoint", dest="recompute", action="store_const", const="on",
                        **older)
    args = parser.parse_args(words)
    if not args.init:
        args.method = args.method or methods[0]
    args.out = args.out or Path("runs") / (args.method or "init")
    if args.dry_run is None:
        args.steps = args.steps or STEPS_OF_A_RUN
    check_training(args)
    take_what_follows(args)
    return args


def take_what_follows(args: argparse.Namespace) -> None:
    """What is not said, where it depends on what is."""
    args.longest = args.longest or LONGEST
    if args.shard and args.recompute == "auto":          # processes that split a model go together
        args.recompute = "off"
    args.cache_draws = args.cache_draws or (1 if args.cache else None)
    if args.dry_run and args.dtype == "auto":
        args.dtype = "bfloat16"                          # of an accelerator that has so many GB


def check_training(args: argparse.Namespace) -> None:
    """Raises: ValueError for options that cannot be met, or not together."""
    if args.cache_draws is not None and not args.cache:
        raise ValueError("--cache-draws belongs to --cache FOLDER")
    if args.compile:
        devices.check_compiler()
    if args.compile and args.shard:
        raise ValueError("--compile: not together with --shard")
    if args.shard and "WORLD_SIZE" not in os.environ:
        raise ValueError("--shard: splits the model over processes; start them with torchrun")
    size = only_size(args)
    if args.longest and size:
        raise ValueError(f"--longest {args.longest}: this model takes pictures of {size[0]}x"
                         f"{size[1]} alone; leave it out")
    folders = [Path(name) for name, _ in map(source_and_weight, args.data)]
    if args.out.is_dir() and any(map(args.out.samefile, filter(Path.is_dir, folders))):
        raise ValueError(f"--out {args.out}: is the folder of --data; name another, or the run's "
                         "pictures would lie among the data")
    if args.dry_run is None:
        resume.check_free(args.out, args.resume)
        if args.base_dtype == "fp8" and workers() == 1:  # several use CUDA or the CPU, which can
            check_device([torch.float8_e4m3fn], devices.choose_device(args.device),
                         "--base-dtype fp8")
