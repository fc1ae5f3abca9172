"""Adapters: which layers they go to, their files, and the form of the paper's own code."""
import dataclasses
import itertools
import json
import pickle
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open, save_file

import baselines
import dit
import mole
import sample
import weights
from helpers import (adapted, adapter_config, Bomb, build_config, BUILDS, CASES, DIT, FIRST,
                     forward, golden, golden_part, inputs, load_adapter, make_pipeline, MODEL,
                     moles, PICTURE, pixels, ROOT, run_command, run_sample, same, SMALL)
from support import adapters, commands, export, research, routing_maps, targets
from support.configs import config_from
from support.files import read_metadata, read_tensors, write_tensors

# ------------------------------------------------------------------------------- support/targets.py

@pytest.mark.parametrize("name, target, wanted", [
    ("single_transformer_blocks.0.norm.linear", "norm.linear", True),
    ("norm.linear", "norm.linear", True),
    ("transformer_blocks.0.norm1_context.linear", "norm.linear", False),
    ("norm_out.linear", "norm.linear", False),
    ("transformer_blocks.0.norm1.linear", "norm.linear", False),
    ("transformer_blocks.0.norm1_context.linear", "norm1.linear", False),
    ("transformer_blocks.0.ff.net.0.proj", "ff.net.0.proj", True),
    ("transformer_blocks.0.ff_context.net.0.proj", "ff.net.0.proj", False),
    ("transformer_blocks.0.ff_context.net.2", "ff.net.2", False),
    ("transformer_blocks.0.ff.net.2", "ff.net.2", True),
    ("transformer_blocks.0.ff.netx2", "ff.net.2", False),                    # the dot is a dot
    ("single_transformer_blocks.12.proj_out", "single_transformer_blocks.*.proj_out", True),
    ("proj_out", "single_transformer_blocks.*.proj_out", False),
    ("single_transformer_blocks.0.attn.proj_out", "single_transformer_blocks.*.proj_out", False),
    ("x_embedder", "x_embedder", True),
    ("context_embedder", "x_embedder", False),
    ("proj_out", ".proj_out", True), ("single_transformer_blocks.0.proj_out", ".proj_out", False),
    ("single_transformer_blocks.0.proj_out", ".single_transformer_blocks.0.proj_out", True),
    ("other_x_embedder", "x_embedder", False),           # the end of a name is not the name
    ("transformer_blocks.0.attn.to_out.0", "attn.to_out.0", True),
    ("transformer_blocks.0.attn.to_add_out", "attn.to_out.0", False)])
def test_target_matching(name, target, wanted):
    assert targets.matches(name, "nothing", target) is wanted


def test_targets_in_the_model():
    """Published targets: exactly these modules are replaced, all others are still plain."""
    model, adapter = adapted()
    double = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "norm1.linear",
              "ff.net.0.proj", "ff.net.2"]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "norm.linear", "proj_mlp", "proj_out"]
    wanted = {"x_embedder"} \
        | {f"transformer_blocks.{i}.{n}" for i, n in itertools.product(range(2), double)} \
        | {f"single_transformer_blocks.{i}.{n}" for i, n in itertools.product(range(3), single)}
    of = {name: type(module) for name, module in model.named_modules()
          if isinstance(module, (mole.LoRALinear, mole.MoLELinear))}
    assert of.keys() == wanted
    mixtures = {name for name, kind in of.items() if kind is mole.MoLELinear}
    assert mixtures == {name for name in wanted if name.endswith((".ff.net.2", ".proj_out"))}
    assert all(layer.router.in_features == 10 for layer in moles(adapter))


def test_token_targets():
    name = "single_transformer_blocks.1.proj_out"
    model, adapter = adapted(token_targets=(name,))
    assert [layer.name for layer in moles(adapter) if layer.by_token] == [name]
    assert model.get_submodule(name).router.in_features == 80                # its own input
    x = inputs()
    with adapter.serve(x["txt"], x["pooled"]):
        model(**x)
    last = routing_maps.last_weights(adapter)
    assert last[name].shape == (2, 4, 4) and last[FIRST].shape == (2, 4)


