"""An adapter's file: ours, another tool's LoRA, a run's folder or the paper's.

weights.load_adapters() reads them; support/resume.py writes ours, and takes one from a checkpoint.
"""
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mole import Adapter, AdapterConfig, LoRALinear, MoLELinear
from support import foreign, lora, research
from support.commands import check_new, file_and_strength
from support.configs import config_from, json_object
from support.files import check_tensors, read_metadata, read_tensors, write_tensors
from support.pictures import LONGEST
from support.words import note

# What a folder holds its adapter in: of a run, of PEFT, of diffusers.
FILE_NAMES = ("adapter.safetensors", "adapter_model.safetensors",
              "pytorch_lora_weights.safetensors")
COUNTED = (".moments", ".calls", ".threshold")           # ends of names of what routings count


def candidates(path: Path) -> list[Path]:
    """The file itself, the folder's one of FILE_NAMES, or else all its safetensors files."""
    if not path.is_dir():
        return [path]
    known = [path / name for name in FILE_NAMES if (path / name).is_file()]
    return known[:1] or sorted(path.glob("*.safetensors"))


def file_of(path: Path) -> Path:
    """The file itself, or the folder's. Raises: FileNotFoundError; ValueError for several."""
    files = candidates(path)
    if not files:
        raise FileNotFoundError(f"{path}: holds no adapter, a file called {', '.join(FILE_NAMES)}"
                                f"{foreign.found_instead(path)}")
    if len(files) > 1:
        raise ValueError(f"{path}: holds {len(files)} .safetensors files ({files[0].name}, "
                         f"{files[1].name}, ...), none called {', '.join(FILE_NAMES)}; name one")
    return files[0]


def files_in(path: Path) -> list[Path]:
    """All files of an adapter: the paper's folder has four. Raises: FileNotFoundError."""
    path = foreign.snapshot(path)
    if research.is_one(path):
        return sorted(file for file in path.iterdir() if file.is_file())
    return [file_of(path)]


def chosen(given: object, model: Path) -> list[tuple[Path, float]]:
    """Adapters that a command or a Python caller asks for, each with its strength (1: as trained).

    given: "auto", adapter.safetensors beside the model's folder, if any; None or "none"; or one or
    several of FILE, "FILE:STRENGTH", (FILE, STRENGTH). Raises: FileNotFoundError, ValueError.
    """
    if given == "auto":
        beside = model.parent / "adapter.safetensors"
        return [(beside, 1.0)] if beside.is_file() else []
    several = given if isinstance(given, list) else [given]
    if "none" in several and len(several) > 1:
        raise ValueError("--adapter none: not together with another --adapter")
    found = []
    for one in several:
        if one is None or one == "none":
            continue
        path, strength = one if isinstance(one, tuple) else file_and_strength(str(one))
        foreign.check_there(Path(path), "--adapter")
        found.append((Path(path), float(strength)))
    return found


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The entries of an adapter's configuration, and its tensors.

    path: a file of ours or another tool's LoRA, the folder of a run, or one that the paper's code,
    PEFT or diffusers has written. Raises: FileNotFoundError, ValueError.
    """
    foreign.check_there(path)
    path = foreign.snapshot(path)
    if research.is_one(path):
        file, (config, tensors) = path, research.read(path)
    else:
        file = file_of(path)
        stored = read_metadata(file).get("adapter")
        config, tensors = lora.read(file) if stored is None else (
            json_object(stored, file).get("config"), read_tensors([file]))
    if not isinstance(config, dict):
        raise ValueError(f"{file}: its adapter configuration is no JSON object")
    for name, t in tensors.items():
        if not t.float().isfinite().all():
            raise ValueError(f"{file}: {name} holds numbers that are not finite: its training has "
                             "diverged (take an earlier checkpoint), or the file is damaged")
    if path != file and file.name not in FILE_NAMES:
        note(f"{file}: taken as the adapter of {path}, which holds no other .safetensors file")
    return config, tensors


def longest(paths: Iterable[Path]) -> int:
    """The most pixels that a side of a picture had where such adapters were trained."""
    found = []
    for path in map(foreign.snapshot, paths):
        if not research.is_one(path):                    # the paper's says nothing of it
            stored = json_object(read_metadata(file_of(path)).get("adapter", "{}"), path)
            side = str(stored.get("longest", 0))
            if not side.isdecimal():
                raise ValueError(f"{path}: says longest {side!a}, which is no number of pixels")
            found.append(int(side))
    return max(found, default=0) or LONGEST


def check_whole(adapter: Adapter, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Raises: ValueError unless saved tensors have exactly the adapter's names and shapes."""
    check_tensors({name: p.shape for name, p in adapter.tensors().items()},
                  {name: t.shape for name, t in tensors.items()}, where)


