"""The embedded model's transformer and text encoders, trained together on text to image and edits.

tiny/pretrain.py asks for them last, in as many processes as there are cores, two at most.
"""
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import dit
import weights
from dit import DiTConfig, FluxTransformer
from sample import as_tokens, velocity
from support import devices
from support.conditions import pick
from support.configs import config_from, read_json
from support.files import read_tensors, replacing, unpickled, write_json, write_part, write_tensors
from support.muon import Muon
from support.pictures import to_tensor
from text_encoder import CLIPConfig, CLIPEncoder, CLIPTokenizer, T5Config, T5Encoder, T5Tokenizer
from tiny import world
from tiny.autoencoder import FAST
from tiny.vocabularies import LENGTH

NOUNS = [*world.SHAPES, *world.FIGURES]                  # what a thing may be,
NAMES = [*NOUNS, *world.COLOURS, "big"]                  # and what it may be called
FILLERS = sorted({word for task in world.BASE_TASKS for wording in world.WORDINGS[task][:-2]
                  for word in re.findall(r"(?<!\{)\b[a-z]+\b(?!\})", wording)})

DIT = {"_class_name": "FluxTransformer2DModel", "attention_head_dim": 32,
       "axes_dims_rope": [8, 12, 12], "guidance_embeds": True, "in_channels": 64,
       "joint_attention_dim": 128, "num_attention_heads": 4, "num_layers": 3,
       "num_single_layers": 6, "out_channels": None, "patch_size": 1, "pooled_projection_dim": 128}
T5 = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 128, "d_ff": 256,
      "d_kv": 32, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 3,
      "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
      "is_encoder_decoder": True, "dropout_rate": 0.0, "layer_norm_epsilon": 1e-06,
      "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
      "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
      "tie_word_embeddings": False, "use_cache": True}
CLIP = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 128,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "max_position_embeddings": LENGTH,
        "attention_dropout": 0.0, "dropout": 0.0, "projection_dim": 128, "bos_token_id": 0,
        "pad_token_id": 1}
PIPELINE = {"_class_name": "FluxKontextPipeline", "_diffusers_version": "0.34.0",
            "feature_extractor": [None, None], "image_encoder": [None, None],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"]}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256,
             "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 4096,
             "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0, "shift_terminal": None,
             "stochastic_sampling": False, "time_shift_type": "exponential",
             "use_beta_sigmas": False, "use_dynamic_shifting": True,
             "use_exponential_sigmas": False, "use_karras_sigmas": False}


