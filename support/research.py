"""The paper's research code: its JSON configuration and its four files, read and written.

adapters.read() and methods.chosen() read them; python weights.py --to-research writes them.
"""
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mole import AdapterConfig
from support.configs import config_from, of_kind, read_json
from support.files import read_tensors, replacing, unpickled, write_json, write_tensors

RESEARCH = {"num_experts": "experts", "num_experts_per_tok": "top_k", "rank": "rank",
            "alpha": "alpha", "type_aux_loss_alpha": "balance_weight",
            "token_aux_loss_alpha": "token_balance_weight", "resampler_heads": "resampler_heads",
            "orthogonal_reg_alpha": "orthogonality_weight", "use_type_embedding": "resampler",
            "target_modules": "mole_targets"}            # its moe_config -> our entries
CONFIG = "train_config.json"                             # in the adapter's folder
BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


def is_one(path: Path) -> bool:
    """Whether a path is the folder of such an adapter."""
    return (path / CONFIG).is_file()


def from_research(values: dict, where: str | Path) -> dict:
    """Its JSON configuration -> our adapter's entries. Raises: ValueError for other routings."""
    lora, moe = (values.get(f"{part}_config", {}) for part in ("lora", "moe"))
    if not isinstance(lora, dict) or not isinstance(moe, dict):
        raise ValueError(f"{where}: lora_config and moe_config must be JSON objects")
    if moe.get("mole_expert", "LoRAMoE") != "LoRAMoE":
        raise ValueError(f"{where}: mole_expert {moe['mole_expert']!r}: only LoRAMoE is read")
    ours = {"lora_targets": lora.get("target_modules", []), "mole_targets": [], "token_targets": []}
    ours |= {name: lora[key] for name, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha"))
             if key in lora}
    ours |= {name: moe[key] for key, name in RESEARCH.items() if key in moe}
    names = ours["mole_targets"]
    if not isinstance(names, list) or not of_kind(tuple(names), tuple[str, ...]):
        raise ValueError(f"{where}: target_modules must be a list of names")
    for kind, block in BLOCKS.items():
        chosen = moe.get(f"token_route_overrides_{kind}") or []
        if chosen != "all" and not isinstance(chosen, list):
            raise ValueError(f"{where}: token_route_overrides_{kind} must be a list or \"all\"")
        inside = [name.removeprefix(f"{block}.*.") for name in names
                  if name.startswith(BLOCKS["single"]) == (kind == "single")]
        ours["token_targets"] += [f"{block}.{i}.{name}" for name in inside
                                  for i in ("*" if chosen == "all" else chosen)]
    return ours


def entries_of(file: Path) -> tuple[dict, bool]:
    """A configuration file's entries, and whether it is the research code's, which says it all.

    Raises: FileNotFoundError, ValueError.
    """
    values = read_json(file)
    theirs = bool(values.keys() & {"lora_config", "moe_config"})
    return (from_research(values, file) if theirs else values), theirs


def to_research(c: dict, where: str | Path) -> dict:
    """Our adapter's entries -> its JSON configuration. Raises: ValueError for other routings."""
    if c["routing"] not in ("instruction", "token"):
        raise ValueError(f"{where}: routing {c['routing']!r} has no form in the research code")
    theirs = {"lora_config": {"r": c["lora_rank"], "lora_alpha": c["lora_alpha"],
                              "init_lora_weights": "gaussian", "target_modules": c["lora_targets"]}}
    if c["mole_targets"]:
        theirs["moe_config"] = {"mole_expert": "LoRAMoE", "dropout": 0.0,
                                "routing_policy": "default", "train_mole_only": True,
                                **{key: c[name] for key, name in RESEARCH.items()}}
        for kind, block in BLOCKS.items():
            found = {number for target in c["token_targets"]
                     for number in re.findall(rf"^{block}\.(\d+|\*)\.", target)}
            theirs["moe_config"][f"token_route_overrides_{kind}"] = (
                "all" if c["routing"] == "token" or "*" in found else sorted(map(int, found)))
    back = from_research(json.loads(json.dumps(theirs)), where)["token_targets"]
    if c["routing"] != "token" and sorted(back) != sorted(c["token_targets"]):
        raise ValueError(f"{where}: token_targets {c['token_targets']} have no form in the "
                         "research code, which names whole blocks of its target_modules")
    return theirs


