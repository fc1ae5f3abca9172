"""An instruction's mixture as a plain LoRA: merged into the weights, or written to a file."""
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import dit
import mole
import sample
import weights
from helpers import expert_use, MODEL, PICTURE, ROOT, run_sample
from sample import condition, Conditioning, generate, load_pipeline, Pipeline, seeded_noise
from support import devices, export, targets
from support.files import read_metadata, read_tensors
from support.fp8 import to_fp8
from support.pictures import to_tensor
from tiny import world

SMALL = dict(lora_rank=4, lora_alpha=2, experts=5, top_k=2, rank=3, alpha=6, resampler=False)


def pipeline(dtype: str = "float32", **changes: object) -> Pipeline:
    """The embedded model with an adapter whose weights are all random."""
    pipe = load_pipeline(MODEL, None, "cpu", dtype)
    torch.manual_seed(3)
    pipe.adapter = weights.new_adapter(pipe.dit, mole.AdapterConfig(**SMALL | changes)).eval()
    for name, p in pipe.adapter.tensors().items():
        torch.nn.init.normal_(p, std=0.5 if "router" in name else 0.05)
    return pipe


def given(pipe: Pipeline, number: int = 1) -> Conditioning:
    tests = world.tiny_test("move", number)
    return condition(pipe, [s.instruction for s in tests], data.stack(s.images for s in tests), [])


def merged(pipe: Pipeline, inputs: Conditioning):
    return export.merged(pipe.dit, pipe.adapter, inputs.txt, inputs.pooled)


def mergeable(pipe: Pipeline, inputs: Conditioning) -> bool:
    return export.mergeable(pipe.adapter, len(inputs.pooled), pipe.device)