def test_layers_have_the_first_class_that_names_them():
    """Of a layer that several lists name: token_targets, then mole_targets, then lora_targets."""
    model, one, two = dit.FluxTransformer(DIT), "transformer_blocks.0.ff.net.2", "x_embedder"
    config = replace(SMALL, lora_targets=("ff.net.2", two), mole_targets=("ff.net.2",),
                     token_targets=(one,))
    found = targets.layers_of(model, config, baselines.KINDS)
    assert list(found) == [name for name, _ in model.named_modules() if name in found]
    assert {name: kind for name, (_, kind) in found.items()} == {
        one: baselines.KINDS["token"], two: mole.LoRALinear,
        "transformer_blocks.1.ff.net.2": baselines.KINDS["instruction"]}
    assert all(linear is model.get_submodule(name) for name, (linear, _) in found.items())


@pytest.mark.parametrize("changes, words", [
    ({"lora_targets": (), "mole_targets": ()}, "needs a target"),
    ({"routing": "chance"}, "routing 'chance'.*instruction"),
    ({"lora_targets": ("nowhere",)}, "'nowhere' names no linear layer")])
def test_targets_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        targets.layers_of(dit.FluxTransformer(DIT), replace(SMALL, **changes), baselines.KINDS)
    with pytest.raises(ValueError, match="routed by instruction$"):          # what is offered
        targets.layers_of(dit.FluxTransformer(DIT), replace(SMALL, token_targets=(FIRST,)),
                          {"instruction": mole.MoLELinear})


@pytest.mark.parametrize("name", ["rank", "lora_rank", "resampler_width", "resampler_heads",
                                  "resampler_head_dim"])
def test_sizes_are_at_least_one(name):
    targets.check_sizes(replace(SMALL, **{name: 1}))
    with pytest.raises(ValueError, match="at least 1"):
        targets.check_sizes(replace(SMALL, **{name: 0}))


def test_a_model_is_untouched_until_an_adapter_is_inserted(tmp_path):
    """Building one changes nothing of it, nor does loading one that fails at its last step."""
    model = dit.FluxTransformer(DIT)
    modules = dict(model.named_modules())
    state = {name: p.clone() for name, p in model.state_dict().items()}
    def untouched() -> bool:
        return (dict(model.named_modules()) == modules and same(model.state_dict(), state)
                and all(p.requires_grad for p in model.parameters()))
    adapter = weights.build_adapter(model, SMALL)
    assert untouched() and adapter.layers
    adapters.write(adapter, tmp_path / "whole.safetensors")
    tensors = read_tensors([tmp_path / "whole.safetensors"])
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as opened:
        about = opened.metadata()
    last = max(tensors)
    for name, broken in (("missing", {k: t for k, t in tensors.items() if k != last}),
                         ("shape", tensors | {last: torch.zeros(1, 2, 3)})):
        save_file(broken, tmp_path / f"{name}.safetensors", about)
        with pytest.raises(ValueError, match=f"{name}.safetensors.*{re.escape(last)}"):
            load_adapter(model, tmp_path / f"{name}.safetensors")
        assert untouched()
    assert adapter.insert(model) is adapter and not untouched()
    for name, layer in adapter.layers.items():
        path = name.replace("/", ".")
        assert model.get_submodule(path) is layer and layer.base is modules[path]
    trained = {id(p) for p in adapter.tensors().values()}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())


def test_bad_configurations_are_refused_and_leave_the_model_alone():
    model = dit.FluxTransformer(DIT)
    names = [name for name, _ in model.named_parameters()]
    for changes, message in (({"top_k": 5}, "top_k"), ({"top_k": 0}, "top_k"),
                             ({"lora_targets": ("x_embedder", "attn.to_z")}, "attn.to_z"),
                             ({"mole_targets": ("ff",)}, "'ff'"),            # module, no nn.Linear
                             ({"token_targets": ("nowhere",)}, "nowhere")):
        with pytest.raises(ValueError, match=message):
            weights.new_adapter(model, dataclasses.replace(SMALL, **changes))
    assert names == [name for name, _ in model.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())


# -------------------------------------------------------------------------------------------- files

