"""What the experiment compares: variants, stages, and the pieces that each stage is made of.

A piece is one training and its scores, a file of tiny/results. tiny/experiment.py makes those that
are not there; tiny/leads.py and tiny/findings.py read them. tiny/EXPERIMENT.md says why each is
what it is, and when that was fixed.
"""
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import baselines
import weights
from dit import FluxTransformer
from mole import AdapterConfig
from sample import load_pipeline
from support import methods
from support.configs import config_from, read_json
from tiny import conflict, probe
from tiny.world import BASE_TASKS, NEW_TASKS

MODEL = Path("tiny/model")
RESULTS = Path("tiny/results")                           # a JSON file for each piece
WORK = Path("runs/experiment")                           # checkpoints
STAGES = ("search", "table", "interference", "balance", "longer", "regimes", "conflict")
SEARCH_SEED, SEEDS, MORE_SEEDS = 0, (1, 2, 3), (4, 5, 6, 7, 8)
STEPS, SEARCH_STEPS, LONGER_STEPS, BATCH = 1500, 500, 4500, 24
TOGETHER_STEPS, OWN = 750, 8                             # interference: of each task in a batch
OWN_IN_CONFLICT = 5                                      # in a batch of BATCH 4.8, on average
NUMBER = 256                                             # pictures per task that are scored
RATES, SCALES = (1e-3, 3e-3, 9e-3), (1.0, 8.0)           # what the search tries
TRIPLES = (("canny", "depth", "pose"), ("fill", "subject", "multi"), ("mixed", "canny", "subject"))
ALL = BASE_TASKS + NEW_TASKS
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


# -------------------------------------------------------------------------------- their adapters

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
    config = replace(methods.configure(variant.method, base, baselines.KINDS), **variant.changes)
    if variant.sized:
        config = sized(config, count(base))
    if piece.balance_weight is not None:
        config = replace(config, balance_weight=piece.balance_weight)
    if variant.method == "lora":
        return replace(config, lora_alpha=piece.scale * config.lora_rank)
    return replace(config, alpha=piece.scale * config.rank)


# -------------------------------------------------------------------------------- what is to do

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
