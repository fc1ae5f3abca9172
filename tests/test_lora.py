"""support/lora.py: other tools' LoRA files, by the names that each gives, and their strength."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dit
from helpers import DIT, KEYS, load_adapter
from support import adapters, lora
from support.configs import config_from, read_json


def layers_of_the_released_model() -> list[str]:
    with torch.device("meta"):
        model = dit.FluxTransformer(config_from(
            dit.DiTConfig, read_json(KEYS / "config_transformer.json"), "config"))
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


FOLDER = layers_of_the_released_model()
ORIGINAL = [name.removesuffix(".weight") for name, shape in
            read_json(KEYS / "transformer_bfl.json").items()
            if len(shape) == 2 and name.endswith(".weight")]
PEFT = ".lora_{A|B}.weight"
KOHYA = ".lora_{down|up}.weight"
TRAINERS = {  # layout, before a layer's name, between its parts, after it
    "kohya's scripts": (ORIGINAL, "lora_unet_", "_", KOHYA),
    "OneTrainer": (FOLDER, "lora_transformer_", "_", KOHYA),
    "ai-toolkit, SimpleTuner, diffusers": (FOLDER, "transformer.", ".", PEFT),
    "ai-toolkit for ComfyUI": (ORIGINAL, "diffusion_model.", ".", PEFT),
    "LyCORIS": (FOLDER, "lycoris_", "_", KOHYA),
    "LyCORIS on the original": (ORIGINAL, "lycoris_", "_", KOHYA),
    "PEFT": (FOLDER, "base_model.model.", ".", PEFT),
    "PEFT with an adapter's name": (FOLDER, "base_model.model.", ".", ".lora_{A|B}.mine.weight"),
    "PEFT on the original": (ORIGINAL, "base_model.model.", ".", PEFT),
    "PEFT on a pipeline's part": (FOLDER, "base_model.model.transformer.", ".", PEFT),
    "PEFT, compiled": (FOLDER, "transformer._orig_mod.", ".", ".lora_{A|B}.default.weight"),
    "no prefix": (FOLDER, "", ".", PEFT), "no prefix, original": (ORIGINAL, "", ".", PEFT),
    "checkpoint": (ORIGINAL, "model.diffusion_model.", ".", KOHYA),
    "diffusers 0.2x": (FOLDER, "transformer.", ".", ".lora.{down|up}.weight"),
    "diffusers 0.1x": (FOLDER, "unet.", ".", ".lora_linear_layer.{down|up}.weight"),
    "underscores": (FOLDER, "transformer_", "_", "_lora.{down|up}.weight")}


def pair(stem: str, after: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    before, _, rest = after.partition("{")
    (first, second), _, end = rest.partition("}")[0].split("|"), "", rest.partition("}")[2]
    return {f"{stem}{before}{first}{end}": A, f"{stem}{before}{second}{end}": B}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_layer_is_found_under_every_trainers_name(tmp_path: Path, trainer: str) -> None:
    """Of the released model; each with its own factors, so that none takes another's."""
    layout, before, between, after = TRAINERS[trainer]
    tensors = {}
    for i, name in enumerate(layout):
        stem = before + name.replace(".", between)
        tensors |= pair(stem, after, torch.full((1, 1), i), torch.full((1, 1), -i))
        tensors[f"{stem}.alpha"] = torch.tensor(float(i))
    save_file(tensors, tmp_path / "lora.safetensors")
    found, _, prefix = lora.layers_in(tmp_path / "lora.safetensors")
    assert sorted(found) == sorted(layout) and not prefix
    for i, name in enumerate(layout):
        assert [found[name][kind].item() for kind in ("A", "B", "alpha")] == [i, -i, i]


@pytest.mark.parametrize("prefix, other", [("student.", "student."), ("generator_", "generator_"),
                                           ("pipe.dit.", "pipe."), ("my-net.module_", "my-net.")])
@pytest.mark.parametrize("layout, between", [(FOLDER, "."), (FOLDER, "_"), (ORIGINAL, "."),
                                             (ORIGINAL, "_")])
