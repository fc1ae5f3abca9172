"""Several processes, each with its GPU: joining them, averaging, splitting the frozen blocks.

train.py calls it by name at each of these places.
"""
import argparse
import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import commands, devices


def join(args: argparse.Namespace) -> tuple[int, int]:
    """This process's rank and how many torchrun started: (0, 1) without it. Each has its GPU."""
    rank, workers = commands.rank(), commands.workers()
    if workers > 1:
        cuda = args.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
            torch.cuda.set_device(devices.choose_device(args.device))
        elif args.device not in ("auto", "cpu"):
            devices.choose_device(args.device)           # says why that one cannot be used, if so
            raise ValueError(f"--device {args.device}: with several processes write auto, cuda "
                             "(one GPU each) or cpu")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(days=1))       # some encode longer than others
    return rank, workers


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def average(trained: Iterable[Tensor], passes: int) -> None:
    """Gradients: from sums over a process's micro-batches, `passes` of them, to means over all's.

    What follows the batch without a gradient, as Expert Race's thresholds, is averaged too.
    """
    workers = commands.workers()
    for p in trained:
        value = p.grad if p.requires_grad else p.data
        if workers > 1 and value is not None:
            dist.all_reduce(value)
            value /= workers
        if p.grad is not None:
            p.grad /= passes


def agree(losses: dict[str, float], stop: bool) -> tuple[dict[str, float], bool]:
    """The means of all processes' losses; and whether any was asked to stop, as all then do."""
    values = torch.tensor([*losses.values(), stop], dtype=torch.float64)
    if commands.workers() > 1:
        dist.all_reduce(values)
    *means, stop = (values / commands.workers()).tolist()
    return dict(zip(losses, means)), stop > 0


def shard(model: nn.Module, adapter: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every block's frozen weights; a block is whole while it runs.

    The adapter is not split: every process has all of it.
    """
    from torch.distributed.device_mesh import init_device_mesh   # both take a second to import
    from torch.distributed.fsdp import fully_shard
    own = set(adapter.tensors().values())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block.to(device), mesh=mesh, ignored_params=own,         # one at a time there
                    reshard_after_forward=True)          # each is its own root, and those are kept
    for part in (adapter.instruction, *model.children()):
        if part is not None and not isinstance(part, nn.ModuleList):
            part.to(device)
