"""LoRA files of other tools: diffusers, ComfyUI, kohya's scripts.

adapters.read() comes here with a file that train.py has not written.
"""
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from support import layouts
from support.files import json_object, read_metadata, read_tensors

LORA = re.compile(r"(?:transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)?(.+)\."
                  r"(?:lora_(A|B|down|up)(?:\.default)?\.weight|alpha)")
LAYER = re.compile(r"((single_)?transformer_blocks\.\d+|time_text_embed|norm_out)\..+"
                   r"|x_embedder|context_embedder|proj_out")                 # the folder's names
KOHYA = {old.strip(".").replace(".", "_"): old.strip(".") for old in layouts.BFL_TRANSFORMER
         if not old.endswith("scale")}                   # img_attn_qkv -> img_attn.qkv


def is_lora(names: Iterable[str]) -> bool:
    return any(map(LORA.fullmatch, names))


def dotted(module: str) -> str:
    """A module's name as kohya's tools write it, without dots -> with dots; others unchanged."""
    name = re.sub(r"^(double|single)_blocks_(\d+)_", r"\1_blocks.\2.", module)
    name = re.sub(r"^(time|guidance|vector)_in_(in|out)_layer$", r"\1_in.\2_layer", name)
    block, dot, inner = name.rpartition(".")
    return block + dot + KOHYA.get(inner, inner)


def strength(module: str, found: dict[str, Tensor], told: dict, file: Path) -> float:
    """What a layer's B A counts: alpha / r, with alpha beside it, in the metadata, or r itself."""
    rank = len(found["A"])
    try:
        alpha = next((value for name, value in told.get("transformer.alpha_pattern", {}).items()
                      if re.fullmatch(rf"(.*\.)?({name})", module)),        # as PEFT reads them
                     told.get("transformer.lora_alpha", rank))
        root = 0.5 if told.get("transformer.use_rslora") else 1
        scale = float(found.get("alpha", alpha)) / rank ** root
        if not math.isfinite(scale):
            raise ValueError(f"{scale}")
        return scale
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError,
            re.error) as error:
        raise ValueError(f"{file}: the alpha of {module} is no number ({error})") from None


def read(file: Path) -> tuple[dict, dict[str, Tensor]]:
    """A LoRA of diffusers, ComfyUI or kohya -> our adapter's entries and tensors.

    Layers of lower rank are filled up with zeros, and scales go into B, so that one rank serves
    all; on a fused layer the slices of B share an A. Raises: ValueError naming a foreign key.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in read_tensors([file]).items():
        found = LORA.fullmatch(name)
        layer = parts.setdefault(dotted(found[1]), {}) if found else {}
        kind = found and {"down": "A", "up": "B", None: "alpha"}.get(found[2], found[2])
        if not found or kind in layer:
            raise ValueError(f"{file}: is no adapter of train.py's, and {name} is no part of a "
                             "LoRA for this transformer, or is there twice")
        layer[kind] = t
    told = json_object(read_metadata(file).get("lora_adapter_metadata") or "{}", file)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, found in parts.items():
        A, B = (found.get(side, torch.empty(0)) for side in "AB")            # none: refused
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not A.numel() * B.numel():
            raise ValueError(f"{file}: {module} needs lora_A (r, in) and lora_B (out, r)")
        B = B.float() * strength(module, found, told, file)
        new = {name.removesuffix(".weight"): (A.float(), rows) for name, rows in
               layouts.to_folder("transformer", {f"{module}.weight": B}).items()}
        if not new or new.keys() & pairs.keys() or not all(map(LAYER.fullmatch, new)):
            raise ValueError(f"{file}: {module} is no layer, or is there under two names")
        pairs |= new
    if not pairs:
        raise ValueError(f"{file}: holds no tensors")
    rank, tensors = max(len(A) for A, _ in pairs.values()), {}
    for name, (A, B) in pairs.items():
        tensors[f"{name}.lora_A"] = F.pad(A, (0, 0, 0, rank - len(A)))       # (rank, in)
        tensors[f"{name}.lora_B"] = F.pad(B, (0, rank - len(A)))             # (out, rank)
    return {"lora_targets": [f".{name}" for name in pairs], "lora_rank": rank,
            "lora_alpha": rank, "mole_targets": []}, tensors
