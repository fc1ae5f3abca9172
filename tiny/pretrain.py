r"""Make the embedded base model from nothing: tokenizers, autoencoder, transformer, text encoders.

Every stage may be interrupted and started again: it goes on from its last checkpoint in --work,
and a finished stage is skipped. The base learns text to image and edits with a native reference
only; what else the tiny world holds is left for adapters. The autoencoder sees all its pictures.

Run: python -m tiny.pretrain
     python -m tiny.pretrain --vae-steps 2 --samples 300 --steps 2 --no-compile --out runs/m \
         --work runs/w                                   # all stages, in half a minute
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # Ctrl-C during imports ends in a line
import os
from pathlib import Path

import torch.multiprocessing as mp

from tiny.autoencoder import train_vae
from tiny.base import cache_latents, train_transformer
from tiny.vocabularies import make_tokenizers


def main() -> None:
    parser = commands.Parser(prog="python -m tiny.pretrain",
                             description="Make the embedded base model.")
    parser.add_argument("--out", type=Path, default=Path("runs/model"),
                        help="takes the model; %(default)s")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"),
                        help="takes checkpoints; %(default)s")
    parser.add_argument("--vae-steps", type=commands.COUNT, default=12_000,
                        help="of the autoencoder; %(default)s")
    parser.add_argument("--samples", type=commands.COUNT, default=100_000,
                        help="latents for the transformer; %(default)s")
    parser.add_argument("--steps", type=commands.COUNT, default=12_000,
                        help="of transformer and text encoders; %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="saves minutes in a short try")
    args = parser.parse_args()
    if (args.out / "model_index.json").is_file() and not args.work.is_dir():
        raise ValueError(f"{args.out} holds a model already; name another --out")
    if args.samples < 200:
        raise ValueError(f"--samples {args.samples}: at least 200 are needed, of both kinds")
    args.work.mkdir(parents=True, exist_ok=True)
    make_tokenizers(args.out)
    train_vae(args.out, args.work, args.vae_steps)
    if not (args.out / "model_index.json").is_file():    # the last that is written
        workers = min(2, os.cpu_count())
        (args.work / "meeting").unlink(missing_ok=True)
        cache_latents(args.out, args.work, args.samples)
        mp.spawn(train_transformer, (workers, args.out, args.work, args.steps, args.samples,
                                     not args.no_compile), nprocs=workers)
    print(f"{args.out}: a whole model; python weights.py {args.out} says what it is")


if __name__ == "__main__":
    commands.run(main)
