"""LoRA files of other tools: diffusers, ComfyUI, kohya's scripts, ai-toolkit, PEFT, XLabs, ...

adapters.read() comes here with a file that train.py has not written. Trainers put many prefixes
before a layer's name, and write it with dots or underscores: it is compared without either.
"""
import math
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import DiTConfig, FluxTransformer
from support import devices, foreign, layouts
from support.configs import json_object, read_json
from support.files import read_metadata, read_tensors
from support.words import note

# to_q.lora_A.weight, to_q.lora_down.default.weight, to_q_lora.up.weight, qkv_lora1.down.weight
FACTOR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?(\d?)[._](A|B|down|up)"
                    r"(?:\.(?!bias)\w+)?(?:\.weight)?")
ALPHA = re.compile(r"(.+?)(?:[._]lora)?\.(?:lora_)?alpha")
TEXT = re.compile(r"(lora_|base_model\.model\.)?(te\d?|text_encoders?(_\d)?|text_model|clip(_[lg])?"
                  r"|t5(xxl)?|bundle_emb)[._].+")      # the last: words that were trained
OTHERS = {"DoRA": r"dora_scale|lora_magnitude_vector", "LoKr": r"lokr_", "LoHa": r"hada_",
          "OFT or BOFT": r"oft_", "LoCon's middle factor": r"lora_mid",
          (WHOLE := "changed biases or whole layers"): r"\.bias$|diff(_b)?$|(set|reshape)_weight$"}
PREFIX = "(?:base|model|module|orig|mod|diffusion|transformer|unet|dit|flux|lora|lycoris)*"
ELSEWHERE = re.compile(r"block|layer|control|vae|text|clip|t5|\d", re.I)    # in another prefix
OLDER = {"transformer_blocks.#.attn.to_out": "transformer_blocks.#.attn.to_out.0",   # diffusers'
         "double_blocks.#.qkv1": "double_blocks.#.img_attn.qkv",             # and XLabs' processors
         "double_blocks.#.qkv2": "double_blocks.#.txt_attn.qkv",
         "double_blocks.#.proj1": "double_blocks.#.img_attn.proj",
         "double_blocks.#.proj2": "double_blocks.#.txt_attn.proj",
         "single_blocks.#.qkv": "single_blocks.#.img_attn.qkv",              # three of linear1's
         "single_blocks.#.proj": "single_blocks.#.linear2"}
ALPHA_IS_RANK = {"alpha": "rank"}                        # in the header of what export.py writes
# How PEFT begins where the base is changed too: such a file alone does not say what was trained.
CHANGED = re.compile("(pissa|olora|loftq|corda).*")


def bare(name: str) -> str:
    """A module's name without separators."""
    return re.sub("[._]", "", name.replace("processor", ""))


@cache
def known_layers() -> tuple[re.Pattern, dict[str, str]]:
    """What a trainer may call a layer; bare name -> name, in the folder's layout or the original's.

    # is a block's number.
    """
    with devices.shapes_alone():
        model = FluxTransformer(DiTConfig(64, 1, 1, 8, 1, 8, 8, (2, 2, 4), guidance_embeds=True))
    ours = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    places = ("", "double_blocks.0.", "single_blocks.0.", "time_in.", "guidance_in.", "vector_in.")
    table = layouts.BFL_TRANSFORMER
    theirs = [f"{place}{key}".strip(".") for place in places for key in table
              if key.startswith(("img_in", "txt_in", "final_layer")) == (not place)
              and all(name.strip(".") in ours for name in layouts.folder_names(place + key, table))]
    names = [re.sub(r"(?<=blocks\.)0", "#", name) for name in ours + theirs]
    known = {bare(name): name for name in names} | {bare(old): name for old, name in OLDER.items()}
    return re.compile(f"{PREFIX}({'|'.join(known)})"), known