def test_any_prefix_that_all_names_share_is_cut_off_with_a_word(
        tmp_path: Path, capsys, prefix: str, other: str, layout: list[str], between: str) -> None:
    """Be it all layers, or one; beside what is for text encoders. other: what is not usual."""
    for names in (layout, layout[-1:], layout[9:10]):
        tensors = {"text_encoder.a.lora_A.weight": torch.ones(1, 1)}
        for i, name in enumerate(names):
            stem = prefix + name.replace(".", between)
            tensors |= pair(stem, PEFT, torch.full((1, 1), i), torch.full((1, 1), -i))
        save_file(tensors, tmp_path / "lora.safetensors")
        found, left_out, cut = lora.layers_in(tmp_path / "lora.safetensors")
        assert {name: layer["A"].item() for name, layer in found.items()} == {
            name: i for i, name in enumerate(names)}
        assert cut == other and len(left_out) == 1
    stem = prefix + "transformer_blocks.0.attn.to_q".replace(".", between)
    save_file(pair(stem, PEFT, torch.ones(1, 4), torch.ones(4, 1)), tmp_path / "lora.safetensors")
    lora.read(tmp_path / "lora.safetensors")
    assert f"all names begin with {other}, which is taken for" in capsys.readouterr().err


@pytest.mark.parametrize("name", [
    "controlnet.transformer_blocks.0.attn.to_q", "transformer_blocks.0.other.proj_out",
    "single_blocks.0.final_layer.linear", "lora_unet_mid_block_attentions_0_proj_out",
    "student.nowhere.to_q", "vae.proj_out"])
def test_not_every_prefix_is_the_transformers(tmp_path: Path, name: str) -> None:
    save_file(pair(name, PEFT, torch.ones(1, 4), torch.ones(4, 1)), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"{name}.lora_A.weight is no part of a LoRA for this"):
        lora.read(tmp_path / "lora.safetensors")


def test_two_prefixes_are_not_both_the_transformers(tmp_path: Path) -> None:
    """As of a student and its teacher in one file: neither is guessed."""
    tensors = {}
    for prefix in ("student", "teacher"):
        tensors |= pair(f"{prefix}.transformer_blocks.0.attn.to_q", PEFT, torch.ones(1, 4),
                        torch.ones(4, 1))
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is no part of a LoRA for this transformer"):
        lora.read(tmp_path / "lora.safetensors")


def test_the_first_diffusers_loras_of_attention_are_found(tmp_path: Path) -> None:
    """By processors, where to_out.0 is to_out."""
    names = [name for name in FOLDER if ".attn." in name]
    tensors = {}
    for name in names:
        block, layer = name.split(".attn.")
        stem = f"transformer.{block}.attn.processor.{layer.removesuffix('.0')}"
        tensors |= pair(stem, "_lora.{down|up}.weight", torch.ones(1, 1), torch.ones(1, 1))
    save_file(tensors, tmp_path / "lora.safetensors")
    assert sorted(lora.layers_in(tmp_path / "lora.safetensors")[0]) == sorted(names)


