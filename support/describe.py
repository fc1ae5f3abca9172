"""What a checkpoint is, in words, and whether it is whole: python weights.py PATH.

weights.py calls it, and gives it its load().
"""
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from dit import DiTConfig, FluxTransformer
from mole import AdapterConfig
from support import (adapters, devices, foreign, layouts, lora, options, origin, research,
                     targets)
from support.configs import config_from, read_json
from support.files import files_of, read_metadata, read_tensors
from support.implied import RELEASED
from support.pictures import PICTURES
from support.resume import CHECKPOINTS
from support.words import as_typed, counted, some_of, span
from text_encoder import CLIPTokenizer, T5Tokenizer

COMMAND = "python sample.py --instruction TEXT"
LORA, RESEARCH = "that is a LoRA", "of the research code"
TEXTS = "the instruction vector"                         # T5's width to CLIP's
# Which of an adapter's tensors tells a layer's width, 0 in or 1 out, and by which dimension.
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


def adapter_kind(path: Path) -> str:
    """Whose adapter a file or folder holds; nothing for none."""
    if research.is_one(path):
        return RESEARCH
    found = adapters.candidates(path)
    if len(found) != 1 or (path / "model_index.json").is_file():
        return ""
    file = found[0]
    if "adapter" in read_metadata(file):
        return "of train.py's"
    return LORA if lora.is_lora(read_tensors([file])) else ""


def describe_adapter(path: Path, kind: str, build_adapter: Callable) -> tuple[list[str], bool]:
    """What an adapter is, which model it fits, and the command that uses it; whether it is whole.

    build_adapter: weights.build_adapter().
    """
    values, tensors = adapters.read(path)
    c = config_from(AdapterConfig, values, path, whole=True)
    targets.check_sizes(c)
    layers = sum(name.endswith(".lora_A") for name in tensors)
    mixtures = [name.removesuffix(".experts_A") for name in tensors if name.endswith(".experts_A")]
    by_token = sum(targets.matches(name, *c.token_targets) for name in mixtures)
    told = [f"{path}: an adapter {kind}, {tally(tensors)}"]
    if layers:
        ranks, alphas, scales = zip(*(
            lora.ranks_and_scales(adapters.file_of(path)) if kind == LORA else
            [(c.lora_rank, c.lora_alpha, c.lora_alpha / c.lora_rank)]))
        told.append(f"LoRA on {counted(layers, 'layer')}: rank {span(ranks)}, alpha "
                    f"{span(alphas)}, scale {span(scales)}")
    if mixtures:
        routed = c.routing + f", {by_token} of them by token" * (by_token > 0)
        routed = "token" if by_token == len(mixtures) else routed
        kept = {"soft": "all", "race": f"{c.top_k} on average", "choice": f"{c.top_k} on average"}
        told.append(f"{c.experts} experts on {counted(len(mixtures), 'layer')}, "
                    f"{kept.get(c.routing, c.top_k)} kept: "
                    f"rank {c.rank}, alpha {c.alpha:g}, scale {c.alpha / c.rank:g}, "
                    f"routed by {routed}")
    line, option, model = fits(tensors)
    if model is None:
        return [*told, line], True
    try:
        with devices.shapes_alone():                     # all that loading checks, and no memory
            adapters.check_whole(build_adapter(model, c), tensors, path)
    except ValueError as error:
        return [*told, str(error), f"{path}: not whole"], False
    return [*told, line, f"{COMMAND}{option} --adapter {as_typed([path])}"], True


def sizes_in(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of each layer that an adapter's tensors belong to: how wide it takes and gives."""
    sizes: dict[str, list[int]] = {}
    for name, t in tensors.items():
        layer, _, side = name.rpartition(".")
        if side in SIZES:
            place, dim = SIZES[side]
            sizes.setdefault(layer, [0, 0])[place] = t.shape[dim]
    if "instruction.proj_in.weight" in tensors:
        sizes[TEXTS] = [tensors["instruction.proj_in.weight"].shape[1],
                        len(tensors["instruction.norm_out.weight"])]
    return {layer: f"{wide} to {out}" for layer, (wide, out) in sizes.items()}


def fits(tensors: dict[str, Tensor]) -> tuple[str, str, FluxTransformer | None]:
    """Which model that is known here has an adapter's layers; its option, and its shapes alone."""
    file, told = options.EMBEDDED / "transformer/config.json", {}
    wanted = sizes_in(tensors)
    for name, config, option in (
            ("FLUX.1-Kontext-dev", RELEASED, " --model FLUX.1-Kontext-dev"),
            ("the embedded model", config_from(DiTConfig, read_json(file), file), "")):
        with devices.shapes_alone():
            model = FluxTransformer(config)
        known = {layer: f"{m.in_features} to {m.out_features}"
                 for layer, m in model.named_modules() if isinstance(m, nn.Linear)}
        known[TEXTS] = f"{config.joint_attention_dim} to {config.pooled_projection_dim}"
        other = [f"{layer} is {size}, there {known.get(layer, 'is none')}"
                 for layer, size in wanted.items() if known.get(layer) != size]
        if not other:
            return f"fits {name} (width {config.width})", option, model
        told[f"{name} (width {config.width})"] = other
    nearest = min(told, key=lambda name: len(told[name]))
    return (f"fits neither {' nor '.join(told)}: of its {len(wanted)} layers {len(told[nearest])} "
            f"are not {nearest.partition(' (')[0]}'s: "
            + some_of(told[nearest], between="; ")), "", None


def describe(path: Path, load: Callable, build_adapter: Callable) -> tuple[str, bool]:
    """What a file or folder is, with the command that uses it, and whether it is whole.

    Of a picture: how it was made.

    load(part, path, device): reads a part of a model, with all checks, as weights.load() does;
    build_adapter(model, config): makes an adapter, as weights.build_adapter() does.
    """
    foreign.check_there(path)
    if path.name in CHECKPOINTS:
        raise ValueError(f"{path}: is what train.py --resume goes on from; the run's adapter is "
                         f"{path.parent / 'adapter.safetensors'}")
    if path.is_file() and path.suffix.lower() in PICTURES:
        return origin.describe(path), True
    path = foreign.snapshot(path)
    kind = adapter_kind(path)
    if kind:
        lines, whole = describe_adapter(path, kind, build_adapter)
        return "\n".join(lines), whole
    found = layouts.parts_in(path)
    if not found:
        files = ", ".join(file.name for file in sorted(path.glob("*.safetensors"))[:3])
        raise ValueError(f"{path}: no FLUX Kontext folder ({', '.join(layouts.OPTIONS)}), "
                         "weights of one of its parts, or adapter"
                         + (f"; name one of its files: {files}" if files else ""))
    told = [describe_part(part, place, load) for part, place in found.items()]
    lines, wrong = [line for line, _ in told], [why for _, why in told if why]
    folder = path not in found.values()
    wrong += [f"{path}: without {part}" for part in layouts.OPTIONS if folder and part not in found]
    if wrong:
        return "\n".join([*lines, *wrong, f"{path}: not whole"]), False
    named = {part: as_typed([place]) for part, place in found.items()}
    used = [f"--model {as_typed([path])}"] if folder else [
        f"{layouts.OPTIONS[part]} {named.get(part, '...')}" for part in layouts.SIGNS
    ] + ["--tokenizers ..."]
    return "\n".join([*lines, f"{path}: whole", " ".join([COMMAND, *used])]), True
