"""mole.py against its equations written out without tricks, and in a small transformer.

Tolerances: equations are compared in float64 (rounding near 1e-15), so 1e-10 lets through nothing
but rounding; fp32 results of the same operations in the same order must be equal bit for bit.
"""
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn, Tensor

import baselines
import dit
import mole
import weights
from helpers import adapted, dense_cosines, DIT, FIRST, inputs, moles, same, SMALL, step
from support import routing_maps

PAIRS = [(E, k) for E in range(1, 7) for k in range(1, E + 1)]


def total(routing: mole.Routing) -> tuple[float, float]:
    return routing.balance.item(), routing.orthogonality.item()


# ----------------------------------------------------------------------------------- dense formulas

def mole_layer(E: int, k: int, by_token: bool = False, **changes: object) -> mole.MoLELinear:
    """A layer 5 -> 7, routed by vectors of 6 unless by tokens, in float64, no noise, B not 0."""
    c = dataclasses.replace(SMALL, experts=E, top_k=k, rank=3, alpha=6, balance_weight=0.7,
                            token_balance_weight=0.3, orthogonality_weight=0.9, **changes)
    kind = baselines.KINDS["token" if by_token else "instruction"]
    layer = kind(nn.Linear(5, 7), c, "some.layer", 6, []).double().eval()
    nn.init.normal_(layer.experts_B)
    nn.init.normal_(layer.router.weight)                 # wide, so that the experts' shares differ
    layer.base.requires_grad_(False)
    return layer


