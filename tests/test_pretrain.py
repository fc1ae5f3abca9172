"""The embedded model is made from nothing: every stage, a few steps each, resumed in between."""
import sys

import pytest
import torch

import sample
from tiny import pretrain

STAGES = ["--vae-steps", "2", "--samples", "300", "--no-compile"]


@pytest.fixture
def all_threads():
    """Its batches are large, unlike other tests'."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_stage_runs_and_the_result_is_a_model(tmp_path, monkeypatch, all_threads):
    def run(*arguments: str) -> None:
        paths = ["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *STAGES, *paths, *arguments])
        pretrain.main()
    run("--steps", "1")
    (tmp_path / "model/model_index.json").unlink()       # as if it had been stopped there
    run("--steps", "2")
    written = (tmp_path / "model/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    run("--steps", "2")                                  # finished stages are skipped
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    assert file.read_bytes() == written
    pipe = sample.load_pipeline(tmp_path / "model", None, "cpu", "float32")
    given = sample.condition(pipe, ["a star"], [], [])
    picture, _ = sample.generate(pipe, given, sample.seeded_noise([0], (64, 64)), steps=1)
    assert picture.shape == (1, 64, 64, 3)


def test_a_finished_model_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", str(tmp_path),
                                      "--work", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="--out"):
        pretrain.main()
