"""The pipeline: an instruction and some pictures -> a picture.

    x = noise;  for t, t_next in the schedule:  x = x + (t_next - t) * velocity(x, t)

Key: B batch; H, W pixels; h, w latent grid; C = 16 latent channels; P = 64 packed; T text,
I target, R native reference, Q clean condition tokens.

Run: python sample.py --instruction "make the green circle blue" --image tiny/examples/before.png
"""
import argparse
import hashlib
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import baselines
import dit
import mole
import weights
from data import (NAMES, checked_text, fitted, load_image, read_rows, resize, row_paths, row_text,
                  to_tensor)
from dit import FluxTransformer, load_dit
from mole import Routing
from text_encoder import CLIPEncoder, CLIPTokenizer, T5Encoder, T5Tokenizer, load_clip, load_t5
from vae import AutoEncoder, load_vae

# Sizes of about one megapixel that the released model was trained on: width, height.
PREFERRED = [(672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248),
             (880, 1184), (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832),
             (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672)]
ROOM = 0.8                                               # of a device's memory, for weights


@dataclass
class Pipeline:
    """Everything between a text, some pictures, and a picture."""
    dit: FluxTransformer
    vae: AutoEncoder
    t5: T5Encoder
    clip: CLIPEncoder
    t5_tokens: T5Tokenizer
    clip_tokens: CLIPTokenizer
    adapter: mole.Adapter | None
    device: torch.device
    dtype: torch.dtype
    cache: weights.Cache | None = None                   # of what the encoders gave before


@dataclass
class Given:
    """What the transformer is told besides the noisy target. All of one batch."""
    txt: Tensor                                          # (B, T, D)
    pooled: Tensor                                       # (B, D')
    ref: Tensor | None                                   # (B, R, P) native references
    ref_ids: Tensor | None                               # (R, 3)
    cond: Tensor | None                                  # (B, Q, P) clean conditions
    cond_ids: Tensor | None                              # (Q, 3)


# ----------------------------------------------------------------------------------------- loading

