"""Public layouts, fp8, other tools' LoRA files, and what `python weights.py PATH` says of them.

Every layout gives the model that the folder gives: by name at whole size, and in values. keys/
holds the names and shapes of the published files, and which of the original's tensors is which of
the folder's (rows in widths).
"""
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn, Tensor

import dit
import text_encoder
import vae
import weights
from helpers import described, KEYS, load_adapter
from sample import load_pipeline
from support import adapters, layouts, lora
from support.configs import config_from
from support.files import read_tensors, write_part
from support.fp8 import NarrowLinear, to_fp8, Widened
from support.layouts import model_paths, only_size

KINDS = {"F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16, "BF16": torch.bfloat16,
         "F32": torch.float32}
DIT = dict(in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
           num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16,
           axes_dims_rope=[16, 56, 56], guidance_embeds=True)
VAE = dict(block_out_channels=[32, 64, 128, 128], layers_per_block=2, latent_channels=16,
           norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159)
CLIP = dict(vocab_size=20, hidden_size=128, intermediate_size=160, num_hidden_layers=2,
            num_attention_heads=2)
T5 = dict(vocab_size=20, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
PARTS = {"transformer": (DIT, dit.DiTConfig, dit.FluxTransformer,
                         partial(weights.load, "transformer")),
         "vae": (VAE, vae.VAEConfig, vae.AutoEncoder, partial(weights.load, "vae")),
         "text_encoder": (CLIP, text_encoder.CLIPConfig, text_encoder.CLIPEncoder,
                          partial(weights.load, "text_encoder")),
         "text_encoder_2": (T5, text_encoder.T5Config, text_encoder.T5Encoder,
                            partial(weights.load, "text_encoder_2"))}


def assert_same(part: str, found: nn.Module, wanted: nn.Module) -> None:
    """Equal weights; outputs to 1e-6: slices lie elsewhere in memory, where some CPUs' products
    add in another order."""
    tensors = found.state_dict()
    assert all(torch.equal(t, tensors[name]) for name, t in wanted.state_dict().items())
    assert (run(part, found) - run(part, wanted)).abs().max() <= 1e-6


def keys(name: str) -> dict:
    return json.loads((KEYS / f"{name}.json").read_text())


def meta(shapes: dict[str, list], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors without values; a shape may begin with its type."""
    found = {}
    for name, shape in shapes.items():
        kind = KINDS[shape[0]] if shape and isinstance(shape[0], str) else dtype
        found[name] = torch.empty([n for n in shape if not isinstance(n, str)], dtype=kind,
                                  device="meta")
    return found


def tensors_of(part: str) -> dict[str, Tensor]:
    config, kind, model, _ = PARTS[part]
    torch.manual_seed(0)
    return model(config_from(kind, config, part)).state_dict()


def original(part: str) -> dict[str, Tensor]:
    """A small part's tensors in the layout that its authors published."""
    ours, found = tensors_of(part), {}
    if part == "transformer":
        width, fused = DIT["attention_head_dim"] * DIT["num_attention_heads"], {}
        for name, source in keys("map_transformer_bfl").items():
            t = ours[name]
            if source.get("op"):                         # (scale, shift) here, (shift, scale) there
                t = torch.cat([t[width:], t[:width]])
            fused.setdefault(source["bfl"], []).append((source.get("rows", [0])[0], t))
        for name, parts in fused.items():
            found[name] = torch.cat([t for _, t in sorted(parts, key=lambda pair: pair[0])])
    if part == "vae":
        for name, source in keys("map_vae_bfl").items():
            t = ours[name]
            flat = ".attentions." in name and t.dim() == 2
            found[source] = t[..., None, None] if flat else t
    return {name: t.clone() for name, t in found.items()} or ours


def run(part: str, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        if part == "transformer":
            return model(torch.randn(1, 4, 64), torch.randn(1, 3, 24), torch.randn(1, 16),
                         torch.tensor([.3]), torch.tensor([2.5]), dit.position_ids(4, 4))
        if part == "vae":
            return model.decode(model.encode(torch.rand(1, 3, 32, 32)))
        return model(torch.randint(2, 20, (2, 7)))


def from_folder(part: str, folder: Path) -> nn.Module:
    write_part(tensors_of(part), PARTS[part][0], folder, "model.safetensors",
                         torch.float32)
    return PARTS[part][3](folder)


def in_fp8(tensors: dict[str, Tensor], scaled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In ComfyUI's fp8 form; and what its values are."""
    narrow, wide = {}, {}
    for name, t in tensors.items():
        matrix = t.dim() == 2 and name.endswith(".weight") and "embed" not in name and (
            "shared" not in name and "bias" not in name)
        scale = t.abs().max() / 448 if scaled and matrix else torch.ones(())
        if matrix or not scaled:
            narrow[name] = (t / scale).to(torch.float8_e4m3fn)
            wide[name] = narrow[name].float() * scale
        else:
            narrow[name] = wide[name] = t
        if scaled and matrix:
            stem = name.removesuffix("weight")
            narrow |= {f"{stem}scale_weight": scale, f"{stem}scale_input": torch.ones(())}
    return narrow | ({"scaled_fp8": torch.zeros(0)} if scaled else {}), wide


@pytest.mark.parametrize("part, layout", [
    ("transformer", "transformer_bfl"), ("vae", "vae_bfl"),
    ("transformer", "transformer_fp8_scaled"), ("text_encoder_2", "text_encoder_2_fp8_scaled")])
def test_whole_size_names_and_shapes(part, layout):
    found = layouts.to_folder(part, meta(keys(layout)))
    scales = {name for name in found if name.endswith(".scale_weight")}
    assert {name: list(t.shape) for name, t in found.items() if name not in scales} == keys(part)
    narrow = {name for name, t in found.items() if t.dtype == torch.float8_e4m3fn}
    assert {name.replace(".scale_weight", ".weight") for name in scales} == narrow
    assert bool(narrow) == ("fp8" in layout)
    settings = json.loads((KEYS / f"config_{part}.json").read_text())
    implied = weights.PARTS[part].implied
    shapes = {name: t.shape for name, t in found.items() if name not in scales}
    kind = PARTS[part][1]
    assert (config_from(kind, implied(shapes), "file")
            == config_from(kind, settings, "folder"))


def test_whole_size_clip_is_implied():
    shapes = {name: torch.Size(shape) for name, shape in keys("text_encoder").items()}
    implied = config_from(text_encoder.CLIPConfig, weights.implied_clip(shapes), "")
    assert implied == config_from(text_encoder.CLIPConfig, keys("config_text_encoder"), "")


@pytest.mark.parametrize("part", PARTS)
def test_a_file_gives_what_the_folder_gives(tmp_path, part):
    save_file(original(part), tmp_path / "one.safetensors")
    wanted = from_folder(part, tmp_path / "folder")
    assert_same(part, PARTS[part][3](tmp_path / "one.safetensors"), wanted)


def test_slices_of_fused_tensors_are_views():
    fused = {"double_blocks.0.img_attn.qkv.weight": torch.randn(12, 4),
             "single_blocks.0.linear1.weight": torch.randn(28, 4)}
    found = layouts.to_folder("transformer", fused)
    assert len(found) == 7
    for t in found.values():
        assert any(t.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                   for whole in fused.values())


def test_one_file_may_hold_all_parts(tmp_path):
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae.",
                "text_encoder": "text_encoders.clip_l.transformer.",
                "text_encoder_2": "text_encoders.t5xxl.transformer."}
    save_file({prefixes[part] + name: t for part in PARTS for name, t in original(part).items()},
              tmp_path / "all.safetensors")
    for part in PARTS:
        wanted = from_folder(part, tmp_path / part)
        assert_same(part, PARTS[part][3](tmp_path / "all.safetensors"), wanted)


def test_clip_and_t5_as_other_tools_write_them(tmp_path):
    clip = {name.removeprefix("text_model."): t for name, t in tensors_of("text_encoder").items()}
    clip |= {"embeddings.position_ids": torch.arange(77), "logit_scale": torch.ones(()),
             "text_projection.weight": torch.randn(3, 3), "vision_model.a.weight": torch.ones(2)}
    t5 = tensors_of("text_encoder_2")
    both = t5 | {"encoder.embed_tokens.weight": t5["shared.weight"].clone()}
    alone = {name.replace("shared.", "encoder.embed_tokens."): t for name, t in t5.items()}
    for part, tensors in (("text_encoder", clip), ("text_encoder_2", both),
                          ("text_encoder_2", alone)):
        save_file(tensors, tmp_path / "one.safetensors")
        wanted = run(part, from_folder(part, tmp_path / part))
        assert torch.equal(run(part, PARTS[part][3](tmp_path / "one.safetensors")), wanted)


@pytest.mark.parametrize("part", PARTS)
def test_another_parts_file_is_refused(tmp_path, part):
    other = "vae" if part != "vae" else "text_encoder_2"
    save_file(original(other), tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=f"one.safetensors: holds no whole {part} "):
        PARTS[part][3](tmp_path / "one.safetensors")


def test_fused_tensors_that_cannot_be_split_are_named(tmp_path):
    tensors = original("transformer")
    tensors["double_blocks.0.img_attn.qkv.weight"] = torch.randn(7, 256)
    tensors["single_blocks.0.linear1.bias"] = torch.zeros(())
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="of another shape: .*attn.to_q.weight"):
        weights.load("transformer", tmp_path / "one.safetensors")


QUANTISED = {"bitsandbytes": "single_blocks.1.linear1.weight.quant_state.bitsandbytes__nf4",
             "nunchaku": "transformer_blocks.0.qkv_proj.wscales", "GPTQ": "layer.qzeros",
             "quanto": "proj_out.weight._data", "MLX": "double_blocks.0.img_mlp.2.scales",
             "nvfp4": "double_blocks.0.img_mlp.2.weight_scale_2",
             "in blocks": "encoder.block.0.layer.1.wo.weight_scale_inv"}


@pytest.mark.parametrize("whose", QUANTISED)
def test_quantisations_are_named(tmp_path, whose):
    file = tmp_path / "flux.safetensors"
    save_file({"img_in.weight": torch.zeros(4, 2), QUANTISED[whose]: torch.zeros(3)}, file)
    for read in (partial(weights.load, "transformer"), model_paths,
                 described):
        with pytest.raises(ValueError, match=f"flux.safetensors: is quantised by .*{whose}"):
            read(file)


def test_a_quantised_files_own_factors_are_no_lora(tmp_path):
    """Those of SVDQuant are called so; the file is named as what it is, as an adapter too."""
    file, block = tmp_path / "svdq-fp4_r32-flux.1-kontext-dev.safetensors", "transformer_blocks.0"
    save_file({f"{block}.mlp_fc1.lora_down": torch.zeros(4, 2), f"{block}.mlp_fc1.wscales":
               torch.zeros(3), f"{block}.mlp_fc1.qweight": torch.zeros(3, dtype=torch.int8),
               f"{block}.mlp_fc1.lora_up": torch.zeros(4, 2)}, file)
    for read in (described, adapters.read):
        with pytest.raises(ValueError, match="is quantised by nunchaku .SVDQuant."):
            read(file)


def thin(number: int = 0) -> dict[str, Tensor]:
    """The original's weights by name, whole in their rows, with one column: the peers fix 3,072."""
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn([shape[0], 1][:len(shape)], generator=generator)
            for name, shape in keys("transformer_bfl").items()}


def test_diffusers_reads_the_original_transformer_alike():
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
    ours = layouts.to_folder("transformer", thin())
    theirs = convert_flux_transformer_checkpoint_to_diffusers(thin())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())


