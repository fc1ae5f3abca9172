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
import shlex
import shutil
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from functools import reduce
from itertools import count
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


def fast_bf16() -> bool:
    """Whether the processor has units for bf16; on others PyTorch's is slower than fp32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))


FAST_BF16 = fast_bf16()                                  # once: a compiled graph cannot ask


def read_json(path: Path) -> dict:
    """A JSON object. Raises: FileNotFoundError; ValueError when it is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
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


def of_kind(value: object, kind: type) -> bool:
    """Whether an entry is of its field's type: counts not negative, sizes in a list not zero."""
    if kind == tuple[int, ...]:
        return (isinstance(value, tuple) and len(value) > 0
                and all(of_kind(v, int) and v > 0 for v in value))
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if kind is int:
        return type(value) is int and 0 <= value < 2 ** 31       # True is no count
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
            if not of_kind(value, entry.type):
                kind = ("a whole number from 0 up" if entry.type is int else
                        entry.type.__name__ if isinstance(entry.type, type) else entry.type)
                raise ValueError(f"{where}: {entry.name} should be {kind}, found {value!r}")
            found[entry.name] = value
        elif entry.default is MISSING:
            raise ValueError(f"{where}: has no entry {entry.name!r}")
    return cls(**found)


def files_of(path: Path) -> list[Path]:
    """A part's safetensors files: the one given, or its folder's, by the index if there is one."""
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
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
                                f"found {len(files)} files")
    return files


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A safetensors file. Raises: FileNotFoundError; ValueError when it is cut or foreign."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with file.open("rb") as start:
        if start.read(4) == b"GGUF":
            raise ValueError(f"{file}: GGUF is not read; take the .safetensors of this model")
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


# ---------------------------------------------------------------------------------------- layouts

# What stands left in a name becomes what stands right, in this order, until the name is the
# folder's. {a|b}: the rows of one fused tensor, in equal parts; "proj_mlp" takes four of them.
BFL_TRANSFORMER = {
    "double_blocks.": "transformer_blocks.", "single_blocks.": "single_transformer_blocks.",
    "img_in.": "x_embedder.", "txt_in.": "context_embedder.",
    "time_in.": "time_text_embed.timestep_embedder.",
    "guidance_in.": "time_text_embed.guidance_embedder.",
    "vector_in.": "time_text_embed.text_embedder.",
    "in_layer.": "linear_1.", "out_layer.": "linear_2.",
    "img_mod.lin.": "norm1.linear.", "txt_mod.lin.": "norm1_context.linear.",
    "modulation.lin.": "norm.linear.",
    "img_attn.qkv.": "{attn.to_q|attn.to_k|attn.to_v}.",
    "txt_attn.qkv.": "{attn.add_q_proj|attn.add_k_proj|attn.add_v_proj}.",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight",
    "img_attn.proj.": "attn.to_out.0.", "txt_attn.proj.": "attn.to_add_out.",
    "img_mlp.0.": "ff.net.0.proj.", "img_mlp.2.": "ff.net.2.",
    "txt_mlp.0.": "ff_context.net.0.proj.", "txt_mlp.2.": "ff_context.net.2.",
    "linear1.": "{attn.to_q|attn.to_k|attn.to_v|proj_mlp}.", "linear2.": "proj_out.",
    "final_layer.linear.": "proj_out.", "final_layer.adaLN_modulation.1.": "norm_out.linear."}
BFL_VAE = {
    ".down.": ".down_blocks.", ".up.": ".up_blocks.", ".block.": ".resnets.",
    ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out.",
    ".mid.block_1.": ".mid_block.resnets.0.", ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
    ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.",
    ".mid.attn_1.": ".mid_block.attentions.0.to_"}
RENAMES = {"transformer": BFL_TRANSFORMER, "vae": BFL_VAE,
           "text_encoder_2": {"encoder.embed_tokens.": "shared."}}
# Before the names of a part, in files that hold several, or that other tools have written.
PREFIXES = {"transformer": ("model.diffusion_model.", "diffusion_model."),
            "vae": ("vae.", "first_stage_model."),
            "text_encoder": ("text_encoders.clip_l.transformer.",),
            "text_encoder_2": ("text_encoders.t5xxl.transformer.",)}