def layer_named(module: str) -> str | None:
    """The layer that a trainer calls so, in the layout it speaks of; None for none."""
    number = re.search(r"(?<=blocks)\d+", bare(module))
    text = re.sub(r"(?<=blocks)\d+", "#", bare(module), count=1)
    pattern, known = known_layers()
    found = pattern.fullmatch(text)
    return found and known[found[1]].replace("#", number[0] if number else "")


def another_prefix(modules: list[str]) -> str:
    """What stands before all layers' names and is none of the usual prefixes; often nothing."""
    common = os.path.commonprefix(modules)
    for end in (0, *(separator.end() for separator in re.finditer("[._]", common))):
        if not ELSEWHERE.search(common[:end]) and all(layer_named(m[end:]) for m in modules):
            return common[:end]
    return ""


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors' names are those of a LoRA, of any kind."""
    others = "|".join(OTHERS.values())
    return any(FACTOR.fullmatch(name) or ALPHA.fullmatch(name) or re.search(
        rf"(lora|lycoris).*({others})", name) for name in names)


def layers_in(file: Path) -> tuple[dict[str, dict[str, Tensor]], list[str], str]:
    """By layer A, B, alpha; names of text encoders' tensors; another_prefix() of all others.

    Raises: ValueError naming a foreign key, or a layer without both factors.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    tensors, left_out = read_tensors([file]), []
    foreign.check_quantised(tensors, file)               # SVDQuant's factors are called lora too
    if not is_lora(tensors):
        raise ValueError(f"{file}: is no adapter of train.py's, and no LoRA of another tool")
    prefix = another_prefix([found[1] + found[2] for name in tensors if not TEXT.fullmatch(name)
                             and (found := FACTOR.fullmatch(name))])
    for name, t in tensors.items():
        if TEXT.fullmatch(name):
            left_out.append(name)
            continue
        other = next((kind for kind in OTHERS if re.search(OTHERS[kind], name)), None)
        if other == WHOLE and not t.float().any():       # of a merge by ComfyUI: changes nothing
            continue
        if other:
            raise ValueError(f"{file}: {name} shows {other}; only plain LoRA is read")
        factor, alpha = FACTOR.fullmatch(name), ALPHA.fullmatch(name)
        if not factor and not alpha:
            raise ValueError(f"{file}: {name} is neither a factor of a LoRA nor its alpha; only "
                             "plain LoRA is read")
        module = factor[1] + factor[2] if factor else alpha[1]
        layer = layer_named(module.removeprefix(prefix))
        if layer is None:
            raise ValueError(f"{file}: {name} is no part of a LoRA for this transformer; no layer "
                             "of it is called so")
        kind = {"down": "A", "up": "B"}.get(factor[3], factor[3]) if factor else "alpha"
        if kind in layers.setdefault(layer, {}):
            raise ValueError(f"{file}: {name}: {layer} is there under two names")
        layers[layer][kind] = t
    if not layers:
        raise ValueError(f"{file}: holds no tensors for the transformer")
    for layer, found in layers.items():
        A, B = (found.get(side, torch.empty(0)) for side in "AB")            # none: refused
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not A.numel() * B.numel():
            raise ValueError(f"{file}: {layer} needs lora_A (r, in) and lora_B (out, r)")
    return layers, left_out, prefix


def settings_of(file: Path) -> dict:
    """PEFT's settings: in the file's own header (diffusers), or in adapter_config.json beside it.

    Raises: ValueError for those with which the file alone is no plain LoRA.
    """
    told = json_object(read_metadata(file).get("lora_adapter_metadata") or "{}", file)
    told = {key.removeprefix("transformer."): value for key, value in told.items()}
    beside = file.with_name("adapter_config.json")
    if not told and file.stem == "adapter_model" and beside.is_file():
        told = read_json(beside)
    for wrong, why in (((told.get("peft_type") or "LORA") != "LORA", f"{told.get('peft_type')}"),
                       (told.get("use_dora"), "DoRA"),
                       (CHANGED.fullmatch(str(told.get("init_lora_weights"))),
                        f"{told.get('init_lora_weights')}, which changes the model's own weights")):
        if wrong:
            raise ValueError(f"{file}: its settings say {why}; only plain LoRA is read")
    return told


def of_layer(told: dict, pattern: str, layer: str, otherwise: object) -> object:
    """A layer's entry in alpha_pattern or rank_pattern, as PEFT reads them."""
    return next((value for name, value in (told.get(pattern) or {}).items()
                 if re.fullmatch(rf"(.*\.)?({name})", layer)), otherwise)


