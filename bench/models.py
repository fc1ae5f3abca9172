"""How fast the models are, beside diffusers, transformers, and the floor of their matrix products.

Real widths, random weights, forward only; contestants take turns, a time is the median. The floor
is the time that the matrix products alone would take, attention's two included, at the rate of one
large product of the same type in the same run.

    blocks  one double and one single block of the transformer, 512 + 2,048 tokens
    vae     the released autoencoder, a picture of 512x512, both ways
    t5      two layers of T5-XXL's encoder, 512 tokens

Run: python bench/models.py blocks vae t5 --rounds 5
"""
import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dit                                               # noqa: E402
import text_encoder                                      # noqa: E402
import vae                                               # noqa: E402
import weights                                           # noqa: E402

TEXT, IMAGE = 512, 2048                                  # tokens


def config(part: str) -> dict:
    return json.loads((ROOT / f"tests/keys/config_{part}.json").read_text())


def times(rounds: int, contestants: dict[str, Callable]) -> dict[str, float]:
    """The median seconds of each, taking turns; one turn before does not count."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            began = time.time()
            with torch.inference_mode():
                work()
            if turn:
                found[name].append(time.time() - began)
    return {name: sorted(values)[len(values) // 2] for name, values in found.items()}


def put(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).eval()


def show(what: str, found: dict[str, float], floor: float | None = None) -> None:
    line = f"{what}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
    ours, peer = found["ours"], next(s for name, s in found.items() if name not in ("ours", "it"))
    line += f"; peer / ours {peer / ours:.2f}"
    if floor:
        line += f"; of the floor, {floor:.2f} s: ours {floor / ours:.0%}, peer {floor / peer:.0%}"
    print(line, flush=True)


def blocks(dtype: torch.dtype, rounds: int) -> None:
    from diffusers.models.transformers import transformer_flux as peers
    c = weights.config_from(dit.DiTConfig, config("transformer"), "transformer")
    D, S = c.width, TEXT + IMAGE
    x, W = torch.randn(S, D, dtype=dtype), torch.randn(4 * D, D, dtype=dtype)
    rate = 8 * S * D * D / times(rounds, {"it": lambda: x @ W.T})["it"]
    print(f"one product of {S} x {D} with {D} x {4 * D}: {rate / 1e9:.0f} GFLOP/s")
    floor = (24 * S * D ** 2 + 4 * S ** 2 * D) / rate
    txt, img, vec = (torch.randn(shape, dtype=dtype) for shape in
                     ((1, TEXT, D), (1, IMAGE, D), (1, D)))
    ids = torch.cat([torch.zeros(TEXT, 3), dit.position_ids(64, 128)])
    pe = dit.rope(ids, c.axes_dims_rope)
    rotary = peers.FluxPosEmbed(10000, c.axes_dims_rope)(ids)
    ours, peer = put(dit.DoubleBlock(c), dtype), put(peers.FluxTransformerBlock(
        D, c.num_attention_heads, c.attention_head_dim), dtype)
    show("double block", times(rounds, {
        "ours": lambda: ours(txt, [img], [vec], pe),
        "diffusers": lambda: peer(img, txt, vec, rotary)}), floor)
    one, other = put(dit.SingleBlock(c), dtype), put(peers.FluxSingleTransformerBlock(
        D, c.num_attention_heads, c.attention_head_dim), dtype)
    both = torch.cat([txt, img], dim=1)
    show("single block", times(rounds, {
        "ours": lambda: one([both], [vec], pe, False),
        "diffusers": lambda: other(img, txt, vec, rotary)}), floor)


def autoencoder(dtype: torch.dtype, rounds: int) -> None:
    from diffusers import AutoencoderKL
    values = config("vae")
    ours = put(vae.AutoEncoder(weights.config_from(vae.VAEConfig, values, "vae")), dtype)
    ours.to(memory_format=torch.channels_last)           # as load_vae() leaves it
    peer = put(AutoencoderKL.from_config(values), dtype)
    img, z = torch.randn(1, 3, 512, 512, dtype=dtype), torch.randn(1, 16, 64, 64, dtype=dtype)
    show("autoencoder, encode", times(rounds, {
        "ours": lambda: ours.encode(img), "diffusers": lambda: peer.encode(img)}))
    show("autoencoder, decode", times(rounds, {
        "ours": lambda: ours.decode(z), "diffusers": lambda: peer.decode(z)}))


def t5(dtype: torch.dtype, rounds: int) -> None:
    import transformers
    values = config("text_encoder_2") | {"num_layers": 2}
    ours = put(text_encoder.T5Encoder(weights.config_from(
        text_encoder.T5Config, values, "t5")), dtype)
    peer = put(transformers.T5EncoderModel(transformers.T5Config(**values)), dtype)
    ids = torch.randint(0, 32000, (1, TEXT))
    show("T5, two layers", times(rounds, {
        "ours": lambda: ours(ids), "transformers": lambda: peer(ids)}))


def main() -> None:
    parts = {"blocks": blocks, "vae": autoencoder, "t5": t5}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    for part in args.parts:
        parts[part](getattr(torch, args.dtype), args.rounds)


if __name__ == "__main__":
    main()