def read_pickle(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, under a key if there is one. Raises: FileNotFoundError, ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    found = unpickled(file)
    if key and isinstance(found, dict):
        found = found.get(key)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{file}: holds no tensors by name")
    return found


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """An adapter in the research code's four files -> our adapter's entries and tensors.

    Raises: FileNotFoundError, ValueError.
    """
    config = from_research(read_json(folder / CONFIG), folder / CONFIG)
    lora = read_tensors([folder / "pytorch_lora_weights.safetensors"])
    ours = {name.removeprefix("transformer.").removesuffix(".weight"): t
            for name, t in lora.items()}
    file, experts = folder / "mole_experts.pt", {}
    for name, t in read_pickle(file).items() if config["mole_targets"] else ():
        found = re.fullmatch(r"(.+)\.experts\.(\d+)\.(left|right)", name)
        if found:
            experts.setdefault((found[1], found[3]), {})[int(found[2])] = t
        else:
            ours[name.replace("gate.weight", "router.weight")] = t
    for (layer, side), parts in experts.items():         # (in, r) or (r, out) -> side by side
        name, dim = ("experts_A", 1) if side == "left" else ("experts_B", 0)
        try:
            ours[f"{layer}.{name}"] = torch.cat([parts[e] for e in sorted(parts)], dim)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{file}: experts of {layer} do not fit together ({error})") from None
    if config["mole_targets"] and config.get("resampler", True):
        file = folder / "condition_type_embedder.pt"
        found, query = read_pickle(file, "condition_type_embedder"), "layers.0.0.to_q.weight"
        if query not in found or found[query].dim() != 2:
            raise ValueError(f"{file}: has no matrix {query}")
        inner, width = found[query].shape
        ours |= {f"instruction.{name}": t for name, t in found.items()}
        heads = config.get("resampler_heads", 12)
        if type(heads) is not int or heads < 1:
            raise ValueError(f"{folder}: resampler_heads {heads!r} must be a whole number from 1")
        config |= {"resampler_width": width, "resampler_head_dim": inner // heads,
                   "resampler_depth": sum(name.endswith(".to_q.weight") for name in found)}
    return config, ours


def write(c: dict, tensors: dict[str, Tensor], where: Path, folder: Path) -> None:
    """Write an adapter of ours, as adapters.read() gives it, as its four files.

    Raises: ValueError for adapters that have no such form, or a folder that exists.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name another folder")
    if "routing" not in c:
        raise ValueError(f"--to-research {folder}: {where} is no adapter of train.py's, which "
                         "alone has that form: it is another tool's LoRA, or in that form already")
    c = asdict(config_from(AdapterConfig, c, where, whole=True))
    lora, experts, resampler = {}, {}, {}
    for name, t in tensors.items():
        module, _, last = name.rpartition(".")
        if name.startswith("instruction."):
            resampler[name.removeprefix("instruction.")] = t
        elif last in ("lora_A", "lora_B"):
            lora[f"transformer.{name}.weight"] = t
        elif last in ("experts_A", "experts_B"):
            side, dim = ("left", 1) if last == "experts_A" else ("right", 0)
            experts |= {f"{module}.experts.{e}.{side}": part.clone()
                        for e, part in enumerate(t.chunk(c["experts"], dim))}
        else:
            experts[name.replace("router.weight", "gate.weight")] = t
    config = to_research(c, where)
    with replacing(folder) as aside:
        write_json(aside / CONFIG, config)
        write_tensors(lora, aside / "pytorch_lora_weights.safetensors")
        if experts:
            torch.save(experts, aside / "mole_experts.pt")
        if resampler:
            torch.save({"condition_type_embedder": resampler}, aside / "condition_type_embedder.pt")
