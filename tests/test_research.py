"""Adapters in the form of the paper's own code: read, written back, refused when broken."""
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dit
import mole
import sample
import weights
from support import adapters, commands, research
from support.files import config_from, read_tensors
from test_golden import (BUILDS, CASES, build_config, forward, frequencies,  # noqa: F401
                         golden, part)
from test_sample import MODEL, PICTURE, ROOT, command

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


def write(file: Path, folder: Path) -> None:
    """An adapter's file in the research code's form."""
    research.write(*adapters.read(file), file, folder)


def research_folder(path: Path, name: str) -> Path:
    """A golden build's adapter in the four files of the research code."""
    theirs = part(f"{name}.w.")
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
    theirs = part(f"{name}.w.")
    model = dit.FluxTransformer(build_config(theirs)[0])
    plain = {key.replace("base_layer.", "").replace("linear_layer.", ""): t
             for key, t in theirs.items()}
    model.load_state_dict({key: plain[key] for key in model.state_dict()})
    return model


@pytest.mark.parametrize("name", BUILDS)
def test_a_research_folder_gives_the_golden_outputs_and_is_written_back_equal(tmp_path, name):
    folder = research_folder(tmp_path / "theirs", name)
    model = bare_model(name)
    adapter = weights.load_adapter(model, folder)
    x = part("in.")
    with torch.no_grad(), adapter.serve(x["txt"], x["pooled"]):
        for case in CASES:
            assert (forward(model, case) - golden()[0][f"{name}.{case}.out"]).abs().max() <= 1e-5

    adapters.write(adapter, tmp_path / "ours.safetensors")
    write(tmp_path / "ours.safetensors", tmp_path / "back")
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
    assert weights.adapter_config("instructmole", file) == mole.AdapterConfig()
    file.write_text(json.dumps(LORA_ONLY))
    c = weights.adapter_config("instructmole", file)
    assert c.lora_targets == ("attn.to_q", "ff.net.2") and not c.mole_targets
    moe = PUBLISHED["moe_config"] | {"token_route_overrides_double": "all",
                                     "token_route_overrides_single": [3, 11]}
    file.write_text(json.dumps(PUBLISHED | {"moe_config": moe}))
    assert weights.adapter_config("instructmole", file).token_targets == (
        "transformer_blocks.*.ff.net.2", "single_transformer_blocks.3.proj_out",
        "single_transformer_blocks.11.proj_out")


def test_an_adapter_of_ours_goes_there_and_back(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "paper", tmp_path / "a.png"
    file = ROOT / "tiny/adapter.safetensors"
    monkeypatch.setattr(sys, "argv", ["weights.py", str(file), "--to-research", str(folder)])
    commands.run(weights.main)
    assert "research" in capsys.readouterr().out
    arguments = ("--instruction", "make the circle blue", "--image", PICTURE, "--steps", 2)
    assert command(monkeypatch, capsys, *arguments, "--adapter", folder, "--out", out)[0] == 0
    again = tmp_path / "b.png"
    assert command(monkeypatch, capsys, *arguments, "--adapter", file, "--out", again)[0] == 0
    assert out.read_bytes() == again.read_bytes()


def test_a_plain_lora_needs_no_pickle(tmp_path):
    pipe = sample.load_pipeline(MODEL, None, "cpu", "float32")
    c = weights.adapter_config("lora", ROOT / "tiny/adapter.json")
    adapters.write(weights.new_adapter(pipe.dit, c), tmp_path / "lora.safetensors")
    write(tmp_path / "lora.safetensors", tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "pytorch_lora_weights.safetensors", "train_config.json"]
    again = weights.load_adapter(sample.load_pipeline(MODEL).dit, tmp_path / "lora")
    stored = read_tensors([tmp_path / "lora.safetensors"])
    assert again.tensors().keys() == stored.keys()
    assert all(torch.equal(p, stored[name]) for name, p in again.tensors().items())


class Bomb:
    """Unpickled carelessly, it leaves a file behind."""
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


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
    code, _, err = command(monkeypatch, capsys, "--instruction", "a", "--adapter", folder,
                           "--out", tmp_path / "out.png")
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


def test_what_cannot_be_written(tmp_path):
    file = ROOT / "tiny/adapter.safetensors"
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        write(file, tmp_path / "there")
    with pytest.raises(ValueError, match="is no adapter"):
        write(MODEL / "vae/diffusion_pytorch_model.safetensors", tmp_path / "a")
    pipe = sample.load_pipeline(MODEL)
    c = weights.adapter_config("race", ROOT / "tiny/adapter.json")
    adapters.write(weights.new_adapter(pipe.dit, c), tmp_path / "race.st")
    for name in ("ff.net.2", "transformer_blocks.ff.net.2"):             # no form over there
        with pytest.raises(ValueError, match="token_targets"):
            research.to_research(vars(mole.AdapterConfig(token_targets=(name,))), "p")
    with pytest.raises(ValueError, match="race"):
        write(tmp_path / "race.st", tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["race.st", "there"]


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


def test_little_memory_is_one_line(capsys):
    def greedy() -> None:
        raise MemoryError
    with pytest.raises(SystemExit) as stopped:
        commands.run(greedy)
    assert stopped.value.code == 2 and "not enough memory" in capsys.readouterr().err