def cache_latents(out: Path, work: Path, images: int) -> dict[str, Tensor]:
    """Latents and token ids of many samples, made once: a quarter text to image, the rest edits."""
    file = work / "latents.safetensors"
    if file.is_file():
        return read_tensors([file])
    rng = np.random.default_rng(3)
    vae = weights.load("vae", out / "vae", dtype=FAST).to(memory_format=torch.channels_last)
    t5, clip = T5Tokenizer(out / "tokenizer_2"), CLIPTokenizer(out / "tokenizer")
    found: dict[str, list[Tensor]] = {}
    for i in trange(images // 100, desc="latents", mininterval=10):
        group = "t2i" if i % 4 == 0 else "edit"
        samples = [world.tiny_sample(rng, "t2i" if group == "t2i" else pick(rng, world.EDITS))
                   for _ in range(100)]
        text = [sample.instruction for sample in samples]
        parts = {"t5": t5(text).short(), "clip": clip(text).short()}
        pictures = {"target": [s.target for s in samples]} | (
            {"ref": [s.images[0] for s in samples]} if group == "edit" else {})
        with torch.no_grad():
            parts |= {name: vae.encode(to_tensor(p).to(FAST))
                      for name, p in pictures.items()}
        for name, tensor in parts.items():
            found.setdefault(f"{group}.{name}", []).append(tensor)
    tensors = {name: torch.cat(parts) for name, parts in found.items()}
    write_tensors(tensors, file)
    return tensors


def build_models(out: Path) -> nn.ModuleDict:
    """All that is trained, with first weights; gates and the last layer start at zero."""
    torch.manual_seed(0)
    clip_vocab = read_json(out / "tokenizer" / "vocab.json")
    sizes = T5Tokenizer(out / "tokenizer_2").model.get_vocab_size()
    T5["vocab_size"], CLIP["vocab_size"] = -(-sizes // 16) * 16, len(clip_vocab)
    CLIP["eos_token_id"] = clip_vocab["<|endoftext|>"]
    model = nn.ModuleDict({"dit": FluxTransformer(config_from(DiTConfig, DIT, "DIT")),
                           "t5": T5Encoder(config_from(T5Config, T5, "T5")),
                           "clip": CLIPEncoder(config_from(CLIPConfig, CLIP, "CLIP")),
                           "reader": Reader(T5["d_model"])})
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.startswith("t5") and name.endswith(".q"):
                module.weight.data *= T5["d_kv"] ** -0.5
        elif name.endswith("relative_attention_bias"):   # near words first, a reach for each head
            far = torch.arange(T5["relative_attention_num_buckets"]) % 16
            module.weight.data = -far[:, None] * torch.tensor([2, 1, 0.5, 0])
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if "shared" in name else 0.1)
        if isinstance(module, (dit.Modulation, dit.FinalModulation)):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(model["dit"].proj_out.weight)
    return model


class Reader(nn.Module):
    """A query per cell of the grid, and one per noun, looks at T5's tokens and says what is there.

    A cell: which thing stands in it; a noun: which colours such things have.
    """

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(len(world.CELLS) + len(NOUNS), width))
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_names = nn.Linear(width, len(NAMES))

    def forward(self, txt: Tensor) -> Tensor:            # (B, T, width) -> (B, queries, names)
        queries = self.queries.expand(len(txt), -1, -1)
        q, k, v = (x.unflatten(-1, (4, -1)).transpose(1, 2)                  # (B, 4, . or T, d)
                   for x in (queries, *self.to_kv(txt).chunk(2, -1)))
        return self.to_names(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def bare_text(rng: np.random.Generator, scene: world.Scene) -> str:
    """What is in a scene, without the places, after up to five words that say nothing of it."""
    before = [pick(rng, FILLERS) for _ in range(rng.integers(6))]
    after = pick(rng, ("", " on {0}", " on a {0} background", ", background {0}"))
    things = world.describe(scene, places=False).replace("a orange", "an orange")
    return " ".join([*before, things]) + after.format(scene.background)


def reading_loss(model: nn.ModuleDict, tokens: T5Tokenizer, rng: np.random.Generator,
                 number: int) -> Tensor:
    """Which shape and colour stand where, read from text alone: T5 must tie words together.

    The public T5 comes trained. Ours learns to read beside the flow loss, which in 12,000 steps
    had learned what is in a picture of two things, but not which of them has which colour or place.
    Where texts without places were not read too, it tied colour and shape in those with places
    alone, and no adapter could colour two shapes of a map.
    """
    scenes, texts = [], []
    for _ in range(number):
        sample = world.tiny_sample(rng, "t2i")
        scenes.append(sample.scene)
        texts.append(sample.instruction)
    cells, nouns = (torch.zeros(number, len(what), len(NAMES)) for what in (world.CELLS, NOUNS))
    for cell, noun, scene in zip(cells, nouns, scenes):
        for thing in scene.things:
            names = [thing.shape, thing.colour] + ["big"] * (thing.radius == world.BIG)
            cell[thing.cell, [NAMES.index(name) for name in names]] = 1
            noun[NOUNS.index(thing.shape), NAMES.index(thing.colour)] = 1
    texts += [bare_text(rng, scene) for scene in scenes]
    read = model["reader"](model["t5"](tokens(texts)))   # (2 number, cells + nouns, names)
    return len(NAMES) * (
        F.binary_cross_entropy_with_logits(read[:number, :len(world.CELLS)], cells)
        + F.binary_cross_entropy_with_logits(read[:, len(world.CELLS):], nouns.repeat(2, 1, 1)))


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, rotate: Callable = dit.rotate) -> Tensor:
    """dit.attend() written out: of so few tokens the fused one takes 13 times as long backward.

    q, k, v (B, N, S, d), pe (S, d/2) -> (B, S, D).
    """
    scores = rotate(q, pe) @ rotate(k, pe).mT * q.shape[-1] ** -0.5          # (B, N, S, S)
    shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (shares @ v).transpose(1, 2).flatten(2)


