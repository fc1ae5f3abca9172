"""What a checkpoint is, in words, and whether it is whole: python weights.py PATH.

weights.py calls it, and gives it its load().
"""
import shlex
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from support import adapters, foreign, layouts, lora
from support.files import files_of, read_metadata, read_tensors
from text_encoder import CLIPTokenizer, T5Tokenizer

TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer}


def tally(tensors: dict[str, Tensor]) -> str:
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    return (f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, "
            f"{kinds}")


def describe_part(part: str, path: Path, load: Callable) -> tuple[str, str]:
    """A part in a folder or a file: what it is, and what is wrong with it."""
    told = f"{path}: {part}"
    try:
        if part in TOKENIZERS:
            TOKENIZERS[part](path)
            return told, ""
        tensors = read_tensors(files_of(path))
        found = layouts.to_folder(part, tensors)
        scaled = any(name.endswith(".scale_weight") for name in found)
        layout = ("ComfyUI, fp8 with scales" if scaled else
                  "Hugging Face" if found.keys() <= tensors.keys() else "original or ComfyUI")
        told = f"{told}, {layout}, {tally(found)}"
        load(part, path, "meta")                         # all its checks, and no memory
    except (ValueError, FileNotFoundError) as error:
        return told, str(error)
    return told, ""


def describe(path: Path, load: Callable) -> str:
    """What a file or folder is, for a model whether it is whole, and the command that uses it.

    load(part, path, device): reads a part of a model, with all checks, as weights.load() does.
    """
    if not path.exists():
        raise foreign.missing(path)
    path = foreign.snapshot(path)
    sample = "python sample.py --instruction TEXT"
    kind = ("of the research code" if (path / "train_config.json").is_file() else
            "of train.py's" if (path / "adapter.safetensors").is_file() or (
                path.is_file() and "adapter" in read_metadata(path)) else
            "that is a LoRA" if path.is_file() and lora.is_lora(read_tensors([path])) else "")
    if kind:
        return (f"{path}: an adapter {kind}, {tally(adapters.read(path)[1])}\n"
                f"{sample} --adapter {shlex.quote(str(path))}")
    found = layouts.parts_in(path)
    if not found:
        raise ValueError(f"{path}: no FLUX Kontext folder ({', '.join(layouts.OPTIONS)}), "
                         "weights of one of its parts, or adapter")
    told = [describe_part(part, place, load) for part, place in found.items()]
    lines, wrong = [line for line, _ in told], [why for _, why in told if why]
    folder = path not in found.values()
    wrong += [f"{path}: without {part}" for part in layouts.OPTIONS if folder and part not in found]
    if wrong:
        return "\n".join([*lines, *wrong, f"{path}: not whole"])
    named = {part: shlex.quote(str(place)) for part, place in found.items()}
    used = [f"--model {shlex.quote(str(path))}"] if folder else [
        f"{layouts.OPTIONS[part]} {named.get(part, '...')}" for part in layouts.SIGNS
    ] + ["--tokenizers ..."]
    return "\n".join([*lines, f"{path}: whole", " ".join([sample, *used])])
