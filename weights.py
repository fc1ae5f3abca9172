"""Weights: files -> named tensors -> models, and an adapter on them.

Strict: every name and every shape is accounted for before anything is assigned. Lazy: on the CPU
safetensors maps its files, so a tensor costs memory only when its pages are touched, and assigning
instead of copying keeps it so.

The native form is the published folder black-forest-labs/FLUX.1-Kontext-dev (model_index.json,
transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/); other layouts are
renamed to its names in support/layouts.py, other adapters read in support/adapters.py.

Run: python weights.py tiny/model
"""
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
from support import adapters, commands, layouts, options, research, targets
from support.describe import describe
from support.files import check_tensors, config_from, files_of, read_json, read_tensors
from support.fp8 import FP8, NarrowLinear, check_device
from text_encoder import CLIPConfig, CLIPEncoder, T5Config, T5Encoder
from vae import AutoEncoder, VAEConfig

Shapes = dict[str, torch.Size]                           # of tensors, by name
READ = FP8 | {torch.float16, torch.bfloat16, torch.float32, torch.float64}


# ------------------------------------------------- what a file without config.json says of itself

def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many blocks have names that begin with the prefix and a number."""
    return len({name[len(prefix):].split(".")[0] for name in shapes if name.startswith(prefix)})


def implied_dit(shapes: Shapes) -> dict:
    """The transformer's configuration; the released model's rotary axes."""
    width, channels = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {"in_channels": channels, "num_layers": count_blocks(shapes, "transformer_blocks."),
            "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
            "attention_head_dim": head, "num_attention_heads": width // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            "axes_dims_rope": (16, 56, 56),
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes}


def implied_vae(shapes: Shapes) -> dict:
    """The autoencoder's; the released model's groups, scale and shift."""
    levels = count_blocks(shapes, "encoder.down_blocks.")
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)]
    return {"block_out_channels": tuple(widths),
            "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
            "latent_channels": shapes["decoder.conv_in.weight"][1], "norm_num_groups": 32,
            "scaling_factor": 0.3611, "shift_factor": 0.1159}


def implied_t5(shapes: Shapes) -> dict:
    """T5's."""
    first = "encoder.block.0.layer."
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    vocab, width = shapes["shared.weight"]
    return {"vocab_size": vocab, "d_model": width, "num_heads": heads,
            "d_kv": shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
            "d_ff": shapes[f"{first}1.DenseReluDense.wo.weight"][1],
            "num_layers": count_blocks(shapes, "encoder.block."),
            "relative_attention_num_buckets": buckets}


def implied_clip(shapes: Shapes) -> dict:
    """CLIP's; heads of 64 channels."""
    vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
    positions = shapes["text_model.embeddings.position_embedding.weight"][0]
    return {"vocab_size": vocab, "hidden_size": width, "num_attention_heads": width // 64,
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": count_blocks(shapes, "text_model.encoder.layers."),
            "max_position_embeddings": positions}


# ------------------------------------------------------------------------------------------ models

class Part(NamedTuple):
    """One model of the pipeline."""
    model: type[nn.Module]
    config: type                                         # of its config.json
    implied: Callable[[Shapes], dict]                    # the same from a file that has none


PARTS = {"transformer": Part(FluxTransformer, DiTConfig, implied_dit),
         "vae": Part(AutoEncoder, VAEConfig, implied_vae),
         "text_encoder": Part(CLIPEncoder, CLIPConfig, implied_clip),
         "text_encoder_2": Part(T5Encoder, T5Config, implied_t5)}


def load(part: str, path: str | Path, device: torch.device | str = "cpu",
         dtype: torch.dtype | None = None, keep: bool = False) -> nn.Module:
    """Read one of PARTS from its folder (config.json and tensors) or from a single file.

    dtype: by default the widest type in the file; keep: as assign() takes it.
    The model is built on the meta device, so that nothing is allocated twice; the result is frozen
    and in eval mode. Raises: FileNotFoundError, ValueError.
    """
    path, what = Path(path), PARTS[part]
    settings = path / "config.json" if path.is_dir() else path.with_name("config.json")
    tensors = read_tensors(files_of(path))
    try:
        tensors = layouts.to_folder(part, tensors)
        given = path.is_dir() or settings.is_file()
        values = (read_json(settings) if given else
                  what.implied({name: t.shape for name, t in tensors.items()}))
        with torch.device("meta"):
            model = what.model(config_from(what.config, values, settings if given else path))
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: holds no whole {part} ({error})") from None
    assign(model, tensors, path, device, dtype, keep)
    if isinstance(model, T5Encoder) and model.shared.weight.dtype == torch.float16:
        for name, module in model.named_modules():       # its second feed-forward matrix overflows
            if name.endswith(".wo") and not isinstance(module, NarrowLinear):
                module.float()
    return model.eval().requires_grad_(False)


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
    check_tensors({name: p.shape for name, p in model.state_dict().items()},
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


# ---------------------------------------------------------------------------------------- adapters

def adapter_config(method: str, file: Path | None) -> AdapterConfig:
    """A method's configuration: that of the file (else the published one), with its routing.

    Raises: FileNotFoundError, ValueError.
    """
    values = {} if file is None else read_json(file)
    if values.keys() & {"lora_config", "moe_config"}:    # the research code's own
        values = research.from_research(values, file)
    c = config_from(AdapterConfig, values, file or "adapter", whole=True)
    return baselines.configure(method, c)


def build_adapter(model: FluxTransformer, config: AdapterConfig) -> Adapter:
    """An adapter for the transformer, not yet in it. Raises: ValueError."""
    targets.check_sizes(config)
    layers = targets.layers_of(model, config, baselines.KINDS)
    return Adapter(layers, config, model.config.joint_attention_dim,
                   model.config.pooled_projection_dim)


def new_adapter(model: FluxTransformer, config: AdapterConfig) -> Adapter:
    """A new adapter on the transformer, to be trained. Raises: ValueError."""
    return build_adapter(model, config).insert(model)


def load_adapter(model: FluxTransformer, path: Path) -> Adapter:
    """Put a saved adapter on the transformer, frozen: a file, or a folder of ours or the paper's.

    Raises: FileNotFoundError, ValueError; the transformer is then as it was.
    """
    values, tensors = adapters.read(path)
    config = config_from(AdapterConfig, values, path, whole=True)
    try:
        adapter = build_adapter(model, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    adapters.assign(adapter, tensors, path)
    return adapter.insert(model).requires_grad_(False).eval()


def main() -> None:
    args = options.weights_options()
    if args.to_research:
        research.write(*adapters.read(args.path), args.path, args.to_research)
    told = describe(args.to_research or args.path, load)
    print(told)
    if told.endswith(": not whole"):
        sys.exit(1)                                      # so that scripts can ask


if __name__ == "__main__":
    commands.run(main)
