"""Muon: the formula, the peer, and which tensors of an adapter it takes."""
import pytest
import torch
from test_train import make_pipeline

import train
from support.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonal_keeps_the_directions(shape):
    """The polynomial brings singular values near 1, not to it: 0.7 to 1.2."""
    torch.manual_seed(0)
    W = torch.randn(3, *shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    made = U.mT @ orthogonal(W) @ V.mT                   # diagonal, if the directions are kept
    values = made.diagonal(dim1=1, dim2=2)
    assert (made - torch.diag_embed(values)).abs().max() < 1e-9
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.allclose(orthogonal(-7 * W), -orthogonal(W), atol=1e-6)


def test_two_steps_are_the_peers(monkeypatch):
    """torch.optim.Muon computes in bf16, three digits; ours in the weights' type."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(16, 24)), torch.nn.Parameter(torch.randn(24, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.95, nesterov=True,
                            adjust_lr_fn="match_rms_adamw")
    own = Muon(ours, 0.1, 0.01)
    for _ in range(2):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        own.step(), peer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (p - before).norm()


def test_what_it_takes():
    """The matrices A and B, at twice the rate; the routers keep theirs; all else has the first."""
    pipe = make_pipeline()
    rest, matrices = train.make_optimizers(pipe.adapter, 1e-3, 5e-4, "muon")
    rates = {id(p): (type(optimizer).__name__, group["lr"]) for optimizer in (rest, matrices)
             for group in optimizer.param_groups for p in group["params"]}
    names = pipe.adapter.tensors()
    assert rates.keys() == {id(p) for p in names.values()}
    for name, p in names.items():
        assert rates[id(p)] == (("Muon", 2e-3) if name.endswith(("_A", "_B")) else
                                ("AdamW", 5e-4 if name.endswith("router.weight") else 1e-3))
    lora = train.make_optimizers(make_pipeline("lora").adapter, 1e-3, 5e-4, "muon")
    assert [type(optimizer).__name__ for optimizer in lora] == ["Muon"]
