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
import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import baselines
import train
import weights
from dit import FluxTransformer
from mole import AdapterConfig
from sample import load_pipeline
from support import commands, sizes
from support.devices import choose_device
from support.files import config_from, read_json, write_json
from support.public_sets import PUBLIC
from support.training_options import train_options
from support.validation import HeldOut
from tiny import conflict, probe
from tiny.world import BASE_TASKS, NEW_TASKS, TinyWorld

MODEL = Path("tiny/model")
RESULTS = Path("tiny/results")                           # a JSON file for each piece
WORK = Path("runs/experiment")                           # checkpoints
STAGES = ("search", "table", "interference", "balance", "longer", "regimes", "conflict")
SEARCH_SEED, SEEDS, MORE_SEEDS = 0, (1, 2, 3), (4, 5, 6, 7, 8)
STEPS, SEARCH_STEPS, LONGER_STEPS, BATCH = 1500, 500, 4500, 24
TOGETHER_STEPS, OWN = 750, 8                             # interference: of each task in a batch
OWN_IN_CONFLICT = 5                                      # in a batch of BATCH 4.8, on average
NUMBER, FEW = 256, 64                                    # pictures per task that are scored
RATES, SCALES = (1e-3, 3e-3, 9e-3), (1.0, 8.0)           # what the search tries
TRIPLES = (("canny", "depth", "pose"), ("fill", "subject", "multi"), ("mixed", "canny", "subject"))
ALL = BASE_TASKS + NEW_TASKS
DTYPE = "bfloat16"                                       # of the frozen model
# As the embedded adapter, but the rank of the LoRA beside the experts, and so the size of all; and
# a smaller resampler, which else would have a third of the parameters, where the paper's has 2 %.
SIZES = {"lora_rank": 16, "lora_alpha": 16, "resampler_width": 32, "resampler_heads": 1}


class Variant(NamedTuple):
    """How an adapter differs."""
    method: str                                          # of baselines.METHODS
    changes: dict = {}                                   # of base_config()
    options: tuple[str, ...] = ()                        # further ones of train.py
    sized: bool = True                                   # made as large as InstructMoLE

    @property
    def routes(self) -> bool:
        """Whether it has a choice of experts."""
        return self.method != "lora" and self.changes.get("experts") != 1


STRONG = {"lora_alpha": 128}                             # the LoRA beside: at 8, as a plain one
FREE = STRONG | {"balance_weight": 0.0}                  # nothing holds the shares even
VARIANTS = {
    "InstructMoLE": Variant("instructmole"),
    "strong LoRA beside": Variant("instructmole", STRONG),
    "routing as drawn": Variant("pooled", options=("--router-lr", "0")),     # nothing of it learns
    "no orthogonality loss": Variant("instructmole", {"orthogonality_weight": 0.0}),
    "no balance loss": Variant("instructmole", {"balance_weight": 0.0}),
    "pooled text only": Variant("pooled"),
    "plain LoRA": Variant("lora"),
    "one expert": Variant("pooled", {"experts": 1, "top_k": 1}),     # a LoRA where the experts are
    "token": Variant("token"),
    "soft": Variant("soft"),
    "Expert Race": Variant("race"),
    "Expert Choice": Variant("choice"),
    "standardised whole": Variant("standardised", FREE)}         # found on tasks in conflict
FOR_EACH = "a LoRA for each task"                        # of a fifth of the size: as if well routed
FREE_POOLED = FREE | {"rank": 9, "resampler": False}     # as large as the plain LoRA
REGIMES = {
    "standardised": Variant("standardised", FREE_POOLED),            # by the pooled text only
    "standardised balanced": Variant("standardised", STRONG),    # the whole, too
    "standardised as drawn": Variant("standardised", FREE_POOLED, ("--router-lr", "0")),
    "free": Variant("pooled", FREE_POOLED),
    "free with resampler": Variant("instructmole", FREE),
    "free as one": Variant("pooled", FREE | {"experts": 1, "top_k": 1}),
    FOR_EACH: Variant("lora", {"lora_rank": 6}, sized=False)}        # settings: the plain LoRA's
ADAPTERS = VARIANTS | REGIMES
# What is compared first, with more seeds. Does it pay, as published or with its LoRA as strong as
# the plain one, and is it the routing?
FIRST = {"table": ("InstructMoLE", "strong LoRA beside", "plain LoRA", "routing as drawn"),
         "conflict": ("plain LoRA", "standardised whole", "standardised", "free as one")}