def served(pipe: Pipeline, inputs: Conditioning, noise: torch.Tensor, steps: int) -> np.ndarray:
    """generate() in rank space, without merging."""
    with torch.no_grad(), pipe.adapter.serve(inputs.txt, inputs.pooled):
        *_, latents = sample.denoise(pipe, noise, inputs, steps, 2.5)
        img = pipe.vae.decode(latents)
    return ((img.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def without(pipe: Pipeline, inputs: Conditioning, noise: torch.Tensor, steps: int) -> np.ndarray:
    """generate() with the adapter taken off for once."""
    layers = {name.replace("/", "."): layer for name, layer in pipe.adapter.layers.items()}
    for name, layer in layers.items():
        pipe.dit.set_submodule(name, layer.base)
    pictures, _ = generate(replace(pipe, adapter=None), inputs, noise, steps)
    for name, layer in layers.items():
        pipe.dit.set_submodule(name, layer)
    return pictures


@pytest.mark.parametrize("changes", [
    {}, {"top_k": 5}, {"top_k": 1}, {"routing": "soft"}, {"mole_targets": ()}, {"lora_targets": ()},
    {"resampler": True, "resampler_width": 32, "resampler_heads": 2, "resampler_head_dim": 8}])
def test_merged_is_the_same_picture_and_leaves_no_trace(changes):
    pipe = pipeline(**changes)
    base = {name: p.clone() for name, p in pipe.dit.state_dict().items()}
    modules = dict(pipe.dit.named_modules())
    inputs, noise = given(pipe), seeded_noise([1], (64, 64))
    pictures, chosen = generate(pipe, inputs, noise, steps=4)
    assert mergeable(pipe, inputs)
    wanted = served(pipe, inputs, noise, steps=4)
    assert np.abs(pictures.astype(int) - wanted).max() <= 1 and wanted.std() > 5
    assert len(chosen) == sum(isinstance(m, mole.MoLELinear) for m in modules.values())
    assert dict(pipe.dit.named_modules()) == modules
    assert all(torch.equal(p, base[name]) for name, p in pipe.dit.state_dict().items())
    bare = without(pipe, inputs, noise, steps=4)
    assert np.abs(bare.astype(int) - wanted).max() > 3   # the adapter is seen


def test_sampling_merges(monkeypatch):
    pipe = pipeline()
    inputs, noise = given(pipe), seeded_noise([1], (64, 64))
    wanted, _ = generate(pipe, inputs, noise, steps=1)
    for kind in (mole.LoRALinear, mole.MoLELinear):      # no adapted layer is called
        monkeypatch.setattr(kind, "forward", None)
    assert np.array_equal(generate(pipe, inputs, noise, steps=1)[0], wanted)


def test_fp8_is_served_in_rank_space():
    pipe = pipeline()
    to_fp8(next(iter(pipe.adapter.layers.values())).base)
    assert not mergeable(pipe, given(pipe))


def test_weights_come_back_when_something_fails():
    pipe = pipeline()
    base = {name: p.clone() for name, p in pipe.dit.state_dict().items()}
    layers = list(pipe.adapter.layers.values())
    with pytest.raises(KeyboardInterrupt):
        with merged(pipe, given(pipe)):
            assert not any(torch.equal(layer.base.weight, base[f"{name.replace('/', '.')}"
                                                               ".base.weight"])
                           for name, layer in pipe.adapter.layers.items())
            assert not any(isinstance(m, (mole.LoRALinear, mole.MoLELinear))
                           for m in pipe.dit.modules())
            raise KeyboardInterrupt
    assert all(torch.equal(p, base[name]) for name, p in pipe.dit.state_dict().items())
    assert sum(isinstance(m, (mole.LoRALinear, mole.MoLELinear))
               for m in pipe.dit.modules()) == len(layers)


def test_bf16_weights_stay_bf16_and_come_back():
    pipe = pipeline("bfloat16")
    base = {name: p.clone() for name, p in pipe.dit.state_dict().items() if "base" in name}
    with merged(pipe, given(pipe)):
        assert all(layer.base.weight.dtype == torch.bfloat16
                   for layer in pipe.adapter.layers.values())
    assert base and all(torch.equal(pipe.dit.state_dict()[name], p) for name, p in base.items())


@pytest.mark.parametrize("changes", [{"routing": "token"}, {"routing": "race"},
                                     {"routing": "choice"},
                                     {"token_targets": ("transformer_blocks.1.ff.net.2",)}])
def test_tokens_have_no_council_and_are_served_in_rank_space(changes):
    pipe = pipeline(**changes)
    inputs, noise = given(pipe), seeded_noise([1], (64, 64))
    with pytest.raises(ValueError, match="one instruction"):
        with merged(pipe, inputs):
            pass
    assert not mergeable(pipe, inputs)
    assert np.array_equal(generate(pipe, inputs, noise, steps=2)[0],
                          served(pipe, inputs, noise, steps=2))


def test_tokens_have_no_use_of_experts_to_draw():
    one = "transformer_blocks.1.ff.net.2"
    use = expert_use(pipeline(token_targets=(one,)), ["a star"])
    assert use and one not in use
    assert not expert_use(pipeline(routing="token"), ["a star"])


def test_several_instructions_have_no_common_council():
    pipe = pipeline()
    inputs = given(pipe, 2)
    assert not mergeable(pipe, inputs)
    with pytest.raises(ValueError, match="one instruction"), merged(pipe, inputs):
        pass


def test_memory_decides(monkeypatch):
    pipe = pipeline()
    size = sum(layer.base.weight.nbytes for layer in pipe.adapter.layers.values())
    monkeypatch.setattr(devices, "memory", lambda device: 2 * size)
    assert not mergeable(pipe, given(pipe))
    monkeypatch.setattr(devices, "memory", lambda device: 2 * size + 2)
    assert mergeable(pipe, given(pipe))


def test_diffusers_makes_the_same_picture_from_the_exported_file(tmp_path, monkeypatch, capsys):
    """Ten instructions, fp32, the same noise: within 1/255 (rounding of 8-bit values)."""
    from diffusers import FluxKontextPipeline
    warnings.filterwarnings("ignore")
    pipe = load_pipeline(MODEL, ROOT / "tiny/adapter.safetensors", "cpu", "float32")
    peer = FluxKontextPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    file, far = tmp_path / "council.safetensors", 0
    for i, task in enumerate((*world.BASE_TASKS, "t2i", "move", "recolour")):
        test, noise = world.tiny_test(task, i + 1)[i], seeded_noise([i], (64, 64))
        code, printed, err = run_sample(monkeypatch, capsys, "--instruction", test.instruction,
                                        "--export-lora", file)
        assert code == 0 and str(file) in printed and "experts" in printed, err
        inputs = condition(pipe, [test.instruction], [to_tensor([p]) for p in test.images], [])
        assert file.stat().st_mode & 0o044 == 0o044      # others may read it
        ours = generate(pipe, inputs, noise, steps=3)[0][0]
        peer.load_lora_weights(file)
        file.unlink()
        theirs = peer(image=Image.fromarray(test.images[0]) if test.images else None,
                      prompt=test.instruction, height=64, width=64, max_area=64 * 64,
                      _auto_resize=False, latents=dit.pack(noise), num_inference_steps=3,
                      guidance_scale=2.5, output_type="np",
                      max_sequence_length=pipe.t5_tokens.length).images[0]
        peer.unload_lora_weights()
        assert np.abs(ours / 255 - theirs).max() <= 1 / 255 + 1e-6, test.instruction
        far = max(far, np.abs(without(pipe, inputs, noise, 3)[0].astype(int) - ours).max())
    assert far > 9                                       # the adapter is seen
    assert not list(tmp_path.iterdir())


def test_an_exported_file_is_read_back_without_a_note(tmp_path, capsys):
    """It says that its alpha is its rank; the same file without that word gets a note."""
    pipe = pipeline()
    file = tmp_path / "a.safetensors"
    inputs, model = given(pipe), load_pipeline(MODEL, None).dit
    export.write_lora(export.as_lora(pipe.adapter, inputs.txt, inputs.pooled), file)
    weights.saved_adapter(model, file, 1.0)
    assert not capsys.readouterr().err
    save_file(load_file(file), file)
    weights.saved_adapter(model, file, 1.0)
    assert "no alpha is said" in capsys.readouterr().err


def test_exported_names_and_ranks_at_the_real_depth(tmp_path):
    """57 blocks, the paper's adapter, a narrow model: names, ranks and nothing but them."""
    config = dit.DiTConfig(num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4),
                           joint_attention_dim=12, pooled_projection_dim=10, in_channels=8,
                           num_layers=19, num_single_layers=38)
    model = dit.FluxTransformer(config)
    sizes = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapter = weights.new_adapter(model, mole.AdapterConfig()).eval()
    txt, pooled = torch.randn(1, 3, 12), torch.randn(1, 10)
    export.write_lora(export.as_lora(adapter, txt, pooled), tmp_path / "real.safetensors")
    stored = read_tensors([tmp_path / "real.safetensors"])
    assert read_metadata(tmp_path / "real.safetensors") == {"alpha": "rank"}
    real = json.loads((Path(__file__).parent / "keys/transformer.json").read_text())
    names = {name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in stored}
    assert len(stored) == 2 * len(names) == 2 * len(adapter.layers)
    assert all(f"{name}.weight" in real for name in names)
    for name in names:
        A, B = (stored[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        rank = 4 * 32 if targets.matches(name, *adapter.config.mole_targets) else 256
        assert A.shape == (rank, sizes[name].in_features)
        assert B.shape == (sizes[name].out_features, rank)
        assert A.dtype == B.dtype == torch.float32


def test_export_alone_makes_no_picture_and_with_out_makes_one(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "a.safetensors", tmp_path / "a.png"
    arguments = ("--instruction", "a red star", "--export-lora", file, "--steps", 1)
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run_sample(monkeypatch, capsys, *arguments)
    assert code == 0 and len(printed.splitlines()) == 1 and not list(tmp_path.glob("*.png"))
    kept = file.read_bytes()
    code, _, err = run_sample(monkeypatch, capsys, *arguments)
    assert code == 2 and str(file) in err and file.read_bytes() == kept
    file.unlink()
    code, printed, _ = run_sample(monkeypatch, capsys, *arguments, "--image", PICTURE, "--out", out)
    assert code == 0 and len(printed.splitlines()) == 2 and out.is_file()


@pytest.mark.parametrize("arguments, words", [
    (["--adapter", "none"], "needs an adapter; name one"),
    (["--export-lora", "gone/a.safetensors"], "gone"),
    (["--export-lora", "a.png"], ".safetensors")])
def test_exports_that_cannot_be(tmp_path, monkeypatch, capsys, arguments, words):
    if "--export-lora" not in arguments:
        arguments = [*arguments, "--export-lora", tmp_path / "a.safetensors"]
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--export-lora", "--routing", "--route-by"])
def test_without_an_adapter_nothing_is_read(tmp_path, monkeypatch, capsys, option):
    """Beside a model that has none, too."""
    (tmp_path / "model").symlink_to(MODEL.resolve())
    monkeypatch.setattr(sample, "load_pipeline", None)
    value = "a" if option == "--route-by" else tmp_path / (
        "a.png" if option == "--routing" else "a.safetensors")
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", option, value,
                              "--model", tmp_path / "model")
    assert code == 2 and err == f"error: {option}: needs an adapter; name one with --adapter\n"
