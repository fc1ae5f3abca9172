"""Products in 8 bits, against the products written out; kept and widened: test_memory.py."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dit
from helpers import MODEL
from sample import condition, generate, load_pipeline, seeded_noise
from support import fp8
from support.pictures import to_tensor
from tiny import world

E4M3 = torch.float8_e4m3fn


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row to e4m3 by a scale of its own, and back."""
    scale = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scale).to(E4M3).float() * scale


def layer_of(kind: str) -> nn.Linear:
    """A layer as a bf16 file has it, or an fp8 file with one scale, or with one for each row."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    if kind != "bf16":
        scale = torch.tensor(0.01) if kind == "one" else torch.rand(48) + 0.5
        layer.weight.data = (100 * layer.weight.data.float()).to(E4M3)
        fp8.narrow(layer, scale)
    return layer


@pytest.mark.parametrize("kind", ["bf16", "one", "rows"])
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 64)])
def test_the_product_written_out(kind, shape):
    layer, x = layer_of(kind), torch.randn(shape, dtype=torch.bfloat16)
    stored = layer.weight.data
    W = rounded(stored) if kind == "bf16" else stored.float() * layer.scale.float()
    fp8.multiply(layer)
    assert layer.weight.dtype == E4M3
    assert kind == "bf16" or layer.weight.data_ptr() == stored.data_ptr()    # taken as it is
    wanted = rounded(x.flatten(0, -2)) @ W.T + layer.bias.float()
    found = layer(x)
    assert found.dtype == torch.bfloat16 and found.shape == (*shape[:-1], 48)
    error = (found.flatten(0, -2).float() - wanted).norm() / wanted.norm()
    assert error < 2 ** -8                               # bf16 rounds the product and the sum
    exact = F.linear(x.float(), W, layer.bias.float()).flatten(0, -2)
    assert (wanted - exact).norm() / exact.norm() > 4 * error    # rounding x to 8 bits is not that


@pytest.mark.parametrize("kind", ["bf16", "rows"])
def test_backward_multiplies_by_the_widened_weight(kind):
    layer = layer_of(kind)
    fp8.multiply(layer)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    layer(x).backward(grad)
    wanted = grad.float() @ (layer.weight.float() * layer.scale)
    assert (x.grad - wanted).norm() < 2 ** -7 * wanted.norm()    # bf16 rounds weight and product


def test_tokens_alone_are_multiplied_so():
    """Not a modulation's one vector, nor a layer whose sides the device cannot take."""
    model = dit.FluxTransformer(dit.DiTConfig(16, 1, 1, 16, 2, 8, 8, (4, 6, 6)))
    model.transformer_blocks[0].attn.to_q = nn.Linear(32, 24)
    fp8.multiply_in_fp8(model)
    kinds = {name: isinstance(layer, fp8.MultipliedLinear)
             for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert kinds["transformer_blocks.0.ff.net.2"] and kinds["single_transformer_blocks.0.proj_out"]
    left = {name.partition("blocks.0.")[2] for name, done in kinds.items() if not done}
    assert left == {"norm1.linear", "norm1_context.linear", "norm.linear", "attn.to_q", ""}
    assert not any(done for name, done in kinds.items() if "blocks" not in name)


def test_pictures_stay_what_they_are():
    """Within 40 dB of fp32 on the embedded model, where bf16 is within 50; and not the same."""
    pictures, sample = [], world.tiny_test("recolour", 1)[0]
    for narrow in (False, True):
        pipe = load_pipeline(MODEL, None, "cpu", "float32")
        if narrow:
            fp8.multiply_in_fp8(pipe.dit)
        given = condition(pipe, [sample.instruction], [to_tensor(sample.images)], [])
        made, _ = generate(pipe, given, seeded_noise([0], (64, 64)), steps=8)
        pictures.append(made.astype(float))
    error = np.square(pictures[0] - pictures[1]).mean()
    assert 0 < error < 255 ** 2 / 10 ** 4


@pytest.mark.parametrize("device, able", [("cpu", None), ("mps", None), ("cuda", (8, 6)),
                                          ("cuda", (8, 9)), ("cuda", (9, 0))])
def test_a_device_that_does_not_multiply_in_8_bits_is_refused(device, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    if able and able >= (8, 9):
        fp8.check_products(torch.device(device))
    else:
        with pytest.raises(ValueError, match=f"--matmul fp8: {device} .* 8.9"):
            fp8.check_products(torch.device(device))
