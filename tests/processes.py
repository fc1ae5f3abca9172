"""Two processes against one: gradients of a step in fp32, Muon's adapter after 20 in float64.

Each process takes one of two micro-batches; beside it, it computes both alone. With and without
the frozen blocks split over the processes.

Run: torchrun --nproc_per_node=2 tests/processes.py
"""
import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sample                                            # noqa: E402
import train                                             # noqa: E402
import weights                                           # noqa: E402
from dit import FluxTransformer                          # noqa: E402
from mole import AdapterConfig                           # noqa: E402
from support import distributed                          # noqa: E402
from support.configs import config_from, read_json       # noqa: E402
from tiny.world import TinyWorld                         # noqa: E402


def run(model: Path, dtype: str, steps: int, mine: list[int], together: bool, split: bool = False
        ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> the first step's gradients, and the adapter in the end."""
    torch.manual_seed(0)
    pipe = sample.load_pipeline(model, None, "cpu", dtype)
    file = ROOT / "tiny/adapter.json"
    pipe.adapter = weights.new_adapter(pipe.dit, config_from(AdapterConfig, read_json(file), file))
    pipe.adapter.to(getattr(torch, dtype)).train()
    own = pipe.adapter.tensors()
    for p in own.values():                               # as after some training
        torch.nn.init.normal_(p, std=0.02)
    most: list[int] = []                                 # blocks that are whole, as each has run
    if split:
        distributed.shard(pipe.dit, pipe.adapter, pipe.device)
        for block in pipe.dit.blocks:
            block.register_forward_hook(lambda *_: most.append(whole(pipe.dit)))
    kind = "muon" if dtype == "float64" else "adamw"     # and with it adamw for the rest
    optimizers, first = train.make_optimizers(pipe.adapter, 1e-3, 1e-3, kind), {}
    for step in range(steps):
        numbers = [2 * step + i for i in mine]
        train.accumulate(pipe, [
            (i, TinyWorld().draw(np.random.default_rng(i), 1)) for i in numbers], 1.0)
        if together:
            distributed.average(own.values(), 1)
        else:
            for p in own.values():
                p.grad /= 2
        first = first or {name: p.grad.clone() for name, p in own.items()}
        for optimizer in optimizers:
            with nullcontext() if together else patch.object(dist, "is_initialized", bool):
                optimizer.step()                         # alone, Muon shares no work
            optimizer.zero_grad()
    assert max(most, default=0) <= 1, most
    return first, {name: p.detach() for name, p in own.items()}


def whole(model: FluxTransformer) -> int:
    """How many blocks' frozen weights are not split over the processes now."""
    return sum(any(not hasattr(p, "placements") for p in block.parameters() if not p.requires_grad)
               for block in model.blocks)


def farthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, of its norm."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - t).norm() / t.norm()).item() for name, t in wanted.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", type=Path, default=ROOT / "tiny/model")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for dtype, steps, which, limit in (("float32", 1, 0, 1e-6), ("float64", args.steps, 1, 1e-8)):
        alone = run(args.model, dtype, steps, [0, 1], together=False)[which]
        first: dict[str, Tensor] = {}
        for split in (False, True):
            found = run(args.model, dtype, steps, [rank], together=True, split=split)[which]
            error = farthest(found, alone)
            print(f"{dtype}, {steps} steps, split {split}: {error:.1e}", flush=True)
            assert error <= limit
            first = first or found
            assert all(torch.equal(found[name], t) for name, t in first.items())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