def test_save_and_load(tmp_path):
    file = tmp_path / "adapter.safetensors"
    model, adapter = adapted(token_targets=("single_transformer_blocks.1.proj_out",))
    adapters.write(adapter, file, base="small")
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["adapter"])["base"] == "small"
        assert not any("base" in name for name in opened.keys())             # no frozen weights
        assert all(opened.get_tensor(name).dtype == torch.float32 for name in opened.keys())
    other = dit.FluxTransformer(DIT)
    base = {name.replace(".base.", "."): t for name, t in model.state_dict().items()}
    other.load_state_dict({name: base[name] for name in other.state_dict()})
    loaded = load_adapter(other, file)
    assert loaded.config == adapter.config and same(loaded.tensors(), adapter.tensors())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = inputs()
    adapter.requires_grad_(False).eval()                 # as loaded: F.linear heeds requires_grad
    with adapter.serve(x["txt"], x["pooled"]), loaded.serve(x["txt"], x["pooled"]):
        assert torch.equal(model(**x), other(**x))


def adapter_file(tmp_path: Path) -> Path:
    adapters.write(adapted()[1], tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def refused(file: Path, changes: dict | None = None) -> None:
    """Loading into a model that is changed so is a ValueError that names the file."""
    model = dit.FluxTransformer(dataclasses.replace(DIT, **(changes or {})))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(str(file))):
        load_adapter(model, file)
    assert list(model.state_dict()) == names             # the model is as it was


def test_load_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            load_adapter(dit.FluxTransformer(DIT), path)


def test_load_truncated_file(tmp_path):
    file = adapter_file(tmp_path)
    whole = file.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file)


def test_load_foreign_files(tmp_path):
    file = tmp_path / "foreign.safetensors"
    file.write_text("not a tensor in sight")
    refused(file)
    configs = ('{"colour": 3}', '{"top_k": 99}', '{"lora_targets": ["nowhere"]}', "3",
               '{"rank": "eight"}', '{"alpha": NaN}', '{"resampler_heads": 0}')
    for adapter in (None, "no json", "[1]", '"text"', "null", "{}",
                    *(f'{{"config": {config}}}' for config in configs)):
        save_file({"some.weight": torch.zeros(2)}, file,
                  metadata={"adapter": adapter} if adapter else {"format": "pt"})
        refused(file)


def test_an_adapter_is_saved_the_same_and_for_all_to_read(tmp_path):
    _, adapter = adapted()
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        adapters.write(adapter, file, step="3", settings="{}")
    assert len({file.read_bytes() for file in files}) == 1
    assert files[0].stat().st_mode & 0o044 == 0o044


def test_load_adapter_of_another_model(tmp_path):
    file = adapter_file(tmp_path)
    with pytest.raises(ValueError, match="another model's.* --model .*weights.py FILE says which"):
        load_adapter(dit.FluxTransformer(replace(DIT, num_attention_heads=3)), file)
    refused(file, {"num_attention_heads": 3})            # wider
    refused(file, {"num_single_layers": 4})              # too few
    refused(file, {"num_single_layers": 2})              # too many
    refused(file, {"joint_attention_dim": 13})           # other text encoders
    refused(file, {"pooled_projection_dim": 11})


def test_unknown_configuration_entries_are_named(tmp_path):
    (tmp_path / "c.json").write_text('{"rnak": 3}')
    with pytest.raises(ValueError, match="rnak"):
        adapter_config("instructmole", tmp_path / "c.json")
    assert "rank" in {entry.name for entry in fields(mole.AdapterConfig)}


def test_kinds_of_adapter():
    file = ROOT / "tiny/adapter.json"
    whole = adapter_config("instructmole", file)
    assert whole == replace(mole.AdapterConfig(), **json.loads(file.read_text()))
    assert not adapter_config("lora", file).mole_targets
    assert adapter_config("instructmole", None) == mole.AdapterConfig()


# ----------------------------------------------------------------------------- the paper's own form

