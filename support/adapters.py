"""An adapter's file: ours, another tool's LoRA, a run's folder or the paper's.

weights.load_adapter() reads one; support/resume.py writes ours, and takes one from a checkpoint.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mole import Adapter
from support import foreign, lora, research
from support.files import check_tensors, json_object, read_metadata, read_tensors, write_tensors


# What a folder holds its adapter in: of a run, of PEFT, of diffusers.
NAMES = ("adapter.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def file_of(path: Path) -> Path:
    """The file itself, or the folder's. Raises: FileNotFoundError."""
    if not path.is_dir():
        return path
    files = [path / name for name in NAMES if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: holds no adapter, a file called {', '.join(NAMES)}"
                                f"{foreign.found_instead(path)}")
    return files[0]


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The entries of an adapter's configuration, and its tensors.

    path: a file of ours or another tool's LoRA, the folder of a run, or one that the paper's code,
    PEFT or diffusers has written. Raises: FileNotFoundError, ValueError.
    """
    if not path.exists():
        raise foreign.missing(path)
    path = foreign.snapshot(path)
    if (path / "train_config.json").is_file():
        return research.read(path)
    file = file_of(path)
    stored = read_metadata(file).get("adapter")
    if stored is None:
        return lora.read(file)
    config, tensors = json_object(stored, file).get("config"), read_tensors([file])
    if not isinstance(config, dict):
        raise ValueError(f"{file}: its adapter configuration is no JSON object")
    return config, tensors


@torch.no_grad()
def fill_in(adapter: Adapter, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Take saved tensors. Raises: ValueError unless names and shapes are exactly the adapter's."""
    own = adapter.tensors()
    check_tensors({name: p.shape for name, p in own.items()},
                  {name: t.shape for name, t in tensors.items()}, where)
    for name, p in own.items():
        p.copy_(tensors[name])


def write(adapter: Adapter, file: Path, **about: str) -> None:
    """One safetensors file: fp32 tensors, and the whole configuration in the metadata."""
    entries = {"config": asdict(adapter.config), **about}        # one: several have no fixed order
    write_tensors(adapter.tensors(), file, adapter=json.dumps(entries))