def dense_mole(layer: mole.MoLELinear, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weighted balance loss, weighted orthogonality loss, expert by expert."""
    c, E, r = layer.config, layer.config.experts, layer.config.rank
    logits = (x if layer.by_token else z) @ layer.router.weight.T
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    rank_of = (p[..., None, :] > p[..., None]).sum(-1)   # how many experts are better
    kept = (rank_of < c.top_k).to(p.dtype)
    outputs = [c.alpha / r * x @ layer.experts_A[:, e * r:(e + 1) * r]
               @ layer.experts_B[e * r:(e + 1) * r] for e in range(E)]
    y = x @ layer.base.weight.T + layer.base.bias
    for e, Y in enumerate(outputs):
        w = (p * kept)[..., e]
        w = w[:, None, None] if not layer.by_token and x.dim() == 3 else w[..., None]
        y = y + w * Y
    rows = p.reshape(-1, E), kept.reshape(-1, E)
    balance = E * sum(rows[1][:, e].mean() * rows[0][:, e].mean() for e in range(E))
    weight = c.token_balance_weight if layer.by_token else c.balance_weight
    return y, weight * balance, c.orthogonality_weight * dense_cosines(outputs)


@pytest.mark.parametrize("shape", [(4, 5), (3, 8, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize("by_token", [False, True], ids=["instruction", "token"])
@pytest.mark.parametrize("E, k", PAIRS)
def test_mole_layer_is_the_dense_formula(E, k, by_token, shape):
    torch.manual_seed(100 * E + 10 * k + by_token)
    layer = mole_layer(E, k, by_token)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    z = torch.randn(shape[0], 6, dtype=torch.float64, requires_grad=True)
    routing = mole.Routing(z, losses=True)
    layer.routings.append(routing)
    ours = layer(x), routing.balance, routing.orthogonality
    theirs = dense_mole(layer, x, z)
    weigh = torch.randn_like(theirs[0])
    of = [x, z, layer.experts_A, layer.experts_B, layer.router.weight]
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-10
        gradients = [torch.autograd.grad((y * (weigh if y.dim() else 1)).sum(), of,
                                         retain_graph=True, allow_unused=True,
                                         materialize_grads=True) if y.requires_grad
                     else [torch.zeros_like(p) for p in of] for y in (a, b)]
        assert all((g - h).abs().max() <= 1e-10 for g, h in zip(*gradients))


def test_lora_layer_is_the_dense_formula():
    torch.manual_seed(0)
    layer = mole.LoRALinear(nn.Linear(5, 7), SMALL).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    delta = 6 / 3 * layer.lora_B @ layer.lora_A          # alpha / r
    assert (layer(x) - (x @ (layer.base.weight + delta).T + layer.base.bias)).abs().max() <= 1e-10


def dense_layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return ((x - x.mean(-1, keepdim=True))
            / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias)


def dense_instruction(v: mole.InstructionVector, txt: Tensor, heads: int, d: int) -> Tensor:
    """What the resampler adds to the pooled vector, sample by sample and head by head."""
    out = []
    for tokens in txt:
        x = tokens @ v.proj_in.weight.T + v.proj_in.bias                     # (T, width)
        latent = v.latents[0]                                                # (1, width)
        for attention, (norm, wide, _, narrow) in v.layers:
            x_in, query = (dense_layer_norm(x, attention.norm1),
                           dense_layer_norm(latent, attention.norm2))
            q = query @ attention.to_q.weight.T
            k, v_ = (torch.cat([x_in, query]) @ attention.to_kv.weight.T).split(heads * d, dim=1)
            parts = []
            for h in range(heads):
                of = slice(h * d, (h + 1) * d)
                score = (q[:, of] * d ** -0.25) @ (k[:, of] * d ** -0.25).T
                parts.append((score.exp() / score.exp().sum()) @ v_[:, of])
            latent = torch.cat(parts, dim=1) @ attention.to_out.weight.T + latent
            hidden = dense_layer_norm(latent, norm) @ wide.weight.T
            gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            latent = gelu @ narrow.weight.T + latent
        out.append(dense_layer_norm(latent @ v.proj_out.weight.T + v.proj_out.bias, v.norm_out)[0])
    return torch.stack(out)


def instruction_vector() -> mole.InstructionVector:
    torch.manual_seed(0)
    vector = mole.InstructionVector(SMALL, text_width=12, pooled_width=10).double()
    for p in vector.parameters():                        # biases and norms too
        nn.init.normal_(p, std=0.5)
    return vector


def test_instruction_vector_is_the_dense_formula_plus_pooled():
    vector = instruction_vector().eval()
    txt, pooled = (torch.randn(3, 5, 12, dtype=torch.float64),
                   torch.randn(3, 10, dtype=torch.float64))
    ours, theirs = vector(txt, pooled), dense_instruction(vector, txt, heads=2, d=4) + pooled
    assert (ours - theirs).abs().max() <= 1e-10
    weigh, of = torch.randn_like(ours), list(vector.parameters())
    gradients = zip(torch.autograd.grad((ours * weigh).sum(), of),
                    torch.autograd.grad((theirs * weigh).sum(), of))
    assert all((a - b).abs().max() <= 1e-10 for a, b in gradients)


def test_dropout_acts_on_the_resampler_in_training_only():
    vector, pooled = instruction_vector(), torch.zeros(500, 10, dtype=torch.float64)
    txt = torch.randn(1, 5, 12, dtype=torch.float64).expand(500, -1, -1)
    whole = vector.eval()(txt, pooled)
    assert torch.equal(whole, vector(txt, pooled))
    dropped = vector.train()(txt, pooled)
    gone = dropped == 0
    assert (dropped - whole / 0.9)[~gone].abs().max() <= 1e-10
    assert abs(gone.double().mean() - 0.1) < 0.02        # 5,000 draws: standard deviation 0.004
    far = vector(txt, pooled + 100)                      # pooled itself is never dropped
    assert (far - 100).abs().max() < 50


def test_without_resampler_z_is_pooled():
    _, adapter = adapted(resampler=False)
    assert adapter.instruction is None and not any(
        "instruction" in name for name in adapter.tensors())
    x = inputs()
    with adapter.serve(x["txt"], x["pooled"]) as routing:
        assert torch.equal(routing.z, x["pooled"])


def test_serve_computes_z_once_with_the_resampler():
    model, adapter = adapted()
    adapter.eval()
    calls, x = [], inputs()
    adapter.instruction.register_forward_hook(lambda *_: calls.append(1))
    with adapter.serve(x["txt"], x["pooled"]) as routing:
        model(**x)
    assert len(calls) == 1
    assert torch.equal(routing.z, adapter.instruction(x["txt"], x["pooled"]))


# ------------------------------------------------------------------------------- routing and losses

def test_kept_probabilities_are_not_renormalised():
    p, w, kept = mole.route(torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])), top_k=2)
    assert torch.allclose(p, torch.tensor([[0.1, 0.4, 0.2, 0.3]]))           # fp32 log and exp
    assert torch.equal(kept, torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    assert torch.equal(w, p * kept) and abs(w.sum() - 0.7) < 1e-6


def test_ties_keep_exactly_k():
    assert mole.route(torch.zeros(3, 5), top_k=2)[2].sum(-1).tolist() == [2, 2, 2]


def test_balance_loss_values():
    even, all_kept = torch.full((6, 4), 0.25), torch.ones(6, 4)
    assert mole.balance_loss(even, all_kept) == 4        # even use of all: k
    one = torch.eye(4)[:1].expand(6, -1)
    assert mole.balance_loss(one, one) == 4              # collapse onto one, k = 1: E
    assert mole.balance_loss(torch.eye(4), torch.eye(4)) == 1                # each has its own: k
    p = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    kept = torch.tensor([[1.0, 0.0], [0.0, 1.0]])        # 2 (0.5 0.55 + 0.5 0.45)
    assert abs(mole.balance_loss(p, kept) - 1) < 1e-6    # fp32 rounding
    assert mole.balance_loss(p.view(1, 2, 2), kept.view(1, 2, 2)) == mole.balance_loss(p, kept)


def test_orthogonality_loss_values():
    same = torch.eye(2).repeat(2, 1)                     # 2 experts of rank 2 with equal B
    assert mole.orthogonality_loss(torch.eye(4), same, 2) == 0               # each on own tokens
    H = torch.eye(2).repeat(1, 2)                        # on the same tokens: Y_e is its block of B
    assert abs(mole.orthogonality_loss(H, same, 2) - 1) < 1e-6               # equal; fp32 rounding
    turned = torch.cat([torch.eye(2), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])])
    assert abs(mole.orthogonality_loss(H, turned, 2) - 0.5) < 1e-6           # 45 deg.: cos^2 = 1/2


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-14, 0.0])
def test_orthogonality_of_small_outputs_is_the_dense_clamp(size):
    """Below norm 1e-12 the dense formula divides by 1e-12; so do we, even where an expert is 0."""
    torch.manual_seed(0)
    H = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    B = torch.randn(9, 5, dtype=torch.float64)
    B[:3] *= size
    B.requires_grad_()
    ours = mole.orthogonality_loss(H, B, 3, scale=2.0)
    theirs = dense_cosines([2 * H[:, e:e + 3] @ B[e:e + 3] for e in (0, 3, 6)])
    assert abs(ours - theirs) <= 1e-10
    for a, b in zip(torch.autograd.grad(ours, (H, B)), torch.autograd.grad(theirs, (H, B))):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= 1e-10 * b.norm()        # relative: 1/size is in the gradient by B


def test_orthogonality_counts_experts_that_were_not_chosen():
    torch.manual_seed(0)
    layer = mole_layer(4, 1)
    x, z = torch.randn(1, 3, 5, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    routing = mole.Routing(z, losses=True)
    layer.routings.append(routing)
    layer(x)
    routing.orthogonality.backward()
    unchosen = layer.last_weights[0] == 0
    assert unchosen.sum() == 3
    assert (layer.experts_A.grad.unflatten(1, (4, 3)).abs().amax((0, 2)) > 0).all()
    assert (layer.experts_B.grad.unflatten(0, (4, 3)).abs().amax((1, 2)) > 0).all()


def test_orthogonality_is_accumulated_in_fp32():
    torch.manual_seed(0)
    H, B = torch.randn(50, 8).bfloat16(), torch.randn(8, 5).bfloat16()
    wide = mole.orthogonality_loss(H.float(), B.float(), 4)
    assert torch.equal(mole.orthogonality_loss(H, B, 4), wide) and wide.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mole.orthogonality_loss(H, B, 4), wide)


def test_one_expert_has_no_orthogonality_loss():
    H, B = torch.randn(4, 2, requires_grad=True), torch.randn(2, 3)
    assert mole.orthogonality_loss(H, B, 1) == 0


@pytest.mark.parametrize("by_token", [False, True], ids=["instruction", "token"])
def test_router_noise(by_token):
    """Train mode adds N(0, 1/E^2) to the logits; the log-ratio of two p is then N(0, 2/E^2)."""
    torch.manual_seed(0)
    E, rows = 4, 100_000                                 # standard deviations 0.0022 and 0.0015
    layer = mole_layer(E, E, by_token).float()
    nn.init.zeros_(layer.router.weight)
    routing = mole.Routing(torch.zeros(rows, 6), losses=False)
    layer.routings.append(routing)
    layer(torch.zeros(rows, 5))
    assert torch.equal(layer.last_weights, torch.full((rows, E), 1 / E))  # eval mode
    layer.train()(torch.zeros(rows, 5))
    p = layer.last_weights
    noise = (p[:, 0] / p[:, 1]).log() * E / math.sqrt(2)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.01             # normal; uniform 0.65


def test_losses_are_collected_only_on_request_and_weights_always():
    model, adapter = adapted()
    x = inputs()
    with adapter.serve(x["txt"], x["pooled"]) as routing:
        model(**x)
    assert routing.balance == routing.orthogonality == 0
    last = routing_maps.last_weights(adapter)
    assert set(last) == {layer.name for layer in moles(adapter)} and FIRST in last
    for w in last.values():
        assert w.shape == (2, 4) and ((w > 0).sum(-1) == 2).all() and not w.requires_grad


@pytest.mark.parametrize("clean, calls", [(False, 5), (True, 9)])
def test_clean_conditions_are_calls_of_their_own(clean, calls, monkeypatch):
    """2 + 3 adapted layers, each called once more for the clean tokens, but not the last."""
    model, adapter = adapted()
    seen, losses, x = [], {"balance_loss": [], "orthogonality_loss": []}, inputs(clean=clean)
    for layer in moles(adapter):
        layer.register_forward_pre_hook(
            lambda layer, args: seen.append((layer.name, args[0].shape[1])))
    for name, found in losses.items():
        def watch(*args: object, real=getattr(mole, name), found: list = found) -> Tensor:
            found.append(real(*args))
            return found[-1]
        monkeypatch.setattr(mole, name, watch)
    with adapter.serve(x["txt"], x["pooled"], losses=True) as routing:
        model(**x)
    doubles = [(f"transformer_blocks.{i}.ff.net.2", n) for i in range(2) for n in (6, 4)]
    singles = [(f"single_transformer_blocks.{i}.proj_out", n)
               for i in range(3) for n in (9, 4)][:-1]
    wanted = [call for call in doubles + singles if clean or call[1] != 4]
    assert len(seen) == calls and seen == wanted         # 9 = text and image together
    balance, orthogonality = losses.values()
    assert len(balance) == len(orthogonality) == calls   # each has its own, and all are summed
    c = adapter.config
    assert torch.allclose(routing.balance, c.balance_weight * sum(balance), rtol=1e-6)
    assert torch.allclose(routing.orthogonality, c.orthogonality_weight * sum(orthogonality),
                          rtol=1e-6)


def test_nothing_of_the_last_clean_call_is_computed():
    """Its keys and values are needed; its MLP, queries and output are not."""
    model, adapter = adapted()
    calls, x = [], inputs()
    for name in ("proj_mlp", "proj_out", "attn.to_k"):
        layer = model.single_transformer_blocks[-1].get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    with adapter.serve(x["txt"], x["pooled"]):
        model(**x)
    assert sorted(calls) == ["attn.to_k", "attn.to_k", "proj_mlp", "proj_out"]


# -------------------------------------------------------------------------------- the adapted model

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_model_computes_what_it_did(dtype):
    torch.manual_seed(0)
    model = dit.FluxTransformer(DIT).to(dtype).requires_grad_(False)         # as load() leaves it
    x = {name: t if name.endswith("ids") else t.to(dtype) for name, t in inputs().items()}
    with torch.no_grad():                                # what needs gradients takes other kernels
        before = model(**x)
        adapter = weights.new_adapter(model, SMALL)      # train mode: noise changes nothing either
        with adapter.serve(x["txt"], x["pooled"]):
            assert torch.equal(model(**x), before)


@pytest.mark.parametrize("needed", [True, False])
def test_the_frozen_layer_is_troubled_for_gradients_only_where_they_are_needed(needed):
    """Its input's gradient is that of plain autograd, also where three layers share the input."""
    whole, seen = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=needed), []
    x, c = whole[:, 2:5], mole.AdapterConfig(lora_rank=2)
    layers = [mole.LoRALinear(nn.Linear(5, 4), c).double() for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
        layer.base.requires_grad_(False)
        layer.base.register_full_backward_hook(lambda *_: seen.append(1))
    sum(layer(x).square().sum() for layer in layers).backward()
    assert len(seen) == (3 if needed else 0)
    found, whole.grad = whole.grad, None
    if needed:
        sum((x @ (layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A).T
             + layer.base.bias).square().sum() for layer in layers).backward()
        assert torch.allclose(found, whole.grad, atol=1e-10, rtol=0)


def test_at_the_start_orthogonality_is_exactly_zero_with_zero_gradient():
    model, adapter = adapted(blank=True)
    x = inputs()
    with adapter.serve(x["txt"], x["pooled"], losses=True) as routing:
        model(**x)
    assert routing.orthogonality == 0
    routing.orthogonality.backward()
    gradients = [p.grad for p in adapter.tensors().values() if p.grad is not None]
    assert gradients and not any(g.any() for g in gradients)                 # NaN counts as any
    _, _, gradients = step(model, adapter, x)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert gradients[f"{FIRST}.experts_B"].any()         # it can leave the start


def test_initialisation():
    """Experts A uniform in +-1/sqrt(r), LoRA A ~ N(0, 1/r^2), every B 0, routers like nn.Linear."""
    torch.manual_seed(0)
    c = dataclasses.replace(SMALL, rank=4, experts=8, lora_rank=16)
    layer = mole.MoLELinear(nn.Linear(500, 9), c, "some.layer", 100, [])
    assert layer.experts_A.shape == (500, 32) and layer.experts_B.shape == (32, 9)
    assert 0.495 < layer.experts_A.abs().max() <= 0.5 and not layer.experts_B.any()
    assert abs(layer.experts_A.std() - 0.5 / math.sqrt(3)) < 0.005           # 16,000 draws: 3 sd
    assert layer.router.weight.shape == (8, 100) and layer.router.bias is None
    assert 0.095 < layer.router.weight.abs().max() <= 0.1
    lora = mole.LoRALinear(nn.Linear(500, 9), c)
    assert abs(lora.lora_A.std() * 16 - 1) < 0.03 and not lora.lora_B.any()  # 8,000 draws: 3.8 sd
    query = mole.InstructionVector(mole.AdapterConfig(), 8, 8).latents       # 768 of N(0, 1/768)
    assert abs(query.std() * 768 ** 0.5 - 1) < 0.1


def test_only_the_adapter_is_trained():
    model, adapter = adapted()
    trained = {id(p) for p in adapter.tensors().values()}
    frozen = [name for name, p in model.named_parameters() if id(p) not in trained]
    assert len(frozen) == len(list(dit.FluxTransformer(DIT).parameters()))   # the whole base
    assert {id(p) for p in itertools.chain(model.parameters(), adapter.parameters())
            if p.requires_grad} == trained
    _, _, gradients = step(model, adapter, inputs())
    assert all(g is not None and g.any() for g in gradients.values())
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is None for name in frozen)


