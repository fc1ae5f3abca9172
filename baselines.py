"""The routings that InstructMoLE is compared with, each a MoLELinear with weights of its own.

    token     w = softmax(G x_n + noise) on its k largest entries: every token asks for itself
    soft      w = softmax(G z / temperature): all experts, by the instruction; no auxiliary loss
    race      w = G x_n where it is among the B N k largest of a call: all samples, tokens, experts
    choice    w = softmax(G x_n) where x_n is among the N k / E best tokens of that expert
    standardised  w = softmax(G ((z - mean) / deviation) + noise) on its k largest entries; ours

Plain LoRA, and instruction routing by the pooled text alone, need no class: mole.py has them.

Key: B batch; N tokens of a sample; E experts; k kept on average; z instruction vector.
Source: arXiv 2512.21788 and its public code; Expert Race: 2503.16057; Expert Choice: 2410.02098.
"""
import math

import torch
from torch import Tensor, nn

from mole import MoLELinear, Routing, balance_loss, route

SIMILARITY_WEIGHT = 1e-5                                 # of the race's loss


class TokenLinear(MoLELinear):
    """Token top-k: the router of InstructMoLE, fed with each token's own input."""
    by_token = True

    def routing_weights(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        p, w, kept = route(self.logits(x), self.config.top_k)                # (..., E)
        return w, self.config.token_balance_weight * balance_loss(p, kept)


class SoftLinear(MoLELinear):
    """All experts serve every image; a learned temperature sharpens their shares."""
    noisy = orthogonal = False

    def __init__(self, *args: object):
        super().__init__(*args)
        self.log_temperature = nn.Parameter(torch.zeros((), device=self.router.weight.device))

    def logits(self, seen: Tensor) -> Tensor:            # (B, width) -> (B, E)
        return super().logits(seen) / self.log_temperature.exp().clamp(min=0.01)

    def routing_weights(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        w = self.logits(routing.z).softmax(dim=-1)                           # (B, E)
        return w, w.new_zeros(())


class StandardisedLinear(MoLELinear):
    """InstructMoLE's router, fed with each entry of z less its mean, over its standard deviation.

    Both are of the last fifty or so training calls. Without them, where all vectors of a text
    encoder are alike, what they share drowns what tells them apart, and the noise decides.
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        zero = self.router.weight.new_zeros(self.router.in_features)
        moments = torch.stack([zero, zero + 1])          # the means of z and of z^2
        self.moments = nn.Parameter(moments, requires_grad=False)
        self.calls = nn.Parameter(zero[0].clone(), requires_grad=False)

    def logits(self, seen: Tensor) -> Tensor:            # (B, width) -> (B, E)
        mean, square = self.moments
        deviation = (square - mean ** 2).clamp(min=1e-6).sqrt()
        return super().logits((seen - mean) / deviation)

    def routing_weights(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        if self.training and not routing.recomputing:
            z = routing.z.detach()
            self.calls += 1
            self.moments.lerp_(torch.stack([z, z ** 2]).mean(1), (1 / self.calls).clamp(min=0.02))
        return super().routing_weights(x, routing)


def similarity_loss(p: Tensor, kept: Tensor) -> Tensor:
    """Router similarity of Expert Race; p, kept (..., E). Pairs that are often kept cost most.

    Eq.: [E / tr M' * sum_i M'_ii P'_ii + (E^2 - E) / sum M' * sum_{i != j} M'_ij P'_ij] / E,
    where P' = P^T P and M' = M^T M over all rows.
    """
    P, M = (rows.flatten(0, -2).T @ rows.flatten(0, -2) for rows in (p, kept))           # (E, E)
    E, both = len(P), M * P
    own = both.diagonal().sum()
    return (E / M.trace().clamp(min=1) * own
            + (E * E - E) / M.sum().clamp(min=1) * (both.sum() - own)) / E


class RaceLinear(MoLELinear):
    """Expert Race: all pairs of token and expert compete; the winners' weight is their raw logit.

    Training keeps the B N k largest logits of a call and follows the smallest of them with a moving
    threshold, which stands in for it afterwards.
    """
    by_token, noisy = True, False

    def __init__(self, *args: object):
        super().__init__(*args)
        self.threshold = nn.Parameter(torch.zeros((), device=self.router.weight.device),
                                      requires_grad=False)         # a parameter: it is saved

    def routing_weights(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)                                              # (..., E)
        threshold = self.threshold
        if self.training:
            tokens = logits.numel() // logits.shape[-1]
            threshold = logits.detach().flatten().topk(tokens * self.config.top_k).values[-1]
            if not routing.recomputing:                  # it computes twice, and learns once
                self.threshold.lerp_(threshold, 0.01)
        kept = (logits >= threshold).to(logits.dtype)
        return logits * kept, SIMILARITY_WEIGHT * similarity_loss(logits.softmax(dim=-1), kept)


class ChoiceLinear(MoLELinear):
    """Expert Choice: in each sample all experts take equally many tokens, their best ones."""
    by_token, noisy, orthogonal = True, False, False

    def routing_weights(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        p = self.logits(x).softmax(dim=-1)                                   # (..., N, E)
        if x.dim() < 3:                                  # (B, in): a sample's only token
            return p, p.new_zeros(())
        take = math.ceil(p.shape[-2] * self.config.top_k / p.shape[-1])
        best = p.topk(take, dim=-2).indices                                  # (..., take, E)
        return p * torch.zeros_like(p).scatter(-2, best, 1.0), p.new_zeros(())


KINDS: dict[str, type[MoLELinear]] = {
    "instruction": MoLELinear, "token": TokenLinear, "soft": SoftLinear, "race": RaceLinear,
    "choice": ChoiceLinear, "standardised": StandardisedLinear}
METHODS = ["instructmole", "pooled", "lora", *(kind for kind in KINDS if kind != "instruction")]