@torch.no_grad()
def fill_in(adapter: Adapter, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Take saved tensors. Raises: ValueError as check_whole() does, with a way out."""
    try:
        check_whole(adapter, tensors, where)
    except ValueError as error:
        raise ValueError(f"{error}; if it is another model's, name that by --model (python "
                         "weights.py FILE says which one it fits)") from None
    for name, p in adapter.tensors().items():
        p.copy_(tensors[name])


def mixtures(adapter: Adapter | None) -> list[MoLELinear]:
    """The layers with experts."""
    layers = adapter.layers.values() if adapter else []
    return [layer for layer in layers if isinstance(layer, MoLELinear)]


def routed(adapter: Adapter | None) -> list[MoLELinear]:
    """The layers that an instruction routes."""
    return [layer for layer in mixtures(adapter) if not layer.by_token]


def combined(parts: list[tuple[Path, Adapter]]) -> Adapter:
    """Several adapters as one. None is placed in the model yet; the one that this gives will be.

    On one layer, LoRAs are joined along their rank; beside experts a LoRA lies beneath, as part of
    what they add to. Raises: ValueError for two with experts, whose instructions would differ.
    """
    mixed = [path for path, part in parts if mixtures(part)]
    if len(mixed) > 1:
        raise ValueError(f"--adapter: {mixed[0]} and {mixed[1]} both have experts; only one "
                         "may, beside any number of plain LoRAs")
    whole, *others = sorted((part for _, part in parts), key=lambda part: not mixtures(part))
    for other in others:
        for name, layer in other.layers.items():
            known = whole.layers[name] if name in whole.layers else None
            whole.layers[name] = with_lora(known, layer) if known else layer
    return whole


def with_lora(layer: LoRALinear | MoLELinear, other: LoRALinear) -> LoRALinear | MoLELinear:
    """A layer that adds what another adapter's LoRA adds, too."""
    if isinstance(layer, MoLELinear):
        layer.base = with_lora(layer.base, other) if isinstance(layer.base, LoRALinear) else other
        return layer
    A = torch.cat([layer.lora_A, other.lora_A])                              # (r + r', in)
    B = torch.cat([layer.scale * layer.lora_B, other.scale * other.lora_B], 1)
    layer.lora_A, layer.lora_B, layer.scale = nn.Parameter(A), nn.Parameter(B), 1.0
    return layer


def write(adapter: Adapter, file: Path, **about: str) -> None:
    """One safetensors file: fp32 tensors, and the whole configuration in the metadata."""
    entries = {"config": asdict(adapter.config), **about}        # one: several have no fixed order
    write_tensors(adapter.tensors(), file, adapter=json.dumps(entries))


def at_strength(config: AdapterConfig, strength: float) -> AdapterConfig:
    """With so much of what an adapter was trained to add: by its experts, and by its LoRA."""
    return replace(config, alpha=config.alpha * strength, lora_alpha=config.lora_alpha * strength)


def write_bf16(path: Path, file: Path, strength: float = 1) -> None:
    """Write an adapter of ours once more, in bf16, but for what routings count; fp32 when read.

    strength: of what it was trained to, as FILE:STRENGTH means it.
    Raises: FileNotFoundError; ValueError for one that is not ours, or a file that exists.
    """
    check_new("--to-bf16", file)
    values, tensors = read(path)
    metadata = read_metadata(file_of(foreign.snapshot(path)))
    if "adapter" not in metadata:
        raise ValueError(f"--to-bf16 {file}: {path} is no adapter of train.py's")
    config = at_strength(config_from(AdapterConfig, values, path, whole=True), strength)
    entries = json.loads(metadata["adapter"]) | {"config": asdict(config)}
    stored = {name: t if name.endswith(COUNTED) else t.bfloat16() for name, t in tensors.items()}
    write_tensors(stored, file, adapter=json.dumps(entries))
