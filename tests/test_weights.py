"""weights.py: whole checkpoints load unchanged and uncopied, others are refused by name."""
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dit
import text_encoder
import vae
import weights
from helpers import (assert_equal, described, KEYS, load, PARTS, raw_file, ROOT, SMALL_VAE,
                     tensors_of, write_shards, written)
from support.configs import config_from, read_json
from support.files import read_metadata, read_tensors, write_part


@pytest.mark.parametrize("part", PARTS)
def test_round_trip(tmp_path: Path, part: str) -> None:
    model = load(written(tmp_path, part), part)
    assert_equal(model, part)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())


def test_there_are_four_parts_and_no_other():
    assert weights.PARTS.keys() == PARTS.keys()
    for name, (_, config, model, _) in PARTS.items():
        assert weights.PARTS[name][:2] == (model, config)
    with pytest.raises(KeyError, match="unet"):
        weights.load("unet", "anywhere")


def test_an_edit_is_made_without_importing_the_compiler(tmp_path):
    """Which takes longer than a small edit; PyTorch would for first weights that nobody reads."""
    code = f"""
import sys
sys.argv += ["--instruction", "add a red star", "--steps", "1", "--out", "{tmp_path}/out.png"]
import sample
sample.main()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert (tmp_path / "out.png").is_file()


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_loaded_from_a_file_too_and_as_asked(tmp_path: Path, part: str) -> None:
    """Beside its config.json; in the type that is named, on the device that is named."""
    file = written(tmp_path, part) / "model.safetensors"
    assert_equal(weights.load(part, file), part)
    assert_equal(weights.load(part, str(tmp_path)), part)
    narrow = weights.load(part, file, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    away = weights.load(part, file, device="meta")
    assert {p.device.type for p in away.parameters()} == {"meta"}
    assert not away.training and not any(p.requires_grad for p in away.parameters())


@pytest.mark.parametrize("part", PARTS)
def test_round_trip_of_shards(tmp_path: Path, part: str) -> None:
    write_shards(tmp_path, part)
    assert_equal(load(tmp_path, part), part)


def test_other_dtypes(tmp_path: Path) -> None:
    write_part(tensors_of("vae"), SMALL_VAE, tmp_path, "model.safetensors", torch.bfloat16)
    model = weights.load("vae", tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}         # the file's
    assert {p.dtype for p in
            weights.load("vae", tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


@dataclass
class NoConfig:
    pass


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(50, 1_000_000))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory use from /proc")
def test_loading_on_the_cpu_copies_nothing(tmp_path: Path, monkeypatch) -> None:
    """A sparse file of 200 MB: a copy would cost as much, the map only the pages touched."""
    header = {"weight": {"dtype": "F32", "shape": [50, 1_000_000],
                         "data_offsets": [0, 200_000_000]}}
    with raw_file(tmp_path / "model.safetensors", header).open("r+b") as file:
        file.truncate(file.seek(0, 2) + 200_000_000)
    (tmp_path / "config.json").write_text("{}")
    before = resident_bytes()
    monkeypatch.setitem(weights.PARTS, "vae", weights.Part(lambda config: Wide(), NoConfig, dict))
    model = weights.load("vae", tmp_path)
    assert resident_bytes() - before < 20_000_000
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert model.weight.shape == (50, 1_000_000) and model.weight[49, -1] == 0


@pytest.mark.parametrize("part, config, model, tensors, parameters", [
    ("transformer", dit.DiTConfig, dit.FluxTransformer, 1160, 11_901_408_320),
    ("vae", vae.VAEConfig, vae.AutoEncoder, 244, 83_819_683),
    ("text_encoder", text_encoder.CLIPConfig, text_encoder.CLIPEncoder, 196, 123_060_480),
    ("text_encoder_2", text_encoder.T5Config, text_encoder.T5Encoder, 219, 4_762_310_656)])
def test_names_and_shapes_of_the_public_model(part: str, config: type, model: type, tensors: int,
                                              parameters: int) -> None:
    values = read_json(KEYS / f"config_{part}.json")
    with torch.device("meta"):
        state = model(config_from(config, values, part)).state_dict()
    assert {name: list(p.shape) for name, p in state.items()} == read_json(
        KEYS / f"{part}.json")
    assert len(state) == tensors and sum(p.numel() for p in state.values()) == parameters


# ---------------------------------------------------------------- what other tools write into files

@pytest.mark.parametrize("kept", [("shared.weight",), ("encoder.embed_tokens.weight",),
                                  ("shared.weight", "encoder.embed_tokens.weight")])
def test_t5_embedding_under_either_name(tmp_path: Path, kept: tuple) -> None:
    def change(tensors: dict) -> None:
        embedding = tensors.pop("shared.weight")
        tensors.update({name: embedding.clone() for name in kept})
    folder = written(tmp_path, "text_encoder_2", change)
    assert_equal(load(folder, "text_encoder_2"), "text_encoder_2")


def test_t5_without_an_embedding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing: shared\.weight"):
        load(written(tmp_path, "text_encoder_2", lambda tensors: tensors.pop("shared.weight")),
             "text_encoder_2")


def test_clip_with_more_than_the_text_encoder(tmp_path: Path) -> None:
    folder = written(tmp_path, "text_encoder")
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None],
            "text_projection.weight": torch.zeros(2, 2), "logit_scale": torch.tensor(4.6),
            "vision_model.post_layernorm.weight": torch.zeros(2),
            "visual_projection.weight": torch.zeros(2, 2)}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors")
    assert_equal(load(folder, "text_encoder"), "text_encoder")


def test_clip_without_prefix(tmp_path: Path) -> None:
    def change(tensors: dict) -> None:
        bare = {name.removeprefix("text_model."): t for name, t in tensors.items()}
        tensors.clear()
        tensors.update(bare)
    assert_equal(load(written(tmp_path, "text_encoder", change), "text_encoder"), "text_encoder")


# --------------------------------------------------------------------------- names, shapes, folders

@pytest.mark.parametrize("part, name", [
    ("vae", "decoder.up_blocks.0.resnets.1.conv2.bias"),
    ("transformer", "single_transformer_blocks.0.attn.norm_q.weight"),
    ("text_encoder", "text_model.final_layer_norm.bias"),
    ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")])
def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path, part: str,
                                                            name: str) -> None:
    shape = tuple(tensors_of(part)[name].shape)
    prefix = "text_model." if part == "text_encoder" else ""                 # added where absent
    changes = {f"1 missing: {name}": lambda t: t.pop(name),
               f"1 unexpected: {prefix}surplus": lambda t: t.update(surplus=torch.zeros(1)),
               f"1 of another shape: {name} (7, 3) instead of {shape}":
                   lambda t: t.update({name: torch.zeros(7, 3)}),
               f"1 of another shape: {name} {shape + (1,)} instead":
                   lambda t: t.update({name: t[name][..., None]})}
    for i, (message, change) in enumerate(changes.items()):
        folder = written(tmp_path / str(i), part, change)
        with pytest.raises(ValueError, match=re.escape(str(folder)) + ".*" + re.escape(message)):
            load(folder, part)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    def change(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith("encoder.mid_block.attentions")]:
            tensors["ema." + name] = tensors.pop(name)
        tensors["decoder.conv_in.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        load(written(tmp_path, "vae", change), "vae")
    for part in ("10 missing: encoder.mid_block", "10 unexpected: ema.", "and 7 more",
                 "(5,) instead of (16,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_tensors_that_are_no_floating_point_numbers_are_named(tmp_path: Path,
                                                              dtype: torch.dtype) -> None:
    folder = written(tmp_path, "vae")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.bias"):
        load(folder, "vae")


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "vae", "vae")
    with pytest.raises(FileNotFoundError, match="nowhere.*no such file"):
        load(tmp_path / "nowhere", "vae")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        load(folder, "vae")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="found 0 files"):
        load(folder, "vae")
    for read in (lambda file: read_tensors([file]), read_metadata,
                 read_json, described):
        with pytest.raises(FileNotFoundError, match="gone: no such file"):
            read(tmp_path / "gone")


def test_folder_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no FLUX Kontext folder"):
        described(tmp_path)[0]
