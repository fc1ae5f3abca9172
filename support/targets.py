"""Which of a model's layers an adapter's targets name, and what each of them becomes.

weights.build_adapter() asks, before anything of the model is changed.
"""
import re

from torch import nn

from mole import AdapterConfig, LoRALinear, MoLELinear
from support.words import counted


def matches(name: str, *targets: str) -> bool:
    """Whether a module's dotted name equals a target or ends in "." + it; * is any block index.

    A target that begins with a dot is the whole name.
    """
    def pattern(target: str) -> str:
        ahead = "" if target.startswith(".") else r".*\."
        return ahead + re.escape(target).replace(r"\*", r"\d+")
    return any(re.fullmatch(pattern(target), f".{name}") for target in targets)


def check_sizes(c: AdapterConfig) -> None:
    """Raises: ValueError for sizes that no adapter can have."""
    if min(c.rank, c.lora_rank, c.resampler_width, c.resampler_heads, c.resampler_head_dim) < 1:
        raise ValueError("ranks and the resampler's sizes must be at least 1")
    if not 1 <= c.top_k <= c.experts:
        raise ValueError(f"top_k is {c.top_k}; with {counted(c.experts, 'expert')} it must be from "
                         f"1 to {c.experts}")


def layers_of(model: nn.Module, c: AdapterConfig, mixtures: dict[str, type[MoLELinear]]
              ) -> dict[str, tuple[nn.Linear, type[LoRALinear] | type[MoLELinear]]]:
    """The linear layers to adapt, by name, in the model's order, each with its new class.

    mixtures: the classes of layers with experts, by routing; see baselines.py.
    Raises: ValueError when a target names no nn.Linear of the model, or a routing is unknown.
    """
    targets = (*c.lora_targets, *c.mole_targets, *c.token_targets)
    if not targets:
        raise ValueError("an adapter needs a target: lora_targets, mole_targets, token_targets")
    if c.routing not in mixtures or (c.token_targets and "token" not in mixtures):
        raise ValueError(f"routing {c.routing!r}, token_targets {c.token_targets}: "
                         f"this model may be routed by {', '.join(mixtures)}")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(matches(name, target) for name in linears):
            raise ValueError(f"adapter target {target!r} names no linear layer of the model")
    found = {}
    for name, linear in linears.items():
        if matches(name, *c.token_targets):
            found[name] = linear, mixtures["token"]
        elif matches(name, *c.mole_targets):
            found[name] = linear, mixtures[c.routing]
        elif matches(name, *c.lora_targets):
            found[name] = linear, LoRALinear
    return found