def test_two_models_never_meet():
    (model_a, a), (model_b, b) = adapted(seed=1), adapted(seed=2)
    a.eval(), b.eval()
    x_a, x_b = inputs(1), inputs(2)
    alone_a, alone_b = step(model_a, a, x_a), step(model_b, b, x_b)
    with a.serve(x_a["txt"], x_a["pooled"], losses=True) as routing_a:
        with pytest.raises(ValueError):
            model_b(**x_b)
        with b.serve(x_b["txt"], x_b["pooled"], losses=True) as routing_b:
            out_b, out_a = model_b(**x_b), model_a(**x_a)
    assert torch.equal(out_a, alone_a[0]) and torch.equal(out_b, alone_b[0])
    assert total(routing_a) == total(alone_a[1]) and total(routing_b) == total(alone_b[1])


def test_equal_calls_are_equal():
    model, adapter = adapted()
    adapter.eval()
    first = step(model, adapter, inputs(1))
    other = step(model, adapter, inputs(2))
    again = step(model, adapter, inputs(1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert total(first[1]) == total(again[1])


def test_instruction_decides():
    """The same images under another instruction pass other councils."""
    model, adapter = adapted()
    adapter.eval()
    x, outputs = inputs(), []
    for seed in (1, 2):
        other = inputs(seed)
        with adapter.serve(other["txt"], other["pooled"]):
            outputs.append(model(**x))
    assert not torch.equal(*outputs)


def test_serve_ends_and_nests():
    model, adapter = adapted()
    adapter.eval()
    x, y = inputs(1), inputs(2)
    with pytest.raises(ValueError, match="serve"):
        model(**x)
    with adapter.serve(x["txt"], x["pooled"]):
        out = model(**x)
        with adapter.serve(y["txt"], y["pooled"]):
            model(**y)
        assert torch.equal(model(**x), out)              # the outer instruction is back
    with pytest.raises(ValueError, match="serve"):
        model(**x)
    with pytest.raises(KeyError), adapter.serve(x["txt"], x["pooled"]):
        raise KeyError
    with pytest.raises(ValueError, match="serve"):       # also after an error
        model(**x)


def test_scaling_the_loss_scales_every_gradient():
    model, adapter = adapted()
    adapter.eval()
    whole = {name: g.clone() for name, g in step(model, adapter, inputs())[2].items()}
    quarter = step(model, adapter, inputs(), scale=0.25)[2]                  # a power of two: exact
    assert same(quarter, {name: g / 4 for name, g in whole.items()})


def test_losses_reach_the_gradients():
    """Gradients are those of the flow loss plus both auxiliary losses: each one moves them."""
    x, found = inputs(), []
    for changes in ({}, {"balance_weight": 0.0}, {"orthogonality_weight": 0.0}):
        model, adapter = adapted(**changes)
        adapter.eval()
        found.append(step(model, adapter, x)[2])
    assert not torch.equal(found[0][f"{FIRST}.router.weight"], found[1][f"{FIRST}.router.weight"])
    assert not torch.equal(found[0][f"{FIRST}.experts_B"], found[2][f"{FIRST}.experts_B"])


def test_fp32_adapter_on_a_bf16_base():
    torch.manual_seed(0)
    model = dit.FluxTransformer(DIT).bfloat16()
    adapter = weights.new_adapter(model, SMALL)
    for name, p in adapter.tensors().items():
        assert p.dtype == torch.float32
        if name.endswith("_B"):
            nn.init.normal_(p, std=0.3)
    x = {name: t if name.endswith("ids") else t.bfloat16() for name, t in inputs().items()}
    out, routing, gradients = step(model, adapter, x)
    assert out.dtype == torch.bfloat16 and all(
        loss.dtype == torch.float32 for loss in (routing.balance, routing.orthogonality))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() and g.any()
               for g in gradients.values())
    adapter.eval()
    exact, wide_adapter = adapted()
    exact.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    wide_adapter.eval().instruction.load_state_dict(adapter.instruction.state_dict())
    x_wide = {name: t.float() for name, t in x.items()}
    with torch.no_grad(), adapter.serve(x["txt"], x["pooled"]):
        out = model(**x)
    with torch.no_grad(), wide_adapter.serve(x_wide["txt"], x_wide["pooled"]):
        wide = exact(**x_wide)
    low, high = map(routing_maps.last_weights, (adapter, wide_adapter))
    assert same(low, high)                               # routing is fp32 in both, bit for bit
    assert F.mse_loss(out.float(), wide).sqrt() < 0.03 * wide.std()          # bf16: 0.4 % a step


@pytest.mark.filterwarnings("ignore:Mismatch dtype")    # RMSNorm of bf16 by fp32 weights
def test_autocast_gives_the_gradients_of_fp32_within_its_rounding():
    """bf16 rounds to 0.4 % in every operation; after five blocks that is a few hundredths."""
    model, adapter = adapted()
    adapter.eval()                                       # no noise
    _, _, exact = step(model, adapter, inputs())
    adapter.zero_grad()
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16), adapter.serve(x["txt"], x["pooled"], True) as r:
        out = model(**x)
    (out.float().square().mean() + r.balance + r.orthogonality).backward()   # outside, as usual
    rounded = {name: p.grad for name, p in adapter.tensors().items()}
    assert out.dtype == torch.bfloat16 and {g.dtype for g in rounded.values()} == {torch.float32}
    errors = sum((rounded[name] - grad).square().sum() for name, grad in exact.items())
    assert errors <= 0.05 ** 2 * sum(grad.square().sum() for grad in exact.values())


