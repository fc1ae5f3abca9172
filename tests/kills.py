"""Kill training at random moments and resume it until it is done: the result must be the same file.

Moments fall in steps, in the writing of checkpoints, in starting and in resuming; with --cache, in
encoding the pictures of a folder too. Each life is a fork of this process, so that most of it is
training.

Run: python tests/kills.py --kills 30
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from PIL import Image

import train
from support import caching


def life(arguments: list[str], seconds: float, log: Path) -> bool:
    """Train in a fork, killed after so many seconds; -> whether it came to its end before."""
    child = os.fork()
    if child == 0:
        try:
            with log.open("a") as told:
                os.dup2(told.fileno(), 1), os.dup2(told.fileno(), 2)
                torch.set_num_threads(1)
                sys.argv = ["train.py", *arguments]
                train.previews = lambda *_: {}           # takes longer than all else
                train.main()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                sys.exit(f"training failed:\n{log.read_text()[-2000:]}")
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def write(folder: Path, rows: int = 60) -> None:
    """A folder of data: pictures of one grey each."""
    lines = []
    for i in range(rows):
        Image.new("RGB", (64, 64), (4 * i,) * 3).save(folder / f"{i}.png")
        lines.append(json.dumps({"target": f"{i}.png", "images": [f"{rows - 1 - i}.png"],
                                 "instruction": f"make it {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def result(out: Path) -> tuple[bytes, list[tuple]]:
    """The adapter's bytes, and every step's number and losses."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return ((out / "adapter.safetensors").read_bytes(),
            [(entry["step"], entry["loss"], entry["norm"]) for entry in entries])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of a life")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(Path(train.__file__).parent / "tiny/model"))
    parser.add_argument("--cache", action="store_true", help="encode a folder's pictures first")
    args, kills, at = parser.parse_args(), 0, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.cache:
            caching.SHARD = 100_000                      # bytes: many shards, many moments
            write(Path(folder))
        common = ["--data", folder if args.cache else "tiny", "--batch-size", "1", "--steps",
                  str(args.steps), "--lr", "1e-3", "--schedule", "cosine", "--save-every", "1",
                  "--seed", str(args.seed), "--model", args.model, "--resume", "--out"]
        log = Path(folder) / "log"

        def train_in(out: Path, seconds: float = float("inf")) -> bool:
            return life([*common, str(out), *(["--cache", f"{out}-cache"] * args.cache)], seconds,
                        log)
        whole = Path(folder) / "whole"
        train_in(whole)
        for run in range(args.kills):
            broken = Path(folder) / f"broken-{run}"
            while kills < args.kills and not train_in(broken, at.uniform(0.1, args.longest)):
                kills += 1
            train_in(broken)
            if result(broken) != result(whole):
                sys.exit(f"after {kills} kills the result is another one")
            if kills >= args.kills:
                break
    print(f"{kills} kills in {run + 1} runs; the same adapter, the same log")


if __name__ == "__main__":
    main()
