"""The compared routings, against loops that spell out what each means."""
import dataclasses
import math

import pytest
import torch
from torch import nn, Tensor

import baselines
import dit
import mole
import weights
from helpers import adapter_config, dense_cosines, DIT, inputs, load_adapter, SMALL, step
from support import adapters, methods

MIXTURES = ["token", "soft", "race", "choice", "standardised"]
BY_INSTRUCTION = ("instructmole", "soft", "standardised")        # by more than the pooled text


def layer_of(kind: str, E: int = 4, k: int = 2) -> mole.MoLELinear:
    """A layer 5 -> 7 in float64, B not 0; in train mode as it is built."""
    c = dataclasses.replace(SMALL, experts=E, top_k=k, rank=3, alpha=6, token_balance_weight=0.3,
                            orthogonality_weight=0.9)
    layer = baselines.KINDS[kind](nn.Linear(5, 7), c, "some.layer", 6, []).double()
    nn.init.normal_(layer.experts_B)
    nn.init.normal_(layer.router.weight)
    layer.base.requires_grad_(False)
    return layer


def outputs_of(layer: mole.MoLELinear, x: Tensor) -> list[Tensor]:
    c = layer.config
    return [c.alpha / c.rank * x @ layer.experts_A[:, e * c.rank:(e + 1) * c.rank]
            @ layer.experts_B[e * c.rank:(e + 1) * c.rank] for e in range(c.experts)]


def call(layer: mole.MoLELinear, x: Tensor) -> tuple[Tensor, mole.Routing]:
    torch.manual_seed(7)
    routing = mole.Routing(torch.randn(len(x), 6, dtype=torch.float64), losses=True)
    layer.routings[:] = [routing]
    return layer(x), routing


def check(layer: mole.MoLELinear, x: Tensor, weights: Tensor, loss: float | Tensor) -> None:
    """The output is the base's and the experts', so weighted; weights (B, N, E)."""
    y, routing = call(layer, x)
    experts = outputs_of(layer, x)
    wanted = layer.base(x) + sum(weights[..., e, None] * Y for e, Y in enumerate(experts))
    assert (y - wanted).abs().max() <= 1e-10
    assert abs(routing.balance - loss) <= 1e-10
    orthogonality = 0.9 * dense_cosines(experts) if layer.orthogonal else 0
    assert abs(routing.orthogonality - orthogonality) <= 1e-10


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_token_top_k(x, k):
    layer = layer_of("token", k=k).eval()
    w = torch.zeros(2, 6, 4, dtype=torch.float64)
    chosen, means = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for n in range(6):
            p = (layer.router.weight @ x[b, n]).softmax(0)
            means += p.detach() / 12
            for e in p.argsort(descending=True)[:k].tolist():
                w[b, n, e] = p[e]
                chosen[e] += 1 / 12
    check(layer, x, w, 0.3 * 4 * (chosen * means).sum())


@pytest.mark.parametrize("log_temperature, temperature", [(0.0, 1.0), (-1.0, math.exp(-1)),
                                                          (-9.0, 0.01)])
def test_soft_routing(x, log_temperature, temperature):
    layer = layer_of("soft")
    nn.init.constant_(layer.log_temperature, log_temperature)
    z = call(layer, x)[1].z
    w = torch.stack([(layer.router.weight @ z[b] / temperature).softmax(0) for b in range(2)])
    check(layer, x, w[:, None].expand(2, 6, 4), 0.0)


def similarity(p: Tensor, kept: Tensor) -> Tensor:
    E = p.shape[1]
    P, M = p.T @ p, kept.T @ kept
    own = sum(M[i, i] * P[i, i] for i in range(E))
    others = sum(M[i, j] * P[i, j] for i in range(E) for j in range(E) if i != j)
    return (E / M.trace() * own + (E ** 2 - E) / M.sum() * others) / E


@pytest.mark.parametrize("k", [1, 2, 4])
def test_expert_race(x, k):
    layer = layer_of("race", k=k)
    logits = x @ layer.router.weight.T                   # (2, 6, E)
    winners = sorted(logits.flatten().tolist(), reverse=True)[:12 * k]
    kept = (logits >= winners[-1]).double()
    assert kept.sum() == 12 * k
    loss = 1e-5 * similarity(logits.softmax(-1).flatten(0, 1), kept.flatten(0, 1))
    check(layer, x, logits * kept, loss)
    assert abs(layer.threshold - 0.01 * winners[-1]) < 1e-10     # 0.99 * 0 + 0.01 * the last winner
    assert not layer.threshold.requires_grad
    layer.eval()
    layer.threshold.fill_(0.3)
    kept = (logits >= 0.3).double()
    check(layer, x, logits * kept,
          1e-5 * similarity(logits.softmax(-1).flatten(0, 1), kept.flatten(0, 1)))
    assert layer.threshold == 0.3                        # it stays outside training


@pytest.mark.parametrize("E, k", [(4, 1), (4, 2), (4, 4), (5, 2)])
def test_expert_choice(x, E, k):
    layer = layer_of("choice", E, k)
    p = (x @ layer.router.weight.T).softmax(-1)          # (2, 6, E)
    w = torch.zeros_like(p)
    for b in range(2):
        for e in range(E):
            for n in p[b, :, e].argsort(descending=True)[:math.ceil(6 * k / E)].tolist():
                w[b, n, e] = p[b, n, e]
    check(layer, x, w, 0.0)