@pytest.mark.parametrize("needed", [True, False])
def test_compiling_a_layer_changes_nothing(needed):
    """Traced by torch.compile, run by its eager backend: the same operations."""
    layer = mole_layer(4, 2)
    whole = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=needed)
    x = whole[:, 2:5]                                    # as a stream of the attention's tokens is
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        whole.grad = None
        routing = mole.Routing(torch.ones(2, 6, dtype=torch.float64), losses=True)
        layer.routings[:] = [routing]
        out = call(x)
        (out.square().mean() + routing.balance + routing.orthogonality).backward()
        results.append([out, layer.last_weights, routing.balance, routing.orthogonality,
                        layer.experts_A.grad, layer.experts_B.grad, layer.router.weight.grad,
                        *([whole.grad] if needed else [])])
    for plain, compiled in zip(*results):
        assert torch.allclose(plain, compiled, atol=1e-12, rtol=0)


def test_lora_alone_needs_no_instruction():
    model, adapter = adapted(mole_targets=())
    x = inputs()
    assert adapter.instruction is None and torch.isfinite(model(**x)).all()
    with adapter.serve(x["txt"], x["pooled"], losses=True) as routing:
        model(**x)
    assert routing.balance == routing.orthogonality == 0


def test_whole_size_count():
    """The published configuration on the released model, without its memory."""
    with torch.device("meta"):
        model = dit.FluxTransformer(
            dit.DiTConfig(64, 19, 38, 128, 24, 4096, 768, (16, 56, 56), True))
        adapter = weights.new_adapter(model, mole.AdapterConfig())
    count = {"lora": 0, "experts": 0, "router": 0, "instruction": 0}
    for name, p in adapter.tensors().items():
        count[next(kind for kind in count if kind in name)] += p.numel()
    assert count == {"lora": 747_913_216, "experts": 254_017_536, "router": 350_208,
                     "instruction": 17_904_384}
    trainable = {p for p in itertools.chain(model.parameters(), adapter.parameters())
                 if p.requires_grad}
    assert sum(p.numel() for p in trainable) == 1_020_185_344