PUBLISHED = {
    "lora_config": {"r": 256, "lora_alpha": 256, "init_lora_weights": "gaussian",
                    "target_modules": ["x_embedder", "attn.to_q", "attn.to_k", "attn.to_v",
                                       "attn.to_out.0", "norm1.linear", "norm.linear",
                                       "ff.net.0.proj", "single_transformer_blocks.*.proj_mlp"]},
    "moe_config": {"mole_expert": "LoRAMoE", "num_experts": 8, "num_experts_per_tok": 4, "rank": 32,
                   "alpha": 32, "dropout": 0.0, "train_mole_only": True, "type_aux_loss_alpha": 0.1,
                   "token_aux_loss_alpha": 0.01, "orthogonal_reg_alpha": 0.01,
                   "use_type_embedding": True, "routing_policy": "default",
                   "target_modules": ["ff.net.2", "single_transformer_blocks.*.proj_out"],
                   "token_route_overrides_double": [], "token_route_overrides_single": []}}
LORA_ONLY = {"lora_config": PUBLISHED["lora_config"] | {
    "target_modules": ["attn.to_q", "ff.net.2"]}}
OVERRIDES = {"igr": ([], []), "token": ("all", "all"), "mixed": ([1], [0, 2]), "pooled": ([], [])}


def write_research(file: Path, folder: Path) -> None:
    """An adapter's file in the research code's form."""
    research.write(*adapters.read(file), file, folder)


def research_folder(path: Path, name: str) -> Path:
    """A golden build's adapter in the four files of the research code."""
    theirs = golden_part(f"{name}.w.")
    _, c = build_config(theirs)
    path.mkdir()
    double, single = OVERRIDES[name]
    (path / "train_config.json").write_text(json.dumps({
        "lora_config": PUBLISHED["lora_config"] | {
            "r": c.lora_rank, "lora_alpha": c.lora_alpha,
            "target_modules": list(c.lora_targets)},
        "moe_config": PUBLISHED["moe_config"] | {
            "num_experts": c.experts, "num_experts_per_tok": c.top_k, "rank": c.rank,
            "alpha": c.alpha, "use_type_embedding": c.resampler,
            "type_aux_loss_alpha": c.balance_weight, "token_aux_loss_alpha": c.token_balance_weight,
            "orthogonal_reg_alpha": c.orthogonality_weight, "resampler_heads": c.resampler_heads,
            "token_route_overrides_double": double, "token_route_overrides_single": single}}))
    save_file({f"transformer.{key.replace('.default', '')}": t.contiguous()
               for key, t in theirs.items() if ".lora_" in key},
              path / "pytorch_lora_weights.safetensors")
    torch.save({key: t for key, t in theirs.items() if ".experts." in key or ".gate." in key},
               path / "mole_experts.pt")
    if c.resampler:
        prefix = "condition_type_embedder."
        torch.save({"condition_type_embedder": {key.removeprefix(prefix): t
                                                for key, t in theirs.items()
                                                if key.startswith(prefix)}},
                   path / "condition_type_embedder.pt")
    return path


def bare_model(name: str) -> dit.FluxTransformer:
    """The golden build's transformer without its adapter."""
    theirs = golden_part(f"{name}.w.")
    model = dit.FluxTransformer(build_config(theirs)[0])
    plain = {key.replace("base_layer.", "").replace("linear_layer.", ""): t
             for key, t in theirs.items()}
    model.load_state_dict({key: plain[key] for key in model.state_dict()})
    return model


def test_a_research_folder_that_has_diverged_is_refused(tmp_path):
    folder = research_folder(tmp_path / "theirs", next(iter(BUILDS)))
    file = next(folder.glob("*.safetensors"))
    tensors = read_tensors([file])
    name = next(iter(tensors))
    write_tensors(tensors | {name: torch.full_like(tensors[name], torch.nan)}, file)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        adapters.read(folder)