OPTIONS = {"transformer": "--model", "vae": "--vae", "text_encoder": "--clip",
           "text_encoder_2": "--t5", "tokenizer": "--tokenizers", "tokenizer_2": "--tokenizers"}
SIGNS = {"transformer": "x_embedder.weight", "vae": "decoder.conv_in.weight",
         "text_encoder": "text_model.embeddings.token_embedding.weight",
         "text_encoder_2": "shared.weight"}              # a tensor that only this part has
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale|scaled_fp8|scale_input)"
                    r"|(vision_model|text_projection|visual_projection)(\..*)?")
FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
READ = FP8 | {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def renamed(name: str, table: dict[str, str]) -> list[str]:
    """The folder's names for the parts of one tensor of another layout."""
    for old, new in table.items():
        name = name.replace(old, new)
    before, _, rest = name.partition("{")
    fused, _, after = rest.partition("}")
    return [before + part + after for part in fused.split("|")]


def to_folder(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One part's tensors, in any known layout, under the folder's names; slices are views.

    Beside a weight in fp8 there may be a scale, in a tensor named .scale_weight.
    """
    for prefix in PREFIXES[part]:
        inside = {name.removeprefix(prefix): t for name, t in tensors.items()
                  if name.startswith(prefix)}
        tensors = inside or tensors
    levels = {name.split(".")[2] for name in tensors if name.startswith("decoder.up.")}
    found: dict[str, Tensor] = {}
    for old, t in tensors.items():
        if UNUSED.fullmatch(old):
            continue
        names = renamed(old, RENAMES.get(part, {}))
        if old.startswith("final_layer.adaLN") and t.dim():      # (shift, scale) -> (scale, shift)
            t = torch.cat(t.chunk(2)[::-1])
        if part == "vae" and t.dim() == 4 and ".attentions." in names[0]:
            t = t.flatten(1)                             # a 1x1 convolution is a linear layer
        if old.startswith("decoder.up."):                # counted from the pixels
            names = [re.sub(r"(?<=up_blocks\.)\d{1,3}", lambda i: str(len(levels) - 1 - int(i[0])),
                            names[0])]
        if part == "text_encoder" and not old.startswith("text_model."):
            names = [f"text_model.{old}"]
        shares = [4 if "proj_mlp" in name else 1 for name in names]
        rows, odd = divmod(len(t), sum(shares)) if t.dim() else (0, 1)
        new = dict(zip(names, [t] * len(names) if odd else       # check() tells of those
                       t.split([rows * share for share in shares])))
        if new.keys() & found.keys() - {"shared.weight"}:        # T5's may have two names
            raise ValueError(f"{old} has the place of another tensor, {min(new)}")
        found |= new
    return found


def places(path: Path) -> dict[str, Path]:
    """Where the parts lie that a model's folder, the folder of one part, or a file holds."""
    if path.is_dir() and not (path / "config.json").is_file():
        return {part: path / part for part in OPTIONS if (path / part).is_dir()}
    tensors = read_tensors(files_of(path))
    return {part: path for part, sign in SIGNS.items() if sign in to_folder(part, tensors)}


class Widened(torch.autograd.Function):
    """x @ W.T + b. Keeps the narrow W for the backward pass, not its wide copy."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, scale: Tensor | None, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W, scale)
        ctx.kind = x.dtype                               # autocast may make grad narrower
        return F.linear(x, Widened.wide(W, scale, x.dtype), b)               # (..., out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        W, scale = ctx.saved_tensors
        return (grad @ Widened.wide(W, scale, grad.dtype)).to(ctx.kind), None, None, None

    @staticmethod
    def wide(W: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return W.to(dtype) if scale is None else W.to(dtype).mul_(scale)


class NarrowLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in fewer bits and widened when it is used."""
    scale: Tensor | None                                 # () or (out, 1), times the weight

    def forward(self, x: Tensor) -> Tensor:              # (..., in) -> (..., out)
        return Widened.apply(x, self.weight, self.scale, self.bias)


def to_fp8(model: nn.Module) -> None:
    """Keep the linear layers' weights in 8 bits, each row with a scale of its own."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype not in FP8:
            W = layer.weight.float()
            scale = W.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448     # 448: the largest
            layer.weight.data = (W / scale).to(torch.float8_e4m3fn)
            layer.__class__ = NarrowLinear
            layer.register_buffer("scale", scale, persistent=False)


def check_device(kinds: Iterable[torch.dtype], device: torch.device | str, where: object) -> None:
    """Raises: ValueError for fp8 on a device that holds none."""
    if torch.device(device).type == "mps" and FP8 & set(kinds):
        raise ValueError(f"{where}: mps holds no fp8; take a bf16 file, or --device cpu")


def assign(model: nn.Module, tensors: dict[str, Tensor], where: str | Path,
           device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
           keep: bool = False) -> None:
    """Give a model its tensors, after all names, shapes and types have been checked.

    Nothing is copied that has its type and place already. Weights of linear layers in fp8 stay so,
    with `keep` all that are narrower than `dtype`; all else becomes `dtype`, or by default the
    widest type there is. Raises: ValueError.
    """
    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    scales = {name.removesuffix("scale_weight") + "weight": t for name, t in tensors.items()
              if name.endswith(".scale_weight")}
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".scale_weight")}
    check({name: p.shape for name, p in model.state_dict().items()},
          {name: t.shape for name, t in tensors.items()}, where)
    for name, t in tensors.items():
        if t.dtype not in READ:
            raise ValueError(f"{where}: {name} holds {t.dtype}, which is not read")
    kinds = {t.dtype for t in tensors.values()}
    check_device(kinds, device, where)
    for name, scale in scales.items():
        if name not in linears or tensors[name].dtype not in FP8 or scale.numel() != 1:
            raise ValueError(f"{where}: {name} has a scale, but is no layer in fp8 with one scale")
    dtype = dtype or reduce(torch.promote_types, kinds - FP8 or {torch.bfloat16})
    narrow = {name for name in linears if tensors[name].dtype in FP8
              or keep and tensors[name].dtype.itemsize < dtype.itemsize}
    for name in narrow:
        linears[name].__class__ = NarrowLinear
        scale = scales[name].reshape(()).to(device) if name in scales else None
        linears[name].register_buffer("scale", scale, persistent=False)
    ready = {name: t.to(device, None if name in narrow else dtype) for name, t in tensors.items()}
    model.load_state_dict(ready, strict=True, assign=True)


def load_part(part: str, build: Callable[[Config], Model], config: type[Config],
              implied: Callable[[dict[str, torch.Size]], dict], path: str | Path,
              device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
              keep: bool = False) -> Model:
    """Read one part of a Hugging Face folder (config.json and tensors), or of a single file.

    implied: a file's configuration, from its tensors' shapes, where no config.json lies beside it;
    keep: as assign() takes it.
    The model is built on the meta device, so that nothing is allocated twice; the result is frozen
    and in eval mode.
    Raises: FileNotFoundError, ValueError.
    """
    path = Path(path)
    settings = path / "config.json" if path.is_dir() else path.with_name("config.json")
    tensors = read_tensors(files_of(path))
    try:
        tensors = to_folder(part, tensors)
        given = path.is_dir() or settings.is_file()
        values = (read_json(settings) if given else
                  implied({name: t.shape for name, t in tensors.items()}))
        with torch.device("meta"):
            model = build(config_from(config, values, settings if given else path))
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: holds no whole {part} ({error})") from None
    assign(model, tensors, path, device, dtype, keep)
    return model.eval().requires_grad_(False)


def blocks(shapes: dict[str, torch.Size], prefix: str) -> int:
    """How many blocks have names that begin with the prefix and a number."""
    return len({name[len(prefix):].split(".")[0] for name in shapes if name.startswith(prefix)})


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
        raise OSError(f"{file}: cannot be written ({why})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)


CACHE_SHARD = 256 * 2 ** 20                              # bytes


class Cache:
    """Tensors that are computed once, by key, in a folder of safetensors shards.

    about: all that the values depend on, but for the key. Several processes may share the folder.
    Raises: ValueError when it was made with something else.
    """

    def __init__(self, folder: Path, about: dict):
        self.folder, self.new = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "about.json"
        if not note.is_file():
            with replacing(note) as aside:
                aside.write_text(json.dumps(about, indent=2) + "\n")
        before = read_json(note)
        for name in sorted(about.keys() | before.keys()):
            if about.get(name) != before.get(name):
                raise ValueError(f"--cache {folder}: was made with {name} {before.get(name)}, not "
                                 f"{about.get(name)}; name another folder")
        self.open()

    def open(self) -> None:
        """See what all processes have written."""
        self.found: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            self.found |= read_tensors([file])

    def through(self, keys: list[str], compute: Callable[[int], tuple[Tensor, ...]]
                ) -> tuple[Tensor, ...]:
        """What compute gives: several tensors with one row for each key.

        compute gives the row of a number, asked once for each key; its result is kept. In a batch
        values would depend, in the last bit, on what else is in it.
        """
        for i, key in enumerate(keys):
            if f"{key}.0" not in self.new and f"{key}.0" not in self.found:
                self.new |= {f"{key}.{j}": t[0].cpu().clone() for j, t in enumerate(compute(i))}
        if sum(t.nbytes for t in self.new.values()) > CACHE_SHARD:
            self.save()
        known = ChainMap(self.new, self.found)
        parts = next(j for j in count() if f"{keys[0]}.{j}" not in known)
        return tuple(torch.stack([known[f"{key}.{j}"] for key in keys]) for j in range(parts))

    def save(self) -> None:
        """Write what is new to a shard."""
        if self.new:
            file = self.folder / f"{uuid4().hex}.safetensors"                # no other's name
            with replacing(file) as aside:
                write_tensors(self.new, aside)
            self.new = {}
            self.found |= read_tensors([file])


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


def unpickled(file: Path) -> object:
    """What torch.save wrote; no code in the file is run. Raises: ValueError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError,
            AssertionError, pickle.UnpicklingError) as error:    # torch checks little
        why = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: cannot be read ({why})") from None


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


# ------------------------------------------------------------------------ other tools' LoRA files

LORA = re.compile(r"(?:transformer\.|diffusion_model\.|base_model\.model\.|lora_unet_)?(.+)\."
                  r"(?:lora_(A|B|down|up)(?:\.default)?\.weight|alpha)")
LAYER = re.compile(r"((single_)?transformer_blocks\.\d+|time_text_embed|norm_out)\..+"
                   r"|x_embedder|context_embedder|proj_out")                 # the folder's names
KOHYA = {old.strip(".").replace(".", "_"): old.strip(".") for old in BFL_TRANSFORMER
         if not old.endswith("scale")}                   # img_attn_qkv -> img_attn.qkv


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


def read_lora(file: Path) -> tuple[dict, dict[str, Tensor]]:
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
    told = parse_json(read_metadata(file).get("lora_adapter_metadata") or "{}", file)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, found in parts.items():
        A, B = (found.get(side, torch.empty(0)) for side in "AB")            # none: refused
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not A.numel() * B.numel():
            raise ValueError(f"{file}: {module} needs lora_A (r, in) and lora_B (out, r)")
        B = B.float() * strength(module, found, told, file)
        new = {name.removesuffix(".weight"): (A.float(), rows) for name, rows in
               to_folder("transformer", {f"{module}.weight": B}).items()}
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


# ---------------------------------------------------------------------------------- any of these

def read_adapter(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The entries of an adapter's configuration, and its tensors.

    path: a file of ours or another tool's LoRA, the folder of a run, or a folder of the paper's.
    Raises: FileNotFoundError, ValueError.
    """
    if (path / "train_config.json").is_file():
        return read_research(path)
    file = path / "adapter.safetensors" if path.is_dir() else path
    stored = read_metadata(file).get("adapter")
    if stored is None:
        return read_lora(file)
    config, tensors = parse_json(stored, file).get("config"), read_tensors([file])
    if not isinstance(config, dict):
        raise ValueError(f"{file}: its adapter configuration is no JSON object")
    return config, tensors


def write_research(file: Path, folder: Path) -> None:
    """Write an adapter of ours as the research code's files. Raises: ValueError."""
    if folder.exists():
        raise ValueError(f"{folder}: exists already; name another folder")
    import mole                                          # here: nothing else in this file needs it
    c, tensors = read_adapter(file)
    if "routing" not in c:
        raise ValueError(f"{file}: is no adapter of train.py's")
    c = asdict(config_from(mole.AdapterConfig, c, file, whole=True))
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
    with replacing(folder) as aside:
        aside.mkdir(parents=True)
        (aside / "train_config.json").write_text(config + "\n")
        write_tensors(lora, aside / "pytorch_lora_weights.safetensors")
        if experts:
            torch.save(experts, aside / "mole_experts.pt")
        if resampler:
            torch.save({"condition_type_embedder": resampler}, aside / "condition_type_embedder.pt")


# ----------------------------------------------------------------------------------------- command

def tally(tensors: dict[str, Tensor]) -> str:
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    return (f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, "
            f"{kinds}")


def describe_part(part: str, path: Path) -> tuple[str, str]:
    """A part in a folder or a file: what it is, and what is wrong with it."""
    import dit                                           # here, because they import this file
    import text_encoder
    import vae
    load = {"transformer": dit.load_dit, "vae": vae.load_vae,
            "text_encoder": text_encoder.load_clip, "text_encoder_2": text_encoder.load_t5,
            "tokenizer": text_encoder.CLIPTokenizer, "tokenizer_2": text_encoder.T5Tokenizer}
    told = f"{path}: {part}"
    try:
        if part not in SIGNS:
            load[part](path)
            return told, ""
        tensors = read_tensors(files_of(path))
        found = to_folder(part, tensors)
        scaled = any(name.endswith(".scale_weight") for name in found)
        layout = ("ComfyUI, fp8 with scales" if scaled else
                  "Hugging Face" if found.keys() <= tensors.keys() else "original or ComfyUI")
        told = f"{told}, {layout}, {tally(found)}"
        load[part](path, "meta")                         # all its checks, and no memory
    except (ValueError, FileNotFoundError) as error:
        return told, str(error)
    return told, ""


def describe(path: Path) -> str:
    """What a file or folder is, for a model whether it is whole, and the command that uses it."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    sample = "python sample.py --instruction TEXT"
    kind = ("of the research code" if (path / "train_config.json").is_file() else
            "of train.py's" if (path / "adapter.safetensors").is_file() or (
                path.is_file() and "adapter" in read_metadata(path)) else
            "that is a LoRA" if path.is_file() and any(map(LORA.fullmatch, read_tensors([path])))
            else "")
    if kind:
        return (f"{path}: an adapter {kind}, {tally(read_adapter(path)[1])}\n"
                f"{sample} --adapter {shlex.quote(str(path))}")
    found = places(path)
    if not found:
        raise ValueError(f"{path}: no FLUX Kontext folder ({', '.join(OPTIONS)}), weights of one "
                         "of its parts, or adapter")
    told = [describe_part(part, place) for part, place in found.items()]
    lines, wrong = [line for line, _ in told], [why for _, why in told if why]
    folder = path not in found.values()
    wrong += [f"{path}: without {part}" for part in OPTIONS if folder and part not in found]
    if wrong:
        return "\n".join([*lines, *wrong, f"{path}: not whole"])
    named = {part: shlex.quote(str(place)) for part, place in found.items()}
    used = [f"--model {shlex.quote(str(path))}"] if folder else [
        f"{OPTIONS[part]} {named.get(part, '...')}" for part in SIGNS] + ["--tokenizers ..."]
    return "\n".join([*lines, f"{path}: whole", " ".join([sample, *used])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what a checkpoint is.",
                                     usage="python weights.py PATH [options]")
    parser.add_argument("path", type=Path, help="a FLUX Kontext folder or a .safetensors file")
    parser.add_argument("--to-research", type=Path, metavar="FOLDER",
                        help="write an adapter in the form of the paper's code")
    args = parser.parse_args()
    if args.to_research:
        write_research(args.path, args.to_research)
    told = describe(args.to_research or args.path)
    print(told)
    if told.endswith(": not whole"):
        sys.exit(1)                                      # so that scripts can ask


def run(command: Callable[[], None]) -> None:
    """Run a command; what its user can get wrong is printed as one line, with exit code 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:         # torch says so in many ways
        told = f"MemoryError {error}" if isinstance(error, MemoryError) else str(error)
        if not re.search("MemoryError|out of memory|can't allocate|cannot allocate", told, re.I):
            raise
        print(f"error: not enough memory ({told.splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main)
