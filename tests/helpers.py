"""What several test files share: where things are, small models, small data, commands.

Nothing here asks anything of the product by itself.
"""
import dataclasses
import io
import json
import math
import operator
import struct
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import safe_open
from torch import nn, Tensor

import baselines
import data
import dit
import mole
import sample
import text_encoder
import train
import vae
import weights
from mole import AdapterConfig
from sample import condition, generate, load_pipeline
from support import commands, methods, recompute, research, routing_maps
from support.configs import config_from
from support.describe import describe
from support.files import write_part
from tiny import world

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny/model"
PICTURE = ROOT / "tiny/examples/before.png"
KEYS = Path(__file__).parent / "keys"                    # names and shapes of the published files


# ----------------------------------------------------------------------------------------- commands

def run_command(monkeypatch, capsys, script: str, main: Callable[[], None],
                *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process -> exit code, stdout, stderr without progress bar."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    code = 0
    try:
        commands.run(main)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, err


def run_sample(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Run sample.py's command in this process -> exit code, stdout, stderr."""
    return run_command(monkeypatch, capsys, "sample.py", sample.main, *arguments)


def run_train(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Run train.py's command in this process -> exit code, stdout, stderr."""
    return run_command(monkeypatch, capsys, "train.py", train.main, *arguments)


def pixels(file: Path) -> bytes:
    """What a picture shows, without what its file says of how it was made."""
    return Image.open(file).tobytes()


# ----------------------------------------------------------------------- models with random weights

TOLERANCE = 1e-5                                         # fp32, outputs of order 1: see test_dit


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Norm scales near 1, biases near 0, matrices that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim == 1:
            p.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))
        else:
            p.data = gain * noise / math.sqrt(p[0].numel())
    return model.eval().requires_grad_(False)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, peer: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal within the tolerance, and of order 1, so that the tolerance means something."""
    assert ours.shape == peer.shape and ours.dtype == peer.dtype
    assert 0.2 < peer.std() < 5, f"outputs of size {peer.std():.3g}: the test would be blind"
    assert (ours - peer).abs().max() <= tolerance


# -------------------------------------------------------------------- a small transformer's adapter

DIT = dit.DiTConfig(in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=8,
                    num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
                    axes_dims_rope=(2, 2, 4), guidance_embeds=True)
SMALL = mole.AdapterConfig(lora_rank=3, lora_alpha=6, experts=4, top_k=2, rank=2, alpha=4,
                           resampler_width=16, resampler_depth=2, resampler_heads=2,
                           resampler_head_dim=4)
FIRST = "transformer_blocks.0.ff.net.2"                  # one MoLE layer


def moles(adapter: mole.Adapter) -> list[mole.MoLELinear]:
    return [layer for layer in adapter.layers.values() if isinstance(layer, mole.MoLELinear)]


def adapted(seed: int = 0, blank: bool = False,
            **changes: object) -> tuple[dit.FluxTransformer, mole.Adapter]:
    """A small transformer and adapter, in train mode; unless blank, as if trained: B is not 0."""
    torch.manual_seed(seed)
    model = dit.FluxTransformer(DIT)
    adapter = weights.new_adapter(model, dataclasses.replace(SMALL, **changes))
    if not blank:
        for name, p in adapter.tensors().items():
            if name.endswith("_B"):
                nn.init.normal_(p, std=0.3)
    return model, adapter


def inputs(seed: int = 0, clean: bool = True) -> dict[str, Tensor]:
    """Two samples: 6 target tokens, 4 clean ones, 3 text tokens."""
    g = torch.Generator().manual_seed(seed)
    x = {"img": torch.randn(2, 6, 8, generator=g), "txt": torch.randn(2, 3, 12, generator=g),
         "pooled": torch.randn(2, 10, generator=g), "t": torch.rand(2, generator=g),
         "guidance": torch.ones(2), "img_ids": dit.position_ids(4, 6)}
    if clean:
        x |= {"cond": torch.randn(2, 4, 8, generator=g),
              "cond_ids": dit.position_ids(4, 4, index=1)}
    return x


def step(model: nn.Module, adapter: mole.Adapter, x: dict[str, Tensor], scale: float = 1.0,
         checkpointed: bool = False) -> tuple[Tensor, mole.Routing, dict[str, Tensor | None]]:
    """One forward and backward: output, routing with its losses, gradients by name."""
    adapter.zero_grad()
    with adapter.serve(x["txt"], x["pooled"], losses=True) as routing:
        run = recompute.recomputing(adapter, routing) if checkpointed else operator.call
        out = model(**x, run=run)
    (scale * (out.square().mean() + routing.balance + routing.orthogonality)).backward()
    return out, routing, {name: p.grad for name, p in adapter.tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dense_cosines(outputs: list[Tensor]) -> Tensor:
    """The orthogonality loss from the experts' outputs themselves."""
    E = len(outputs)
    unit = [Y.flatten() / Y.norm().clamp(min=1e-12) for Y in outputs]
    pairs = [(unit[i] @ unit[j]) ** 2 for i in range(E) for j in range(E) if i != j]
    return sum(pairs, outputs[0].new_zeros(())) / max(1, E * (E - 1))


# ------------------------------------------------------- small parts, written as they are published

SMALL_VAE = dict(block_out_channels=[8, 16], layers_per_block=1, latent_channels=4,
                 norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159)
SMALL_T5 = dict(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
SMALL_CLIP = dict(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2)
SMALL_DIT = dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
           num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
           axes_dims_rope=[4, 6, 6], guidance_embeds=True)
PARTS = {"vae": (SMALL_VAE, vae.VAEConfig, vae.AutoEncoder, partial(weights.load, "vae")),
         "transformer": (SMALL_DIT, dit.DiTConfig, dit.FluxTransformer,
                         partial(weights.load, "transformer")),
         "text_encoder": (SMALL_CLIP, text_encoder.CLIPConfig, text_encoder.CLIPEncoder,
                          partial(weights.load, "text_encoder")),
         "text_encoder_2": (SMALL_T5, text_encoder.T5Config, text_encoder.T5Encoder,
                            partial(weights.load, "text_encoder_2"))}


def tensors_of(part: str) -> dict[str, Tensor]:
    config, kind, model, _ = PARTS[part]
    torch.manual_seed(0)
    return model(config_from(kind, config, part)).state_dict()


def written(folder: Path, part: str,
            change: Callable[[dict], object] = lambda tensors: None) -> Path:
    """One component as published, in a single file, after `change` had its way with its tensors."""
    tensors = tensors_of(part)
    change(tensors)
    write_part(tensors, PARTS[part][0], folder, "model.safetensors", torch.float32)
    return folder


def load(folder: Path, part: str) -> nn.Module:
    return PARTS[part][3](folder)


def assert_equal(model: nn.Module, part: str) -> None:
    found, expected = model.state_dict(), tensors_of(part)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write_shards(folder: Path, part: str = "vae") -> dict[str, str]:
    """The same component in two files and an index. -> its weight_map."""
    tensors = tensors_of(part)
    names = sorted(tensors)
    weight_map = {}
    for i, half in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        write_part({name: tensors[name] for name in half}, PARTS[part][0], folder,
                             file, torch.float32)
        weight_map |= dict.fromkeys(half, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_file(path: Path, header: object, body: bytes = b"") -> Path:
    """A safetensors file with any header: its length in 8 bytes, JSON, then the tensors' bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    return path


def described(path: Path) -> tuple[str, bool]:
    """As `python weights.py PATH` says it; whether it is whole."""
    return describe(path, weights.load, weights.build_adapter)


ONE = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}


# ---------------------------------------------------------------------- the embedded model, trained

def adapter_config(method: str, file: Path | None = None) -> AdapterConfig:
    """A method's, with what a file names, as `train.py --config` takes it."""
    values = research.entries_of(file)[0] if file else {}
    config = config_from(AdapterConfig, values, file or "published", whole=True)
    return methods.configure(method, config, baselines.KINDS)


def make_pipeline(kind: str = "instructmole", seed: int = 0, model: Path = MODEL):
    torch.manual_seed(seed)
    pipe = load_pipeline(model, None, "cpu", "float32")
    config = adapter_config(kind, ROOT / "tiny/adapter.json")
    pipe.adapter = weights.new_adapter(pipe.dit, config).train()
    with torch.no_grad():                                # not zero, so that every gradient is alive
        for p in pipe.adapter.tensors().values():
            p.add_(0.02 * torch.randn_like(p))
    return pipe


def gradients(pipe) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in pipe.adapter.tensors().items()
             if p.grad is not None}
    pipe.adapter.zero_grad()
    return found


def samples(task: str, number: int = 2) -> list[data.Sample]:
    return world.tiny_test(task, number)


def made(pipe, instructions, images, conds, noise, steps):
    return generate(pipe, condition(pipe, instructions, images, conds), noise, steps)


def load_adapter(model: dit.FluxTransformer, path: Path) -> mole.Adapter:
    """One adapter, at its own strength."""
    return weights.load_adapters(model, [(path, 1.0)])


def expert_use(pipe: sample.Pipeline, texts: list[str]) -> dict[str, torch.Tensor]:
    """Mean weight of each expert in each layer that instructions route."""
    found = routing_maps.shares(pipe.adapter, *sample.encode_text(pipe, texts))
    return {name: (p * kept).mean(0) for name, (p, kept) in found.items()}


# ------------------------------------------------------------- public data sets, a few rows of each

def cell(colour: str, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> dict:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def omniedit() -> list[dict]:
    lists = [["one", "two"], ["alone"], [], None, ["one", "two"], ["one", "two"]]
    return [{"omni_edit_id": str(i), "task": "swap", "src_img": cell("red", kind="JPEG"),
             "edited_img": cell("blue", (64, 32)), "edited_prompt_list": prompts, "width": 64,
             "height": 48, "sc_score_1": 1.0, "sc_score_2": 1.0, "pq_score": 1.0, "o_score": 1.0}
            for i, prompts in enumerate(lists)]


def musar() -> list[dict]:
    return [{"cond_img_0": cell("red", (32, 64)), "cond_img_1": cell("green", (32, 32)),
             "tgt_img": cell("blue"), "cond_prompt_0": "a", "cond_prompt_1": "b",
             "prompt": f"both {i}"} for i in range(4)]


def subjectspatial() -> list[dict]:
    halves = Image.new("RGB", (256, 128), "blue")
    halves.paste("red", (128, 0, 256, 128))
    file = io.BytesIO()
    halves.save(file, "PNG")
    return [{"image": {"bytes": file.getvalue(), "path": "x.png"}, "bbox": [0.25, 0.5, 0.25, 0.5],
             "canny": {"bytes": cell("white", (128, 128))["bytes"]},
             "depth": {"bytes": cell("grey", (128, 128))["bytes"]},
             "description": {"item": "teapot", "description_0": "A teapot on a hill.",
                             "description_1": None, "category": "x", "description_valid": True},
             "quality_assessment": None if i else {"compositeStructure": 5, "objectConsistency": 5,
                                                   "imageQuality": 5}} for i in range(3)]


def coco() -> list[dict]:
    return [{"image": cell("blue"), "conditioning_image": cell("green"), "text": "a dog"}
            for _ in range(3)]


SETS = {"omniedit": omniedit, "musar": musar, "subjectspatial": subjectspatial, "coco": coco}


def write_set(folder, name: str, rows: list[dict] | None = None, **options: object):
    file = folder / f"{name}.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows or SETS[name]()), file, **options)
    return file


# ---------------------------------------------------------------------- the research code's numbers

GOLDEN_FILE = Path(__file__).parent / "golden" / "research_code_tiny.safetensors"
BUILDS = "igr", "token", "mixed", "pooled"
CASES = "t2i", "native", "cond", "both"


@cache
def golden() -> tuple[dict[str, Tensor], dict[str, dict]]:
    """All tensors by name, aliases resolved; the configuration of model, adapter and resampler."""
    with safe_open(GOLDEN_FILE, framework="pt") as opened:
        metadata = {name: json.loads(value) for name, value in opened.metadata().items()}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    aliases = metadata.pop("aliases")
    return tensors | {name: tensors[stored] for name, stored in aliases.items()}, metadata


def golden_part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in golden()[0].items()
            if name.startswith(prefix)}


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to ours, and put the experts of a layer side by side: A (in, E r), B (E r, out)."""
    replace = (("base_layer", "base"), ("linear_layer", "base"),
               ("lora_A.default.weight", "lora_A"), ("lora_B.default.weight", "lora_B"),
               ("gate.weight", "router.weight"), ("condition_type_embedder.", "instruction."))
    ours, experts = {}, {}
    for name, tensor in theirs.items():
        if ".experts." in name:
            layer, _, expert = name.partition(".experts.")
            number, side = expert.split(".")
            experts.setdefault((layer, side), {})[int(number)] = tensor
            continue
        for old, new in replace:
            name = name.replace(old, new)
        ours[name] = tensor
    for (layer, side), found in experts.items():
        name, dim = ("experts_A", 1) if side == "left" else ("experts_B", 0)
        ours[f"{layer}.{name}"] = torch.cat([found[e] for e in range(len(found))], dim=dim)
    return ours


def token_layers(theirs: dict[str, Tensor], pooled_width: int) -> tuple[str, ...]:
    """Layers whose gate is not as wide as the instruction vector take each token's own input."""
    return tuple(name.removesuffix(".gate.weight") for name, t in theirs.items()
                 if name.endswith(".gate.weight") and t.shape[1] != pooled_width)


def build_config(theirs: dict[str, Tensor]) -> tuple[dit.DiTConfig, mole.AdapterConfig]:
    _, metadata = golden()
    c, m, lora, resampler = (metadata[name] for name in ("config", "mole", "lora", "resampler"))
    model = dit.DiTConfig(**{name: tuple(value) if isinstance(value, list) else value
                             for name, value in c.items() if name != "patch_size"})
    return model, mole.AdapterConfig(
        lora_targets=tuple(lora["target_modules"]), lora_rank=lora["r"], lora_alpha=lora["alpha"],
        mole_targets=("ff.net.2", "single_transformer_blocks.*.proj_out"),
        token_targets=token_layers(theirs, model.pooled_projection_dim),
        experts=m["num_experts"], top_k=m["num_experts_per_tok"], rank=m["rank"], alpha=m["alpha"],
        balance_weight=m["type_aux_loss_alpha"], token_balance_weight=m["token_aux_loss_alpha"],
        orthogonality_weight=m["orthogonal_reg_alpha"],
        resampler=any(name.startswith("condition_type_embedder.") for name in theirs),
        resampler_width=resampler["dim"], resampler_depth=resampler["depth"],
        resampler_heads=resampler["heads"], resampler_head_dim=resampler["dim_head"])


def forward(model: dit.FluxTransformer, case: str) -> Tensor:
    """The velocity of the target's tokens."""
    x = golden_part("in.")
    native, clean = case in ("native", "both"), case in ("cond", "both")
    target = x["target"].shape[1]
    img = torch.cat([x["target"], x["native_ref"]], dim=1) if native else x["target"]
    out = model(img, x["txt"], x["pooled"], x["timestep"], x["guidance"],
                x["img_ids"][:img.shape[1]], cond=x["cond"] if clean else None,
                cond_ids=x["cond_ids"] if clean else None)
    return out[:, :target]


class Bomb:
    """Unpickled carelessly, it leaves a file behind."""
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)
