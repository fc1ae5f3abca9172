"""What a checkpoint is, in words, and whether it is whole: python weights.py PATH.

weights.py calls it, and gives it its load().
"""
import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dit import DiTConfig, FluxTransformer
from mole import AdapterConfig
from support import adapters, foreign, layouts, lora, options, origin, targets
from support.files import config_from, files_of, read_json, read_metadata, read_tensors
from text_encoder import CLIPTokenizer, T5Tokenizer

RELEASED = DiTConfig(64, 19, 38, 128, 24, 4096, 768, (16, 56, 56), guidance_embeds=True)
LORA, RESEARCH = "that is a LoRA", "of the research code"
# Of an adapter's tensors: whether in or out of the layer is told, and by which dimension.
SIZES = {"lora_A": (0, 1), "lora_B": (1, 0), "experts_A": (0, 0), "experts_B": (1, 1)}
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


def span(values: list[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def adapter_kind(path: Path) -> str:
    """Whose adapter a file or folder holds; nothing for none."""
    if (path / "train_config.json").is_file():
        return RESEARCH
    if path.is_dir() and not any((path / name).is_file() for name in adapters.NAMES):
        return ""
    file = adapters.file_of(path)
    if "adapter" in read_metadata(file):
        return "of train.py's"
    return LORA if lora.is_lora(read_tensors([file])) else ""


def describe_adapter(path: Path, kind: str) -> list[str]:
    """What an adapter is made of, how strong it is, and which model it fits, in lines."""
    values, tensors = adapters.read(path)
    c = config_from(AdapterConfig, values, path, whole=True)
    layers = sum(name.endswith(".lora_A") for name in tensors)
    mixtures = sum(name.endswith(".experts_A") for name in tensors)
    targets.check_sizes(c)
    pairs = (lora.ranks_and_strengths(adapters.file_of(path)) if kind == LORA else
             [(c.lora_rank, c.lora_alpha / c.lora_rank)])
    told = [f"{path}: an adapter {kind}, {tally(tensors)}"]
    if layers:
        told.append(f"LoRA on {layers} layers: rank {span([r for r, _ in pairs])}, alpha "
                    f"{span([r * s for r, s in pairs])}, strength {span([s for _, s in pairs])}")
    if mixtures:
        told.append(f"{c.experts} experts on {mixtures} layers, {c.top_k} kept: rank {c.rank}, "
                    f"alpha {c.alpha:g}, strength {c.alpha / c.rank:g}, routed by {c.routing}")
    return [*told, fits(tensors)]


def fits(tensors: dict[str, Tensor]) -> str:
    """Which of the models that are known here has an adapter's layers, in their sizes."""
    sizes: dict[str, list[int]] = {}                     # of a layer: in, out
    for name, t in tensors.items():
        layer, _, side = name.rpartition(".")
        if side in SIZES:
            place, dim = SIZES[side]
            sizes.setdefault(layer, [0, 0])[place] = t.shape[dim]
    file = options.EMBEDDED / "transformer/config.json"
    found = []
    for model, config in (("the embedded model", config_from(DiTConfig, read_json(file), file)),
                          ("FLUX.1-Kontext-dev", RELEASED)):
        with torch.device("meta"):
            linears = dict(FluxTransformer(config).named_modules())
        if all(layer in linears and [linears[layer].in_features, linears[layer].out_features]
               == size for layer, size in sizes.items()):
            return f"fits {model} (width {config.width})"
        found.append(f"{model} (width {config.width})")
    layer, (wide, out) = next(iter(sizes.items()))
    return f"fits neither {' nor '.join(found)}: its {layer} is {wide} to {out}"


def describe(path: Path, load: Callable) -> str:
    """What a file or folder is, for a model whether it is whole, and the command that uses it.

    Of a picture: how it was made.

    load(part, path, device): reads a part of a model, with all checks, as weights.load() does.
    """
    if not path.exists():
        raise foreign.missing(path)
    if path.is_file() and not foreign.is_header(foreign.start_of(path)):
        if origin.begins_as_picture(path):
            return origin.describe(path)
    path = foreign.snapshot(path)
    sample = "python sample.py --instruction TEXT"
    kind = adapter_kind(path)
    if kind:
        return "\n".join([*describe_adapter(path, kind),
                          f"{sample} --adapter {shlex.quote(str(path))}"])
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
