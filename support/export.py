"""One instruction's mixture as a plain LoRA: merged into the weights, or written to a file.

sample.generate() merges where it can, so that an adapter costs nothing per step; sample.py
--export-lora writes what every other FLUX tool loads.
"""
import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import call
from pathlib import Path

import torch
from torch import Tensor, nn

from mole import Adapter, LoRALinear, MoLELinear, Routing
from support import devices
from support.adapters import mixtures
from support.files import write_tensors
from support.fp8 import NarrowLinear
from support.lora import ALPHA_IS_RANK
from support.offload import bytes_of
from support.routing_maps import experts_line, show
from support.words import counted, span


def layer_as_lora(layer: LoRALinear | MoLELinear, routing: Routing) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), scales within B, of what a layer adds to the frozen one.

    The mixture of one instruction is a LoRA of rank k r, the same at every token and step: the
    kept experts stacked, with s w_e within B, and any LoRA that lies beneath the experts.
    Raises: ValueError when there is no such mixture.
    """
    if isinstance(layer, LoRALinear):
        return layer.lora_A, layer.scale * layer.lora_B
    if layer.by_token or len(routing.z) != 1:
        raise ValueError(f"{layer.name}: only the mixture of one instruction is a plain LoRA; "
                         "where tokens route, each has its own")
    c, (w, _) = layer.config, layer.routing_weights(routing.z, routing)      # (1, E)
    layer.last_weights = w.detach()
    shares = (c.alpha / c.rank * w[0]).repeat_interleave(c.rank)
    kept = shares != 0                                                       # (E r,)
    A, B = layer.experts_A.T[kept], layer.experts_B.T[:, kept] * shares[kept]
    if isinstance(layer.base, LoRALinear):               # another adapter's
        below = layer_as_lora(layer.base, routing)
        A, B = torch.cat([A, below[0].to(A)]), torch.cat([B, below[1].to(B)], 1)
    return A, B


def frozen(layer: LoRALinear | MoLELinear) -> nn.Linear:
    """The model's own layer beneath those that adapt it."""
    return layer.base.base if isinstance(layer.base, LoRALinear) else layer.base


def as_lora(adapter: Adapter, txt: Tensor, pooled: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The plain LoRA that the adapter is for one instruction: layer name -> A, B.

    Raises: as layer_as_lora() does.
    """
    with torch.no_grad(), adapter.serve(txt, pooled) as routing:
        return {name.replace("/", "."): layer_as_lora(layer, routing)
                for name, layer in adapter.layers.items()}


@contextmanager
def merged(model: nn.Module, adapter: Adapter, txt: Tensor, pooled: Tensor) -> Iterator[None]:
    """Within the `with` the model's weights are W + B A for this one instruction.

    The adapter then costs nothing per step. Afterwards all is as before, bit for bit.
    """
    pairs = as_lora(adapter, txt, pooled)
    layers = {name: model.get_submodule(name) for name in pairs}
    kept = {name: frozen(layer).weight.data for name, layer in layers.items()}
    try:
        for name, (A, B) in pairs.items():
            base, W = frozen(layers[name]), kept[name]
            base.weight.data = torch.addmm(W.float(), B.detach(), A.detach()).to(W.dtype)
            model.set_submodule(name, base)
        yield
    finally:
        for name, layer in layers.items():
            frozen(layer).weight.data = kept[name]
            model.set_submodule(name, layer)


def mergeable(adapter: Adapter, instructions: int, device: torch.device) -> bool:
    """Whether the adapter is a plain LoRA here, its weights can be added to, and kept twice."""
    bases = [frozen(layer) for layer in adapter.layers.values()]
    return (instructions == 1 and not any(layer.by_token for layer in mixtures(adapter))
            and all(not isinstance(base, NarrowLinear)
                    and not hasattr(base.weight, "placements")               # one of many parts
                    and base.weight.device.type == device.type for base in bases)
            and sum(base.weight.nbytes for base in bases) < devices.memory(device) / 2)


def at_work(model: nn.Module, adapter: Adapter | None, txt: Tensor, pooled: Tensor,
            device: torch.device, run: Callable) -> AbstractContextManager:
    """A `with` in which the adapter does its work: merged into the weights where it can be.

    run: what calls a block; where weights come and go with it, they are not merged.
    """
    if adapter is None:
        return nullcontext()
    if run is call and mergeable(adapter, len(pooled), device):
        return merged(model, adapter, txt, pooled)
    return adapter.serve(txt, pooled)


def write_asked(args: argparse.Namespace, pipe: object,
                encode: Callable[[list[str]], tuple[Tensor, Tensor]], todo: list) -> None:
    """What sample.py's --export-lora and --routing want of the adapter: files, not pictures.

    pipe: a sample.Pipeline; encode: instructions -> T5 tokens, pooled; todo: the jobs.
    Raises: ValueError.
    """
    if args.export_lora or args.routing:                 # a large T5 takes its time on a CPU
        devices.announce("encoding", bytes_of(pipe.t5))
    if args.export_lora:
        text = args.route_by or args.instruction
        write_instruction(pipe.adapter, *encode([text]), args.export_lora)
    if args.routing:
        show(pipe.adapter, encode, todo, args.routing)


def write_instruction(adapter: Adapter, txt: Tensor, pooled: Tensor, file: Path) -> None:
    """Write the adapter as the plain LoRA that it is for one instruction, and say so."""
    pairs = as_lora(adapter, txt, pooled)
    write_lora(pairs, file)
    ranks = [len(A) for A, _ in pairs.values()]
    print(f"{file}: a plain LoRA on {counted(len(pairs), 'layer')}, of rank {span(ranks)}"
          f"{experts_line(adapter)}")


def write_lora(pairs: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Write W + B A by module name, in the one form that diffusers and ComfyUI read alike.

    Both take an alpha that is not said as the rank, which is meant; lora.read() is told so.
    """
    write_tensors({f"transformer.{name}.lora_{part}.weight": t.float()
                   for name, pair in pairs.items() for part, t in zip("AB", pair)}, file,
                  **ALPHA_IS_RANK)                       # one entry: several have no fixed order
