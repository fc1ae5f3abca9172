r"""Does routing by the whole instruction pay? The tiny model, every variant, several seeds.

A piece is one training and its scores: a file of tiny/results. Pieces that are there are skipped,
and one that was interrupted goes on from its last checkpoint, so the experiment may be killed and
started again; several pieces run side by side, each in a process and a thread of its own.

    search         rate and scale of each variant, 500 steps, by its flow loss on validation scenes
                   of all tasks: a grid, then the neighbours of its best, while that lies on an edge
    table          every variant with three seeds, by what the search has found; with eight what is
                   compared first
    interference   a task alone, with two others, with all, 750 steps; 8 pictures of each task in a
                   batch, on average, so that each draws as many of its own in any company
    balance        the weight of the balance loss
    longer         what is compared first, 4,500 steps, with a falling rate and three seeds, which
                   are too few to decide
    regimes        a search again, on the tasks of tiny/conflict.py, with what lies between a plain
                   LoRA, InstructMoLE, and a setting in which routing might pay: found afterwards
    conflict       the same as in the table, on those tasks

Run: python -m tiny.experiment                           # all, in many hours on two cores
     python -m tiny.experiment table --workers 1 --minutes 15
     python -m tiny.experiment --list                    # what is there, what is still to do
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # Ctrl-C during imports ends in a line
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import baselines
import train
from sample import load_pipeline
from support.configs import read_json
from support.devices import choose_device
from support.files import write_json
from support.public_sets import PUBLIC
from support.training_options import train_options
from support.validation import HeldOut
from support.words import counted
from tiny import conflict, probe
from tiny.design import (ADAPTERS, MODEL, SEARCHES, STAGES, WORK, Piece, configuration, count,
                         found, left, pieces)
from tiny.world import BASE_TASKS, TinyWorld

FEW = 64                                                 # pictures per task, routed otherwise
DTYPE = "bfloat16"                                       # of the frozen model


# --------------------------------------------------------------------------------------- one piece

def fit(piece: Piece, device: str = "cpu") -> Path:
    """Train a piece's adapter, or go on with it -> the run's folder.

    As the paper trains: AdamW, a constant rate. Muon, by which the embedded adapter learns faster,
    makes the steps of all experts orthogonal, which is what the orthogonality loss is to do.
    On tasks in conflict, and in longer training, the rate falls, lest the noise of a high one
    decides more than the variant.
    """
    out, variant = WORK / piece.name, ADAPTERS[piece.variant]
    in_conflict = set(piece.tasks) <= set(conflict.TASKS)
    world = conflict.ConflictWorld if in_conflict else TinyWorld
    schedule = "cosine" if in_conflict or piece.stage == "longer" else "constant"
    args = train_options(baselines.METHODS, PUBLIC, [
        "--data", "tiny", "--model", str(MODEL), "--method", variant.method,
        "--steps", str(piece.steps), "--batch-size", str(piece.batch), "--lr", str(piece.lr),
        "--schedule", schedule, "--shift", str(probe.SHIFT), "--seed", str(piece.seed),
        "--save-every", "500", "--device", device, "--dtype", DTYPE, "--out", str(out),
        "--resume", *variant.options])
    train.run_training(args, configuration(piece), None, [(world(piece.tasks), 1.0)], HeldOut(None))
    return out


def progress(out: Path) -> dict[str, object]:
    """Of a run: seconds of all its steps; its losses, each a mean over every tenth of them."""
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "flow" in step]
    tenths = np.array_split(np.arange(len(steps)), min(10, len(steps)))
    return {"training_seconds": round(sum(step["seconds"] for step in steps)),
            "losses": {name: [round(float(np.mean([steps[i][name] for i in tenth])), 5)
                              for tenth in tenths]
                       for name in ("flow", "balance", "orthogonality")}}


def about(device: str = "cpu") -> dict[str, str]:
    """With what the numbers are made."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()
    on = (torch.cuda.get_device_name(device) if device.startswith("cuda") else
          f"{platform.machine()}, {os.cpu_count()} cores")
    changed = " and changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": git("rev-parse", "HEAD") + changed, "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(), "torch": torch.__version__,
            "machine": f"{on}, one thread, {DTYPE}"}