@pytest.mark.usefixtures("research_frequencies")
@pytest.mark.parametrize("name", BUILDS)
def test_a_research_folder_gives_the_golden_outputs_and_is_written_back_equal(tmp_path, name):
    folder = research_folder(tmp_path / "theirs", name)
    model = bare_model(name)
    adapter = load_adapter(model, folder)
    x = golden_part("in.")
    with torch.no_grad(), adapter.serve(x["txt"], x["pooled"]):
        for case in CASES:
            assert (forward(model, case) - golden()[0][f"{name}.{case}.out"]).abs().max() <= 1e-5

    adapters.write(adapter, tmp_path / "ours.safetensors")
    write_research(tmp_path / "ours.safetensors", tmp_path / "back")
    files = sorted(p.name for p in folder.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "back").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ours.safetensors", "theirs"]
    for file in files:
        one, two = folder / file, tmp_path / "back" / file
        if file.endswith(".json"):
            assert json.loads(one.read_text()) == json.loads(two.read_text())
            continue
        key = "condition_type_embedder" if "embedder" in file else None
        one, two = (read_tensors([f]) if file.endswith(".safetensors") else
                    research.read_pickle(f, key) for f in (one, two))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_published_configuration_is_our_default():
    c = config_from(mole.AdapterConfig, research.from_research(PUBLISHED, "p"), "p", True)
    assert c == mole.AdapterConfig()
    values = {**vars(c)}
    back = research.to_research({k: list(v) if isinstance(v, tuple) else v
                                for k, v in values.items()}, "p")
    assert {k: v for k, v in back["moe_config"].items() if k != "resampler_heads"} \
        == PUBLISHED["moe_config"] and back["lora_config"] == PUBLISHED["lora_config"]


def test_its_json_is_read_by_config(tmp_path):
    file = tmp_path / "train_config.json"
    file.write_text(json.dumps(PUBLISHED))
    assert adapter_config("instructmole", file) == mole.AdapterConfig()
    file.write_text(json.dumps(LORA_ONLY))
    c = adapter_config("instructmole", file)
    assert c.lora_targets == ("attn.to_q", "ff.net.2") and not c.mole_targets
    moe = PUBLISHED["moe_config"] | {"token_route_overrides_double": "all",
                                     "token_route_overrides_single": [3, 11]}
    file.write_text(json.dumps(PUBLISHED | {"moe_config": moe}))
    assert adapter_config("instructmole", file).token_targets == (
        "transformer_blocks.*.ff.net.2", "single_transformer_blocks.3.proj_out",
        "single_transformer_blocks.11.proj_out")


def test_an_adapter_in_bf16_is_the_same_within_its_rounding(tmp_path, monkeypatch, capsys):
    """And half as large, with its configuration; what is no adapter of ours is refused."""
    file, half = ROOT / "tiny/adapter.safetensors", tmp_path / "half.safetensors"
    def run(*arguments: object) -> tuple[int, str, str]:
        return run_command(monkeypatch, capsys, "weights.py", weights.main, *arguments)
    assert run(file, "--to-bf16", half)[0] == 0
    (config, whole), (also, rounded) = adapters.read(file), adapters.read(half)
    assert also == config and read_metadata(half) == read_metadata(file)
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    for name, t in whole.items():                        # 8 bits of fraction: 2^-9 of the value
        torch.testing.assert_close(rounded[name].float(), t.float(), rtol=2 ** -8, atol=0)
    pipe = sample.load_pipeline(MODEL, half, "cpu", "float32")
    assert {p.dtype for p in pipe.adapter.tensors().values()} == {torch.float32}
    weaker, bare = tmp_path / "weaker.safetensors", tmp_path / "bare.safetensors"
    assert run(file, "--to-bf16", weaker, "--strength", 0.5)[0] == 0
    assert run(file, "--to-bf16", bare)[0] == 0
    x, seen = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)), []
    for given in (weaker, f"{bare}:0.5", bare):
        layer = sample.load_pipeline(MODEL, given, "cpu", "float32").adapter.layers[
            "transformer_blocks/0/attn/to_q"]
        seen.append(layer(x))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    code, _, err = run(file, "--strength", 0.5)
    assert code == 2 and "--strength is for --to-bf16" in err
    for wrong in ("0", "1e40", "nan"):
        code, _, err = run(file, "--to-bf16", tmp_path / "a.safetensors", "--strength", wrong)
        assert code == 2 and f"--strength {wrong}: must be above 0" in err
    for path, out, words in ((file, half, "exists"), (file, tmp_path / "a.bin", "must end in"),
                             (file, tmp_path / "new/a.safetensors", "its folder does not exist"),
                             (MODEL / "vae", tmp_path / "a.safetensors", "no adapter"),
                             (tmp_path / "none", tmp_path / "a.safetensors", "no such")):
        code, _, err = run(path, "--to-bf16", out)
        assert code == 2 and words in err and not (tmp_path / "a.safetensors").exists()


