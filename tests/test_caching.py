"""support/caching.py, what is encoded once: the same training, without the encoders."""
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import sample
import train
import vae
from helpers import MODEL, write_set
from sample import load_pipeline
from support import caching, commands
from support.files import write_part
from support.public_sets import PUBLIC

pytestmark = pytest.mark.usefixtures("short_by_default")


@pytest.fixture
def folder(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png")
        rows.append({"target": f"{i}.png", "instruction": f"make it {'red' if i % 2 else 'blue'}",
                     "images": ["0.png"] if i % 2 else [], "conds": [] if i % 3 else ["1.png"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def command(monkeypatch, out: Path, source: object, *rest: object) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(train, "previews", lambda *_: {})
    rest = rest if "--batch-size" in rest else ("--batch-size", 2, *rest)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(source), "--steps", "6", "--lr",
                                      "1e-3", "--method", "lora", "--out", str(out),
                                      *map(str, rest)])
    commands.run(train.main)
    return load_file(out / "adapter.safetensors")


def encoders(monkeypatch) -> list[int]:
    """How many texts and pictures are encoded from now on."""
    calls, real = [], vae.AutoEncoder.moments
    monkeypatch.setattr(vae.AutoEncoder, "moments", lambda self, img: calls.extend(
        range(len(img))) or real(self, img))
    texts = sample.encode_text.__globals__["T5Encoder"]
    forward = texts.forward
    monkeypatch.setattr(texts, "forward", lambda self, ids: calls.extend(
        range(len(ids))) or forward(self, ids))
    return calls


def test_a_cache_changes_nothing_and_is_filled_once(folder, tmp_path, monkeypatch):
    """It encodes one by one: equal to the bit in batches of one, to rounding in others.

    6 texts of 2 kinds, one empty, 6 pictures.
    """
    def runs(name: str, *rest: object) -> dict[str, torch.Tensor]:
        return command(monkeypatch, tmp_path / name, folder, *rest)
    cache = "--cache", tmp_path / "cache"
    plain, plain_pairs = runs("plain", "--batch-size", 1), runs("plain_pairs")
    calls = encoders(monkeypatch)
    filled = runs("filled", "--batch-size", 1, *cache)
    assert len(calls) == 3 + 6
    again, pairs = runs("again", "--batch-size", 1, *cache), runs("pairs", *cache)
    assert len(calls) == 3 + 6                           # nothing is encoded any more
    for name, t in plain.items():
        assert torch.equal(filled[name], t) and torch.equal(again[name], t)
        # AdamW's first steps are as large where a gradient is small: rounding becomes 1e-4 there
        far = (pairs[name] - plain_pairs[name]).norm() / plain_pairs[name].norm().clamp(min=1e-9)
        assert far < 1e-3
    first = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["flow"]
             for name in ("plain_pairs", "pairs")]
    assert first[0] == pytest.approx(first[1], rel=2e-6)
    assert any("_B" in name and t.any() for name, t in plain.items())


def test_an_interrupted_cache_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SHARD", 1)       # every batch is written
    monkeypatch.setattr(caching, "islice", lambda samples, number: islice(samples, 2))
    real, left = sample.encode_picture, [3]

    def dies(*args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "encode_picture", dies)
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "out", folder, "--cache", tmp_path / "cache")
    known = caching.Cache(tmp_path / "cache", json.loads(
        (tmp_path / "cache/about.json").read_text())).found
    assert 0 < len(known) < 2 * 9
    (tmp_path / "cache/.0009.new.safetensors").write_bytes(b"torn")     # killed in writing
    monkeypatch.setattr(train, "encode_picture", real)
    calls = encoders(monkeypatch)
    command(monkeypatch, tmp_path / "out", folder, "--cache", tmp_path / "cache")
    assert len(calls) == 9 - len(known) // 2