def run(piece: Piece, device: str = "cpu") -> None:
    """Train and score a piece, or go on with it, and write its file."""
    work, searching = WORK / piece.name, piece.stage in SEARCHES
    begun = work / "about.json"
    if not begun.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(begun, about(device))
    try:
        out, began = fit(piece, device), time.time()
    except ValueError as error:                          # at so high a rate, or with this seed
        if "no number" not in str(error):
            raise
        return write_json(piece.file, {
            "piece": asdict(piece), "parameters": count(configuration(piece)),
            "flow": dict.fromkeys(piece.tasks), "diverged": str(error),
            "begun": read_json(begun), "ended": about(device)})
    pipe = load_pipeline(MODEL, out / "adapter.safetensors", device, DTYPE)
    result = {"piece": asdict(piece), "config": asdict(pipe.adapter.config),
              "parameters": sum(t.numel() for t in pipe.adapter.tensors().values()),
              "flow": probe.flow_losses(pipe, piece.tasks, searching)}
    if not searching:
        result["tasks"] = probe.scores(pipe, piece.tasks, piece.number, work)
    if piece.ways:
        new = tuple(task for task in piece.tasks if task not in BASE_TASKS)
        result["routing"] = probe.decisions(pipe, FEW, work, piece.ways, new)
        result["cosine"] = probe.cosine(pipe, tasks=new)
    write_json(piece.file, result | progress(out) | {
        "scoring_seconds": round(time.time() - began),
        "command": f"python -m tiny.experiment --piece {piece.name}",
        "begun": read_json(begun), "ended": about(device)})


# ----------------------------------------------------------------------------------------- command

class Crew:
    """Pieces at work, each in a process of its own; all are asked to stop when this one is."""

    def __init__(self, minutes: int | None, device: str = "cpu"):
        self.device = device
        self.until = time.time() + 60 * minutes if minutes else float("inf")
        self.running: set[subprocess.Popen] = set()

    def work(self, piece: Piece) -> int:
        """-> the process's exit code; none is started once the time is over."""
        while busy(piece) and time.time() < self.until:  # left by a crew that was killed
            time.sleep(5)
        if time.time() > self.until or piece.there():
            return 0
        print(f"{time.strftime('%H:%M')} {piece.name}", flush=True)
        WORK.mkdir(parents=True, exist_ok=True)
        with open(WORK / f"{piece.name}.log", "a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tiny.experiment", "--piece", piece.name,
                 "--device", self.device],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
                start_new_session=True)                  # Ctrl-C comes by stop(), once
            self.running.add(process)
            if self.until == 0:                          # stop() came in between
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        return code

    def stop(self, *_: object) -> None:
        """No more are started, and those at work end after their step, saved."""
        self.until = 0
        for process in list(self.running):
            process.terminate()


def mark_of(piece: Piece) -> Path:
    """The file that holds the number of the process that is at a piece."""
    return WORK / piece.name / "process"


def busy(piece: Piece) -> str | None:
    """The number of another process that is at a piece, if one is."""
    mark, own = mark_of(piece), str(os.getpid())
    other = mark.read_text() if mark.exists() else own
    known = Path(f"/proc/{other}/cmdline")               # elsewhere than on Linux there is none
    at_it = other != own and known.exists() and piece.name.encode() in known.read_bytes()
    return other if at_it else None


@contextmanager
def alone(piece: Piece) -> Iterator[None]:
    """Raises: ValueError where another process is at this piece."""
    if other := busy(piece):
        raise ValueError(f"{piece.name}: process {other} is at it")
    mark = mark_of(piece)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(str(os.getpid()))
    try:
        yield
    finally:
        mark.unlink()


def tell(stage: str) -> list[Piece]:
    """Say what of a stage is there; -> what is to do."""
    todo, waiting = left(stage)
    told = [f"{len(found(stage))} pieces are there"]
    if todo or not waiting:
        told.append(f"{len(todo)} to do")
    if waiting:
        told.append(f"{counted(waiting, 'variant')} more after a stage before")
    print(f"{stage}: {', '.join(told)}", flush=True)
    return todo


def main() -> None:
    parser = commands.Parser(prog="python -m tiny.experiment",
                             description="Measure routing on the tiny model.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; "
                        "by default all, one after the other")
    parser.add_argument("--workers", type=commands.COUNT, default=os.cpu_count(),
                        help="pieces side by side, a thread each; %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; %(default)s. There "
                        "too, a worker keeps a core busy")
    parser.add_argument("--minutes", type=commands.COUNT, help="start no piece after so many")
    parser.add_argument("--list", action="store_true", help="say what is there and what is not")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        raise ValueError(f"no stage {unknown.pop()!r}; there are {', '.join(STAGES)}")
    choose_device(args.device)                           # refuses what is not there
    if args.piece:
        named = {piece.name: piece for stage in STAGES for piece in pieces(stage)}
        if args.piece not in named:
            raise ValueError(f"--piece {args.piece}: there is none, or not yet; see --list")
        with alone(named[args.piece]):
            return run(named[args.piece], args.device)
    crew = Crew(args.minutes, args.device)
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):         # Windows has two
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:            # as by nohup
            signal.signal(number, crew.stop)
    for stage in dict.fromkeys(args.stages or STAGES):
        while todo := tell(stage):                       # what a search finds asks for more
            if args.list or time.time() > crew.until:
                break
            with ThreadPoolExecutor(args.workers) as pool:
                codes = list(pool.map(crew.work, todo))
            if crew.until == 0:
                raise ValueError("stopped; the same command goes on")
            if any(codes):
                raise ValueError(f"{stage}: a piece failed; its last words are in {WORK}/*.log")


if __name__ == "__main__":
    commands.run(main)