def choose_device(name: str) -> torch.device:
    """auto: an accelerator where there is one. Raises: ValueError for what this machine has not."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", name):
        raise ValueError(f"--device {name}: write auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: unusable here ({str(error).splitlines()[0]})") from None
    return device


def memory(device: torch.device) -> int:
    """Bytes: on a CUDA device those that are free, elsewhere all that the machine has."""
    if device.type == "cuda":                            # what PyTorch keeps for itself is free too
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    if not hasattr(os, "sysconf"):                       # Windows does not say
        return 16 * 2 ** 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_dtype(name: str, device: torch.device, stored: int) -> torch.dtype:
    """auto: bf16 on an accelerator; on a CPU only where it is fast and the model large.

    Large: in fp32 it would not fit in half the memory.
    """
    if name != "auto":
        return getattr(torch, name)
    fast = device.type != "cpu" or weights.FAST_BF16
    large = device.type != "cpu" or 2 * stored >= memory(device) / 2
    return torch.bfloat16 if fast and large else torch.float32


def model_paths(model: Path, tokenizers: Path | None = None,
                **others: Path | None) -> dict[str, Path]:
    """Where each part of a model is: where it is said to be, else in the model's folder or file.

    others: by part. Raises: FileNotFoundError; ValueError naming the option that is missing.
    """
    if not model.exists():
        raise FileNotFoundError(f"{model}: no such model; the embedded one is tiny/model")
    found = weights.places(model) | {part: path for part, path in others.items() if path}
    if tokenizers:
        found |= {name: tokenizers / name for name in ("tokenizer", "tokenizer_2")}
    missing = dict.fromkeys(option for part, option in weights.OPTIONS.items() if part not in found)
    if "--model" in missing:
        raise ValueError(f"--model {model}: holds no FLUX Kontext transformer; "
                         f"python weights.py {model} says what it is")
    if missing:
        raise ValueError(f"{model}: is no whole model; name {', '.join(missing)} too "
                         "(--tokenizers: a folder that holds tokenizer/ and tokenizer_2/)")
    for path in found.values():
        if not path.exists():
            raise FileNotFoundError(f"{path}: not found")
    return found


def load_pipeline(model: str | Path, adapter: str | Path | None = None, device: str = "auto",
                  dtype: str = "auto", encoders_stay: bool = False, weightless: bool = False,
                  **others: Path | None) -> Pipeline:
    """Read a model and any adapter given. others: as model_paths() takes them.

    A model that would fill the device stays where it is mapped; its parts visit the device in turn.
    So do text encoders and autoencoder if they are asked to stay. weightless: on "meta".
    Raises: FileNotFoundError, ValueError.
    """
    paths = model_paths(Path(model), **others)
    t5_tokens, clip_tokens = T5Tokenizer(paths["tokenizer_2"]), CLIPTokenizer(paths["tokenizer"])
    where = choose_device(device)
    stored = sum(file.stat().st_size for path in {paths[part] for part in weights.SIGNS}
                 for file in weights.files_of(path))
    kind = choose_dtype(dtype, where, stored)
    needed = stored * kind.itemsize / 2                  # files hold two bytes a weight, or fewer
    home = where if needed < ROOM * memory(where) else torch.device("cpu")
    keep = where.type == "cpu" and needed >= memory(where) / 2   # widened where they are used
    home = torch.device("meta") if weightless else home
    near = torch.device("cpu") if encoders_stay else home
    pipe = Pipeline(
        load_dit(paths["transformer"], home, kind, keep), load_vae(paths["vae"], near, kind),
        load_t5(paths["text_encoder_2"], near, kind, keep),
        load_clip(paths["text_encoder"], near, kind), t5_tokens, clip_tokens, None, where, kind)
    kinds = {t.dtype for part in (pipe.dit, pipe.vae, pipe.t5, pipe.clip) for t in weights_of(part)}
    weights.check_device(kinds, where, model)
    if where.type == "cpu":                              # convolutions are faster so there
        pipe.vae.to(memory_format=torch.channels_last)   # (and slower on a GPU, with the norms)
    if adapter is not None:
        pipe.adapter = load_adapter(pipe.dit, Path(adapter))
        for p in pipe.adapter.tensors().values():        # and not the model's weights in its layers
            p.data = p.data.to(where)
    return pipe


def put_adapter(model: FluxTransformer, config: mole.AdapterConfig,
                tensors: dict[str, Tensor] | None = None) -> mole.Adapter:
    """An adapter on the transformer, where that one is: a new one, or of saved tensors."""
    c = model.config
    return mole.Adapter(model, config, c.joint_attention_dim, c.pooled_projection_dim, tensors,
                        baselines.KINDS)


def load_adapter(model: FluxTransformer, path: Path) -> mole.Adapter:
    """Put a saved adapter on the transformer, frozen: a file, or a folder of ours or the paper's.

    Raises: FileNotFoundError, ValueError.
    """
    values, tensors = weights.read_adapter(path)
    config = weights.config_from(mole.AdapterConfig, values, path, whole=True)
    try:
        adapter = put_adapter(model, config, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return adapter.requires_grad_(False).eval()


# ------------------------------------------------------------------- models larger than the device

def weights_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the device has the model's weights, or room for them."""
    away = [t.nbytes for t in weights_of(model) if t.device.type != device.type]
    return not away or sum(away) < ROOM * memory(device)


@contextmanager
def visiting(model: nn.Module, device: torch.device) -> Iterator[Callable]:
    """Within the `with` the model's weights are on the device; then they are where they were.

    Gives a plain `run` for the transformer.
    """
    kept = [(t, t.data) for t in weights_of(model) if t.device != device]
    try:
        for t, home in kept:
            t.data = home.to(device)
        yield dit.call
    finally:
        for t, home in kept:
            t.data = home


@contextmanager
def streamed(model: FluxTransformer, device: torch.device) -> Iterator[Callable]:
    """A `run` for the transformer: its blocks visit the device one after another.

    While one computes, the next is on its way; there are never more than two.
    """
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    road = torch.cuda.Stream(device) if device.type == "cuda" else None
    visits: dict[nn.Module, ExitStack] = {}

    def wait() -> None:                                  # until what was asked has been computed
        if road:
            torch.cuda.current_stream(device).synchronize()

    def fetch(block: nn.Module) -> None:                 # ends when the copy does
        if block not in visits:
            visits[block] = ExitStack()
            with torch.cuda.stream(road) if road else nullcontext():
                visits[block].enter_context(visiting(block, device))

    def run(block: nn.Module, *args: object) -> object:
        fetch(block)
        out = block(*args)                               # a GPU is asked, and not waited for
        for ahead in blocks[blocks.index(block) + 1:][:1]:
            fetch(ahead)
        wait()
        visits.pop(block).close()
        return out

    with ExitStack() as rest:
        for part in model.children():
            if not isinstance(part, nn.ModuleList):
                rest.enter_context(visiting(part, device))
        try:
            yield run
        finally:
            wait()
            for visit in visits.values():
                visit.close()


