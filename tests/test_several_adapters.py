"""--adapter, several times and with strengths; numbers that are not finite."""
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mole
import sample
import weights
from helpers import MODEL, PICTURE, pixels, ROOT, run_sample, run_train
from sample import condition, denoise, generate, load_pipeline, Pipeline, seeded_noise
from support import adapters, export, offload, streaming
from support.commands import file_and_strength
from support.files import read_tensors, write_tensors
from support.fp8 import NarrowLinear, to_fp8, Widened

OURS = ROOT / "tiny/adapter.safetensors"
CPU = torch.device("cpu")
SHARED = ("transformer_blocks.1.ff.net.2", "single_transformer_blocks.0.proj_out",   # with experts
          "transformer_blocks.0.attn.to_q", "x_embedder", "norm_out.linear")         # LoRA, none


def shapes() -> dict[str, torch.Size]:
    file = MODEL / "transformer/diffusion_pytorch_model.safetensors"
    return {name: t.shape for name, t in load_file(file).items()}


def lora_file(file: Path, seed: int, rank: int, names: tuple[str, ...] = SHARED) -> Path:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in names:
        rows, columns = shapes()[f"{name}.weight"]
        tensors |= {f"transformer.{name}.lora_A.weight": torch.randn(rank, columns,
                                                                     generator=generator) * 0.2,
                    f"transformer.{name}.lora_B.weight": torch.randn(rows, rank,
                                                                     generator=generator) * 0.2,
                    f"transformer.{name}.alpha": torch.tensor(rank / 2)}
    save_file(tensors, file)
    return file


def added(pipe: Pipeline, files: list[tuple[Path, float]]) -> Pipeline:
    """The LoRAs added to the frozen weights by hand."""
    for file, strength in files:
        tensors = read_tensors([file])
        for name in {name.split(".lora_")[0] for name in tensors if ".lora_" in name}:
            A, B = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
            layer = pipe.dit.get_submodule(name.removeprefix("transformer."))
            layer = export.frozen(layer) if hasattr(layer, "base") else layer
            W = layer.weight.data
            if isinstance(layer, NarrowLinear):
                W, layer.__class__ = Widened.wide(W, layer.scale, torch.float32), nn.Linear
            layer.weight.data = W + strength * 0.5 * B @ A
    return pipe


def latents(pipe: Pipeline, way: str) -> Tensor:
    """After two steps, by merging or without, or with blocks that visit the device."""
    given = condition(pipe, ["make the circle blue"], [torch.ones(1, 3, 64, 64) / 3], [])
    noise = seeded_noise([3], (64, 64))
    within = (export.merged(pipe.dit, pipe.adapter, given.txt, given.pooled) if way == "merged"
              else pipe.adapter.serve(given.txt, given.pooled) if pipe.adapter else torch.no_grad())
    visit = streaming.stream if way == "streamed" else offload.on_device
    with torch.no_grad(), visit(pipe.dit, CPU) as run, within:
        *_, x = denoise(pipe, noise, given, 2, 2.5, run)
    return x


@pytest.mark.parametrize("way", ["merged", "served", "streamed", "fp8"])
@pytest.mark.parametrize("beside", [False, True])
def test_adapters_add_up(tmp_path: Path, way: str, beside: bool) -> None:
    """Two LoRAs, alone or beside experts: as on weights to which they were added; to rounding."""
    loras = [(lora_file(tmp_path / "a.safetensors", 1, 3), 0.5),
             (lora_file(tmp_path / "b.safetensors", 2, 5, SHARED[1:]), -1.5)]
    own = [(OURS, 0.75)] if beside else []
    pipe = load_pipeline(MODEL, None, "cpu", "float32")
    other = load_pipeline(MODEL, None, "cpu", "float32")
    if way == "fp8":
        to_fp8(pipe.dit)
        to_fp8(other.dit)
    pipe.adapter = weights.load_adapters(pipe.dit, [loras[0], *own, loras[1]])
    if beside:
        other.adapter = weights.load_adapters(other.dit, own)
    found, wanted = latents(pipe, way), latents(added(other, loras), "served")
    assert torch.allclose(found, wanted, atol=3e-4, rtol=1e-3)
    without = latents(load_pipeline(MODEL, own, "cpu", "float32"), "served")
    assert (without - wanted).abs().max() > 0.5
    kinds = [type(layer) for layer in pipe.adapter.layers.values()]
    assert (mole.MoLELinear in kinds) == beside and "norm_out/linear" in pipe.adapter.layers
    if not beside:                                       # one product for both, of their joint rank
        assert pipe.adapter.layers["x_embedder"].lora_A.shape[0] == 8
    merges = export.mergeable(pipe.adapter, 1, CPU)
    assert merges == (way != "fp8")


def test_a_strength_scales_what_an_adapter_adds_and_no_routing() -> None:
    whole, half = (weights.load_adapters(load_pipeline(MODEL, None).dit, [(OURS, s)])
                   for s in (1., .5))
    width = whole.instruction.proj_in.in_features, whole.instruction.proj_out.out_features
    txt, pooled = torch.randn(1, 4, width[0]), torch.randn(1, width[1])
    halved = export.as_lora(half, txt, pooled)
    for name, (A, B) in export.as_lora(whole, txt, pooled).items():
        assert torch.allclose(halved[name][1] @ halved[name][0], 0.5 * B @ A, atol=1e-6)
    assert all(torch.equal(p, half.tensors()[name]) for name, p in whole.tensors().items())


