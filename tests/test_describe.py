"""support/describe.py on adapters: rank, alpha, experts, scale, and which model each kind fits.

What it says of models is tested beside their layouts (test_layouts.py).
"""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dit
import mole
import weights
from helpers import described, DIT, ROOT, SMALL
from support import adapters, research
from support.files import read_metadata, read_tensors

OURS = ROOT / "tiny/adapter.safetensors"
QKV = "double_blocks.3.img_attn.qkv"
TO_K = "transformer_blocks.1.attn.to_k"


def pair(A: str, B: str, rank: int, wide: int = 3072, out: int = 3072) -> dict[str, Tensor]:
    return {A: torch.ones(rank, wide), B: torch.ones(out, rank)}


def kohya(folder: Path) -> Path:
    stem = f"lora_unet_{QKV.replace('.', '_')}"
    save_file(pair(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", 4, out=9216)
              | {f"{stem}.alpha": torch.tensor(2.)}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def diffusers(folder: Path) -> Path:
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True}
    save_file(pair(f"transformer.{TO_K}.lora_A.weight", f"transformer.{TO_K}.lora_B.weight", 4),
              folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(
                  {f"transformer.{name}": value for name, value in settings.items()})})
    return folder


def bfl(folder: Path) -> Path:
    save_file(pair(f"diffusion_model.{QKV}.lora_A.weight", f"diffusion_model.{QKV}.lora_B.weight",
                   16, out=9216) | pair("diffusion_model.single_blocks.0.linear2.lora_A.weight",
                                        "diffusion_model.single_blocks.0.linear2.lora_B.weight", 8,
                                        wide=15360), folder / "lora.safetensors")
    return folder / "lora.safetensors"


def xlabs(folder: Path) -> Path:
    stem = "single_blocks.31.processor.qkv_lora"
    save_file(pair(f"{stem}.down.weight", f"{stem}.up.weight", 2, out=9216),
              folder / "lora.safetensors")
    return folder / "lora.safetensors"


def peft(folder: Path) -> Path:
    stem = f"base_model.model.{TO_K}"
    save_file(pair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", 2),
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5}))
    return folder


LORAS = {"kohya": (kohya, "3 layers: rank 4, alpha 2, scale 0.5"),
         "diffusers, rank-stabilised": (diffusers, "1 layer: rank 4, alpha 8, scale 4"),
         "BFL": (bfl, "4 layers: rank 8 to 16, alpha 8 to 16, scale 1"),
         "XLabs": (xlabs, "3 layers: rank 2, alpha 2, scale 1"),
         "PEFT": (peft, "1 layer: rank 2, alpha 5, scale 2.5")}


@pytest.mark.parametrize("kind", LORAS)
def test_what_a_lora_is_is_said(tmp_path: Path, kind: str) -> None:
    write, told = LORAS[kind]
    path = write(tmp_path)
    lines = described(path)[0].splitlines()
    assert lines[0].startswith(f"{path}: an adapter that is a LoRA, ") and len(lines) == 4
    assert lines[1] == f"LoRA on {told}"
    assert lines[2] == "fits FLUX.1-Kontext-dev (width 3072)"
    assert lines[3] == ("python sample.py --instruction TEXT --model FLUX.1-Kontext-dev "
                        f"--adapter {path}")


def test_an_adapter_that_lacks_a_tensor_is_not_whole(tmp_path: Path) -> None:
    """Then no command is named that would refuse it."""
    tensors = read_tensors([OURS])
    del tensors["instruction.latents"]
    save_file(tensors, tmp_path / "a.safetensors", read_metadata(OURS))
    told, whole = described(tmp_path / "a.safetensors")
    assert not whole and told.endswith(f"{tmp_path}/a.safetensors: not whole")
    assert "1 missing: instruction.latents" in told and "python" not in told


