"""What a MoLE layer costs, in time and memory, against the dense formula and the frozen linear.

Dense: every expert's output is built, stacked, gathered and compared, as the equations read. The
contestants of a word (but `train`) take turns in one run; a time is the median over the rounds.
Ratios travel between machines, seconds do not.

    layer   one layer of the real size (in 15,360, out 3,072, E 8, k 4, r 32), 2,048 tokens, forward
            and backward with the input's gradient, balance and orthogonality losses included
    step    a training step of a middle-sized transformer (width 768, 4 + 8 blocks, 512 + 1,024
            tokens) with the paper's adapter, against diffusers with peft's LoRA of the same rank on
            the same layers and no experts at all
    train   the same at the released size, 512 + 1,024 + 1,024 tokens, blocks recomputed in backward
            (on a GPU with 60 GB)
    sample  a sampling step of the same transformer: alone, with the adapter merged for one
            instruction, and with the adapter beside the weights

Run: python bench/mole.py layer --rounds 3               # two minutes on two cores
"""
import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import in_turns, measured, told              # noqa: E402
from dit import DiTConfig, FluxTransformer, position_ids # noqa: E402
from mole import (Adapter, AdapterConfig, MoLELinear, Routing, balance_loss, # noqa: E402
                  route)
from support.casts import casting                        # noqa: E402
from support.devices import compile_blocks, keep_freed_memory # noqa: E402
from support.export import merged                        # noqa: E402
from support.recompute import recomputing                # noqa: E402
from support.targets import layers_of                    # noqa: E402
from weights import new_adapter                          # noqa: E402


class DenseMoLE(MoLELinear):
    """The same layer, with every expert's output written out."""

    def forward(self, x: Tensor) -> Tensor:              # (B, N, in) -> (B, N, out)
        c, routing, scale = self.config, self.routings[-1], self.config.alpha / self.config.rank
        p, w, kept = route(self.logits(routing.z), c.top_k)                  # (B, E)
        Y = torch.stack([scale * (x @ A.to(x.dtype)) @ B.to(x.dtype) for A, B in zip(
            self.experts_A.chunk(c.experts, 1), self.experts_B.chunk(c.experts, 0))])
        chosen = w.topk(c.top_k).indices                 # (B, k);  Y (E, B, N, out)
        rows = torch.arange(len(x), device=x.device)[:, None]               # (B, 1)
        picked = Y.transpose(0, 1)[rows, chosen]         # (B, k, N, out)
        out = self.base(x) + (w.gather(1, chosen)[..., None, None].to(x.dtype) * picked).sum(1)
        if routing.losses:
            flat = F.normalize(Y.float().flatten(1), dim=1)                  # (E, B N out)
            cosine = flat @ flat.T
            off = cosine - torch.diag(cosine.diagonal())
            routing.balance = routing.balance + c.balance_weight * balance_loss(p, kept)
            routing.orthogonality = (routing.orthogonality + c.orthogonality_weight
                                     * off.square().sum() / (c.experts * (c.experts - 1)))
        return out