def test_diffusers_reads_the_original_autoencoder_alike():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    ours = layouts.to_folder("vae", original("vae"))
    theirs = convert_ldm_vae_checkpoint(original("vae"), {
        "down_block_types": [""] * 4, "up_block_types": [""] * 4})
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())


def test_parts_may_lie_elsewhere(tmp_path):
    tiny = Path(weights.__file__).parent / "tiny/model"
    paths = model_paths(tiny)
    file = tmp_path / "vae.safetensors"
    file.write_bytes((paths["vae"] / "diffusion_pytorch_model.safetensors").read_bytes())
    assert model_paths(tiny, vae=file) == model_paths(tiny, vae=str(file)) == paths | {"vae": file}
    with pytest.raises(TypeError, match="unexpected keyword argument 't5'"):
        model_paths(tiny, t5=file)
    with pytest.raises(ValueError, match="--tokenizers .*: holds no tokenizer. and tokenizer_2."):
        model_paths(tiny, tokenizers=tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    assert model_paths(tiny, tokenizers=tmp_path)["tokenizer"] == tmp_path / "tokenizer"


def test_a_folders_own_file_has_the_folders_configuration(tmp_path):
    wanted = run("text_encoder", from_folder("text_encoder", tmp_path))
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = weights.load("text_encoder", tmp_path / "model.safetensors")
    assert not torch.equal(run("text_encoder", model), wanted)


def test_a_repositorys_name_is_no_folder_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = r"hf download someone/Some-Model\.1 --local-dir Some-Model\.1,"
    for name in ("someone/Some-Model.1", "https://huggingface.co/someone/Some-Model.1/tree/main"):
        for read in (model_paths, described, adapters.read):
            with pytest.raises(FileNotFoundError, match=told):
                read(Path(name))
    Path("someone").mkdir()                              # then a slip in a local name is likelier
    with pytest.raises(FileNotFoundError, match="Some-Model.1: no such file or folder$"):
        model_paths(Path("someone/Some-Model.1"))


def test_the_cache_of_hugging_face_is_looked_into(tmp_path):
    upper, tiny = tmp_path / "models--someone--Some-Model", Path(weights.__file__).parent
    for name in ("0a", "0b"):
        (upper / "snapshots" / name).mkdir(parents=True)
    (upper / "snapshots/0a/it").symlink_to(tiny / "tiny/model")
    for part in (tiny / "tiny/model").iterdir():
        (upper / "snapshots/0a" / part.name).symlink_to(part)
    (upper / "refs").mkdir()
    (upper / "refs/main").write_text("0a\n")
    for path in (upper, upper / "snapshots"):
        assert model_paths(path)["vae"] == upper / "snapshots/0a/vae"
        assert only_size(path) == only_size(tiny / "tiny/model/vae") == (64, 64)
        assert f"{upper / 'snapshots/0a'}: whole" in described(path)[0]
    file = "tiny/model/vae/diffusion_pytorch_model.safetensors"
    assert only_size(tiny / file) == (64, 64)            # its config.json is beside it
    found = model_paths(tiny / "tiny/model", tokenizers=upper)
    assert found["tokenizer"] == upper / "snapshots/0a/tokenizer"
    (upper / "refs/main").unlink()                       # then the newest
    os.utime(upper / "snapshots/0b", (0, 0))
    assert model_paths(upper)["vae"] == upper / "snapshots/0a/vae"


def test_a_part_is_found_in_the_cache_and_as_a_folders_only_file(tmp_path):
    tiny = Path(weights.__file__).parent / "tiny/model"
    upper = tmp_path / "models--someone--Some-VAE"
    (upper / "snapshots").mkdir(parents=True)
    (upper / "snapshots/0a").symlink_to(tiny / "vae")
    assert model_paths(tiny, vae=upper)["vae"] == upper / "snapshots/0a"
    alone = tmp_path / "fetched"
    alone.mkdir()
    file = alone / "ae.safetensors"
    file.symlink_to(tiny / "vae/diffusion_pytorch_model.safetensors")
    assert model_paths(tiny, vae=alone)["vae"] == file
    (alone / "other.safetensors").symlink_to(tiny / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="--vae .*fetched: holds no part"):  # which of the two?
        model_paths(tiny, vae=alone)


def test_parts_of_other_models_are_refused_before_they_meet(monkeypatch):
    tiny = Path(weights.__file__).parent / "tiny/model"
    load = weights.load
    for part, entry, option in (("text_encoder_2", "d_model", "--t5"),
                                ("text_encoder", "hidden_size", "--clip"),
                                ("vae", "latent_channels", "--vae")):
        def other(name, *how, part=part, entry=entry):
            model = load(name, *how)
            if name == part:
                model.config = replace(model.config, **{entry: 24})
            return model
        monkeypatch.setattr(weights, "load", other)
        with pytest.raises(ValueError, match=f"{option}: gives vectors of .* name one of the same"):
            load_pipeline(tiny, None, "cpu")


def test_an_adapter_in_the_cache_is_found_by_its_upper_folder(tmp_path, capsys):
    folder = tmp_path / "models--someone--Some-LoRA/snapshots/0a"
    folder.mkdir(parents=True)
    lora_file("kohya", some_lora({"double_blocks.0.img_attn.qkv": torch.ones(768, 256)}),
              folder / "winter.safetensors")
    for path in (tmp_path / "models--someone--Some-LoRA", folder.parent, folder):
        assert adapters.read(path)[0]["lora_rank"] == 2
        assert "rank 2, alpha 1, scale 0.5" in described(path)[0]


@pytest.mark.parametrize("name", ["tokenizer/merges.txt", "tokenizer_2/tokenizer.json",
                                  "vae/config.json", "text_encoder/config.json"])
def test_pointers_for_small_files_are_named(tmp_path, name):
    shutil.copytree(Path(weights.__file__).parent / "tiny/model", tmp_path / "model")
    (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\n"
                                           "oid sha256:12ab\nsize 100\n")
    with pytest.raises(ValueError, match=f"{name}: is a Git LFS pointer.*git lfs pull"):
        load_pipeline(tmp_path / "model")


def test_what_a_file_lacks_is_named(tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file(original("transformer"), file)
    with pytest.raises(ValueError, match="name --vae, --clip, --t5, --tokenizers too"):
        model_paths(file)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="name --clip too"):
        model_paths(file, vae=file, text_encoder_2=file, tokenizers=tmp_path)
    save_file(original("vae"), file)
    with pytest.raises(ValueError, match="holds no FLUX Kontext transformer"):
        model_paths(file)


# ---------------------------------------------------------------------------------------------- fp8

@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_is_the_widened_weights(tmp_path, part, scaled):
    """In fp32 the same products of the same numbers; sums may be ordered otherwise."""
    narrow, wide = in_fp8(original(part), scaled)
    save_file(narrow, tmp_path / "fp8.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    load = PARTS[part][3]
    model = load(tmp_path / "fp8.safetensors", dtype=torch.float32)
    kept = [m for m in model.modules() if isinstance(m, NarrowLinear)]
    assert kept and all(m.weight.dtype == torch.float8_e4m3fn for m in kept)
    wanted = run(part, load(tmp_path / "wide.safetensors", dtype=torch.float32))
    assert torch.allclose(run(part, model), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1)])