def test_a_value_does_not_depend_on_what_is_encoded_with_it(tmp_path):
    """Processes that meet the same picture in other company write the same bits."""
    pipe, found = load_pipeline(MODEL, None, "cpu", "float32"), []
    pictures = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for i, rows in enumerate(([2], [0, 1, 2, 3], [4, 2])):
        pipe.cache = caching.Cache(tmp_path / str(i), {})
        mean, logvar = sample.encode_picture(pipe, pictures[rows])
        found.append(torch.stack([mean, logvar])[:, rows.index(2)])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_known_is_not_computed(tmp_path):
    """By texts or pictures; several tensors with a row for each; without a cache all at once."""
    asked, device = [], torch.device("cpu")
    def lengths(items):
        asked.append(list(items))
        rows = torch.tensor([[float(len(item)), 1.0] for item in items])
        return rows, rows[:, 0]
    plain = caching.cached(None, ["a", "bb", "a"], lengths, device)
    assert asked.pop() == ["a", "bb", "a"] and not asked
    cache = caching.Cache(tmp_path, {"model": "one"})
    for texts, new in ((["a", "bb", "a"], [["a"], ["bb"]]), (["bb", "ccc"], [["ccc"]])):
        found = caching.cached(cache, texts, lengths, device)
        assert asked == new and found[1].tolist() == [len(text) for text in texts]
        assert found[0].tolist() == [[len(text), 1] for text in texts]
        asked.clear()
    assert all(torch.equal(a, b) for a, b in zip(
        plain, caching.cached(cache, ["a", "bb", "a"], lengths, device), strict=True))
    cache.save()
    again = caching.Cache(tmp_path, {"model": "one"})
    assert caching.cached(again, ["ccc"], lengths, device)[1].tolist() == [3] and not asked
    pictures = torch.arange(24.0).reshape(2, 3, 2, 2)
    def means(items):
        asked.append(len(items))
        return (items.mean((1, 2, 3)),)
    first = caching.cached(again, pictures, means, device)
    assert asked == [1, 1] and first[0].tolist() == [5.5, 17.5]
    assert caching.cached(again, pictures.flip(0), means, device)[0].tolist() == [17.5, 5.5]
    assert asked == [1, 1]
    assert caching.key_of(pictures[0]) != caching.key_of(pictures[0].reshape(3, 1, 4))
    with pytest.raises(ValueError, match="made with model one, not two"):
        caching.Cache(tmp_path, {"model": "two"})


def test_changed_pictures_are_encoded_anew(folder, tmp_path, monkeypatch):
    command(monkeypatch, tmp_path / "a", folder, "--cache", tmp_path / "cache")
    Image.new("RGB", (64, 64), "red").save(folder / "5.png")
    calls = encoders(monkeypatch)
    command(monkeypatch, tmp_path / "b", folder, "--cache", tmp_path / "cache")
    assert len(calls) == 1


@pytest.mark.parametrize("change, words", [
    (("--dtype", "bfloat16"), "dtype"), (("--vae", "other"), "vae")])
def test_another_model_is_refused(folder, tmp_path, monkeypatch, capsys, change, words):
    command(monkeypatch, tmp_path / "a", folder, "--cache", tmp_path / "cache")
    before = sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache").iterdir())
    if words == "vae":
        tensors = load_file(MODEL / "vae/diffusion_pytorch_model.safetensors")
        tensors["encoder.conv_in.bias"] += 1
        values = json.loads((MODEL / "vae/config.json").read_text())
        write_part(tensors, values, tmp_path / "other",
                             "diffusion_pytorch_model.safetensors", torch.bfloat16)
        change = ("--vae", tmp_path / "other")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, tmp_path / "b", folder, "--cache", tmp_path / "cache", *change)
    printed = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "--cache" in printed and words in printed
    assert before == sorted((p.name, p.read_bytes()) for p in (tmp_path / "cache").iterdir())


def test_an_endless_source_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "a", "tiny", "--cache", tmp_path / "cache")
    assert "no end" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_draws_are_fixed(tmp_path, monkeypatch):
    """With --cache a row has so many wordings, conditions and boxes; all are encoded before."""
    file = write_set(tmp_path, "subjectspatial")
    for draws in (1, 3):
        source, _ = data.open_source(f"subjectspatial={file}", {}, PUBLIC, draws=draws,
                                     size=(64, 64))
        every = {s.instruction: s for s in source.all()}
        seen = {s.instruction: s for i in range(150) for s in
                source.draw(np.random.default_rng(i), 2)}
        assert seen.keys() == every.keys() and len(list(source.all())) == 3 * 3 * draws
        assert all(np.array_equal(p, q) for name, s in seen.items()
                   for p, q in zip(s.conds, every[name].conds, strict=True))
    calls = encoders(monkeypatch)
    rest = ("--cache", tmp_path / "cache", "--cache-draws", 2)
    command(monkeypatch, tmp_path / "a", f"subjectspatial={file}", *rest)
    number = len(calls)
    command(monkeypatch, tmp_path / "b", f"subjectspatial={file}", *rest)
    assert len(calls) == number > 0
