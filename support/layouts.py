"""Layouts: how the original release, ComfyUI and others name the tensors of a FLUX model.

weights.py calls to_folder() on every file it reads, sample.py and train.py ask model_paths() where
the parts of a model lie. Inside the project a tensor has its name in the Hugging Face folder.
"""
import re
from pathlib import Path

import torch
from torch import Tensor

from support import foreign
from support.configs import config_from, read_json
from support.files import files_of, read_tensors
from vae import VAEConfig

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
KINDS = {"transformer": "a transformer", "vae": "an autoencoder",
         "text_encoder": "a CLIP text encoder", "text_encoder_2": "a T5 text encoder"}
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale|scaled_fp8|scale_input|input_scale"
                    r"|comfy_quant)"
                    r"|(vision_model|text_projection|visual_projection)(\..*)?")


def folder_names(name: str, table: dict[str, str]) -> list[str]:
    """The folder's names for the parts of one tensor of another layout."""
    for old, new in table.items():
        name = name.replace(old, new)
    before, _, rest = name.partition("{")
    fused, _, after = rest.partition("}")
    return [before + part + after for part in fused.split("|")]


def to_folder(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One part's tensors, in any known layout, under the folder's names; slices are views.

    Beside a weight in fp8 there may be a scale, in a tensor named .scale_weight (.weight_scale in
    newer files), one for the tensor or one for each row.
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
        names = folder_names(re.sub(r"\.weight_scale$", ".scale_weight", old),
                             RENAMES.get(part, {}))
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
        new = dict(zip(names, [t] * len(names) if odd else       # check_tensors() tells of those
                       t.split([rows * share for share in shares])))
        if new.keys() & found.keys() - {"shared.weight"}:        # T5's may have two names
            raise ValueError(f"{old} has the place of another tensor, {min(new)}")
        found |= new
    return found


def parts_in(path: Path) -> dict[str, Path]:
    """Where the parts lie that a model's folder, the folder of one part, or a file holds."""
    if path.is_dir() and not (path / "config.json").is_file():
        found = {part: path / part for part in OPTIONS if (path / part).is_dir()}
        files = sorted(path.glob("*.safetensors"))
        if found or len(files) != 1:
            return found
        path = files[0]                                  # as a folder holds that one is fetched to
    tensors = read_tensors(files_of(path))
    foreign.check_quantised(tensors, path)
    return {part: path for part, sign in SIGNS.items() if sign in to_folder(part, tensors)}


def part_in(path: Path, part: str) -> Path:
    """Where in what an option names its part lies. Raises: ValueError, FileNotFoundError."""
    foreign.check_there(path, OPTIONS[part])
    found = parts_in(foreign.snapshot(path))
    if part not in found:
        held = " and ".join(KINDS[other] for other in found if other in KINDS)
        raise ValueError(f"{OPTIONS[part]} {path}: holds {held or 'no part of a FLUX model'}, not "
                         f"{KINDS[part]}")
    return found[part]


def check_widths(dit: object, vae: object, t5: object, clip: object) -> None:
    """Raises: ValueError where parts' configurations are of models that do not go together."""
    for option, has, takes in (("--t5", t5.d_model, dit.joint_attention_dim),
                               ("--clip", clip.hidden_size, dit.pooled_projection_dim),
                               ("--vae", 4 * vae.latent_channels, dit.in_channels)):
        if has != takes:
            raise ValueError(f"{option}: gives vectors of {has} numbers, and the transformer takes "
                             f"{takes}; name one of the same model, or another --model")


def only_size(model: Path) -> tuple[int, int] | None:
    """The (W, H) of all pictures where the autoencoder's config.json is that of a small model.

    model: its folder, or the autoencoder's own, or its file.
    """
    place = foreign.snapshot(model)
    folder = place.parent if place.is_file() else place  # of a file, weights.load() looks beside it
    file = (folder / "vae" if (place / "vae").is_dir() else folder) / "config.json"
    values = read_json(file) if file.is_file() else {}
    whole = "block_out_channels" in values               # else load_pipeline() says what it is
    return config_from(VAEConfig, values, file).only_size if whole else None


def model_paths(model: Path, tokenizers: str | Path | None = None, vae: str | Path | None = None,
                text_encoder: str | Path | None = None, text_encoder_2: str | Path | None = None
                ) -> dict[str, Path]:
    """Where each part of a model is: where it is said to be, else in the model's folder or file.

    Raises: FileNotFoundError; ValueError naming the option that is missing.
    """
    tokenizers = Path(tokenizers) if tokenizers else None
    given = {"vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    foreign.check_there(model, "--model")
    if tokenizers:
        foreign.check_there(tokenizers, "--tokenizers")
    model = foreign.snapshot(model)
    others = {part: Path(path) for part, path in given.items() if path}
    found = parts_in(model) | others
    if tokenizers:
        tokenizers = foreign.snapshot(tokenizers)
        if not (tokenizers / "tokenizer").is_dir():
            raise ValueError(f"--tokenizers {tokenizers}: holds no tokenizer/ and tokenizer_2/; "
                             "name the folder that does")
        found |= {name: tokenizers / name for name in ("tokenizer", "tokenizer_2")}
    missing = dict.fromkeys(option for part, option in OPTIONS.items() if part not in found)
    if "--model" in missing:
        raise ValueError(f"--model {model}: holds no FLUX Kontext transformer; "
                         f"python weights.py {model} says what it is")
    if missing:
        raise ValueError(f"{model}: is no whole model; name {', '.join(missing)} too "
                         "(--tokenizers: a folder that holds tokenizer/ and tokenizer_2/)")
    found |= {part: part_in(path, part) for part, path in others.items()}
    for folder in (found["tokenizer"], found["tokenizer_2"]):
        foreign.check_there(folder)
        for file in filter(Path.is_file, folder.glob("*")):
            foreign.check_text(foreign.start_of(file), file)
    return found