def test_fp8_may_have_a_scale_for_each_row_under_the_newer_names(tmp_path, shape):
    """One number for a tensor or one for each row, also of a fused tensor; fp32 to rounding."""
    narrow, wide = {}, {}
    for name, t in original("transformer").items():
        narrow[name] = wide[name] = t
        if t.dim() == 2 and name.endswith(".weight"):
            top = t.abs().amax(1) if -1 in shape else t.abs().max()
            scale = (top / 400).reshape(shape)
            narrow[name] = (t / scale.reshape((-1, 1) if -1 in shape else ())
                            ).to(torch.float8_e4m3fn)
            wide[name] = narrow[name].float() * scale.reshape((-1, 1) if -1 in shape else ())
            stem = name.removesuffix("weight")
            narrow |= {f"{stem}weight_scale": scale, f"{stem}input_scale": torch.ones(()),
                       f"{stem}comfy_quant": torch.zeros(9, dtype=torch.uint8)}
    save_file(narrow, tmp_path / "fp8.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    model = weights.load("transformer", tmp_path / "fp8.safetensors", dtype=torch.float32)
    assert isinstance(model.transformer_blocks[0].attn.to_k, NarrowLinear)
    wanted = weights.load("transformer", tmp_path / "wide.safetensors")
    assert torch.allclose(run("transformer", model), run("transformer", wanted), atol=1e-6,
                          rtol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (256, 4), (0,)])
