"""How fast the models are, beside diffusers, transformers, and the floor of their matrix products.

Real widths, random weights, forward only; contestants take turns, a time is the median. The floor
is the time that the matrix products alone would take, attention's two included, at the rate of one
large product of the same type in the same run.

    blocks  one double and one single block of the transformer, 512 + 2,048 tokens
    dit     the whole transformer, 512 + 8,192 tokens: 1024x1024 with a reference (needs 60 GB)
    vae     the released autoencoder, a picture of 512x512, both ways
    t5      two layers of T5-XXL's encoder, 512 tokens
    load    all of the embedded model, and of a folder of the released size, whose files are holes

Run: python bench/models.py blocks vae t5 load --rounds 5
     python bench/models.py blocks dit --dtype bfloat16 --device cuda --compile
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dit                                               # noqa: E402
import sample                                            # noqa: E402
import text_encoder                                      # noqa: E402
import vae                                               # noqa: E402
import weights                                           # noqa: E402
import whole                                             # noqa: E402
from common import block_flops, in_turns, product_rate   # noqa: E402
from support import layouts                              # noqa: E402
from support.configs import config_from                  # noqa: E402
from support.files import files_of, read_tensors         # noqa: E402

TEXT, IMAGE = 512, 2048                                  # tokens
COMPILE = False                                          # --compile


def config(part: str) -> dict:
    return json.loads((ROOT / f"tests/keys/config_{part}.json").read_text())


def put(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).eval()


def compiled(*modules: nn.Module) -> None:
    """Under --compile, each by itself, as sample.py --compile has its blocks."""
    torch._dynamo.reset()                                # or it would allow for any size
    for module in modules if COMPILE else ():
        module.compile()


def show(what: str, found: dict[str, float], floor: float | None = None) -> None:
    line = f"{what}: " + ", ".join(f"{name} {seconds:.4g} s" for name, seconds in found.items())
    ours, peer = found["ours"], next(s for name, s in found.items() if name != "ours")
    line += f"; peer / ours {peer / ours:.2f}"
    if floor:
        line += f"; of the floor, {floor:.4g} s: ours {floor / ours:.0%}, peer {floor / peer:.0%}"
    print(line, flush=True)


def blocks(dtype: torch.dtype, rounds: int) -> None:
    from diffusers.models.transformers import transformer_flux as peers
    c = config_from(dit.DiTConfig, config("transformer"), "transformer")
    D, S = c.width, TEXT + IMAGE
    rate = product_rate(S, D, dtype)
    print(f"one product of {S} x {D} with {D} x {4 * D}: {rate / 1e9:.0f} GFLOP/s")
    floor = block_flops(S, D) / rate
    txt, img, vec = (torch.randn(shape, dtype=dtype) for shape in
                     ((1, TEXT, D), (1, IMAGE, D), (1, D)))
    ids = torch.cat([torch.zeros(TEXT, 3), dit.position_ids(64, 128)])
    pe = dit.rope(ids, c.axes_dims_rope)
    rotary = peers.FluxPosEmbed(10000, c.axes_dims_rope)(ids)
    ours, peer = put(dit.DoubleBlock(c), dtype), put(peers.FluxTransformerBlock(
        D, c.num_attention_heads, c.attention_head_dim), dtype)
    one, other = put(dit.SingleBlock(c), dtype), put(peers.FluxSingleTransformerBlock(
        D, c.num_attention_heads, c.attention_head_dim), dtype)
    compiled(ours, peer)
    show("double block", in_turns({
        "ours": lambda: ours(txt, [img], [vec], pe),
        "diffusers": lambda: peer(img, txt, vec, rotary)}, rounds), floor)
    both = torch.cat([txt, img], dim=1)
    compiled(one, other)
    show("single block", in_turns({
        "ours": lambda: one([both], [vec], pe, False),
        "diffusers": lambda: other(img, txt, vec, rotary)}, rounds), floor)


def whole_dit(dtype: torch.dtype, rounds: int) -> None:
    from diffusers import FluxTransformer2DModel
    values = config("transformer")
    with torch.device("meta"):
        ours = dit.FluxTransformer(config_from(dit.DiTConfig, values, "transformer"))
        peer = FluxTransformer2DModel.from_config(values)
    ours = ours.to(dtype).to_empty(device=torch.get_default_device()).eval()
    for p in ours.parameters():
        p.data.normal_(std=0.02)
    peer.load_state_dict(ours.state_dict(), assign=True)         # the same weights: one copy
    peer.eval()
    compiled(*ours.blocks, *peer.transformer_blocks, *peer.single_transformer_blocks)
    ids = torch.cat([dit.position_ids(128, 128), dit.position_ids(128, 128, 1)])
    img, txt, pooled = (torch.randn(shape, dtype=dtype) for shape in
                        ((1, len(ids), 64), (1, TEXT, 4096), (1, 768)))
    t, guidance, txt_ids = torch.tensor([0.5]), torch.tensor([2.5]), torch.zeros(TEXT, 3)
    c, tokens = ours.config, TEXT + len(ids)
    floor = ((c.num_layers + c.num_single_layers) * block_flops(tokens, c.width)
             / product_rate(tokens, c.width, dtype))
    show("transformer", in_turns({
        "ours": lambda: ours(img, txt, pooled, t, guidance, ids),
        "diffusers": lambda: peer(hidden_states=img, encoder_hidden_states=txt,
                                  pooled_projections=pooled, timestep=t.to(dtype),
                                  guidance=guidance.to(dtype), img_ids=ids,
                                  txt_ids=txt_ids)}, rounds), floor)


def autoencoder(dtype: torch.dtype, rounds: int) -> None:
    from diffusers import AutoencoderKL
    values = config("vae")
    ours = put(vae.AutoEncoder(config_from(vae.VAEConfig, values, "vae")), dtype)
    if torch.get_default_device().type == "cpu":
        ours.to(memory_format=torch.channels_last)       # as load_pipeline() leaves it
    peer = put(AutoencoderKL.from_config(values), dtype)
    img, z = torch.randn(1, 3, 512, 512, dtype=dtype), torch.randn(1, 16, 64, 64, dtype=dtype)
    show("autoencoder, encode", in_turns({
        "ours": lambda: ours.encode(img), "diffusers": lambda: peer.encode(img)}, rounds))
    show("autoencoder, decode", in_turns({
        "ours": lambda: ours.decode(z), "diffusers": lambda: peer.decode(z)}, rounds))


def t5(dtype: torch.dtype, rounds: int) -> None:
    import transformers
    values = config("text_encoder_2") | {"num_layers": 2}
    ours = put(text_encoder.T5Encoder(config_from(text_encoder.T5Config, values, "t5")), dtype)
    peer = put(transformers.T5EncoderModel(transformers.T5Config(**values)), dtype)
    ids = torch.randint(0, 32000, (1, TEXT))
    show("T5, two layers", in_turns({
        "ours": lambda: ours(ids), "transformers": lambda: peer(ids)}, rounds))


def hollow(folder: Path) -> None:
    """The released model's folder with names, shapes and types, and no values: sparse files."""
    whole.copy_rest(folder)
    for part in weights.PARTS:
        model, values = whole.build(part)
        base = "model" if part.startswith("text") else "diffusion_pytorch_model"
        header, at = {}, 0
        for name, p in model.state_dict().items():
            size = 2 * p.numel()
            header[name] = {"dtype": "BF16", "shape": p.shape, "data_offsets": (at, at + size)}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(values))
        with (folder / part / f"{base}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)


def headers(folder: Path) -> None:
    """Know every tensor of a folder by name, shape and type."""
    for part in weights.PARTS:
        layouts.to_folder(part, read_tensors(files_of(folder / part)))


def load(dtype: torch.dtype, rounds: int) -> None:
    from diffusers import FluxKontextPipeline
    tiny = ROOT / "tiny/model"
    show("loading tiny/model", in_turns({
        "ours": lambda: sample.load_pipeline(tiny, None),
        "diffusers": lambda: FluxKontextPipeline.from_pretrained(tiny, torch_dtype=dtype)}, rounds))
    with tempfile.TemporaryDirectory() as name:
        hollow(Path(name))
        for what, seconds in in_turns({"the headers": lambda: headers(Path(name)),
                                       "all of it": lambda: sample.load_pipeline(name, None)},
                                      rounds).items():
            print(f"loading the released size, {what}: {seconds:.2f} s", flush=True)


def main() -> None:
    parts = {"blocks": blocks, "dit": whole_dit, "vae": autoencoder, "t5": t5, "load": load}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="the transformers' blocks")
    args = parser.parse_args()
    global COMPILE
    COMPILE = args.compile
    torch.set_default_device(args.device)
    with torch.inference_mode():
        for part in args.parts:
            parts[part](getattr(torch, args.dtype), args.rounds)


if __name__ == "__main__":
    main()