SEARCHES = {"search": (*VARIANTS,),                      # what they are of
            "regimes": ("InstructMoLE", "strong LoRA beside", "plain LoRA", "standardised whole",
                        *(name for name in REGIMES if name != FOR_EACH))}
COMPARED = {"interference": ("plain LoRA", "InstructMoLE"), "balance": ("InstructMoLE",),
            "longer": ("InstructMoLE", "strong LoRA beside", "plain LoRA"),
            "conflict": (*SEARCHES["regimes"], FOR_EACH)}        # else all VARIANTS
COMPANIES = (*((task,) for task in NEW_TASKS), *TRIPLES, NEW_TASKS)          # of interference


@dataclass(frozen=True)
class Piece:
    """One training and its scores."""
    stage: str
    variant: str                                         # of ADAPTERS
    seed: int
    steps: int
    lr: float
    scale: float                                         # alpha / rank, of experts or plain LoRA
    number: int = NUMBER                                 # pictures per task that are scored
    batch: int = BATCH
    tasks: tuple[str, ...] = ALL
    balance_weight: float | None = None                  # None: the variant's
    ways: tuple[str, ...] = ()                           # of probe.WAYS, in which it is routed too

    @property
    def name(self) -> str:
        parts = [self.stage, self.variant, f"seed {self.seed}"]
        if self.stage in SEARCHES:
            parts += [f"lr {self.lr:g}", f"scale {self.scale:g}"]
        if self.tasks not in (ALL, conflict.TASKS):
            parts.append(" ".join(self.tasks))
        if self.balance_weight is not None:
            parts.append(f"weight {self.balance_weight:g}")
        return "-".join(parts).replace(" ", "_")

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def there(self) -> bool:
        """Whether its file is. Raises: ValueError for one made with other settings."""
        if not self.file.exists():
            return False
        was = read_json(self.file)["piece"]
        now = json.loads(json.dumps(asdict(self)))
        other = [name for name in now if was.get(name) != now[name]]
        if other:
            raise ValueError(f"{self.file}: made with another {other[0]}, {was.get(other[0])} and "
                             f"not {now[other[0]]}; move it and {WORK / self.name} away")
        return True


# ----------------------------------------------------------------------------- what is compared

@cache
def empty_transformer() -> FluxTransformer:
    """The tiny model's, shapes alone."""
    return load_pipeline(MODEL, adapter=None, weightless=True).dit


def count(config: AdapterConfig) -> int:
    """Trained parameters of an adapter on the tiny model."""
    adapter = weights.build_adapter(empty_transformer(), config)
    return sum(t.numel() for t in adapter.tensors().values())


def sized(config: AdapterConfig, parameters: int) -> AdapterConfig:
    """The configuration, its rank changed so that it has about so many parameters.

    The rank is that of its experts, or of the plain LoRA; within 5 % it stays as it is.
    """
    if abs(count(config) / parameters - 1) < 0.05:
        return config
    name = "rank" if config.mole_targets else "lora_rank"
    one, two = (count(replace(config, **{name: rank})) for rank in (1, 2))
    return replace(config, **{name: max(1, 1 + round((parameters - one) / (two - one)))})


def base_config() -> AdapterConfig:
    """The embedded adapter's, in SIZES."""
    embedded = config_from(AdapterConfig, read_json(MODEL.parent / "adapter.json"), "adapter.json")
    return replace(embedded, **SIZES)


def configuration(piece: Piece) -> AdapterConfig:
    """A piece's adapter, scaled as it says; but for some regimes, as large as base_config()'s."""
    base, variant = base_config(), ADAPTERS[piece.variant]
    config = replace(sizes.configure(variant.method, base, baselines.KINDS), **variant.changes)
    if variant.sized:
        config = sized(config, count(base))
    if piece.balance_weight is not None:
        config = replace(config, balance_weight=piece.balance_weight)
    if variant.method == "lora":
        return replace(config, lora_alpha=piece.scale * config.lora_rank)
    return replace(config, alpha=piece.scale * config.rank)


def found(stage: str) -> list[dict]:
    """The results of a stage that are there, by name."""
    return [read_json(file) for file in sorted(RESULTS.glob(f"{stage}-*.json"))]


