"""Weights: files -> named tensors -> models, and an adapter on them.

Read load() -> assign(), then load_adapters().

Strict: every name and every shape is accounted for before anything is assigned. Lazy: on the CPU
safetensors maps its files, so a tensor costs memory only when its pages are touched, and assigning
instead of copying keeps it so.

The native form is the published folder black-forest-labs/FLUX.1-Kontext-dev (model_index.json,
transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/); other layouts are
renamed to its names in support/layouts.py, other adapters read in support/adapters.py.

Run: python weights.py tiny/model
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # what is imported now takes seconds
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import baselines
from dit import DiTConfig, FluxTransformer
from mole import Adapter, AdapterConfig
from support import adapters, devices, foreign, layouts, options, research, targets
from support.configs import config_from, has_all, read_json
from support.describe import describe
from support.files import check_tensors, files_of, read_tensors
from support.fp8 import FP8, NarrowLinear, check_device, narrow
from support.implied import implied_clip, implied_dit, implied_t5, implied_vae
from text_encoder import CLIPConfig, CLIPEncoder, T5Config, T5Encoder
from vae import AutoEncoder, VAEConfig

READABLE = FP8 | {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Part(NamedTuple):
    """One model of the pipeline."""
    model: type[nn.Module]
    config: type                                         # of the entries of its config.json
    implied: Callable[[dict[str, torch.Size]], dict]     # such entries for a file without one


PARTS = {"transformer": Part(FluxTransformer, DiTConfig, implied_dit),
         "vae": Part(AutoEncoder, VAEConfig, implied_vae),
         "text_encoder": Part(CLIPEncoder, CLIPConfig, implied_clip),
         "text_encoder_2": Part(T5Encoder, T5Config, implied_t5)}


def load(part: str, path: str | Path, device: torch.device | str = "cpu",
         dtype: torch.dtype | None = None, keep_narrow: bool = False) -> nn.Module:
    """Read one of PARTS from its folder (config.json and tensors) or from a single file.

    dtype: by default the one that holds all types of the file but fp8, which alone becomes bf16.
    Weights of linear layers in fp8 stay so and are widened where they are used; with keep_narrow
    so do all that are narrower than dtype.
    The model is built on the meta device, so that nothing is allocated twice; the result is frozen
    and in eval mode. Raises: FileNotFoundError, ValueError.
    """
    path, kind = Path(path), PARTS[part]
    config_file = path / "config.json" if path.is_dir() else path.with_name("config.json")
    tensors = read_tensors(files_of(path))
    foreign.check_quantised(tensors, path)
    try:
        tensors = layouts.to_folder(part, tensors)
        values = read_json(config_file) if path.is_dir() or config_file.is_file() else {}
        inner, where = values.get("text_config"), config_file                # of a whole CLIP
        values = inner if isinstance(inner, dict) else values
        if path.is_file() and not has_all(kind.config, values):  # none beside it, or another part's
            values, where = kind.implied({name: t.shape for name, t in tensors.items()}), path
        with devices.shapes_alone():
            model = kind.model(config_from(kind.config, values, where))
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: holds no whole {part} ({error})") from None
    assign(model, tensors, path, device, dtype, keep_narrow)
    if isinstance(model, T5Encoder) and model.shared.weight.dtype == torch.float16:
        for name, module in model.named_modules():       # T5FeedForward's second product overflows
            if name.endswith(".wo") and not isinstance(module, NarrowLinear):
                module.float()
    return model.eval().requires_grad_(False)


def assign(model: nn.Module, tensors: dict[str, Tensor], where: str | Path,
           device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
           keep_narrow: bool = False) -> None:
    """Give a model its tensors, after all names, shapes and types have been checked.

    Nothing is copied that has its type and place already; dtype, keep_narrow: as load() takes them.
    Raises: ValueError.
    """
    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    scales = {name.removesuffix("scale_weight") + "weight": t for name, t in tensors.items()
              if name.endswith(".scale_weight")}
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".scale_weight")}
    # Names, shapes, types
    check_tensors({name: p.shape for name, p in model.state_dict().items()},
                  {name: t.shape for name, t in tensors.items()}, where)
    for name, t in tensors.items():
        if t.dtype not in READABLE:
            raise ValueError(f"{where}: {name} holds {t.dtype}, which is not read; "
                             "take a bf16 or an fp8 file")
    kinds = {t.dtype for t in tensors.values()}
    check_device(kinds, device, where)
    for name, scale in scales.items():
        if (name not in linears or tensors[name].dtype not in FP8
                or scale.numel() not in (1, len(tensors[name]))):
            raise ValueError(f"{where}: {name} has a scale, but is no layer in fp8 with one scale "
                             "or one for each row")
    # Which layers stay narrow, and the type of all else
    dtype = dtype or reduce(torch.promote_types, (kinds - FP8) or {torch.bfloat16})
    stay = {name for name in linears if tensors[name].dtype in FP8
            or (keep_narrow and tensors[name].dtype.itemsize < dtype.itemsize)}
    for name in stay:
        narrow(linears[name], scales[name].to(device) if name in scales else None)
    ready = {name: t.to(device, None if name in stay else dtype) for name, t in tensors.items()}
    model.load_state_dict(ready, strict=True, assign=True)


# ---------------------------------------------------------------------------------------- adapters

def build_adapter(model: FluxTransformer, config: AdapterConfig) -> Adapter:
    """An adapter for the transformer, not yet in it. Raises: ValueError."""
    targets.check_sizes(config)
    layers = targets.layers_of(model, config, baselines.KINDS)
    return Adapter(layers, config, model.config.joint_attention_dim,
                   model.config.pooled_projection_dim)


def new_adapter(model: FluxTransformer, config: AdapterConfig) -> Adapter:
    """A new adapter on the transformer, to be trained. Raises: ValueError."""
    return build_adapter(model, config).insert(model)


def load_adapters(model: FluxTransformer, chosen: list[tuple[Path, float]]) -> Adapter:
    """Put saved adapters on the transformer as one, frozen.

    chosen: of each its file, or a folder of ours or the paper's, and its strength: 1, as it was
    trained. Raises: FileNotFoundError, ValueError; the transformer is then as it was.
    """
    saved = [(path, saved_adapter(model, path, strength)) for path, strength in chosen]
    return adapters.combined(saved).insert(model).requires_grad_(False).eval()


def saved_adapter(model: FluxTransformer, path: Path, strength: float) -> Adapter:
    """A saved adapter for the transformer, not yet in it. Raises: as load_adapters()."""
    values, tensors = adapters.read(path)
    config = config_from(AdapterConfig, values, path, whole=True)
    config = adapters.at_strength(config, strength)
    try:
        adapter = build_adapter(model, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    adapters.fill_in(adapter, tensors, path)
    return adapter


def main() -> None:
    args = options.weights_options()
    if args.to_research:
        research.write(*adapters.read(args.path), args.path, args.to_research)
    if args.to_bf16:
        adapters.write_bf16(args.path, args.to_bf16, args.strength or 1)
    told, whole = describe(args.to_research or args.to_bf16 or args.path, load, build_adapter)
    print(told)
    if not whole:
        sys.exit(1)                                      # so that scripts can ask


if __name__ == "__main__":
    commands.run(main)