def test_what_is_exported_holds_all_of_them(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "a.safetensors", 1, 3)
    pipe = load_pipeline(MODEL, [(OURS, 1.0), (file, 2.0)], "cpu", "float32")
    text = sample.encode_text(pipe, ["make the circle blue"])
    export.write_instruction(pipe.adapter, *text, tmp_path / "all.safetensors")
    again = load_pipeline(MODEL, tmp_path / "all.safetensors", "cpu", "float32")
    assert torch.allclose(latents(again, "served"), latents(pipe, "served"), atol=3e-4, rtol=1e-3)


def test_two_with_experts_are_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    pipe = load_pipeline(MODEL, None)
    names = list(pipe.dit.state_dict())
    with pytest.raises(ValueError, match="adapter.safetensors and .* both have experts"):
        weights.load_adapters(pipe.dit, [(OURS, 1.0), (OURS, 0.5)])
    assert list(pipe.dit.state_dict()) == names


def test_the_command_takes_several_with_strengths(tmp_path: Path, monkeypatch, capsys) -> None:
    one = lora_file(tmp_path / "one.safetensors", 1, 3)
    two = lora_file(tmp_path / "two.safetensors", 2, 4)

    def picture(*chosen: str) -> bytes:
        out = tmp_path / "out.png"
        named = [word for text in chosen for word in ("--adapter", text)]
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "make the circle blue",
                                  "--image", PICTURE, "--steps", 2, "--out", out, *named)
        assert code == 0, err
        return pixels(out)
    both = picture(f"{one}:0.7", f"{two}")
    assert len({both, picture(one), picture(two), picture("none"), picture(one, two)}) == 5
    assert picture(f"{one}:0", two) == picture(two)
    assert picture(f"{OURS}:1.0") == picture()           # as the model's own is by default


@pytest.mark.parametrize("named, words", [
    (["none", OURS], "not together"), ([f"{OURS}:1e999"], "FILE:STRENGTH"),
    ([f"{OURS}:nan"], "FILE:STRENGTH"), ([f"{OURS}:0.8.1"], "FILE:STRENGTH"),
    ([f"{OURS}:strong"], "FILE:STRENGTH"), ([f"{OURS}:"], "FILE:STRENGTH"),
    ([f"{OURS}x:0.8"], "no such file"), ([OURS, OURS], "both have experts")])
def test_adapters_that_cannot_be(tmp_path: Path, monkeypatch, capsys, named: list,
                                 words: str) -> None:
    options = [word for text in named for word in ("--adapter", text)]
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--out",
                              tmp_path / "a.png", *options)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_colon_may_belong_to_the_name(tmp_path: Path) -> None:
    file = tmp_path / "step:10"
    assert file_and_strength(str(file)) == (tmp_path / "step", 10.0)
    file.touch()
    assert file_and_strength(str(file)) == (file, 1.0)
    assert file_and_strength(f"{file}:.5") == (file, 0.5)
    assert file_and_strength("C:\\models\\a.safetensors") == (Path("C:\\models\\a.safetensors"), 1)


# ------------------------------------------------------------------------------ given twice, NaN

def test_an_option_that_holds_one_value_may_be_given_once(tmp_path: Path, monkeypatch,
                                                          capsys) -> None:
    for run, options in ((run_sample, ["--instruction", "a", "--seed", 1, "--seed", 1]),
                         (run_sample, ["--instruction", "a", "--instruction", "b"]),
                         (run_train, ["--data", "tiny", "--data", "tiny"]),
                         (run_train, ["--data", "tiny", "--method", "lora", "--adapter", "lora"])):
        code, _, err = run(monkeypatch, capsys, *options)
        assert code == 2 and "given twice" in err and str(options[-2]) in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["ours", "another's"])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path, value: float,
                                                  form: str) -> None:
    file = lora_file(tmp_path / "a.safetensors", 1, 3)
    if form == "ours":
        pipe = load_pipeline(MODEL, OURS)
        adapters.write(pipe.adapter, file)
    metadata = adapters.read_metadata(file)
    tensors = read_tensors([file])
    name = [name for name in tensors if "lora_B" in name][1]
    tensors[name] = tensors[name].clone()
    tensors[name][2, 1] = value
    write_tensors(tensors, tmp_path / "bad.safetensors", **metadata)
    with pytest.raises(ValueError, match="bad.safetensors: .*lora_B holds numbers.*not finite"):
        load_pipeline(MODEL, tmp_path / "bad.safetensors")


@pytest.mark.parametrize("part, told", [("dit", "the transformer"), ("vae", "the autoencoder")])
def test_a_picture_is_not_made_of_numbers_that_are_not_finite(part: str, told: str) -> None:
    pipe = load_pipeline(MODEL, None, "cpu", "float32")
    last = pipe.dit.proj_out if part == "dit" else pipe.vae.decoder.conv_out
    last.bias.data = torch.full_like(last.bias, float("nan"))
    given = condition(pipe, ["a"], [], [])
    with pytest.raises(ValueError, match=f"{told} gives numbers that are not finite"):
        generate(pipe, given, seeded_noise([0], (64, 64)), steps=1)
    last.bias.data = torch.zeros_like(last.bias)
    assert np.isfinite(generate(pipe, given, seeded_noise([0], (64, 64)), steps=1)[0]).all()