def searched(search: str, variant: str, i: int, j: int) -> Piece:
    """A search's piece of a variant at a place: rate RATES[0] * 3^i, scale SCALES[0] * 8^j."""
    rate = float(f"{RATES[0] * 3.0 ** i:g}")             # 0.003, and not 0.0030000000000000005
    return Piece(search, variant, SEARCH_SEED, SEARCH_STEPS, rate, SCALES[0] * 8.0 ** j,
                 tasks=conflict.TASKS if search == "regimes" else ALL)


def tried(search: str, variant: str) -> list[Piece]:
    """A search's pieces of a variant: the grid, and once that is there, around its best."""
    places = list(product(range(len(RATES)), range(len(SCALES))))
    while all(searched(search, variant, *place).there() for place in places):
        i, j = min(places, key=lambda place: validation_loss(searched(search, variant, *place)))
        around = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        new = [place for place in around if place not in places]
        if not new:
            break
        places += new
    return [searched(search, variant, *place) for place in places]


def flow_loss(result: dict, tasks: Iterable[str]) -> float:
    """A mean over the tasks, infinite of a training that diverged.

    The search's is on validation scenes.
    """
    losses = [result["flow"][task] for task in tasks]
    return math.inf if None in losses else sum(losses) / len(losses)


def validation_loss(piece: Piece) -> float:
    """Of a piece of a search, a mean over all its tasks: what it was trained for."""
    return flow_loss(read_json(piece.file), piece.tasks)


def best(variant: str, stage: str) -> Piece | None:
    """The best piece of the search that a variant's settings are from, once all are there."""
    candidates = tried("regimes" if stage == "conflict" else "search",
                       "plain LoRA" if variant == FOR_EACH else variant)
    if not all(piece.there() for piece in candidates):
        return None
    return min(candidates, key=validation_loss)


def pieces(stage: str) -> Iterator[Piece]:
    """A stage's pieces, those of one seed together. After the search: of what it has finished."""
    if stage in SEARCHES:
        yield from (piece for name in SEARCHES[stage] for piece in tried(stage, name))
        return
    names, seeds = COMPARED.get(stage, VARIANTS), SEEDS
    if stage in FIRST:
        seeds += MORE_SEEDS                              # for what is compared first alone
    settings = {name: {"lr": piece.lr, "scale": piece.scale}
                for name in names if (piece := best(name, stage))}
    for seed, (variant, how) in product(seeds, settings.items()):
        if seed in MORE_SEEDS and variant not in FIRST[stage]:
            continue
        routes = seed not in MORE_SEEDS and ADAPTERS[variant].routes
        whole = Piece(stage, variant, seed, STEPS, **how, ways=probe.WAYS if routes else ())
        if stage == "table":
            yield whole
        if stage == "longer":
            yield replace(whole, steps=LONGER_STEPS)
        if stage == "balance":
            for weight in (0.0, 0.001, 0.01):            # 0.1, the paper's, is in the table
                yield replace(whole, balance_weight=weight,
                              ways=("as trained", "another's", "none"))
        if stage == "interference":
            for tasks in COMPANIES:
                yield replace(whole, steps=TOGETHER_STEPS, batch=OWN * len(tasks), tasks=tasks,
                              ways=())
        if stage == "conflict" and variant != FOR_EACH:
            yield replace(whole, tasks=conflict.TASKS)
        if stage == "conflict" and variant == FOR_EACH:
            for task in conflict.TASKS:
                yield replace(whole, batch=OWN_IN_CONFLICT, tasks=(task,))


def left(stage: str) -> tuple[list[Piece], int]:
    """What of a stage is to do; of how many variants that is not known before others are there."""
    todo = [piece for piece in pieces(stage) if not piece.there()]
    names = () if stage in SEARCHES else COMPARED.get(stage, VARIANTS)
    return todo, sum(best(name, stage) is None for name in names)


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
    train.prepare(args, configuration(piece), None, [(world(piece.tasks), 1.0)], HeldOut(None))
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
        told.append(f"{waiting} variants wait for a stage before")
    print(f"{stage}: {', '.join(told)}", flush=True)
    return todo


def main() -> None:
    parser = commands.Parser(description="Measure routing on the tiny model.")
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