# --------------------------------------------------------------------------------- what is given

def encode_text(pipe: Pipeline, instructions: list[str]) -> tuple[Tensor, Tensor]:
    """B texts -> T5's tokens (B, T, D) and CLIP's pooled vectors (B, D')."""
    def compute(texts: list[str]) -> tuple[Tensor, Tensor]:
        where = pipe.device if fits(pipe.t5, pipe.device) else torch.device("cpu")
        with torch.no_grad(), visiting(pipe.t5, where):
            txt = pipe.t5(pipe.t5_tokens(texts).to(where)).to(pipe.device)
        with torch.no_grad(), visiting(pipe.clip, pipe.device):
            return txt, pipe.clip(pipe.clip_tokens(texts).to(pipe.device))
    if pipe.cache is None:
        return compute(instructions)
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in instructions]
    txt, pooled = pipe.cache.through(keys, lambda i: compute([instructions[i]]))
    return txt.to(pipe.device), pooled.to(pipe.device)


def encode_picture(pipe: Pipeline, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the raw latents, each (B, C, h, w)."""
    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), visiting(pipe.vae, pipe.device):
            return pipe.vae.moments(pictures.to(pipe.device, pipe.dtype))
    if pipe.cache is None:
        return compute(pictures)
    keys = [hashlib.sha256(str(p.shape).encode() + p.numpy().tobytes()).hexdigest()
            for p in pictures]
    mean, logvar = pipe.cache.through(keys, lambda i: compute(pictures[i:i + 1]))
    return mean.to(pipe.device), logvar.to(pipe.device)


def condition(pipe: Pipeline, instructions: list[str], images: list[Tensor],
              conds: list[Tensor]) -> Given:
    """Encode instructions and pictures, once for all steps.

    Shapes: instructions B texts; images, conds: each picture of the batch (B, 3, H, W), native
    references and clean conditions, any number of each. Units: pictures in [-1, 1].
    """
    return arranged(*encode_text(pipe, instructions),
                    [pipe.vae.latents(*encode_picture(pipe, p)) for p in (*images, *conds)],
                    len(images))


def arranged(txt: Tensor, pooled: Tensor, latents: list[Tensor], n: int) -> Given:
    """Latents (B, C, h, w) as tokens with their positions; the first n are native references."""
    ids = [i.to(txt.device) for i in dit.reference_ids([z.shape[-2:] for z in latents])]
    tokens = [dit.pack(z) for z in latents]              # each (B, hw/4, P)
    ref, cond = (torch.cat(some, 1) if some else None for some in (tokens[:n], tokens[n:]))
    ref_ids, cond_ids = (torch.cat(some) if some else None for some in (ids[:n], ids[n:]))
    return Given(txt, pooled, ref, ref_ids, cond, cond_ids)


def velocity(model: FluxTransformer, xt: Tensor, t: Tensor, guidance: Tensor, given: Given,
             h: int, w: int, run: Callable = dit.call) -> Tensor:
    """Velocity of the target alone: xt (B, I, P); t, guidance (B,); grid h x w -> (B, I, P)."""
    ids = dit.position_ids(h, w).to(xt.device)           # (I, 3)
    img = xt if given.ref is None else torch.cat([xt, given.ref.to(xt.dtype)], dim=1)  # (B, I+R, P)
    ids = ids if given.ref is None else torch.cat([ids, given.ref_ids])      # (I+R, 3)
    v = model(img, given.txt, given.pooled, t, guidance, ids, given.cond, given.cond_ids, run=run)
    return v[:, :xt.shape[1]]                            # the references' velocities mean nothing


# ---------------------------------------------------------------------------------------- sampling

def denoise(pipe: Pipeline, noise: Tensor, given: Given, steps: int, guidance: float,
            run: Callable = dit.call) -> Iterator[Tensor]:
    """Euler steps from noise to latents, in fp32; yields the latents after each step.

    Shapes: noise (B, C, h, w) -> (B, C, h, w), steps times. When there is an adapter, call within
    `with pipe.adapter.serve(...)` or `with merged(...)`; run: as the transformer takes it.
    """
    h, w = noise.shape[-2:]
    x = dit.pack(noise.float().to(pipe.device))          # (B, I, P)
    scale = torch.full((len(x),), guidance, device=pipe.device)
    times = dit.schedule(steps, x.shape[1]).tolist()
    for t, t_next in zip(times, times[1:]):
        now = torch.full((len(x),), t, device=pipe.device)
        with torch.no_grad():
            v = velocity(pipe.dit, x.to(pipe.dtype), now, scale, given, h, w, run)
        x = x + (t_next - t) * v.float()
        yield dit.unpack(x, h, w)


def seeded_noise(seeds: list[int], size: tuple[int, int], channels: int = 16) -> Tensor:
    """Standard normal (B, C, H / 8, W / 8), drawn on the CPU: a seed means the same everywhere."""
    shape = (1, channels, size[1] // 8, size[0] // 8)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                      for seed in seeds])


def council(pipe: Pipeline, given: Given) -> tuple[dict[str, tuple[Tensor, Tensor]], Routing]:
    """The adapter as the plain LoRA that it is for one instruction: layer name -> A, B."""
    with torch.no_grad(), pipe.adapter.serve(given.txt, given.pooled) as routing:
        return pipe.adapter.plain(routing), routing


@contextmanager
def merged(pipe: Pipeline, given: Given) -> Iterator[Routing]:
    """Within the `with` the transformer's weights are W + B A for this one instruction.

    The adapter then costs nothing per step. Afterwards all is as before, bit for bit.
    """
    pairs, routing = council(pipe, given)
    layers = {name: pipe.dit.get_submodule(name) for name in pairs}
    kept = {name: layer.base.weight.data for name, layer in layers.items()}
    try:
        for name, (A, B) in pairs.items():
            base, W = layers[name].base, kept[name]
            base.weight.data = torch.addmm(W.float(), B.detach(), A.detach()).to(W.dtype)
            pipe.dit.set_submodule(name, base)
        yield routing
    finally:
        for name, layer in layers.items():
            layer.base.weight.data = kept[name]
            pipe.dit.set_submodule(name, layer)


def mergeable(pipe: Pipeline, given: Given) -> bool:
    """Whether the adapter is a plain LoRA here, and its layers can be added to, and kept twice."""
    layers = pipe.adapter.layers.values()
    return (len(given.pooled) == 1 and not any(getattr(layer, "by_token", False)
                                               for layer in layers)
            and all(not isinstance(layer.base, weights.NarrowLinear)
                    and not isinstance(layer.base.weight, DTensor)           # one of many parts
                    and layer.base.weight.device.type == pipe.device.type for layer in layers)
            and sum(layer.base.weight.nbytes for layer in layers) < memory(pipe.device) / 2)


def compile_blocks(model: FluxTransformer) -> None:
    """Have the blocks compiled when they first run; those of a kind share what is compiled."""
    warnings.filterwarnings("ignore", ".*complex operators")     # rotate()'s are left as they are
    torch._dynamo.config.recompile_limit = 64            # for other numbers of tokens, conditions
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile()


def generate(pipe: Pipeline, given: Given, noise: Tensor, steps: int = 28, guidance: float = 2.5,
             bar: bool = False) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Pictures for what condition() encoded, and the routing weights of each adapted layer.

    Shapes: noise (B, C, h, w) -> (B, H, W, 3) uint8; layer name -> (B, E), by token (..., E).
    """
    whole = fits(pipe.dit, pipe.device)
    with torch.no_grad(), ExitStack() as stack:
        run = stack.enter_context((visiting if whole else streamed)(pipe.dit, pipe.device))
        routing = stack.enter_context(
            nullcontext() if pipe.adapter is None else
            merged(pipe, given) if mergeable(pipe, given) else
            pipe.adapter.serve(given.txt, given.pooled))
        for latents in tqdm(denoise(pipe, noise, given, steps, guidance, run), desc="steps",
                            total=steps, disable=not bar, leave=False):
            pass
    with torch.no_grad(), visiting(pipe.vae, pipe.device):
        img = pipe.vae.decode(latents.to(pipe.dtype)).float()            # (B, 3, H, W) in [-1, 1]
    img = ((img.clamp(-1, 1) + 1) * 127.5).round().byte()                # rounded, not truncated
    return img.permute(0, 2, 3, 1).cpu().numpy(), routing.weights if routing else {}


# ------------------------------------------------------------------------------------------- sizes

def output_size(pipe: Pipeline, images: list[Image.Image],
                wanted: tuple[int, int] | None) -> tuple[int, int]:
    """(W, H): as wanted, else the preferred size nearest in aspect to the picture to edit."""
    if wanted is not None:
        return wanted
    side = pipe.vae.config.sample_size
    sizes = PREFERRED if side >= 512 else [(side, side)]
    aspect = images[0].width / images[0].height if images else 1
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1] / aspect)))


