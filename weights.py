"""Checkpoints: files -> named tensors -> models. The only file that knows how weights are laid out.

Strict: every name and every shape is accounted for before anything is assigned. Lazy: on the CPU
safetensors maps its files, so a tensor costs memory only when its pages are touched, and assigning
instead of copying keeps it so.

Source: the published folder black-forest-labs/FLUX.1-Kontext-dev (model_index.json, transformer/,
vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/).

Run: python weights.py tiny/model
"""
import argparse
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def read_json(path: Path) -> dict:
    """A JSON object. Raises: FileNotFoundError; ValueError when it is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, where: str | Path) -> dict:
    """A JSON object. Raises: ValueError naming where the text is from."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:        # no JSON, no UTF-8, endless digits or [[[
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def fits(value: object, kind: type) -> bool:
    """Whether an entry is of its field's type: counts not negative, sizes in a list not zero."""
    if kind == tuple[int, ...]:
        return (isinstance(value, tuple) and len(value) > 0
                and all(fits(v, int) and v > 0 for v in value))
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if kind is int:
        return type(value) is int and value >= 0         # True is no count
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def config_from(cls: type[Config], values: dict, where: str | Path, whole: bool = False) -> Config:
    """Build a config dataclass from the entries of a config.json that it has fields for.

    Lists become tuples; `whole`: there may be no further entries.
    Raises: ValueError naming an entry that is missing, unknown or of another type.
    """
    known = [entry.name for entry in fields(cls)]
    if whole and values.keys() - set(known):
        raise ValueError(f"{where}: unknown entry {min(values.keys() - set(known))!r}; "
                         f"it may hold {', '.join(known)}")
    found = {}
    for entry in fields(cls):
        if entry.name in values:
            value = values[entry.name]
            value = tuple(value) if isinstance(value, list) else value
            if not fits(value, entry.type):
                kind = entry.type.__name__ if isinstance(entry.type, type) else entry.type
                raise ValueError(f"{where}: {entry.name} should be {kind}, found {value!r}")
            found[entry.name] = value
        elif entry.default is MISSING:
            raise ValueError(f"{where}: has no entry {entry.name!r}")
    return cls(**found)


def shards(folder: Path) -> list[Path]:
    """The safetensors files of one component: those its index names, else the only one there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found; "
                                f"a FLUX Kontext folder holds {', '.join(PARTS)}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = read_json(indices[0]).get("weight_map")
        if not isinstance(names, dict) or not all(
                isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors")
                for n in names.values()):
            raise ValueError(f"{indices[0]}: weight_map must name "
                             ".safetensors files of the same folder")
        return [folder / name for name in sorted(set(names.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}: expected one .safetensors file or an index, "
                                f"found {len(files)} files")
    return files


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A safetensors file. Raises: FileNotFoundError; ValueError when it is cut or foreign."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of some safetensors files, mapped from disk. Raises: as opened()."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        with opened(file) as handle:
            for name in handle.keys():
                if name in tensors:
                    raise ValueError(f"{file}: tensor {name} occurs in another shard too")
                tensors[name] = handle.get_tensor(name)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The text entries of a safetensors file's header. Raises: as opened()."""
    with opened(file) as handle:
        return handle.metadata() or {}


def check(expected: dict[str, torch.Size], found: dict[str, torch.Size], where: str | Path) -> None:
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