def flow_loss(model: nn.ModuleDict, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """mean((velocity - (noise - x0))^2); guidance from [1, 4]; half of the t above 0.88.

    So few pixels are nearly all layout, which the words decide and noise hides only near t = 1.
    """
    x0 = dit.pack(batch["target"].float())               # (B, I, P)
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(2 + 1.5 * torch.randn(len(x0), generator=generator))   # (B,)
    guidance = 1 + 3 * torch.rand(len(x0), generator=generator)
    xt = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    txt, pooled = model["t5"](batch["t5"].long()), model["clip"](batch["clip"].long())
    half, refs = model["dit"].proj_out.weight.dtype, [batch["ref"]] if "ref" in batch else []
    given = as_tokens(txt.to(half), pooled.to(half), refs, 1)
    v = velocity(model["dit"], xt.to(half), t, guidance, given, 8, 8)        # (B, I, P)
    return F.mse_loss(v.float(), noise - x0)


def make_optimizers(model: nn.ModuleDict, master: list[Tensor], lr_hidden: float,
                    lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the hidden matrices, AdamW for the rest. master: fp32 copies of the parameters."""
    hidden = {id(module.weight) for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and re.search(r"block|layers", name)}
    matrices, others = ([m for m, p in zip(master, model.parameters()) if (id(p) in hidden) == own]
                        for own in (True, False))
    return Muon(matrices, lr_hidden), torch.optim.AdamW(
        others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def take_gradients(parameters: list[Tensor], master: list[Tensor], workers: int) -> None:
    """Hand the mean of all processes' gradients to the fp32 copies; 0 where none came."""
    flat = torch.cat([torch.zeros_like(m).flatten() if p.grad is None else
                      p.grad.float().flatten() for p, m in zip(parameters, master)])
    dist.all_reduce(flat)
    flat /= workers
    for p, m, g in zip(parameters, master, flat.split([m.numel() for m in master])):
        m.grad, p.grad = g.view_as(m), None


def train_transformer(rank: int, workers: int, out: Path, work: Path, steps: int, samples: int,
                      compiled: bool, batch_size: int = 64, lr: float = 1e-3) -> None:
    """One of `workers` processes, each with its share of the batch and one thread.

    The rates fall in the last third. Both passes see copies of the fp32 weights, in FAST in the
    transformer.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{(work / 'meeting').resolve()}",
                            rank=rank, world_size=workers)
    cache = cache_latents(out, work, samples)
    groups = {group: {name.split(".")[1]: t for name, t in cache.items() if name.startswith(group)}
              for group in ("t2i", "edit")}
    read = torch.cat([group["t5"].flatten() for group in groups.values()]).unique().long()
    model, tokens = build_models(out), T5Tokenizer(out / "tokenizer_2")
    master = [p.detach().clone() for p in model.parameters()]
    average = [p.clone() for p in master]
    checkpoint = work / "transformer.pt"
    state = unpickled(checkpoint) if checkpoint.is_file() else {"step": 0, "optimizers": []}
    if state["step"]:
        master, average = state["master"], state["average"]
    rates = (3 * lr, lr)
    optimizers = make_optimizers(model, master, *rates)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    model["dit"].to(FAST)
    for block in model["dit"].blocks:
        block.attend = attend
    if compiled:
        devices.compile_blocks(model["dit"])
    parameters = list(model.parameters())
    copies = [p.data for p in parameters]                # what both passes see
    torch._foreach_copy_(copies, master)
    bar, smooth = trange(state["step"], steps, initial=state["step"], total=steps,
                         desc="transformer", mininterval=10, disable=rank > 0), {}
    for step in bar:
        rng = np.random.default_rng([4, step])
        generator = torch.Generator().manual_seed(step * workers + rank)
        group = ("edit", "t2i", "edit")[step % 3]
        rows = torch.from_numpy(rng.choice(len(groups[group]["t5"]), batch_size))[rank::workers]
        loss = flow_loss(model, {name: t[rows] for name, t in groups[group].items()}, generator)
        (loss + reading_loss(model, tokens, np.random.default_rng([6, step, rank]),
                             batch_size // workers)).backward()
        take_gradients(parameters, master, workers)
        nn.utils.clip_grad_norm_(master, 1.0)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 200, 1, 3 - 3 * step / steps)
            optimizer.step()
        torch._foreach_copy_(copies, master)
        torch._foreach_lerp_(average, master, max(0.003, 1 / (step + 1)))
        smooth[group] = 0.98 * smooth.get(group, loss.item()) + 0.02 * loss.item()
        bar.set_postfix(**{name: f"{value:.4f}" for name, value in smooth.items()}, refresh=False)
        if rank == 0 and (step % 250 == 249 or step + 1 == steps):
            with replacing(checkpoint) as aside:
                torch.save({"step": step + 1, "master": master, "average": average,
                            "optimizers": [optimizer.state_dict() for optimizer in optimizers]},
                           aside)
            save_models(model, average, read, out if step + 1 == steps else work / "model")


def save_models(model: nn.ModuleDict, average: list[Tensor], read: Tensor, out: Path) -> None:
    """Write transformer, text encoders and the pipeline's own files, with averaged weights.

    read: T5's pieces that stand in what was trained on. The others have their first, random
    vectors still; they are drawn to the mean of the known, so that an unknown word disturbs little.
    """
    named = dict(zip((name for name, _ in model.named_parameters()), average))
    known = named["t5.shared.weight"]                    # (pieces, D)
    others = known[read].mean(0) + 0.2 * known
    named["t5.shared.weight"] = others.index_copy(0, read, known[read])
    for part, folder, config, name in (
            ("dit", "transformer", DIT, "diffusion_pytorch_model.safetensors"),
            ("t5", "text_encoder_2", T5, "model.safetensors"),
            ("clip", "text_encoder", CLIP, "model.safetensors")):
        tensors = {key.removeprefix(part + "."): t for key, t in named.items()
                   if key.startswith(part + ".")}
        write_part(tensors, config, out / folder, name, torch.bfloat16)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", PIPELINE)