def test_what_a_routing_counts_is_not_rounded(tmp_path, monkeypatch, capsys):
    """The square of a mean, less the mean of squares, would be lost in bf16, and more."""
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    pipe = make_pipeline("standardised")
    for layer in moles(pipe.adapter):                    # mean 3, deviation 0.01
        layer.moments[0].fill_(3.0)
        layer.moments[1].fill_(9.0001)
    adapters.write(pipe.adapter, whole)
    asked = "weights.py", weights.main, whole, "--to-bf16", half
    assert run_command(monkeypatch, capsys, *asked)[0] == 0
    (_, before), (_, after) = adapters.read(whole), adapters.read(half)
    counted = [name for name in before if name.endswith(("moments", "calls"))]
    assert len(counted) == 2 * len(moles(pipe.adapter))
    assert all(torch.equal(before[name], after[name]) for name in counted)
    assert {t.dtype for name, t in after.items() if name not in counted} == {torch.bfloat16}


def test_an_adapter_of_ours_goes_there_and_back(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "paper", tmp_path / "a.png"
    file = ROOT / "tiny/adapter.safetensors"
    monkeypatch.setattr(sys, "argv", ["weights.py", str(file), "--to-research", str(folder)])
    commands.run(weights.main)
    assert "research" in capsys.readouterr().out
    arguments = ("--instruction", "make the circle blue", "--image", PICTURE, "--steps", 2)
    assert run_sample(monkeypatch, capsys, *arguments, "--adapter", folder, "--out", out)[0] == 0
    again = tmp_path / "b.png"
    assert run_sample(monkeypatch, capsys, *arguments, "--adapter", file, "--out", again)[0] == 0
    assert pixels(out) == pixels(again)


def test_a_plain_lora_needs_no_pickle(tmp_path):
    pipe = sample.load_pipeline(MODEL, None, "cpu", "float32")
    c = adapter_config("lora", ROOT / "tiny/adapter.json")
    adapters.write(weights.new_adapter(pipe.dit, c), tmp_path / "lora.safetensors")
    write_research(tmp_path / "lora.safetensors", tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "pytorch_lora_weights.safetensors", "train_config.json"]
    again = load_adapter(sample.load_pipeline(MODEL, None).dit, tmp_path / "lora")
    stored = read_tensors([tmp_path / "lora.safetensors"])
    assert again.tensors().keys() == stored.keys()
    assert all(torch.equal(p, stored[name]) for name, p in again.tensors().items())


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, capsys):
    folder, trace = research_folder(tmp_path / "theirs", "igr"), tmp_path / "trace"
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(trace)))
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert trace.exists()                                # the bomb works
    trace.unlink()
    for file in ("mole_experts.pt", "condition_type_embedder.pt"):
        kept = (folder / file).read_bytes()
        torch.save({"a": Bomb(trace)}, folder / file)
        with pytest.raises(ValueError, match=file):
            research.read(folder)
        (folder / file).write_bytes(kept)
    assert not trace.exists()


