"""support/methods.py: which adapter is trained, by --method, --config, --rank, --init, ..."""
import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import baselines
import train
from helpers import adapter_config, ROOT, run_train
from mole import AdapterConfig
from sample import load_pipeline
from support import adapters, methods


def asked(tmp_path: Path, **given: object) -> argparse.Namespace:
    """Options as they are parsed; config: entries for a file."""
    values = {"model": tmp_path / "model", "method": "instructmole", "config": None, "rank": None,
              "experts": None, "init": None, "longest": None} | given
    if isinstance(values["config"], dict):
        (tmp_path / "config.json").write_text(json.dumps(values["config"]))
        values["config"] = tmp_path / "config.json"
    return argparse.Namespace(**values)


def chosen(tmp_path: Path, **given: object) -> AdapterConfig:
    return methods.chosen(asked(tmp_path, **given), baselines.KINDS)[0]


def differences(c: AdapterConfig, other: AdapterConfig) -> dict:
    return {name: value for name, value in asdict(c).items() if value != asdict(other)[name]}


def test_what_a_file_names_is_changed_alone(tmp_path):
    """Of the published sizes, or of adapter.json beside the model; a null file changes nothing."""
    published = AdapterConfig()
    assert chosen(tmp_path) == chosen(tmp_path, config={}) == published
    assert differences(chosen(tmp_path, config={"rank": 4, "dropout": 0}), published) == {
        "rank": 4, "dropout": 0}
    (tmp_path / "adapter.json").write_text(json.dumps({"experts": 6, "lora_rank": 3}))
    beside = chosen(tmp_path)
    assert differences(beside, published) == {"experts": 6, "lora_rank": 3}
    assert differences(chosen(tmp_path, config={"rank": 4}), beside) == {"rank": 4}
    theirs = {"lora_config": {"target_modules": ["proj_out"]}, "moe_config": {}}
    assert chosen(tmp_path, config=theirs).lora_rank == published.lora_rank  # theirs says it all


def test_experts_that_are_all_kept_are_told(tmp_path, capsys):
    for number, method, told in ((4, None, True), (5, None, False), (4, "soft", False),
                                 (4, "standardised", True), (4, "race", True)):
        chosen(tmp_path, experts=number, **({"method": method} if method else {}))
        assert ("all are kept" in capsys.readouterr().err) == told
    chosen(tmp_path, experts=1)                          # of which no fewer can be kept
    assert capsys.readouterr().err.endswith("so that routing chooses none\n")


def test_rank_and_experts(tmp_path):
    """The scale, alpha / rank, stays; of the experts at most as many are kept as there are."""
    published = AdapterConfig()
    assert differences(chosen(tmp_path, rank=8), published) == {"rank": 8, "alpha": 8}
    assert differences(chosen(tmp_path, experts=2), published) == {"experts": 2, "top_k": 2}
    assert differences(chosen(tmp_path, experts=16), published) == {"experts": 16}
    lora = chosen(tmp_path, method="lora", rank=8, config={"lora_alpha": 512})
    assert (lora.lora_rank, lora.lora_alpha, lora.rank) == (8, 16, 32)
    assert differences(chosen(tmp_path, rank=8, config={"rank": 8, "alpha": 16}), published) == {
        "rank": 8, "alpha": 16}


@pytest.mark.parametrize("given, words", [
    ({"method": "lora", "experts": 4}, "--experts 4: --method lora has none"),
    ({"rank": 4, "config": {"rank": 8}}, "--rank 4: .*config.json says rank 8"),
    ({"experts": 4, "config": {"experts": 8}}, "--experts 4: .*config.json says experts 8"),
    ({"method": "lora", "rank": 4, "config": {"lora_rank": 8}}, "--rank 4: .*says lora_rank 8"),
    ({"config": {"ranks": 8}}, "config.json: unknown entry 'ranks'; it may hold .*experts, top_k"),
    ({"config": {"rank": "8"}}, "config.json: rank should be a whole number"),
    ({"config": {"rank": "8"}, "rank": 4}, "config.json: rank should be a whole number"),
    ({"config": {"rank": 0}, "rank": 4}, "config.json says rank 0"),
    ({"config": {"experts": 2}}, "top_k is 4; with 2 experts it must be from 1 to 2"),
    ({"config": {"alpha": 0}}, "config.json: alpha is 0, so that the experts would add nothing"),
    ({"config": Path("gone.json")}, "gone.json")])