def prepare(pipe: Pipeline, images: list[Image.Image], conds: list[Image.Image],
            size: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Resize what is given, to (1, 3, H, W) tensors in [-1, 1].

    The picture to edit takes the output's size, so that the grids coincide. Conditions keep their
    aspect, the longer side at most 512, as in training; a model for small squares takes only those.
    """
    # Deviation: diffusers makes 1024x1024 by default, whatever the reference: crops, zooms, drift.
    side = pipe.vae.config.sample_size
    refs = [resize(image, size if i == 0 else output_size(pipe, [image], None))
            for i, image in enumerate(images)]
    clean = [resize(image, fitted(image.size) if side >= 512 else (side, side)) for image in conds]
    return [to_tensor([p]) for p in refs], [to_tensor([p]) for p in clean]


# ----------------------------------------------------------------------------------------- command

@dataclass
class Job:
    """An instruction, and the pictures to make by it."""
    instruction: str
    images: list[Path]
    conds: list[Path]
    task: str                                            # a name for a group of instructions
    outs: list[tuple[int, Path]]                         # seed, file


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, as in 1024x768."""
    found = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    width, height = map(int, found.groups()) if found else (1000, 750)
    near = [min(max(16, round(side / 16) * 16), 8192) for side in (width, height)]
    if near != [width, height]:
        raise ValueError(f"--size {text}: write it as WIDTHxHEIGHT, multiples of 16 up to 8192, "
                         f"for example {near[0]}x{near[1]}")
    return width, height


def is_picture(name: str | Path) -> bool:
    """Whether Pillow can write an RGB picture to a file of this name."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower())
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind or "")
    except (OSError, KeyError, ValueError):
        return False
    return True


def read_batch(file: Path, folder: Path, seed: int) -> list[Job]:
    """Jobs of a .jsonl file: instruction, optionally images, conds (paths), task, seed, out (name).

    Everything is checked before anything is made; what is in the folder already is left out.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--batch {file}: no such file")
    jobs, names = [], set()
    known = {*NAMES["instruction"], *NAMES["images"], *NAMES["conds"], "task", "seed", "out"}
    for where, row in read_rows(file):
        if row.keys() - known:
            raise ValueError(f"{where}: unknown entry {min(row.keys() - known)!r}; a line may hold "
                             "instruction, images, conds, task, seed, out")
        name = row.get("out", f"{where.rpartition(' ')[2]:0>4}.png")
        own_seed = row.get("seed", seed)
        if not isinstance(name, str) or Path(name).name != name or not is_picture(name):
            raise ValueError(f"{where}: \"out\" must be a picture's file name, without a folder")
        if type(own_seed) is not int or not 0 <= own_seed < 2 ** 63:
            raise ValueError(f"{where}: \"seed\" must be a whole number from 0 to 2^63 - 1")
        images, conds = ([file.parent / path for path in row_paths(row, key, where)]
                         for key in ("images", "conds"))
        for path in (*images, *conds):
            load_image(path, where)
        if name in names:
            raise ValueError(f"{where}: a line before it has the same \"out\", {name}")
        names.add(name)
        jobs.append(Job(row_text(row, "instruction", where), images, conds,
                        str(row.get("task", "")),
                        [] if (folder / name).exists() else [(own_seed, folder / name)]))
    if not jobs:
        raise ValueError(f"{file}: holds no rows")
    return jobs


def save_picture(picture: np.ndarray, path: Path) -> None:
    with weights.replacing(path) as aside:
        Image.fromarray(picture).save(aside)


def routed(pipe: Pipeline) -> list[mole.MoLELinear]:
    """The layers that an instruction routes."""
    layers = pipe.adapter.layers.values() if pipe.adapter else []
    return [layer for layer in layers if isinstance(layer, mole.MoLELinear) and not layer.by_token]


def experts_line(pipe: Pipeline, chosen: dict[str, Tensor]) -> str:
    """The experts an instruction chose, by mean weight over the layers it routes."""
    layers = routed(pipe)
    if not layers:
        return ""
    mean = torch.stack([chosen[layer.name][0] for layer in layers]).mean(0)  # (E,)
    top = mean.argsort(descending=True)[:4].tolist()
    return (f"; experts (mean weight over {len(layers)} layers) "
            + ", ".join(f"{e}: {mean[e]:.2f}" for e in top))


def expert_use(pipe: Pipeline, instructions: list[str]) -> dict[str, Tensor]:
    """Mean weight of each expert, (E,), in each layer that instructions route, by its name."""
    given = condition(pipe, instructions, [], [])
    with torch.no_grad(), pipe.adapter.serve(given.txt, given.pooled) as routing:
        return {layer.name: layer.weigh(routing.z, routing)[0].mean(0)
                for layer in routed(pipe)}


def drawn(figure: "matplotlib.figure.Figure") -> np.ndarray:
    """-> (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def draw_routing(use: dict[str, dict[str, Tensor]]) -> np.ndarray:
    """Heat map of expert_use() by task: a panel each, layers down, experts across.

    -> (height, width, 3) uint8. Needs matplotlib.
    """
    from matplotlib.figure import Figure
    layers = list(next(iter(use.values())))
    top = max(w.max().item() for found in use.values() for w in found.values())
    figure = Figure((3.5 + 2 * len(use), 1.5 + 0.2 * len(layers)), layout="constrained")
    panels = figure.subplots(1, len(use), sharey=True, squeeze=False)[0]
    for panel, (task, found) in zip(panels, use.items()):
        w = torch.stack(list(found.values())).cpu().numpy()                  # (layers, E)
        image = panel.imshow(w, vmin=0, vmax=top, aspect="auto")
        panel.set(title=task, xlabel="expert")
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    figure.colorbar(image, ax=panels, label="mean weight")
    return drawn(figure)


def show_routing(pipe: Pipeline, jobs: list[Job], file: Path) -> None:
    """Draw which experts each layer chose, by the jobs' tasks. Raises: ValueError if none did."""
    use = {} if pipe.adapter is None else {
        task: expert_use(pipe, [job.instruction for job in jobs if job.task == task])
        for task in dict.fromkeys(job.task for job in jobs)}
    if not any(use.values()):
        raise ValueError(f"--routing {file}: no layer here is routed by the instruction")
    save_picture(draw_routing(use), file)
    print(f"{file}: the experts that {len(jobs)} instruction{'s'[:len(jobs) - 1]} chose")


def choose_adapter(name: str | None, model: Path) -> Path | None:
    """As named, where "none" means none; unnamed, adapter.safetensors beside the model, if any."""
    if name:
        return None if name == "none" else Path(name)
    beside = model.parent / "adapter.safetensors"
    return beside if beside.is_file() else None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What open_model() needs; the same for every command."""
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny/model",
                        help="FLUX Kontext folder, or a file with its transformer or all of it")
    for part, what in (("vae", "autoencoder"), ("text_encoder_2", "T5 text encoder"),
                       ("text_encoder", "CLIP text encoder")):
        parser.add_argument(weights.OPTIONS[part], dest=part, type=Path, metavar="PATH",
                            help=f"file or folder with the {what}, where --model has none")
    parser.add_argument("--tokenizers", type=Path, metavar="FOLDER",
                        help="holds tokenizer/ and tokenizer_2/, where --model is a file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto",
                        choices=["auto", "float32", "bfloat16", "float16"],
                        help="of the model; an adapter is fp32")


def model_options(args: argparse.Namespace) -> dict[str, Path | None]:
    """Where a command's options say that parts of the model are."""
    return {name: getattr(args, name) for name in ("vae", "text_encoder", "text_encoder_2",
                                                   "tokenizers")}


def open_model(args: argparse.Namespace, adapter: Path | None, **how: bool) -> Pipeline:
    """The model that a command's options name; how: as load_pipeline() takes it."""
    return load_pipeline(args.model, adapter, args.device, args.dtype, **how,
                         **model_options(args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Edit or make a picture by instruction.",
                                     usage="python sample.py --instruction TEXT [options]")
    parser.add_argument("--instruction", help="what to do, in words")
    parser.add_argument("--image", type=Path, action="append", default=[],
                        help="picture to edit; may be repeated")
    parser.add_argument("--cond", type=Path, action="append", default=[],
                        help="further condition (edges, depth, pose, subject); may be repeated")
    add_model_options(parser)
    parser.add_argument("--adapter", help="adapter file or folder, or none; "
                        "by default adapter.safetensors beside the model")
    parser.add_argument("--out", type=Path,
                        help="picture (out.png), or with --batch a folder (out)")
    parser.add_argument("--batch", type=Path,
                        help="a .jsonl file: one instruction, with images and conds, per line; a "
                        "picture whose name is in --out already is not made again")
    parser.add_argument("--seed", type=int, default=0, help="of the noise: the same makes the same")
    parser.add_argument("--steps", type=int, default=28, help="from noise to picture; %(default)s")
    parser.add_argument("--guidance", type=float, default=2.5, help="%(default)s; more follows "
                        "the words more closely")
    parser.add_argument("--size", help="WIDTHxHEIGHT; else that of --image, at the model's scale")
    parser.add_argument("--keep-size", action="store_true",
                        help="give the result the size of the first --image")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks: "
                        "half a minute more at first, then faster steps")
    parser.add_argument("--num", type=int, default=1, help="pictures, with --seed, --seed + 1, ...")
    parser.add_argument("--export-lora", type=Path, metavar="FILE.safetensors",
                        help="write the adapter, as this instruction routes it, as a plain LoRA; "
                        "a picture too only with --out")
    parser.add_argument("--routing", type=Path, metavar="PICTURE",
                        help="draw which experts each layer chose, for --instruction or, by task, "
                        "for a --batch; pictures too only with --out")
    return parser.parse_args()


def check_compiler() -> None:
    """Raises: ValueError when the one that torch.compile would take is not there."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not which(compiler):
        raise ValueError(f"--compile: needs a C++ compiler; there is no {compiler}")


def check_folder(option: str, file: Path) -> None:
    """Raises: ValueError when no file can be made there."""
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option} {file}: its folder does not exist or may not be written to")


def check_pictures(option: str, files: list[Path], given: list[Path]) -> None:
    """Of one folder and ending. Raises: ValueError when they cannot be, or one is given."""
    if not is_picture(files[0]) or any(map(Path.is_dir, files)):
        raise ValueError(f"{option} {files[0]}: name a picture file, for example out.png")
    check_folder(option, files[0])
    for file in filter(Path.exists, files):
        if any(map(file.samefile, given)):
            raise ValueError(f"{option} {file}: is a picture that is given; name another file")


def plan(args: argparse.Namespace) -> list[Job]:
    """What is to be made; all that the user gave is checked before any weight is read."""
    if (args.instruction is None) == (args.batch is None):
        raise ValueError("give either --instruction TEXT or --batch FILE.jsonl")
    if not 1 <= args.steps <= 10_000 or not 1 <= args.num <= 10_000:
        raise ValueError(f"--steps {args.steps} --num {args.num}: both must be from 1 to 10,000")
    if not 0 <= args.guidance <= 100:
        raise ValueError(f"--guidance {args.guidance}: must be from 0 to 100; 2.5 is usual")
    if not 0 <= args.seed < 2 ** 63 - args.num:
        raise ValueError(f"--seed {args.seed}: must be from 0 to 2^63")
    if args.compile:
        check_compiler()
    out, lora = args.out or Path("out" if args.batch else "out.png"), args.export_lora
    if lora:
        for wrong, why in ((args.batch, "needs one --instruction"),
                           (args.adapter == "none", "needs an adapter"),
                           (lora.suffix != ".safetensors", "its name must end in .safetensors"),
                           (lora.exists(), "exists already; name another file")):
            if wrong:
                raise ValueError(f"--export-lora {lora}: {why}")
        check_folder("--export-lora", lora)
    if args.routing and not find_spec("matplotlib"):
        raise ValueError(f"--routing {args.routing}: needs matplotlib: pip install matplotlib")
    make = args.out is not None or not (lora or args.routing)
    if args.num > 1 and not make:
        raise ValueError(f"--num {args.num}: without --out no picture is made")
    if args.batch is not None:
        if args.image or args.cond or args.num > 1:
            raise ValueError("--batch: pictures and seeds stand in the file; "
                             "leave out --image, --cond and --num")
        jobs = read_batch(args.batch, out, args.seed)
        if args.routing:
            check_pictures("--routing", [args.routing], [
                path for job in jobs for path in (*job.images, *job.conds)])
        if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
            raise ValueError(f"--out {out}: with --batch this must be a folder to write to")
        if not make:
            return [replace(job, outs=[]) for job in jobs]
        if made := sum(not job.outs for job in jobs):
            print(f"{args.batch}: {made} of {len(jobs)} pictures are in {out} by their names "
                  "already, and are not made again")
        return jobs
    if args.keep_size and not args.image:
        raise ValueError("--keep-size: there is no --image whose size could be kept")
    if not args.instruction.strip():
        raise ValueError("--instruction is empty: say what to show, or what to change")
    checked_text(args.instruction, "--instruction")
    given = [*args.image, *args.cond]
    for path in given:
        load_image(path)
    if args.routing:
        check_pictures("--routing", [args.routing], given)
    outs = [out] if args.num == 1 else [out.with_stem(f"{out.stem}_{i}") for i in range(args.num)]
    if make:
        check_pictures("--out", outs, given)
        if args.routing in outs:
            raise ValueError(f"--routing {args.routing}: --out makes that file too; name another")
    return [Job(args.instruction, args.image, args.cond, "",
                list(enumerate(outs, args.seed)) if make else [])]


def export_lora(pipe: Pipeline, instruction: str, file: Path) -> None:
    """Write the adapter as the plain LoRA that it is for one instruction."""
    if pipe.adapter is None:
        raise ValueError(f"--export-lora {file}: there is no adapter; name one with --adapter")
    pairs, routing = council(pipe, condition(pipe, [instruction], [], []))
    weights.save_lora(pairs, file)
    ranks = [len(A) for A, _ in pairs.values()]
    print(f"{file}: a plain LoRA on {len(pairs)} layers, of rank {min(ranks)} to {max(ranks)}"
          f"{experts_line(pipe, routing.weights)}")


def main() -> None:
    args, start = parse(), time.time()
    size = parse_size(args.size) if args.size else None
    jobs = plan(args)
    if not (args.export_lora or args.routing or any(job.outs for job in jobs)):
        return
    adapter = choose_adapter(args.adapter, args.model)
    pipe = open_model(args, adapter)
    if args.compile:
        compile_blocks(pipe.dit)
    if args.export_lora:
        export_lora(pipe, args.instruction, args.export_lora)
    if args.routing:
        show_routing(pipe, jobs, args.routing)
    for job in jobs:
        if not job.outs:
            continue
        if pipe.t5_tokens.cuts(job.instruction):
            print(f"note: the model reads {pipe.t5_tokens.length} tokens of text; the end of this "
                  f"instruction is lost: {job.instruction}", file=sys.stderr)
        images, conds = ([load_image(path) for path in paths] for paths in (job.images, job.conds))
        width, height = output_size(pipe, images, size)
        given = condition(pipe, [job.instruction], *prepare(pipe, images, conds, (width, height)))
        for seed, out in job.outs:
            out.parent.mkdir(parents=True, exist_ok=True)
            noise = seeded_noise([seed], (width, height), pipe.vae.config.latent_channels)
            pictures, chosen = generate(pipe, given, noise, args.steps, args.guidance, bar=True)
            picture, told = pictures[0], f"{width}x{height}"
            if args.keep_size and images:
                picture = resize(Image.fromarray(picture), images[0].size)
                told = f"{images[0].width}x{images[0].height}, made at {told}"
            elif images and images[0].size != (width, height):
                told += f" (the picture to edit: {images[0].width}x{images[0].height})"
            save_picture(picture, out)
            print(f"{out}: {told}, {args.steps} steps, seed {seed}, "
                  f"{time.time() - start:.1f} s{experts_line(pipe, chosen)}")
            start = time.time()


if __name__ == "__main__":
    weights.run(main)