@pytest.mark.parametrize("file, content, words", [
    ("mole_experts.pt", None, "mole_experts.pt"), ("mole_experts.pt", b"x" * 50, "mole_experts.pt"),
    ("mole_experts.pt", [1], "mole_experts.pt"), ("mole_experts.pt", {"a": 1}, "mole_experts.pt"),
    ("pytorch_lora_weights.safetensors", None, "pytorch_lora"),
    ("pytorch_lora_weights.safetensors", b"x" * 50, "pytorch_lora"),
    ("condition_type_embedder.pt", None, "condition_type_embedder.pt"),
    ("mole_experts.pt", {f"transformer_blocks.0.ff.net.2.experts.{e}.left": torch.ones(e + 2, 3)
                         for e in range(2)}, "do not fit together"),
    ("mole_experts.pt", {"a.experts.0.left": torch.ones(2)}, "do not fit together"),
    ("condition_type_embedder.pt", {}, "condition_type_embedder.pt"),
    ("condition_type_embedder.pt",
     {"condition_type_embedder": {"layers.0.0.to_q.weight": torch.ones(3)}}, "no matrix"),
    ("condition_type_embedder.pt", {"condition_type_embedder": 3}, "condition_type_embedder.pt"),
    ("train_config.json", b"{", "JSON"), ("train_config.json", b'{"moe_config": 3}', "objects"),
    ("train_config.json", b'{"moe_config": {"mole_expert": "SoftMoE"}}', "SoftMoE"),
    ("train_config.json", b'{"moe_config": {"target_modules": 5}}', "train_config.json"),
    ("train_config.json", b'{"moe_config": {"num_experts": "x"}}', "experts"),
    ("train_config.json", b'{"moe_config": {"token_route_overrides_double": 3}}', "overrides"),
    ("train_config.json", b'{"moe_config": {"target_modules": [], "resampler_heads": 0}}', "sizes"),
    ("train_config.json", b"{}", "target")])
def test_broken_folders_are_named(tmp_path, monkeypatch, capsys, file, content, words):
    folder = research_folder(tmp_path / "theirs", "igr")
    (folder / file).unlink()
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    elif content is not None:
        torch.save(content, folder / file)
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--adapter", folder,
                              "--out", tmp_path / "out.png")
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


def test_what_cannot_be_written(tmp_path):
    file = ROOT / "tiny/adapter.safetensors"
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        write_research(file, tmp_path / "there")
    with pytest.raises(ValueError, match="is no adapter"):
        write_research(MODEL / "vae/diffusion_pytorch_model.safetensors", tmp_path / "a")
    pipe = sample.load_pipeline(MODEL, None)
    c = adapter_config("race", ROOT / "tiny/adapter.json")
    adapters.write(weights.new_adapter(pipe.dit, c), tmp_path / "race.st")
    for name in ("ff.net.2", "transformer_blocks.ff.net.2"):             # no form over there
        with pytest.raises(ValueError, match="token_targets"):
            research.to_research(vars(mole.AdapterConfig(token_targets=(name,))), "p")
    with pytest.raises(ValueError, match="race"):
        write_research(tmp_path / "race.st", tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["race.st", "there"]


def test_a_lora_of_another_tool_has_no_such_form(tmp_path, monkeypatch, capsys):
    file, folder = tmp_path / "lora.safetensors", tmp_path / "new"
    pairs = {"x_embedder": (torch.ones(2, 64), torch.ones(128, 2))}
    export.write_lora(pairs, file)
    code, _, err = run_command(monkeypatch, capsys, "weights.py", weights.main, file,
                               "--to-research", folder)
    assert code == 2 and len(err.splitlines()) == 1 and not folder.exists()
    assert "lora.safetensors is no adapter of train.py's" in err and "another tool's LoRA" in err


def test_layers_that_would_route_otherwise_are_not_written():
    """The research code's form names whole blocks: what it cannot say is refused, not changed."""
    c = dict(mole_targets=("ff.net.2", "attn.to_q"))
    for tokens in (("transformer_blocks.0.ff.net.2",), ("transformer_blocks.0.ff.net.0.proj",)):
        with pytest.raises(ValueError, match="token_targets"):
            research.to_research(vars(mole.AdapterConfig(token_targets=tokens, **c)), "p")
    both = ("transformer_blocks.0.ff.net.2", "transformer_blocks.0.attn.to_q")
    told = research.to_research(vars(mole.AdapterConfig(token_targets=both, **c)), "p")
    assert told["moe_config"]["token_route_overrides_double"] == [0]


def test_a_full_disk_leaves_no_half_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / ".new.new").mkdir()                      # what a killed run has left
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] write failed: No space left on device")
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(sys, "argv", ["weights.py", str(ROOT / "tiny/adapter.safetensors"),
                                      "--to-research", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stopped:
        commands.run(weights.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1 and "written" in err
    assert not list(tmp_path.iterdir())