def test_expert_choice_of_a_vector_is_each_samples_own():
    """Where a sample has one input, (B, in), every expert takes it, whatever the batch."""
    layer, x = layer_of("choice"), torch.randn(3, 5, dtype=torch.float64)
    together, _ = layer.routing_weights(x, None)
    alone = torch.cat([layer.routing_weights(row[None], None)[0] for row in x])
    assert torch.equal(together > 0, torch.ones(3, 4, dtype=torch.bool))
    assert torch.allclose(together, alone, atol=1e-12, rtol=0)


def test_standardised_routing():
    """By z less its mean, over its standard deviation, of all calls in training so far."""
    layer, seen = layer_of("standardised"), []
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    for shift in (0.0, 2.0, 5.0):
        z = shift + torch.randn(3, 6, dtype=torch.float64)
        seen.append(z)
        layer.routing_weights(x, mole.Routing(z, losses=True))
    layer.eval()
    z, every = torch.randn(3, 6, dtype=torch.float64), torch.cat(seen)
    wanted = (z - every.mean(0)) / every.std(0, correction=0)
    for _ in range(2):                                   # outside training nothing moves
        w, _ = layer.routing_weights(x, mole.Routing(z, losses=True))
        p = (wanted @ layer.router.weight.T).softmax(-1)
        assert torch.allclose(w, torch.where(w > 0, p, 0.0), atol=1e-10, rtol=0)
        assert torch.equal((w > 0).sum(-1), torch.full((3,), 2))
    assert not layer.moments.requires_grad and not layer.calls.requires_grad


def test_standardised_routing_forgets():
    """Of calls long ago little is left, and one alone, of one picture, is no division by zero."""
    layer, x = layer_of("standardised"), torch.randn(1, 6, 5, dtype=torch.float64)
    for value, calls in ((100.0, 60), (1.0, 500)):
        for _ in range(calls):
            routing = mole.Routing(torch.full((1, 6), value, dtype=torch.float64), losses=True)
            assert layer.routing_weights(x, routing)[0].isfinite().all()
    assert (layer.moments[0] - 1).abs().max() < 0.01


@pytest.mark.parametrize("kind", MIXTURES)
def test_everything_that_is_trained_gets_a_gradient(x, kind):
    layer = layer_of(kind)
    y, routing = call(layer, x)
    (y.square().mean() + routing.balance + routing.orthogonality).backward()
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.any(), name


def adapted(kind: str) -> tuple[nn.Module, mole.Adapter]:
    torch.manual_seed(0)
    model = dit.FluxTransformer(DIT)
    adapter = weights.new_adapter(model, methods.configure(kind, SMALL, baselines.KINDS))
    for name, p in adapter.tensors().items():
        if name.endswith("_B"):
            nn.init.normal_(p, std=0.3)
    return model, adapter


@pytest.mark.parametrize("kind", ["instructmole", "pooled", "lora", *MIXTURES])
def test_each_kind_is_saved_and_loaded(tmp_path, kind):
    model, adapter = adapted(kind)
    step(model, adapter, inputs())                       # a threshold moves, where there is one
    adapters.write(adapter, tmp_path / "a.safetensors")
    other = dit.FluxTransformer(DIT)
    base = {name.replace(".base.", "."): t for name, t in model.state_dict().items()}
    other.load_state_dict({name: base[name] for name in other.state_dict()})
    loaded = load_adapter(other, tmp_path / "a.safetensors")
    assert loaded.config == adapter.config
    kinds = {type(layer) for layer in loaded.layers.values()} - {mole.LoRALinear}
    assert kinds == ({baselines.KINDS.get(kind, mole.MoLELinear)} if kind != "lora" else set())
    assert (loaded.instruction is not None) == (kind in BY_INSTRUCTION)
    x = inputs()
    adapter.requires_grad_(False).eval()
    with adapter.serve(x["txt"], x["pooled"]), loaded.serve(x["txt"], x["pooled"]):
        assert torch.equal(model(**x), other(**x))


@pytest.mark.parametrize("kind", MIXTURES)
def test_checkpointing_changes_nothing(kind):
    """The race's threshold, and the moments of z, must move once, not twice."""
    found = []
    for checkpointed in (False, True):
        model, adapter = adapted(kind)
        torch.manual_seed(5)
        out, routing, gradients = step(model, adapter, inputs(), checkpointed=checkpointed)
        found.append([out, routing.balance, routing.orthogonality,
                      *(g for g in gradients.values() if g is not None),
                      *(p for p in adapter.tensors().values() if not p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_kinds_differ_in_routing_only():
    c = dataclasses.replace(SMALL, token_targets=("single_transformer_blocks.1.proj_out",))
    assert methods.configure("instructmole", c, baselines.KINDS) == c
    pooled = methods.configure("pooled", c, baselines.KINDS)
    assert pooled == dataclasses.replace(c, resampler=False)
    lora = methods.configure("lora", c, baselines.KINDS)
    assert lora.mole_targets == lora.token_targets == ()
    assert set(lora.lora_targets) == {*c.lora_targets, *c.mole_targets, *c.token_targets}
    for kind in MIXTURES:
        wanted = dataclasses.replace(c, routing=kind, resampler=kind in BY_INSTRUCTION)
        assert methods.configure(kind, c, baselines.KINDS) == wanted


def test_unknown_routings_are_named():
    model = dit.FluxTransformer(DIT)
    with pytest.raises(ValueError, match="chance"):
        weights.new_adapter(model, dataclasses.replace(SMALL, routing="chance"))
    assert adapter_config("race", None).routing == "race"
