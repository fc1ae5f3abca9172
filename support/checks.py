"""What options of train.py need, and which do not go together: asked before anything is read.

support/options.py calls check_training() when they are parsed.
"""
import argparse
import os

import torch

from support import devices, layouts, resume
from support.fp8 import check_device


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
    size = layouts.only_size(args.vae or args.model / "vae")
    if args.longest and size:
        raise ValueError(f"--longest {args.longest}: this model takes pictures of {size[0]}x"
                         f"{size[1]} alone; leave it out")
    if args.dry_run is None:
        resume.check_free(args.out, args.resume)
        if args.base_dtype == "fp8":
            check_device([torch.float8_e4m3fn], devices.choose_device(args.device),
                         "--base-dtype fp8")