def test_diffusers_reads_xlabs_names_alike(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
    generator, tensors = torch.Generator().manual_seed(4), {}
    for block, layers in (("double_blocks.5", ("qkv_lora1", "qkv_lora2", "proj_lora1",
                                               "proj_lora2")),
                          ("single_blocks.31", ("qkv_lora", "proj_lora"))):
        for layer in layers:
            A = torch.randn(2, 7 + len(layer), generator=generator)
            B = torch.randn(12 if "qkv" in layer else 4, 2, generator=generator)
            tensors |= pair(f"{block}.processor.{layer}", ".{down|up}.weight", A, B)
    save_file(tensors, tmp_path / "lora.safetensors")
    _, ours = lora.read(tmp_path / "lora.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    wanted = {name.removeprefix("transformer.").removesuffix(".weight"): t
              for name, t in theirs.items()}
    assert ours.keys() == wanted.keys() and len(ours) == 24
    assert all(torch.equal(ours[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("name", [
    "lora_unet_down_blocks_0_attentions_0_proj_in", "transformer.transformer_blocks.0.attn.to_z",
    "controlnet.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.proj_out",
    "diffusion_model.linear2", "diffusion_model.double_blocks.0.linear1", "x_embedder.inner",
    "single_blocks.0.final_layer.linear", "transformer_blocks.0.other.proj_out"])
def test_what_the_model_has_not_is_no_layer(name: str) -> None:
    assert lora.layer_named(name) is None


# ----------------------------------------------------------------------------- beside the LoRA

A, B = torch.ones(2, 16) / 4, torch.ones(16, 2)
LAYER = "transformer_blocks.1.attn.to_k"


def written(file: Path, more: dict[str, Tensor] | None = None, **metadata: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    stem = f"base_model.model.{LAYER}"
    save_file({f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B} | (more or {}), file,
              metadata)
    return file


@pytest.mark.parametrize("stem", ["lora_te_text_model_encoder_layers_0_mlp_fc1",
                                  "lora_te2_encoder_block_3_layer_0_SelfAttention_k", "lora_te3_a",
                                  "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
                                  "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo",
                                  "text_encoders.clip_l.transformer.text_model.encoder.layers.0",
                                  "base_model.model.text_model.encoder.layers.0.mlp.fc1",
                                  "bundle_emb.word"])
def test_text_encoders_parts_are_left_out_with_a_word(tmp_path: Path, capsys, stem: str) -> None:
    file = written(tmp_path / "a.safetensors", {f"{stem}.lora_down.weight": torch.ones(1, 3),
                                                f"{stem}.lora_up.weight": torch.ones(3, 1)})
    config, tensors = lora.read(file)
    assert config["lora_targets"] == [f".{LAYER}"] and len(tensors) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and f"{file}: 2 tensors for text encoders ({stem}" in said[0]


def test_one_of_several_processes_speaks(tmp_path: Path, capsys, monkeypatch) -> None:
    written(tmp_path / "other.safetensors", {})          # a name that is nobody's, and no alpha
    for rank, notes in (("0", 2), ("1", 0)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        adapters.read(tmp_path)
        assert capsys.readouterr().err.count("note: ") == notes


def test_text_encoders_alone_are_refused(tmp_path: Path) -> None:
    save_file({"lora_te1_a.lora_down.weight": torch.ones(1, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no tensors for the transformer"):
        lora.read(tmp_path / "a.safetensors")


def test_a_layer_that_the_model_has_is_not_said_to_be_none(tmp_path: Path) -> None:
    """Whole weights beside the factors, as PEFT's modules_to_save and control LoRAs have them."""
    for name in ("base_model.model.proj_out.weight",
                 "double_blocks.0.img_attn.norm.key_norm.scale"):
        with pytest.raises(ValueError, match=f"{name} is neither a factor of a LoRA nor its alpha"):
            lora.read(written(tmp_path / "a.safetensors", {name: torch.ones(2)}))


@pytest.mark.parametrize("name, kind", [
    (f"transformer.{LAYER}.lora_magnitude_vector", "DoRA"),
    ("lora_unet_img_in.dora_scale", "DoRA"), ("lycoris_x_embedder.lokr_w1", "LoKr"),
    ("lora_unet_img_in.hada_w1_a", "LoHa"), (f"transformer.{LAYER}.lora_B.bias", "biases"),
    ("diffusion_model.img_in.diff", "whole layers"), ("lora_unet_img_in.lora_mid.weight", "LoCon"),
    ("lora_unet_img_in.oft_blocks", "OFT")])
def test_what_is_more_than_a_lora_is_named(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{name} shows .*{kind}.*only plain LoRA"):
        lora.read(written(tmp_path / "a.safetensors", {name: torch.ones(1, 2)}))


def test_changes_that_are_none_are_passed(tmp_path: Path) -> None:
    """ComfyUI's merges have zeros where a bias or a norm might have changed."""
    name = f"diffusion_model.{ORIGINAL[0]}"
    factors = {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(3, 1)}
    plain, zeros = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(factors, plain)
    save_file(factors | {f"{name}.diff_b": torch.zeros(3)}, zeros)
    assert torch.equal(*(next(iter(lora.read(file)[1].values())) for file in (plain, zeros)))
    save_file(factors | {f"{name}.diff_b": torch.ones(3)}, zeros)
    with pytest.raises(ValueError, match="diff_b shows changed biases"):
        lora.read(zeros)


# ------------------------------------------------------------------------------------- strength

def peft(folder: Path, **settings: object) -> Path:
    written(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": False, "use_dora": False,
         "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"} | settings))
    return folder


@pytest.mark.parametrize("settings, wanted", [
    ({}, 4), ({"lora_alpha": 3}, 1.5), ({"use_rslora": True}, 8 / 2 ** 0.5),
    ({"alpha_pattern": {"to_k": 5}}, 2.5), ({"alpha_pattern": {"to_q": 5}}, 4),
    ({"alpha_pattern": {r"^transformer_blocks\.1\.attn\.to_[kv]": 5}, "rank_pattern": None}, 2.5),
    ({"r": 16, "rank_pattern": {"attn.to_k": 2}}, 4), ({"init_lora_weights": "gaussian"}, 4)])
def test_pefts_folder_and_file_have_the_strength_of_its_settings(
        tmp_path: Path, capsys, settings: dict, wanted: float) -> None:
    folder = peft(tmp_path / "peft", **settings)
    for path in (folder, folder / "adapter_model.safetensors"):
        adapter = load_adapter(dit.FluxTransformer(DIT).requires_grad_(False), path)
        layer = adapter.layers[LAYER.replace(".", "/")]
        assert torch.allclose(layer.scale * layer.lora_B @ layer.lora_A, wanted * B @ A)
    assert not capsys.readouterr().err                   # nothing had to be assumed


@pytest.mark.parametrize("settings, words", [
    ({"use_dora": True}, "DoRA"), ({"peft_type": "LOHA"}, "LOHA"), ({"r": 4}, "rank 2.*say 4"),
    ({"lora_alpha": "much"}, "no number"), ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"init_lora_weights": "olora"}, "model's own weights")])
def test_peft_settings_that_say_more_than_a_lora_are_refused(tmp_path: Path, settings: dict,
                                                             words: str) -> None:
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{words}"):
        load_adapter(dit.FluxTransformer(DIT), peft(tmp_path / "peft", **settings))


def test_a_folder_of_diffusers_is_read_and_one_of_pickles_is_named(tmp_path: Path) -> None:
    told = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 1})
    file = written(tmp_path / "pytorch_lora_weights.safetensors", lora_adapter_metadata=told)
    adapter = load_adapter(dit.FluxTransformer(DIT), tmp_path)
    assert torch.equal(adapter.layers[LAYER.replace(".", "/")].lora_B, B / 2)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no adapter.*adapter_model.bin is not read"):
        load_adapter(dit.FluxTransformer(DIT), tmp_path)


def test_a_strength_that_is_assumed_is_said(tmp_path: Path, capsys) -> None:
    _, tensors = lora.read(written(tmp_path / "a.safetensors"))
    assert torch.equal(tensors[f"{LAYER}.lora_B"], B)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "a.safetensors: no alpha is said for 1 of 1 layers" in err[0]
    lora.read(written(tmp_path / "b.safetensors",
                      {f"base_model.model.{LAYER}.alpha": torch.ones(())}))
    assert not capsys.readouterr().err


def test_what_stands_in_the_file_counts_before_what_stands_beside_it(tmp_path: Path) -> None:
    folder = peft(tmp_path / "peft")
    told = json.dumps({"transformer.lora_alpha": 6, "transformer.r": 2})
    _, tensors = lora.read(written(folder / "b.safetensors", lora_adapter_metadata=told))
    assert torch.equal(tensors[f"{LAYER}.lora_B"], 3 * B)
    _, tensors = lora.read(written(folder / "c.safetensors", lora_adapter_metadata=told, more={
        f"base_model.model.{LAYER}.alpha": torch.tensor(5.)}))
    assert torch.equal(tensors[f"{LAYER}.lora_B"], 2.5 * B)