def test_other_numbers_of_scales_are_refused(tmp_path, shape):
    tensors = original("transformer")
    tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {"img_in.weight_scale": torch.ones(shape)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="x_embedder.weight has a scale.*each row"):
        weights.load("transformer", tmp_path / "one.safetensors")


def test_a_scale_without_its_weight_is_refused(tmp_path):
    tensors = original("transformer") | {"img_in.scale_weight": torch.ones(())}
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="x_embedder.weight has a scale"):
        weights.load("transformer", tmp_path / "one.safetensors")


def test_fp8_on_a_device_that_holds_none_is_refused_before_it_goes_there():
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="mps holds no fp8"):
        weights.assign(layer, {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "f", "mps")


def test_a_model_in_fp8_is_near_its_own():
    """e4m3 keeps three bits after the first: 2^-4 of a number, or of the smallest step, at most."""
    layers = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).requires_grad_(False)
    layers[1].weight.data[3] = 0
    before = [layer.weight.clone() for layer in layers]
    to_fp8(layers)
    for layer, W in zip(layers, before):
        wide = Widened.wide(layer.weight, layer.scale, torch.float32)
        assert layer.weight.dtype == torch.float8_e4m3fn and not layer.weight.requires_grad
        assert ((wide - W).abs() <= W.abs() / 16 + layer.scale * 2 ** -10).all()
        assert torch.allclose(wide.abs().amax(1), W.abs().amax(1), rtol=1e-6)
    x = torch.randn(4, 30, requires_grad=True)
    layers(x).sum().backward()
    products = [Widened.wide(layer.weight, layer.scale, torch.float32) for layer in layers]
    assert torch.allclose(x.grad, (products[1] @ products[0]).sum(0).expand(4, 30), atol=1e-5)
    assert layers.bfloat16()(x.detach().bfloat16()).dtype == torch.bfloat16


