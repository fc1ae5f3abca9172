"""Muon, an optimizer for matrices.

train.make_optimizers() takes it with --optimizer muon, tiny/base.py always.
"""
import torch
import torch.distributed as dist
from torch import Tensor


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all about 1. (n, a, b) -> (n, a, b)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):                                   # an odd polynomial of the singular values
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: every direction of a hidden matrix is learned at one pace.

        M <- 0.95 M + 0.05 G                                             G: the gradient
        W <- W - lr * 0.2 sqrt(max(a, b)) * orthogonal(0.05 G + 0.95 M)  W is (a, b)

    The factor gives the step the size that AdamW's has. Each of several processes makes orthogonal
    its share of the matrices. torch.optim.Muon computes in bf16 alone, slow on many processors.
    Source: Jordan et al., 2024, "Muon"; the factor: Liu et al., arXiv 2502.16982.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "initial_lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        (group,), together = self.param_groups, dist.is_initialized()
        rank, workers = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        stacks: dict[torch.Size, list[Tensor]] = {}      # matrices of one shape are one batch
        for p in group["params"]:
            stacks.setdefault(p.shape, []).append(p)
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            self.state[p]["momentum"].lerp_(p.grad, 0.05)
        for shape, stack in stacks.items():
            steps = stack[0].new_zeros(len(stack), *shape)
            ahead = [p.grad.lerp(self.state[p]["momentum"], 0.95) for p in stack[rank::workers]]
            if ahead:
                steps[rank::workers] = orthogonal(torch.stack(ahead))
            if together:
                dist.all_reduce(steps)
            for p, step in zip(stack, steps):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(step, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
