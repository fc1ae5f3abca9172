"""Tests run from the repository's root, on one thread each, without a network.

Their models are tiny: two threads wait for each other longer than they compute. What a test starts
inherits that.
"""
import math
import os
import re
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"                      # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

from forks import Forks
from helpers import MODEL, ROOT
from sample import Pipeline, load_pipeline
from support import options
from support.configs import read_json
from support.files import read_tensors, write_part


@pytest.fixture(scope="session")
def bare() -> Pipeline:
    """The embedded model without an adapter."""
    return load_pipeline(MODEL, None, "cpu", "float32")


@pytest.fixture(scope="session")
def trained() -> Pipeline:
    """The embedded model with its adapter."""
    return load_pipeline(MODEL, ROOT / "tiny/adapter.safetensors", "cpu", "float32")


@pytest.fixture
def research_frequencies(monkeypatch):
    """exp as it was where the golden file was made: rounded rightly but for one value, an ulp more.

    Processors differ in such ulps, and 1000 t multiplies them: with its own exp a CPU without
    AVX-512 is up to 1.9e-5 away from the golden outputs, with this one as near as any other.
    """
    made = (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double().exp().float()
    made[13] = torch.nextafter(made[13], torch.ones(()))
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: made if x.shape == made.shape else exp(x))


@pytest.fixture(scope="session")
def forks():
    """Runs the project's scripts in processes of their own, without importing torch in each."""
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def short_model(tmp_path_factory) -> Path:
    """A copy of the embedded model with one block of each kind, and its adapter.json beside it.

    Where what is asked does not depend on the model, it takes a third of the time.
    """
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(MODEL, folder)
    shutil.copyfile(ROOT / "tiny/adapter.json", folder.parent / "adapter.json")
    file, config = (folder / "transformer" / name for name in (
        "diffusion_pytorch_model.safetensors", "config.json"))
    values = read_json(config) | {"num_layers": 1, "num_single_layers": 1}
    kept = {name: t for name, t in read_tensors([file]).items()
            if not re.search(r"blocks\.[1-9]", name)}
    write_part(kept, values, folder / "transformer", file.name, torch.bfloat16)
    return folder


@pytest.fixture
def short_by_default(monkeypatch, short_model) -> None:
    """Commands that name no --model take the short one."""
    monkeypatch.setattr(options, "EMBEDDED", short_model)