def test_narrow_linear_follows_the_type_of_its_input():
    layer = nn.Linear(8, 5).requires_grad_(False)
    layer.weight.data = layer.weight.to(torch.float8_e4m3fn)
    layer.__class__ = NarrowLinear
    layer.register_buffer("scale", torch.tensor(0.5), persistent=False)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight.float() * 0.5, layer.bias))
    layer.bias.data = layer.bias.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_fp8_weights_are_kept_in_fp8_for_backward(tmp_path):
    save_file(in_fp8(original("transformer"), scaled=True)[0], tmp_path / "fp8.safetensors")
    model = weights.load("transformer", tmp_path / "fp8.safetensors", dtype=torch.float32)
    layer = model.transformer_blocks[0].ff.net[2]
    x = torch.randn(3, 1024, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    assert not any(t.shape == layer.weight.shape and t.dtype == torch.float32 for t in kept)
    out.sum().backward()
    wanted = (layer.weight.float() * layer.scale).sum(0).expand(3, -1)
    assert torch.allclose(x.grad, wanted, atol=1e-5)     # 256 numbers near 0.02, in another order


# -------------------------------------------------------------------------- other tools' LoRA files

def some_lora(modules: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, in), B (out, r), alpha for each weight; ranks and alphas differ."""
    generator, found = torch.Generator().manual_seed(3), {}
    for i, (name, W) in enumerate(modules.items()):
        r = 2 + i % 3
        A, B = (torch.randn(shape, generator=generator) * 0.1
                for shape in ((r, W.shape[1]), (W.shape[0], r)))
        found[name] = A, B, float(1 + i % 2)
    return found


def lora_file(form: str, lora: dict[str, tuple[Tensor, Tensor, float]], file: Path) -> None:
    tensors, metadata = {}, None
    for name, (A, B, alpha) in lora.items():
        if form == "kohya":
            stem = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B,
                        f"{stem}.alpha": torch.tensor(alpha)}
        else:
            stem = ("transformer." if form.startswith("diffusers") else "diffusion_model.") + name
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
            if form != "diffusers, metadata":
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    if form == "diffusers, metadata":
        metadata = {"lora_adapter_metadata": json.dumps({
            "transformer.lora_alpha": 1.0, "transformer.alpha_pattern": {
                name: alpha for name, (_, _, alpha) in lora.items() if alpha != 1.0}})}
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("form", ["diffusers", "diffusers, metadata", "comfy", "kohya"])
def test_a_lora_does_what_adding_it_to_the_weights_does(tmp_path, form):
    """W + alpha / r B A in the layout that the file speaks of; fp32, sums ordered otherwise."""
    tensors = tensors_of("transformer") if form.startswith("diffusers") else original("transformer")
    save_file(tensors, tmp_path / "base.safetensors")
    lora = some_lora({name.removesuffix(".weight"): t for name, t in tensors.items()
                      if t.dim() == 2 and name.endswith(".weight")})
    lora_file(form, lora, tmp_path / "lora.safetensors")
    for name, (A, B, alpha) in lora.items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + alpha / len(A) * B @ A
    save_file(tensors, tmp_path / "added.safetensors")
    wanted = run("transformer", weights.load("transformer", tmp_path / "added.safetensors"))
    model = weights.load("transformer", tmp_path / "base.safetensors")
    bare = run("transformer", model)
    adapter = load_adapter(model, tmp_path / "lora.safetensors")
    linears = sum(isinstance(m, nn.Linear) for m in dit.FluxTransformer(model.config).modules())
    assert len(adapter.layers) == linears
    assert (bare - wanted).abs().max() > 0.01
    assert torch.allclose(run("transformer", model), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, words", [
    ({"transformer.nowhere.lora_A.weight": torch.ones(2, 4),
      "transformer.nowhere.lora_B.weight": torch.ones(4, 2)}, "nowhere"),
    ({"transformer.proj_out.lora_A.weight": torch.ones(2, 4)}, "proj_out"),
    ({"transformer.proj_out.lora_A.weight": torch.ones(3, 256),
      "transformer.proj_out.lora_B.weight": torch.ones(64, 2)}, "proj_out"),
    ({"transformer.proj_out.lora_A.weight": torch.ones(2, 7),
      "transformer.proj_out.lora_B.weight": torch.ones(64, 2)}, "proj_out"),
    ({"transformer.proj_out.dora_scale": torch.ones(64)}, "dora_scale")])
def test_lora_keys_that_match_nothing_are_named(tmp_path, change, words):
    save_file(tensors_of("transformer"), tmp_path / "base.safetensors")
    good = {"transformer.x_embedder.lora_A.weight": torch.ones(2, 64),
            "transformer.x_embedder.lora_B.weight": torch.ones(256, 2)}
    save_file(good | change, tmp_path / "lora.safetensors")
    model = weights.load("transformer", tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=f"lora.safetensors.*{words}"):
        load_adapter(model, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_reads_lora_files_alike(tmp_path, form):
    """Their A and B may share the scale otherwise; the products agree to rounding."""
    from diffusers import FluxPipeline
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, rows in thin(2).items():
        module, A = name.removesuffix(".weight"), torch.randn(1, 1, generator=generator)
        known = "blocks" in name or (form == "peft" and "final_layer.linear" in name)
        if rows.dim() != 2 or not known:                 # the peer converts no others
            continue
        if form == "kohya":
            stem = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": rows,
                        f"{stem}.alpha": torch.tensor(0.5)}
        else:
            stem = f"base_model.model.{module}"
            tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": rows}
    save_file(tensors, tmp_path / "lora.safetensors")
    _, ours = lora.read(tmp_path / "lora.safetensors")
    theirs = FluxPipeline.lora_state_dict(tensors)
    modules = {name.removesuffix(".lora_A.weight").removeprefix("transformer.")
               for name in theirs if name.endswith(".lora_A.weight")}
    assert modules == {name.removesuffix(".lora_A") for name in ours if name.endswith(".lora_A")}
    for module in modules:
        A, B = (theirs[f"transformer.{module}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(ours[f"{module}.lora_B"] @ ours[f"{module}.lora_A"], B @ A,
                              atol=1e-6, rtol=1e-6), module


@pytest.mark.parametrize("metadata", [
    {"transformer.alpha_pattern": [1]}, {"transformer.alpha_pattern": {"(": 1}},
    {"transformer.lora_alpha": [1]}, {"transformer.lora_alpha": 1e400}])
def test_alphas_that_are_no_numbers_are_named(tmp_path, metadata):
    lora_file("diffusers, metadata", some_lora({"x_embedder": torch.ones(256, 64)}),
              tmp_path / "lora.safetensors")
    save_file(read_tensors([tmp_path / "lora.safetensors"]), tmp_path / "bad.safetensors",
              {"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(ValueError, match="bad.safetensors: the alpha of x_embedder"):
        lora.read(tmp_path / "bad.safetensors")


def test_rank_stabilised_lora_counts_alpha_over_the_root(tmp_path):
    A, B = torch.ones(4, 64), torch.ones(256, 4)
    metadata = json.dumps({"transformer.lora_alpha": 6, "transformer.use_rslora": True})
    save_file({f"transformer.x_embedder.lora_{part}.weight": t for part, t in zip("AB", (A, B))},
              tmp_path / "lora.safetensors", {"lora_adapter_metadata": metadata})
    _, tensors = lora.read(tmp_path / "lora.safetensors")
    assert torch.equal(tensors["x_embedder.lora_B"], 3 * B)


def test_two_tensors_for_one_place_are_refused(tmp_path):
    tensors = original("transformer") | {"x_embedder.weight": torch.zeros(256, 64)}
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="one.safetensors.*has the place of another"):
        weights.load("transformer", tmp_path / "one.safetensors")
    pair = {f"{prefix}.lora_{part}.weight": torch.ones(2, 64) if part == "A" else torch.ones(256, 2)
            for prefix in ("transformer.x_embedder", "diffusion_model.img_in") for part in "AB"}
    save_file(pair, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="under two names"):
        lora.read(tmp_path / "lora.safetensors")


# ----------------------------------------------------------------------------------- what a file is

def test_a_file_is_described_with_the_command_that_uses_it(tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file(original("transformer"), file)
    lines = described(file)[0].splitlines()
    assert "transformer, original or ComfyUI" in lines[0] and lines[1] == f"{file}: whole"
    assert lines[2] == (f"python sample.py --instruction TEXT --model {file} "
                        "--vae ... --clip ... --t5 ... --tokenizers ...")
    cut = original("transformer")
    del cut["double_blocks.0.img_mlp.0.bias"]
    save_file(cut, file)
    lines = described(file)[0].splitlines()
    assert "ff.net.0.proj.bias" in lines[1] and lines[-1] == f"{file}: not whole"
    save_file(in_fp8(original("transformer"), scaled=True)[0], file)
    assert "fp8 with scales" in described(file)[0].splitlines()[0]
