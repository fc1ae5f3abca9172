"""Files: safetensors read lazily, writing that is whole or nothing.

Every other room that writes, or reads tensors, goes through here, as do weights.py and the
commands; JSON is read in support/configs.py. On the CPU safetensors maps its files, so a tensor
costs memory only when its pages are touched.
"""
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support import foreign
from support.configs import read_json


def files_of(path: Path) -> list[Path]:
    """A part's safetensors files: the one given, or its folder's, by the index if there is one."""
    if not path.is_dir():
        return [path]
    indices = (sorted(path.glob("*.safetensors.index.json"))         # or of a variant, as fp16
               or sorted(path.glob("*.safetensors.index.*.json")))
    if indices:
        names = read_json(indices[0]).get("weight_map")
        if not isinstance(names, dict) or not all(
                Path(str(n)).name == n and n.endswith(".safetensors") for n in names.values()):
            raise ValueError(f"{indices[0]}: weight_map must name files of the same folder, "
                             "all .safetensors")
        return [path / name for name in sorted(set(names.values()))]
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(f"{path}: expected one .safetensors file or an index, "
                                f"found {len(files)} files"
                                + ("" if files else foreign.found_instead(path)))
    return files


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """A safetensors file. Raises: FileNotFoundError; ValueError when it is cut or foreign."""
    foreign.check_there(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: is {'a folder; name a file in it' if file.is_dir() else 'no regular file'}")
    foreign.check_weights(file)
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); if its download was "
                         f"cut, {foreign.AGAIN}") from None


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of some safetensors files, mapped from disk. Raises: as open_safetensors()."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with open_safetensors(file) as handle:
            for name in handle.keys():
                if name in tensors:
                    raise ValueError(f"{file}: tensor {name} occurs in another shard too")
                tensors[name] = handle.get_tensor(name)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The text entries of a safetensors file's header. Raises: as open_safetensors()."""
    with open_safetensors(file) as handle:
        return handle.metadata() or {}


def check_tensors(expected: dict[str, torch.Size], found: dict[str, torch.Size],
                  where: str | Path) -> None:
    """Raises: ValueError naming what is missing, foreign or of another shape."""
    problems = {"missing": sorted(expected.keys() - found.keys()),
                "unexpected": sorted(found.keys() - expected.keys()),
                "of another shape": [f"{name} {tuple(found[name])} instead of {tuple(shape)}"
                                     for name, shape in expected.items()
                                     if found.get(name, shape) != shape]}
    problems = [f"{len(names)} {what}: {', '.join(names[:3])}"
                + f" and {len(names) - 3} more" * (len(names) > 3)
                for what, names in problems.items() if names]
    if problems:
        raise ValueError(f"{where}: tensors do not match the configuration: {'; '.join(problems)}")


def unpickled(file: Path) -> object:
    """What torch.save wrote; no code in the file is run. Raises: ValueError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError,
            AssertionError, pickle.UnpicklingError) as error:    # torch checks little
        why = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        if isinstance(error, EOFError) or re.search("central directory|Errno 22", why):
            why = "it is cut short: what wrote or copied it did not end"
        raise ValueError(f"{file}: cannot be read ({why})") from None


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write a file or folder to. What stood in `file` stays whole until all went well.

    Raises: OSError naming `file` when it cannot be written.
    """
    aside = file.with_name(f".{file.stem}.new{file.suffix}")
    try:
        shutil.rmtree(aside, ignore_errors=True)         # a folder that a killed run has left
        yield aside
        os.replace(aside, file)
    except (SafetensorError, RuntimeError, OSError) as error:    # the libraries' words, or its own
        if isinstance(error, OSError) and error.errno is None:
            raise                                        # said already, of a file within
        why = getattr(error, "strerror", None) or error
        if "unexpected pos" in str(error):               # torch's words for a write cut short
            why = "No space left on device?"
        raise OSError(f"{file}: cannot be written ({why})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    """A safetensors file, whole or not at all; others may read it too, not its owner alone."""
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(file) as aside:
        save_file(stored, aside, metadata=metadata or {"format": "pt"})
        aside.chmod(0o644)


def write_text(file: Path, text: str) -> None:
    """A file of text, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(file: Path, value: object) -> None:
    """A JSON file, as write_text() writes it."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_part(tensors: dict[str, Tensor], config: dict, folder: Path, name: str,
                 dtype: torch.dtype) -> None:
    """Write one component, config.json and tensors, the way weights.load() reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors({key: t.to(dtype) for key, t in tensors.items()}, folder / name)
    write_json(folder / "config.json", config)