def assign(model: nn.Module, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Give a model its tensors, without copying, after all names and shapes have been checked."""
    check({name: p.shape for name, p in model.state_dict().items()},
          {name: t.shape for name, t in tensors.items()}, where)
    foreign = [f"{name} ({str(t.dtype).removeprefix('torch.')})"
               for name, t in tensors.items() if not t.is_floating_point()]
    if foreign:
        raise ValueError(f"{where}: {len(foreign)} tensors hold no floating point numbers, "
                         f"such as {foreign[0]}")
    model.load_state_dict(tensors, strict=True, assign=True)


def tidy_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP text files: drop what the text encoder does not use, add the prefix where absent."""
    kept = {name: t for name, t in tensors.items() if not name.endswith("position_ids")
            and not name.startswith(("vision_model.", "text_projection", "visual_projection",
                                     "logit_scale"))}
    return {name if name.startswith("text_model.") else f"text_model.{name}": t
            for name, t in kept.items()}


def tidy_t5(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """T5 files: the embedding is stored as shared.weight, encoder.embed_tokens.weight, or both."""
    kept, name = dict(tensors), "encoder.embed_tokens.weight"
    return {"shared.weight": kept.pop(name)} | kept if name in kept else kept


def load_part(build: Callable[[Config], Model], config: type[Config], folder: str | Path,
              device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
              tidy: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> Model:
    """Read one component of a Hugging Face folder: its config.json, then its tensors.

    The model is built on the meta device, so that nothing is allocated twice. dtype None keeps the
    file's. The result is frozen and in eval mode. Raises: FileNotFoundError, ValueError.
    """
    folder = Path(folder)
    files, settings = shards(folder), folder / "config.json"
    with torch.device("meta"):
        model = build(config_from(config, read_json(settings), settings))
    assign(model, tidy(read_tensors(files)), folder)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write to. What stood in `file` stays whole until the `with` ends well."""
    aside = file.with_name(f".{file.stem}.new{file.suffix}")
    try:
        yield aside
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file that others may read too: safetensors writes for its owner alone."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def save_tensors(tensors: dict[str, Tensor], config: dict, folder: Path, name: str,
                 dtype: torch.dtype) -> None:
    """Write one component, config.json and tensors, the way load_part reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {key: t.detach().to("cpu", dtype).contiguous() for key, t in tensors.items()}
    write_tensors(stored, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_lora(pairs: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Write W + B A by module name, in the one form that diffusers and ComfyUI read alike."""
    tensors = {f"transformer.{name}.lora_{part}.weight": t.detach().float().cpu().contiguous()
               for name, pair in pairs.items() for part, t in zip("AB", pair)}
    with replacing(file) as aside:
        write_tensors(tensors, aside)


# ------------------------------------------------------------------------ the research code's form

RESEARCH = {"num_experts": "experts", "num_experts_per_tok": "top_k", "rank": "rank",
            "alpha": "alpha", "type_aux_loss_alpha": "balance_weight",
            "token_aux_loss_alpha": "token_balance_weight", "resampler_heads": "resampler_heads",
            "orthogonal_reg_alpha": "orthogonality_weight", "use_type_embedding": "resampler",
            "target_modules": "mole_targets"}            # its moe_config -> our entries
BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


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
    if not isinstance(names, list) or not fits(tuple(names), tuple[str, ...]):
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


def to_research(c: dict, where: str | Path) -> dict:
    """Our adapter's entries -> its JSON configuration. Raises: ValueError for other routings."""
    if c["routing"] not in ("instruction", "token"):
        raise ValueError(f"{where}: routing {c['routing']!r} has no form in the research code")
    theirs = {"lora_config": {"r": c["lora_rank"], "lora_alpha": c["lora_alpha"],
                              "init_lora_weights": "gaussian", "target_modules": c["lora_targets"]}}
    strange = [target for target in c["token_targets"]
               if not re.match(rf"({'|'.join(BLOCKS.values())})\.(\d+|\*)\.", target)]
    if strange or (c["token_targets"] and not c["mole_targets"]):
        raise ValueError(f"{where}: token_targets {c['token_targets']} have no form in the "
                         "research code, which names blocks of its target_modules")
    if not c["mole_targets"]:
        return theirs
    theirs["moe_config"] = {"mole_expert": "LoRAMoE", "dropout": 0.0, "routing_policy": "default",
                            "train_mole_only": True, **{k: c[name] for k, name in RESEARCH.items()}}
    for kind, block in BLOCKS.items():
        found = {re.sub(rf"{block}\.([^.]+)\..*", r"\1", target) for target in c["token_targets"]
                 if target.startswith(block)}
        theirs["moe_config"][f"token_route_overrides_{kind}"] = (
            "all" if c["routing"] == "token" or "*" in found else sorted(map(int, found)))
    return theirs


def read_pickle(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, saved by torch.save; no code in the file is run. Raises: ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        found = found if key is None else found[key]
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{file}: holds no tensors by name ({error!r})") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{file}: holds no tensors by name")
    return found


def read_research(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """An adapter in the research code's four files -> our adapter's entries and tensors.

    Raises: FileNotFoundError, ValueError.
    """
    config = from_research(read_json(folder / "train_config.json"), folder / "train_config.json")
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
        ours[f"{layer}.{name}"] = torch.cat([parts[e] for e in sorted(parts)], dim)
    if config["mole_targets"] and config.get("resampler", True):
        file = folder / "condition_type_embedder.pt"
        found, query = read_pickle(file, "condition_type_embedder"), "layers.0.0.to_q.weight"
        if query not in found:
            raise ValueError(f"{file}: has no tensor {query}")
        inner, width = found[query].shape
        ours |= {f"instruction.{name}": t for name, t in found.items()}
        heads = config.get("resampler_heads", 12)
        if type(heads) is not int or heads < 1:
            raise ValueError(f"{folder}: resampler_heads {heads!r} must be a whole number from 1")
        config |= {"resampler_width": width, "resampler_head_dim": inner // heads,
                   "resampler_depth": sum(name.endswith(".to_q.weight") for name in found)}
    return config, ours


def read_adapter(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The entries of an adapter's configuration, and its tensors.

    path: a file, the folder of a run, or a folder of the paper's.
    Raises: FileNotFoundError, ValueError.
    """
    if (path / "train_config.json").is_file():
        return read_research(path)
    file = path / "adapter.safetensors" if path.is_dir() else path
    tensors, stored = read_tensors([file]), read_metadata(file).get("adapter")
    if stored is None:
        raise ValueError(f"{file}: holds no adapter configuration; it was not written by train.py")
    config = parse_json(stored, file).get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{file}: its adapter configuration is no JSON object")
    return config, tensors


def write_research(file: Path, folder: Path) -> None:
    """Write an adapter of ours as the research code's files. Raises: ValueError."""
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name another folder")
    c, tensors = read_adapter(file)
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
    config = json.dumps(to_research(c, file), indent=2)
    aside = folder.with_name(f".{folder.name}.new")
    aside.mkdir(parents=True)
    try:
        (aside / "train_config.json").write_text(config + "\n")
        write_tensors(lora, aside / "pytorch_lora_weights.safetensors")
        if experts:
            torch.save(experts, aside / "mole_experts.pt")
        if resampler:
            torch.save({"condition_type_embedder": resampler}, aside / "condition_type_embedder.pt")
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ----------------------------------------------------------------------------------------- command

def tally(tensors: dict[str, Tensor]) -> str:
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    return (f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, "
            f"{kinds}")


def describe(path: Path) -> str:
    """What a file or a folder holds: its parts, tensors, parameters, dtypes."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found")
    if (path / "train_config.json").is_file():
        return f"{path}: an adapter of the research code, {tally(read_research(path)[1])}"
    if (path / "adapter.safetensors").is_file():
        path = path / "adapter.safetensors"
    if path.is_file() or (path / "config.json").is_file():
        return f"{path}: {tally(read_tensors(shards(path) if path.is_dir() else [path]))}"
    parts = [path / part for part in PARTS if (path / part).is_dir()]
    if not parts:
        raise ValueError(f"{path}: no FLUX Kontext folder ({', '.join(PARTS)}), adapter or "
                         "safetensors file")
    lines = [f"{part}: {tally(read_tensors(shards(part)))}" if "tokenizer" not in part.name else
             f"{part}: {len(list(part.iterdir()))} files" for part in parts]
    missing = [part for part in PARTS if path / part not in parts]
    return "\n".join(lines + [f"{path}: not whole, without {', '.join(missing)}"] * bool(missing))


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what a checkpoint is.")
    parser.add_argument("path", type=Path, help="a FLUX Kontext folder or a .safetensors file")
    parser.add_argument("--to-research", type=Path, metavar="FOLDER",
                        help="write an adapter in the form of the paper's code")
    args = parser.parse_args()
    if args.to_research:
        write_research(args.path, args.to_research)
    print(describe(args.to_research or args.path))


def run(command: Callable[[], None]) -> None:
    """Run a command; what its user can get wrong is printed as one line, with exit code 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:                        # torch says so in many ways
        if not re.search("out of memory|can't allocate|cannot allocate", str(error), re.I):
            raise
        print(f"error: not enough memory ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
