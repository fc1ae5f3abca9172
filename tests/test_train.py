"""train.py: the loss, gradients, optimizers, and a run on a folder."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dit
import sample
import train
from helpers import gradients, make_pipeline, run_train, samples
from support.pictures import to_tensor


@pytest.mark.parametrize("task", ["t2i", "move", "canny", "multi"])
def test_accumulation_is_the_gradient_of_the_sum(task):
    pipe, batches = make_pipeline(), [(3, samples(task)), (4, samples("recolour"))]
    single = []
    for batch in batches:
        train.accumulate(pipe, [batch], 0.7)
        single.append(gradients(pipe))
    losses = train.accumulate(pipe, batches, 0.7)
    both = gradients(pipe)
    assert losses["loss"] == pytest.approx(
        losses["flow"] + 0.7 * (losses["balance"] + losses["orthogonality"]), rel=1e-6)
    for name, gradient in both.items():                  # another order: fp32 rounding of two terms
        wanted = single[0].get(name, 0) + single[1].get(name, 0)
        assert torch.allclose(gradient, wanted, rtol=1e-5,
                              atol=1e-7 * float(wanted.norm()) + 1e-12), name


def test_compiled_blocks_train_alike():
    """Traced by torch.compile, run as traced: the same losses and gradients, noise included."""
    pipe, batch, graphs = make_pipeline(), [(3, samples("canny"))], []
    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward
    plain = train.accumulate(pipe, batch, 1.0), gradients(pipe)
    torch._dynamo.reset()
    for block in pipe.dit.blocks:
        block.compile(backend=counted, fullgraph=True)
    losses = train.accumulate(pipe, batch, 1.0, recompute=True)
    assert len(graphs) == 4                              # of 9 blocks, as first and last differ
    assert losses == pytest.approx(plain[0], rel=1e-6)
    for name, grad in gradients(pipe).items():           # fp32 sums in another order
        assert (grad - plain[1][name]).norm() <= 1e-5 * plain[1][name].norm(), name


def test_shift_moves_every_time_towards_noise(monkeypatch):
    """The model is told the shifted t, and given the mixture of that very t."""
    pipe, seen, velocity = make_pipeline(), [], sample.velocity
    def watch(model, xt, t, *rest):
        seen.append((t, xt))
        return velocity(model, xt, t, *rest)
    monkeypatch.setattr(train, "velocity", watch)
    for shift in (1.0, 6.0):
        train.flow_loss(pipe, samples("move", 8), 3, shift=shift)
    (plain, x), (shifted, y) = seen
    assert plain.min() < 0.3 and torch.allclose(shifted, 6 * plain / (1 + 5 * plain), atol=1e-6)
    x0 = dit.pack(pipe.vae.encode(to_tensor([s.target for s in samples("move", 8)])))
    noise = (y - (1 - shifted)[:, None, None] * x0) / shifted[:, None, None]
    mixed = (1 - plain)[:, None, None] * x0 + plain[:, None, None] * noise
    assert (x - mixed).abs().mean() < 0.3 * (x - y).abs().mean()             # up to the VAE's noise


def test_only_the_adapter_is_trained_and_in_fp32():
    pipe = make_pipeline()
    train.accumulate(pipe, [(1, samples("move"))], 1.0)
    names = pipe.adapter.tensors()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in names.values())
    trained = {id(p) for p in names.values()}
    frozen = [p for m in (pipe.dit, pipe.vae, pipe.t5, pipe.clip) for p in m.parameters()
              if id(p) not in trained]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_routers_have_their_own_rate():
    pipe = make_pipeline()
    optimizer, = train.make_optimizers(pipe.adapter, 1e-4, 5e-5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in pipe.adapter.tensors().items():
        assert rates[id(p)] == (5e-5 if name.endswith("router.weight") else 1e-4)
    assert len(rates) == len(pipe.adapter.tensors())


def test_the_auxiliary_factor_is_a_cosine_from_1_to_1e_minus_5():
    assert train.auxiliary_factor(0, 100) == 1
    assert train.auxiliary_factor(50, 100) == pytest.approx(0.500005)
    assert train.auxiliary_factor(100, 100) == pytest.approx(1e-5)


def test_dropped_conditions_lose_tokens_and_ids(monkeypatch):
    pipe, seen = make_pipeline(), []
    real = sample.velocity
    def watch(model, xt, t, guidance, given, h, w, run):
        seen.append((None if given.cond is None else given.cond.shape[1],
                     None if given.cond_ids is None else len(given.cond_ids)))
        return real(model, xt, t, guidance, given, h, w, run)
    monkeypatch.setattr(train, "velocity", watch)
    monkeypatch.setattr(train, "CONDITION_DROPOUT", 0.5)
    for seed in range(12):
        train.flow_loss(pipe, samples("multi", 1), seed)
    assert {count for count, _ in seen} == {None, 16, 32}                    # none, one, both left
    assert all(tokens == ids for tokens, ids in seen)


def test_instructions_are_dropped_with_their_chance(monkeypatch):
    pipe, seen = make_pipeline(), []
    real = sample.condition
    monkeypatch.setattr(train, "condition", lambda pipe, texts, *rest:
                        seen.append(texts) or real(pipe, texts, *rest))
    monkeypatch.setattr(train, "INSTRUCTION_DROPOUT", 0.5)
    for seed in range(12):
        train.flow_loss(pipe, samples("t2i"), seed)
    assert all(len(set(map(bool, texts))) == 1 for texts in seen)            # a whole batch or none
    assert 0 < sum(not texts[0] for texts in seen) < 12


@pytest.mark.usefixtures("short_by_default")
def test_training_on_a_folder(tmp_path, monkeypatch, capsys):
    for i in range(2):
        Image.fromarray(np.full((70, 50, 3), 100 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(
        {"target": "0.png", "instruction": "dark", "images": ["1.png"]}))
    code, _, err = run_train(monkeypatch, capsys, "--data", tmp_path, "--steps", 1, "--batch-size",
                             2, "--out", tmp_path / "run", "--recompute")
    assert code == 0, err