class Nothing(nn.Module):
    """In place of the frozen linear, to measure the adapter's part alone."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.in_features, self.out_features = (
            linear.weight, linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:              # zeros, (..., out), of one number
        return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)


def saved_for_backward(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes that a forward keeps for backward beyond its input, its output and the weights."""
    storages = {}
    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    for tensor in (*known, out):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def bench_layer(dtype: torch.dtype, rounds: int, tokens: int = 2048, inner: int = 15_360,
                outer: int = 3072) -> None:
    torch.manual_seed(0)
    base = nn.Linear(inner, outer).to(dtype).requires_grad_(False)
    x = torch.randn(1, tokens, inner, dtype=dtype, requires_grad=True)
    grad, z = torch.randn(1, tokens, outer, dtype=dtype), torch.randn(1, 768)
    routings: list[Routing] = []
    layers = {}
    for name, kind, linear in (("MoLE", MoLELinear, base), ("dense MoLE", DenseMoLE, base),
                               ("MoLE alone", MoLELinear, Nothing(base)),
                               ("dense MoLE alone", DenseMoLE, Nothing(base))):
        torch.manual_seed(1)
        layer = layers[name] = kind(linear, AdapterConfig(), name, 768, routings).eval()
        nn.init.normal_(layer.experts_B, std=0.01)       # as after some training

    def step(layer: nn.Module) -> None:
        routings[:] = [Routing(z, losses=True)]
        out = layer(x)
        loss = routings[-1].balance + routings[-1].orthogonality
        if loss.requires_grad:
            torch.autograd.backward([out, loss], [grad, torch.ones_like(loss)])
        else:
            out.backward(grad)
        x.grad = None

    seconds = in_turns({"frozen linear": lambda: step(base)}
                       | {name: lambda layer=layer: step(layer) for name, layer in layers.items()},
                       rounds)
    memory = {}
    for name in ("MoLE alone", "dense MoLE alone"):
        routings[:] = [Routing(z, losses=True)]
        memory[name] = saved_for_backward(lambda: layers[name](x),
                                          [x, *layers[name].parameters()])
    kind = str(dtype).removeprefix("torch.")
    for name, value in seconds.items():
        print(f"{kind:9} {name:18} {1000 * value:8.4g} ms")
    def ratio(what: str, values: dict[str, float], above: str, below: str) -> None:
        print(f"{kind:9} {what:33} {values[above] / values[below]:6.2f}", flush=True)
    ratio("MoLE / frozen linear", seconds, "MoLE", "frozen linear")
    ratio("adapter alone, dense / ours", seconds, "dense MoLE alone", "MoLE alone")
    ratio("saved for backward, dense / ours", memory, "dense MoLE alone", "MoLE alone")
    print(f"{kind:9} saved for backward by ours        {memory['MoLE alone'] / 1e6:6.2f} MB")


SHAPE = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 6,
         "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
         "guidance_embeds": True, "in_channels": 64, "axes_dims_rope": (16, 56, 56)}
RELEASED = SHAPE | {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}


def inputs(dtype: torch.dtype, *grids: int) -> tuple[Tensor, ...]:
    """img, txt, pooled, t, guidance, img_ids for a transformer of SHAPE; latents of each side."""
    torch.manual_seed(0)
    ids = torch.cat([position_ids(side, side, i) for i, side in enumerate(grids)])
    img, txt, pooled = (torch.randn(1, len(ids), 64), torch.randn(1, 512, 4096),
                        torch.randn(1, 768))
    return (img.to(dtype), txt.to(dtype), pooled.to(dtype), torch.tensor([0.5]),
            torch.tensor([1.0]), ids)


def trainers(shape: dict, dtype: torch.dtype, given: tuple[Tensor, ...], recompute: bool,
             compiled: bool = False) -> dict[str, Callable[[], Callable[[], None]]]:
    """What builds a model and gives its training step, by name."""
    from diffusers import FluxTransformer2DModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    c, (img, txt, pooled, t, guidance, ids) = AdapterConfig(), given

    def ours(kind: type[MoLELinear]) -> Callable[[], None]:
        model = FluxTransformer(DiTConfig(**shape)).to(dtype)
        layers = layers_of(model, c, {"instruction": kind})
        adapter = Adapter(layers, c, 4096, 768).insert(model).train()
        if compiled:
            compile_blocks(model)
        optimizer = torch.optim.AdamW(adapter.tensors().values(), lr=1e-4, fused=True)
        def step() -> None:
            with adapter.serve(txt, pooled, losses=True) as routing:
                run = casting(dtype)                     # as train.matching_loss() does
                run = recomputing(adapter, routing, run) if recompute else run
                v = model(img, txt, pooled, t, guidance, ids, run=run)
            (v.float().square().mean() + routing.balance + routing.orthogonality).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    def theirs() -> Callable[[], None]:
        model = FluxTransformer2DModel(**shape).to(dtype).requires_grad_(False)
        singles = [f"single_transformer_blocks.{i}.proj_mlp"
                   for i in range(shape["num_single_layers"])]
        targets = [name for name in c.lora_targets if not name.startswith("single")]
        model.add_adapter(LoraConfig(r=c.lora_rank, lora_alpha=c.lora_alpha,
                                     target_modules=targets + singles))
        if recompute:
            model.train().enable_gradient_checkpointing()
        if compiled:
            model.compile_repeated_blocks()
        cast_training_params(model, torch.float32)       # like this and with autocast its own
        trained = [p for p in model.parameters() if p.requires_grad]         # scripts train
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        def step() -> None:
            with torch.autocast(img.device.type, dtype, enabled=dtype != torch.float32):
                v = model(hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled,
                          timestep=t.to(dtype), guidance=guidance.to(dtype), img_ids=ids,
                          txt_ids=ids.new_zeros(512, 3), return_dict=False)[0]
            v.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    return {"MoLE": lambda: ours(MoLELinear), "dense MoLE": lambda: ours(DenseMoLE),
            "diffusers, LoRA": theirs}