def test_what_contradicts_or_is_unknown_is_named(tmp_path, given, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        chosen(tmp_path, **given)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_a_method_is_known_by_its_configuration(method):
    c = adapter_config(method, ROOT / "tiny/adapter.json")
    assert methods.method_of(c) == method
    assert methods.configure(method, c, baselines.KINDS) == c    # so that --init may name it


def test_training_begins_with_another_s_adapter(tmp_path, monkeypatch, capsys, short_model):
    """Its weights, method and sizes; the first losses are those that it ends with."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    common = "--data", "tiny", "--model", short_model, "--batch-size", 2, "--steps", 2, "--lr", 1e-3
    code, _, err = run_train(monkeypatch, capsys, *common, "--out", tmp_path / "one", "--method",
                             "pooled", "--rank", 4)
    assert code == 0, err
    seen, real = [], train.train
    monkeypatch.setattr(train, "train", lambda args, pipe, *rest: seen.append(
        {name: p.detach().clone() for name, p in pipe.adapter.tensors().items()}) or real(
            args, pipe, *rest))
    init = "--init", tmp_path / "one"
    code, _, err = run_train(monkeypatch, capsys, *common, *init, "--out", tmp_path / "two")
    assert code == 0, err
    begun = load_file(tmp_path / "one/adapter.safetensors")
    assert seen[0].keys() == begun.keys()
    assert all(torch.equal(t, begun[name]) for name, t in seen[0].items())
    for rank, told in ("0", True), ("1", False):         # of several processes the first speaks
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        chosen(tmp_path, init=tmp_path / "one", method=None)
        assert capsys.readouterr().out.startswith("begins with ") == told
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    settings = json.loads((tmp_path / "two/run.json").read_text())["settings"]
    assert settings["adapter"] == "pooled" and settings["config"]["rank"] == 4
    assert settings["init"].startswith("adapter.safetensors ")
    assert "init" not in json.loads((tmp_path / "one/run.json").read_text())["settings"]
    for more, words in (
            (["--method", "lora"], "is an adapter of --method pooled, not lora"),
            (["--rank", 8], "rank is 4, not 8"), (["--experts", 4], "experts is 8, not 4"),
            (["--config", ROOT / "tiny/adapter.json"], "rank is 4, not 8"),
            (["--init", tmp_path / "gone"], f"--init {tmp_path}/gone: no such file or folder")):
        code, _, err = run_train(monkeypatch, capsys, *common, *([] if "--init" in more else init),
                                 *more, "--out", tmp_path / "three")
        assert code == 2 and words in err.splitlines()[-1], err
    assert not (tmp_path / "three").exists()
    code, _, err = run_train(monkeypatch, capsys, *common, "--method", "pooled", "--rank", 4,
                             "--out", tmp_path / "two", "--resume")
    assert code == 2 and "began with init = adapter.safetensors" in err
    code, out, err = run_train(monkeypatch, capsys, *common, *init, "--method", "pooled", "--rank",
                               4, "--out", tmp_path / "two", "--resume")
    assert code == 0 and "finished already, at step 2; nothing to do" in out


def test_the_longest_side_is_in_the_adapter_where_it_was_asked_for(tmp_path, monkeypatch, capsys,
                                                                   short_model):
    """Sampling shrinks its conditions to it; the embedded model has one size and refuses."""
    common = "--data", "tiny", "--model", short_model, "--batch-size", 1, "--steps", 1
    code, _, err = run_train(monkeypatch, capsys, *common, "--longest", 768, "--out", tmp_path)
    assert code == 2 and "--longest 768: this model takes pictures of 64x64 alone" in err
    code, _, err = run_train(monkeypatch, capsys, *common, "--longest", 500, "--out", tmp_path)
    assert code == 2 and "--longest 500: must be a multiple of 16" in err
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr("support.layouts.only_size", lambda vae: None)       # as the released
    for name, more in (("plain", []), ("long", ["--longest", 768])):
        code, out, err = run_train(monkeypatch, capsys, *common, *more, "--method", "lora",
                                   "--out", tmp_path / name)
        assert code == 0, err
        assert ("pictures: at most 768 on the longer side" in out) == (name == "long")
    files = [tmp_path / name / "adapter.safetensors" for name in ("plain", "long")]
    assert [adapters.longest([file]) for file in files] == [512, 768]
    assert adapters.longest([file.parent for file in files]) == 768
    for wrong in ("abc", [], -1):
        save_file({}, tmp_path / "odd.safetensors", {"adapter": json.dumps({"longest": wrong})})
        with pytest.raises(ValueError, match="odd.safetensors: says longest .*, which is no"):
            adapters.longest([tmp_path / "odd.safetensors"])
    assert [load_pipeline(short_model, file, "cpu", "float32").longest for file in files] == [
        512, 768]
    with safe_open(files[0], "pt") as opened:            # the same bytes as ever
        assert "longest" not in opened.metadata()["adapter"]
    for more, note in (([], True), (["--longest", 768], False)):
        code, _, err = run_train(monkeypatch, capsys, *common, "--init", files[1], *more,
                                 "--out", tmp_path / f"after-{note}")
        assert code == 0 and ("was trained with --longest 768, this run is with 512" in err) == note
    code, _, err = run_train(monkeypatch, capsys, *common, "--method", "lora", "--out",
                             tmp_path / "long", "--resume")
    assert code == 2 and "began with longest = 768, not None" in err
