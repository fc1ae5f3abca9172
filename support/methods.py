"""Which adapter a training makes: its method and sizes, as the options, files and --init say.

train.main() calls chosen() before any weight of the model is read.
"""
import argparse
from dataclasses import asdict, replace

from torch import Tensor

from mole import AdapterConfig, MoLELinear
from support import adapters, foreign, research, targets
from support.commands import is_first
from support.configs import config_from
from support.words import note


def method_of(c: AdapterConfig) -> str:
    """The --method whose adapters have this configuration; configure() is its inverse."""
    if not c.mole_targets and not c.token_targets:
        return "lora"
    if c.routing != "instruction":
        return c.routing
    return "instructmole" if c.resampler else "pooled"


def configure(method: str, c: AdapterConfig, kinds: dict[str, type[MoLELinear]]) -> AdapterConfig:
    """The same sizes with the routing of a --method; kinds: baselines.KINDS. Raises: ValueError."""
    if c.routing not in ("instruction", method):
        raise ValueError(f"the configuration says routing {c.routing!r}; choose that --method")
    if method == "lora":                                 # plain LoRA everywhere
        return replace(c, lora_targets=c.lora_targets + c.mole_targets + c.token_targets,
                       mole_targets=(), token_targets=())
    if method == "pooled":
        return replace(c, resampler=False)
    if method in kinds:
        return replace(c, routing=method, resampler=c.resampler and not kinds[method].by_token)
    return c


def by_options(args: argparse.Namespace, named: dict, base: AdapterConfig) -> dict:
    """What --config, which names such values, --rank and --experts change.

    Raises: ValueError where two contradict.
    """
    asked = {}
    before = asdict(config_from(AdapterConfig, asdict(base) | named, args.config, whole=True))
    if args.rank:                                        # alpha follows: the scale stays
        rank, alpha = ("lora_rank", "lora_alpha") if args.method == "lora" else ("rank", "alpha")
        asked |= {rank: args.rank, alpha: args.rank * before[alpha] / max(1, before[rank])}
    if args.experts:
        if args.method == "lora":
            raise ValueError(f"--experts {args.experts}: --method lora has none")
        asked |= {"experts": args.experts, "top_k": min(args.experts, before["top_k"])}
        if args.experts <= before["top_k"] and args.method != "soft":        # which keeps all
            note(f"--experts {args.experts}: all are kept, so that routing chooses none"
                 + "; give a smaller top_k by --config" * (args.experts > 1))
    for name in ("rank", "lora_rank", "experts"):
        if name in named and name in asked and named[name] != asked[name]:
            raise ValueError(f"--{name.removeprefix('lora_')} {asked[name]}: {args.config} says "
                             f"{name} {named[name]}; keep one")
    return named | asked


def chosen(args: argparse.Namespace, kinds: dict[str, type[MoLELinear]]
           ) -> tuple[AdapterConfig, dict[str, Tensor] | None]:
    """The adapter's configuration and, with --init, its first weights; sets args.method then.

    What --config names changes those values alone; the others are those of adapter.json beside the
    model, where there is one, else the paper's. kinds: baselines.KINDS.
    Raises: FileNotFoundError, ValueError.
    """
    beside, first, where = args.model.parent / "adapter.json", None, args.config or "--rank"
    named, whole = research.entries_of(args.config) if args.config else ({}, False)
    if args.init:
        foreign.check_there(args.init, "--init")
        args.init = foreign.snapshot(args.init)
        values, first = adapters.read(args.init)
        base = config_from(AdapterConfig, values, args.init, whole=True)
        if args.method not in (None, method_of(base)):
            raise ValueError(f"--init {args.init}: is an adapter of --method {method_of(base)}, "
                             f"not {args.method}")
        args.method = method_of(base)
        if is_first():
            print(f"begins with {args.init}, of --method {args.method}")
        if (side := adapters.longest([args.init])) != args.longest:
            note(f"{args.init} was trained with --longest {side}, this run is with "
                 f"{args.longest}")
        if not research.is_one(args.init):               # of the paper's a whole folder
            args.init = adapters.file_of(args.init)
    else:
        values = research.entries_of(beside)[0] if beside.is_file() and not whole else {}
        base = config_from(AdapterConfig, values, beside, whole=True)
    changes = by_options(args, named, base)
    asked = config_from(AdapterConfig, asdict(base) | changes, where, whole=True)
    c = configure(args.method, asked, kinds)
    if args.init and c != base:
        told = ", ".join(f"{name} is {value}, not {asdict(c)[name]}"
                         for name, value in asdict(base).items() if value != asdict(c)[name])
        raise ValueError(f"--init {args.init}: its sizes stay as they are: {told}; leave out "
                         "--config, --rank and --experts")
    targets.check_sizes(c)
    if c.mole_targets and not c.alpha:
        raise ValueError(f"{where}: alpha is 0, so that the experts would add nothing")
    return c, first