def bench_step(dtype: torch.dtype, rounds: int) -> None:
    makers = trainers(SHAPE, dtype, inputs(dtype, 64), recompute=False)
    seconds = in_turns({name: make() for name, make in makers.items()}, rounds)
    for name, value in seconds.items():
        print(f"{name:18} {value:8.4g} s a step, {value / seconds['MoLE']:.2f} of ours", flush=True)


def train_alone(name: str, dtype: torch.dtype, rounds: int, device: str, cudnn: bool,
                recompute: bool, compiled: bool) -> tuple[list[float], int]:
    """Seconds of a step of training, least first; bytes of the GPU at the most."""
    keep_freed_memory()
    torch.set_default_device(device)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    step = trainers(RELEASED, dtype, inputs(dtype, 64, 64), recompute, compiled)[name]()
    return measured(step, rounds)


def bench_train(dtype: torch.dtype, rounds: int) -> None:
    """The released size: recomputing, compiled, and compiled without recomputing.

    One contestant at a time, as there is no room for two; one that fails says so.
    """
    device, cudnn = str(torch.get_default_device()), torch.backends.cuda.cudnn_sdp_enabled()
    for recompute, compiled in ((True, False), (True, True), (False, True)):
        for name in ("MoLE", "diffusers, LoRA"):         # the dense one has no room on most devices
            told(name + ", recomputing" * recompute + ", compiled" * compiled, train_alone,
                 name, dtype, rounds, device, cudnn, recompute, compiled)


def bench_sample(dtype: torch.dtype, rounds: int) -> None:
    img, txt, pooled, t, guidance, ids = inputs(dtype, 64)
    names = ("base", "adapter merged", "adapter beside")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        models = {}
        for name in names:
            torch.manual_seed(0)
            model = models[name] = FluxTransformer(DiTConfig(**SHAPE)).to(dtype).eval()
            if name != "base":
                adapter = new_adapter(model, AdapterConfig()).eval()
                stack.enter_context(merged(model, adapter, txt, pooled)
                                    if name == "adapter merged" else adapter.serve(txt, pooled))
        seconds = in_turns({name: lambda model=model: model(img, txt, pooled, t, guidance, ids)
                            for name, model in models.items()}, rounds)
    for name, value in seconds.items():
        print(f"{name:18} {value:8.4g} s a step, {value / seconds['base']:.3f} of the base's")


BENCHES = {"layer": bench_layer, "step": bench_step, "train": bench_train, "sample": bench_sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=list(BENCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-cudnn", action="store_true", help="attention by another than cuDNN, "
                        "whose backward fails in diffusers on some GPUs")
    args = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn)
    keep_freed_memory()                                  # as train.py does; for all contestants
    torch.set_default_device(args.device)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in args.dtype or ["bfloat16", "float32"]:
        BENCHES[args.what](getattr(torch, name), args.rounds)


if __name__ == "__main__":
    main()
