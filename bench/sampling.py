"""A sampling step of the released transformer on a GPU, each way beside diffusers' own.

    eager     as it is
    compiled  sample.py --compile; diffusers' compile_repeated_blocks()
    fp8       the same with --matmul fp8; diffusers has nothing like it
    streamed  weights in the computer's memory, blocks visiting; diffusers' group offload with a
              stream of its own

1024x1024, one reference of that size, 512 tokens of text, a batch of one, weights at random, bf16.
Contestants run one at a time, as there is no room for two; one that fails says so. Also the
relative error that fp8 makes in one block of each kind, which a CPU can tell as well.

Run: python bench/sampling.py --small --rounds 2         # a try without a GPU, in two minutes
     python bench/sampling.py --device cuda              # five minutes, 60 GB of a GPU
"""
import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import measured, told                        # noqa: E402
from dit import DiTConfig, FluxTransformer, position_ids, rope # noqa: E402
from support import fp8, streaming                       # noqa: E402
from support.devices import compile_blocks               # noqa: E402

RELEASED = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
            "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "in_channels": 64, "axes_dims_rope": (16, 56, 56)}
SMALL = RELEASED | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}


def inputs(side: int, device: torch.device) -> tuple[Tensor, ...]:
    """img, txt, pooled, t, guidance, img_ids, of a picture and a reference of `side` pixels."""
    ids = torch.cat([position_ids(side // 8, side // 8, index) for index in range(2)])
    img, txt, pooled = torch.randn(1, len(ids), 64), torch.randn(1, 512, 4096), torch.randn(1, 768)
    return (*(x.to(device, torch.bfloat16) for x in (img, txt, pooled)),
            torch.tensor([0.5], device=device), torch.tensor([2.5], device=device), ids.to(device))


def ours(way: str, shape: dict, given: tuple, device: torch.device,
         stack: ExitStack) -> Callable[[], Tensor]:
    """A step of this project's transformer; stack: what ends with it."""
    with torch.device(device):                           # numbers are drawn more quickly there
        model = FluxTransformer(DiTConfig(**shape)).to(torch.bfloat16).eval()
    model.to("cpu" if way == "streamed" else device)
    if way == "fp8":
        fp8.multiply_in_fp8(model)
    if way in ("compiled", "fp8"):
        compile_blocks(model)
    run = stack.enter_context(streaming.stream(model, device)) if way == "streamed" else None
    return lambda: model(*given, **({"run": run} if run else {}))


def theirs(way: str, shape: dict, given: tuple, device: torch.device) -> Callable[[], Tensor]:
    """The same of diffusers."""
    from diffusers import FluxTransformer2DModel
    img, txt, pooled, t, guidance, ids = given
    with torch.device(device):
        model = FluxTransformer2DModel(**shape).to(torch.bfloat16).eval()
    model.to("cpu" if way == "streamed" else device)
    if way == "compiled":
        model.compile_repeated_blocks()
    if way == "streamed":
        model.enable_group_offload(onload_device=device, offload_type="block_level",
                                   num_blocks_per_group=1, use_stream=device.type == "cuda")
    return lambda: model(hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled,
                         timestep=t.to(img.dtype), guidance=guidance.to(img.dtype), img_ids=ids,
                         txt_ids=ids.new_zeros(txt.shape[1], 3), return_dict=False)[0]


def step_alone(whose: str, way: str, small: bool, rounds: int,
               name: str) -> tuple[list[float], int]:
    """Seconds of a step on the device of that name, least first; bytes of the GPU at the most."""
    torch.manual_seed(0)
    device, shape = torch.device(name), SMALL if small else RELEASED
    given = inputs(256 if small else 1024, device)
    with torch.no_grad(), ExitStack() as stack:
        step = (ours(way, shape, given, device, stack) if whose == "ours" else
                theirs(way, shape, given, device))
        return measured(step, rounds)


@torch.no_grad()
def errors(shape: dict, device: torch.device) -> None:
    """Print how far products in fp8 take a block's output, relative to what the block adds."""
    tokens, c = 256, DiTConfig(**shape | {"num_layers": 1, "num_single_layers": 1})
    with torch.device(device):
        model = FluxTransformer(c).eval()
        x, txt, vec = (torch.randn(1, n, c.width) for n in (tokens, tokens, 1))
    ids = torch.cat([torch.zeros(tokens, 3), position_ids(32, 32)])
    pe = rope(ids, c.axes_dims_rope).to(device)
    def added(m: FluxTransformer, kind: torch.dtype) -> dict[str, Tensor]:
        img, text, v = (part.to(kind) for part in (x, txt, vec[:, 0]))
        outs = {"double": m.transformer_blocks[0](text, [img], [v], pe)[1][0],
                "single": m.single_transformer_blocks[0]([img], [v], pe[:tokens], False)[0]}
        return {block: out.float() - x for block, out in outs.items()}
    wanted, half = added(model, torch.float32), added(deepcopy(model).bfloat16(), torch.bfloat16)
    fp8.multiply_in_fp8(model)
    found = {"bf16": half, "fp8": added(model, torch.float32)}
    for block, exact in wanted.items():
        each = [f"{kind} {((outs[block] - exact).norm() / exact.norm()).item():.4f}"
                for kind, outs in found.items()]
        print(f"error in a {block} block, relative to what it adds: {', '.join(each)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", nargs="+", default=["eager", "compiled", "fp8", "streamed"])
    parser.add_argument("--small", action="store_true", help="three blocks of width 256, 256x256")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print(f"{args.device}, torch {torch.__version__}")
    torch.manual_seed(0)
    if "fp8" in args.ways:
        errors(SMALL if args.small else RELEASED, torch.device(args.device))
    for way, whose in product(args.ways, ("ours", "diffusers")):
        if (way, whose) != ("fp8", "diffusers"):         # which has nothing like it
            told(f"{way}, {whose}", step_alone, whose, way, args.small, args.rounds, args.device)


if __name__ == "__main__":
    main()
