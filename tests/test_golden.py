"""Our model and adapter against numbers that the paper's own code produced on a tiny random model.

The file holds four builds of the adapter: all layers routed by the instruction (igr), all by tokens
(token), some of each (mixed), and by the pooled vector alone (pooled). Equal tensors are stored
once; the metadata's `aliases` maps the other names to the stored ones.

Tolerances: both sides are fp32, summed in different orders; outputs (of size 1) agree to some 1e-6,
gradients to some 1e-6 of their norm. 1e-5 and 1e-4 leave room for other processors; a wrong formula
misses them by orders of magnitude. Gradients are compared by norm: single entries may be near zero.
"""
import pytest
import torch

import dit
import mole
from helpers import build_config, BUILDS, CASES, forward, golden, golden_part, our_names
from weights import new_adapter

pytestmark = pytest.mark.usefixtures("research_frequencies")


def build(name: str) -> tuple[dit.FluxTransformer, mole.Adapter]:
    """Model and adapter with the golden weights: every tensor of the file is used, none missing."""
    theirs = golden_part(f"{name}.w.")
    model_config, config = build_config(theirs)
    model = dit.FluxTransformer(model_config)
    adapter = new_adapter(model, config)
    weights = our_names(theirs)
    instruction = {name.removeprefix("instruction."): weights.pop(name)
                   for name in list(weights) if name.startswith("instruction.")}
    model.load_state_dict(weights)
    if adapter.instruction is not None:
        adapter.instruction.load_state_dict(instruction)
    else:
        assert not instruction
    return model, adapter.eval()                         # eval: no router noise, no dropout


def test_configurations_are_the_four_builds():
    token = {name: build_config(golden_part(f"{name}.w."))[1].token_targets for name in BUILDS}
    assert not token["igr"] and not token["pooled"] and len(token["token"]) == 5
    assert set(token["mixed"]) == {"transformer_blocks.1.ff.net.2",
                                   "single_transformer_blocks.0.proj_out",
                                   "single_transformer_blocks.2.proj_out"}


@pytest.mark.parametrize("name", BUILDS)
def test_outputs(name):
    model, adapter = build(name)
    x = golden_part("in.")
    with torch.no_grad(), adapter.serve(x["txt"], x["pooled"]):
        for case in CASES:
            out = forward(model, case)
            wanted = golden()[0][f"{name}.{case}.out"]
            assert out.shape == wanted.shape
            assert (out - wanted).abs().max() <= 1e-5, case


@pytest.mark.parametrize("name", BUILDS)
def test_loss_and_gradients(name):
    model, adapter = build(name)
    x = golden_part("in.")
    with adapter.serve(x["txt"], x["pooled"], losses=True) as routing:
        loss = (forward(model, "both") - x["v"]).square().mean()
    assert abs(loss.item() - golden()[0][f"{name}.both.loss"].item()) <= 1e-5
    (loss + routing.balance + routing.orthogonality).backward()

    wanted, trained = our_names(golden_part(f"{name}.both.grad.")), adapter.tensors()
    assert wanted.keys() == trained.keys()
    for parameter, theirs in wanted.items():
        ours = trained[parameter].grad
        ours = torch.zeros_like(theirs) if ours is None else ours            # None: not in graph
        if not theirs.any():
            assert not ours.any(), parameter
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), parameter
    assert not any(p.grad is not None for n, p in model.named_parameters()   # the base stays frozen
                   if n not in trained)


def test_resampler_gets_no_gradient_when_tokens_route():
    resampler = golden_part("token.both.grad.condition_type_embedder.")
    assert resampler and not any(grad.any() for grad in resampler.values())


def test_orthogonality_loss_of_given_outputs():
    Y = golden()[0]["orth.in"]                           # (E, N, out): the experts' outputs
    E, N, _ = Y.shape
    H = torch.eye(N).repeat(1, E)                        # with r = N and this H, H_e B_e is Y_e
    assert abs(mole.orthogonality_loss(H, Y.flatten(0, 1), E) - golden()[0]["orth.out"]) <= 1e-6


def test_gate():
    gate = golden_part("gate.")
    p, w, kept = mole.route(gate["in"] @ gate["weight"].T, top_k=2)
    assert torch.equal(kept.sum(-1), torch.full((len(w),), 2.0))
    assert (w.gather(-1, gate["idx"]) - gate["w"]).abs().max() <= 1e-6       # the kept, unchanged
    assert (w.sum(-1) - gate["w"].sum(-1)).abs().max() <= 1e-6               # and nothing else
    assert abs(0.1 * mole.balance_loss(p, kept) - gate["aux"]) <= 1e-6       # weight 0.1