def test_a_checkpoint_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="what train.py --resume goes on from; .*adapter.safetens"):
        described(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("form", ["file", "run", "research"])
def test_what_an_adapter_with_experts_is_is_said(tmp_path: Path, form: str) -> None:
    """By its file, the folder of its run, and the paper's own form."""
    path, run = OURS, tmp_path / "run"
    if form == "run":
        run.mkdir()
        (run / "adapter.safetensors").symlink_to(OURS)
        path = run
    elif form == "research":
        research.write(*adapters.read(OURS), OURS, run)
        path = run
    c, _ = adapters.read(OURS)
    mixtures = sum(name.endswith("experts_A") for name in read_tensors([OURS]))
    lines = described(path)[0].splitlines()
    whose = "of the research code" if form == "research" else "of train.py's"
    assert lines[0].startswith(f"{path}: an adapter {whose}, ")
    assert lines[1].startswith("LoRA on ") and lines[1].endswith(
        f"rank {c['lora_rank']}, alpha {c['lora_alpha']:g}, scale "
        f"{c['lora_alpha'] / c['lora_rank']:g}")
    assert lines[2] == (f"{c['experts']} experts on {mixtures} layers, {c['top_k']} kept: rank "
                        f"{c['rank']}, alpha {c['alpha']:g}, scale {c['alpha'] / c['rank']:g}, "
                        "routed by instruction")
    assert lines[3] == "fits the embedded model (width 128)"
    assert lines[4].endswith(f"--adapter {path}")


@pytest.mark.parametrize("targets, routed", [
    (("single_transformer_blocks.1.proj_out",), "instruction, 1 of them by token"),
    (SMALL.mole_targets, "token")])
def test_layers_routed_by_tokens_are_counted(tmp_path: Path, targets, routed) -> None:
    c = replace(SMALL, token_targets=targets)
    adapter = weights.new_adapter(dit.FluxTransformer(DIT), c)
    adapters.write(adapter, tmp_path / "a.safetensors")
    line = described(tmp_path / "a.safetensors")[0].splitlines()[2]
    assert line == f"4 experts on 5 layers, 2 kept: rank 2, alpha 4, scale 2, routed by {routed}"


def test_what_fits_no_model_is_said_of_the_nearest(tmp_path: Path) -> None:
    """Not of the first layer, which may be the model's; and of the instruction's width too."""
    good = {f"transformer.transformer_blocks.{i}.attn.to_q": (3072, 3072) for i in range(3)}
    bad = {"transformer.x_embedder": (384, 3072),        # FLUX.1-Fill's
           "transformer.transformer_blocks.19.attn.to_q": (3072, 3072)}
    tensors = {}
    for name, (wide, out) in (good | bad).items():
        tensors |= pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight", 2, wide, out)
    save_file(tensors, tmp_path / "a.safetensors")
    line = described(tmp_path / "a.safetensors")[0].splitlines()[2]
    assert line.startswith("fits neither FLUX.1-Kontext-dev (width 3072) nor the embedded model "
                           "(width 128): of its 5 layers 2 are not FLUX.1-Kontext-dev's: ")
    assert "transformer_blocks.19.attn.to_q is 3072 to 3072, there is none" in line
    assert "x_embedder is 384 to 3072, there 64 to 3072" in line
    config, tensors = adapters.read(OURS)
    tensors["instruction.proj_in.weight"] = torch.ones(4, 77)
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "b.safetensors",
              {"adapter": json.dumps({"config": config})})
    line = described(tmp_path / "b.safetensors")[0].splitlines()[3]
    assert "1 are not the embedded model's: the instruction vector is 77 to " in line


def test_a_small_adapter_names_three_of_its_layers(tmp_path: Path) -> None:
    adapters.write(weights.new_adapter(dit.FluxTransformer(DIT), mole.AdapterConfig(
        lora_rank=2, rank=2, resampler_width=4)), tmp_path / "a.safetensors")
    line = described(tmp_path / "a.safetensors")[0].splitlines()[3]
    assert line.startswith("fits neither ") and line.count(", there ") == 3 and line.endswith("...")


# ----------------------------------------------------------------------------------- folders

def test_a_folders_only_file_is_its_adapter_whatever_its_name(tmp_path: Path, capsys) -> None:
    file = kohya(tmp_path).rename(tmp_path / "my_lora.safetensors")
    config, tensors = adapters.read(tmp_path)
    assert config["lora_rank"] == 4 and len(tensors) == 6
    err = capsys.readouterr().err.splitlines()           # its alpha is said: nothing else is told
    assert err == [f"note: {file}: taken as the adapter of {tmp_path}, which holds no other "
                   ".safetensors file"]
    lines = described(tmp_path)[0].splitlines()
    assert lines[1] == "LoRA on 3 layers: rank 4, alpha 2, scale 0.5"
    assert len(capsys.readouterr().err.splitlines()) == 1
    file.with_name("other.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 .safetensors files \(my_lora.*other.*name one"):
        adapters.read(tmp_path)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: is no adapter"):
        adapters.read(ROOT / "tiny/model/vae")
    assert not capsys.readouterr().err                   # no word of what is not taken
    file.rename(tmp_path / "adapter.safetensors")        # then it is the one
    assert adapters.read(tmp_path)[0]["lora_rank"] == 4 and not capsys.readouterr().err


def test_a_models_folder_is_no_adapter_because_it_holds_one_file(tmp_path: Path) -> None:
    """As the released one does beside its parts, here a pointer; nor is the folder of a part."""
    for part in (ROOT / "tiny/model").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "ae.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{tmp_path}: whole" in described(tmp_path)[0]
    assert "vae, Hugging Face" in described(ROOT / "tiny/model/vae")[0]