def alpha_and_scale(layer: str, found: dict[str, Tensor], told: dict,
                    file: Path) -> tuple[float, float]:
    """A layer's alpha, and the scale of B A: alpha / r, or if rank-stabilised alpha / sqrt(r).

    Alpha is the layer's own tensor, else what the settings say, else r.
    """
    rank = len(found["A"])
    try:
        alpha = of_layer(told, "alpha_pattern", layer, told.get("lora_alpha", rank))
        alpha, root = float(found.get("alpha", alpha)), 0.5 if told.get("use_rslora") else 1
        scale = alpha / rank ** root
        if not math.isfinite(scale):
            raise ValueError(f"{scale}")
        said = of_layer(told, "rank_pattern", layer, told.get("r", rank))
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError,
            re.error) as error:
        raise ValueError(f"{file}: the alpha of {layer} is no number ({error})") from None
    if "alpha" not in found and said != rank:
        raise ValueError(f"{file}: {layer} has rank {rank}, its settings say {said}; so its "
                         "scale is unknown")
    return alpha, scale


def ranks_and_scales(file: Path) -> list[tuple[int, float, float]]:
    """Rank, alpha and scale of each layer, as the file says them. Raises: as read() does."""
    layers, told = layers_in(file)[0], settings_of(file)
    return [(len(found["A"]), *alpha_and_scale(layer, found, told, file))
            for layer, found in layers.items()]


def read(file: Path) -> tuple[dict, dict[str, Tensor]]:
    """A LoRA of another tool -> our adapter's entries and tensors.

    Layers of lower rank are filled up with zeros, and scales go into B, so that one rank serves
    all; on a fused layer the slices of B share an A. Raises: ValueError naming a foreign key.
    """
    (layers, left_out, prefix), told = layers_in(file), settings_of(file)
    if prefix:
        note(f"{file}: all names begin with {prefix}, which is taken for the transformer")
    if left_out:
        note(f"{file}: {len(left_out)} tensors for text encoders ({left_out[0]}, ...) are left "
             "out; only those for the transformer are used")
    silent = [layer for layer, found in layers.items() if "alpha" not in found]
    ours = read_metadata(file).items() >= ALPHA_IS_RANK.items()
    if silent and not ours and "lora_alpha" not in told and "alpha_pattern" not in told:
        note(f"{file}: no alpha is said for {len(silent)} of {len(layers)} layers; taken as their "
             "rank, so that B A counts once")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, found in layers.items():
        B = found["B"].float() * alpha_and_scale(layer, found, told, file)[1]
        new = {name.removesuffix(".weight"): (found["A"].float(), rows) for name, rows in
               layouts.to_folder("transformer", {f"{layer}.weight": B}).items()}
        if new.keys() & pairs.keys():
            raise ValueError(f"{file}: {layer} is there under two names")
        pairs |= new
    rank, tensors = max(len(A) for A, _ in pairs.values()), {}
    for name, (A, B) in pairs.items():
        tensors[f"{name}.lora_A"] = F.pad(A, (0, 0, 0, rank - len(A)))       # (rank, in)
        tensors[f"{name}.lora_B"] = F.pad(B, (0, rank - len(A)))             # (out, rank)
    return {"lora_targets": [f".{name}" for name in pairs], "lora_rank": rank,
            "lora_alpha": rank, "mole_targets": []}, tensors
