"""Matrices cast once for a block, against a cast at each use."""

import pytest
import torch

import train
from helpers import gradients, make_pipeline, samples
from support.casts import cast_once, casting

BF16 = torch.bfloat16


def narrow_pipeline(kind: str = "instructmole"):
    pipe = make_pipeline(kind)
    pipe.dtype = BF16
    for part in (pipe.dit, pipe.vae, pipe.t5, pipe.clip):
        for p in part.parameters():
            p.data = p.data.to(BF16)
    for p in pipe.adapter.tensors().values():            # they lie in the model, and stay fp32
        p.data = p.data.float()
    return pipe


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind, task", [("instructmole", "move"), ("token", "canny"),
                                        ("lora", "multi")])
def test_gradients_are_those_of_a_cast_at_each_call(kind, task, recompute, monkeypatch):
    """To rounding: where a matrix serves two streams, their gradients are added in bf16."""
    pipe, batch = narrow_pipeline(kind), [(3, samples(task)), (4, samples("recolour"))]
    losses, names = train.accumulate(pipe, batch, 1.0, recompute), list(pipe.adapter.tensors())
    found = gradients(pipe)
    monkeypatch.setattr(train, "casting", lambda dtype, run: run)
    assert losses == train.accumulate(pipe, batch, 1.0, recompute)
    assert list(pipe.adapter.tensors()) == names
    for name, wanted in gradients(pipe).items():
        assert found[name].dtype == torch.float32
        assert (found[name] - wanted).norm() <= 2 ** -7 * wanted.norm(), name


def test_one_cast_serves_a_block_and_ends_with_it():
    pipe = narrow_pipeline()
    own, seen = pipe.adapter.tensors(), []
    for block in pipe.dit.blocks:
        layers = [layer for layer in block.modules() if hasattr(layer, "lora_A")
                  or hasattr(layer, "experts_A")]
        with pytest.raises(RuntimeError, match="in the midst"):
            with cast_once(block, BF16):
                copies = [getattr(layer, name) for layer in layers
                          for name in ("lora_A", "lora_B", "experts_A") if hasattr(layer, name)]
                assert len(copies) > 2 and {copy.dtype for copy in copies} == {BF16}
                assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
                assert all(layer.experts_B.dtype == torch.float32 for layer in layers
                           if hasattr(layer, "experts_B"))
                raise RuntimeError("in the midst")
        assert all(not vars(layer).keys() & {"lora_A", "lora_B", "experts_A"} for layer in layers)
        seen += layers
    again = pipe.adapter.tensors()
    assert list(again) == list(own) and all(again[name] is p for name, p in own.items())
    assert len(seen) >= len(pipe.adapter.layers) - 2     # all but those before the blocks


def test_what_runs_within_sees_the_copies_and_its_result_comes_back():
    pipe = narrow_pipeline()
    block = pipe.dit.blocks[0]
    layer = block.ff.net[2]
    run = casting(BF16, lambda block, *args: (layer.experts_A.dtype, args))
    assert run(block, 1, 2) == (BF16, (1, 2)) and layer.experts_A.dtype == torch.float32
    assert casting(BF16)(torch.nn.Identity(), 3) == 3    # a block without adapted layers


def test_nothing_is_cast_where_types_agree():
    pipe = make_pipeline()
    with cast_once(pipe.dit.blocks[0], torch.float32):
        assert pipe.adapter.tensors().keys() == make_pipeline().adapter.tensors().keys()
