"""The whole model on a small machine: a random checkpoint of the real size, sampled by sample.py.

Writes a Hugging Face folder of 34 GB in bf16 (removed afterwards), then runs sample.py's own
command on it at 512x512 with one reference: time to the first step, seconds per step, and the most
memory that was its own (not the operating system's cache of files). Beside them two floors from the
same run: reading the transformer's files once, and its matrix products at the rate of a large one.

Run: python bench/whole.py --folder /a/disk/with/40/GB
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dit                                               # noqa: E402
import sample                                            # noqa: E402
import text_encoder                                      # noqa: E402
import vae                                               # noqa: E402
import weights                                           # noqa: E402
from common import block_flops, memory, product_rate     # noqa: E402

PARTS = {"transformer": (dit.FluxTransformer, dit.DiTConfig),
         "vae": (vae.AutoEncoder, vae.VAEConfig),
         "text_encoder": (text_encoder.CLIPEncoder, text_encoder.CLIPConfig),
         "text_encoder_2": (text_encoder.T5Encoder, text_encoder.T5Config)}
SHARD = 2 * 10 ** 9                                      # bytes
TEXT, GRID = 512, 64                                     # T5 tokens; latents of 512 pixels


def build(part: str) -> tuple[torch.nn.Module, dict]:
    """One part at its real size, on the meta device, and its config.json."""
    model, config = PARTS[part]
    values = json.loads((ROOT / f"tests/keys/config_{part}.json").read_text())
    with torch.device("meta"):
        return model(weights.config_from(config, values, part)), values


def write(part: str, folder: Path) -> None:
    """Random weights, small enough that nothing overflows, in shards with an index."""
    model, values = build(part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    base = "model" if part.startswith("text") else "diffusion_pytorch_model"
    noise = torch.randn(10 ** 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    shard, index, number = {}, {}, 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        save_file(shard, folder / f"{base}-{number:05}.safetensors")
        shard = {}

    for name, p in model.state_dict().items():
        t = torch.full(p.shape, float("norm" in name), dtype=torch.bfloat16)
        if p.dim() > 1:                                  # the same noise again and again: faster
            copies = noise.repeat(p.numel() // len(noise) + 1)[:p.numel()].view(p.shape)
            t = copies / p[0].numel() ** 0.5
        shard[name] = t
        index[name] = f"{base}-{number + 1:05}.safetensors"
        if sum(t.nbytes for t in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    if number == 1:
        (folder / f"{base}-00001.safetensors").rename(folder / f"{base}.safetensors")
    else:
        (folder / f"{base}.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": index}))


def copy_rest(folder: Path) -> None:
    """What the embedded model's folder holds beside weights, with the released number of tokens."""
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(ROOT / "tiny/model" / name, folder / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "tiny/model/model_index.json", folder)
    file = folder / "tokenizer_2" / "tokenizer_config.json"              # the words do not matter,
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": TEXT}))


def forget(folder: Path) -> None:
    """Ask the operating system to drop its copies of the files."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(folder: Path) -> tuple[float, int]:
    """Seconds and bytes of reading a folder's weights once, in order."""
    began, size = time.time(), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while block := opened.read(1 << 24):
                size += len(block)
    return time.time() - began, size


def floor(dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs of a step's matrix products, and the rate of one large product, per second."""
    c, tokens = build("transformer")[0].config, TEXT + 2 * (GRID // 2) ** 2
    blocks = c.num_layers + c.num_single_layers
    return blocks * block_flops(tokens, c.width), product_rate(tokens, c.width, dtype)


def timed(arguments: list[str]) -> None:
    """sample.py's command in this process; says when each step of the transformer began."""
    forward = dit.FluxTransformer.forward

    def told(*args: object, **named: object) -> torch.Tensor:
        print("@step", time.time(), args[1].dtype, flush=True)
        out = forward(*args, **named)
        print("@done", time.time(), flush=True)
        return out
    dit.FluxTransformer.forward = told
    sys.argv = ["sample.py", *arguments]
    weights.run(sample.main)


def peer(folder: Path, picture: Path) -> None:
    """The same by diffusers."""
    from diffusers import FluxKontextPipeline
    from PIL import Image
    pipe = FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe(prompt="make it red", image=Image.open(picture).resize((512, 512)), height=512, width=512,
         max_area=512 * 512, num_inference_steps=2, _auto_resize=False)


def watch(*command: object, limit: float = float("inf")) -> tuple[list[str], float, float, int]:
    """Run this file's `command`; -> its lines, start, seconds, most bytes of memory of its own.

    It is ended after `limit` seconds, and before it takes all the memory there is.
    """
    began, most, room = time.time(), 0, 0.9 * sample.memory(torch.device("cpu"))
    with subprocess.Popen([sys.executable, __file__, *map(str, command)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            most = max(most, memory(process.pid))
            if most > room or time.time() - began > limit:
                process.kill()
            time.sleep(0.1)
        lines = process.stdout.read().splitlines()
    return lines, began, time.time() - began, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed afterwards")
    parser.add_argument("--keep", action="store_true", help="let it stay; use it if it is there")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--diffusers", action="store_true", help="see how far diffusers comes")
    args = parser.parse_args()
    folder, picture = args.folder / "random-kontext", ROOT / "tiny/examples/before.png"
    try:
        if not folder.exists():
            began = time.time()
            with weights.replacing(folder) as aside:
                for part in PARTS:
                    write(part, aside / part)
                copy_rest(aside)
            print(f"written in {time.time() - began:.0f} s")
        forget(folder)
        seconds, size = reading(folder / "transformer")
        print(f"reading the transformer's {size / 1e9:.1f} GB once: {seconds:.1f} s", flush=True)
        forget(folder)
        lines, began, whole, most = watch(
            "--timed", "--model", folder, "--instruction", "make it red", "--image", picture,
            "--size", "512x512", "--steps", args.steps, "--out", folder / "out.png")
        print(*lines[-1:])
        told = " ".join(lines)                           # the progress bar stands between
        steps, done = ([float(at) for at in re.findall(rf"@{what} ([\d.]+)", told)]
                       for what in ("step", "done"))
        kind = re.search(r"@step \S+ (\S+)", told)[1]
        each = [end - start for start, end in zip(steps, done)]
        flops, rate = floor(getattr(torch, kind.removeprefix("torch.")))
        print(f"computed in {kind}; {whole:.0f} s in all; first step after "
              f"{steps[0] - began:.1f} s; steps of {', '.join(f'{s:.1f}' for s in each)} s\n"
              f"matrix products: {flops / 1e12:.1f} TFLOP, {flops / rate:.1f} s at the "
              f"{rate / 1e9:.0f} GFLOP/s of one large product; reached "
              f"{flops / rate / each[-1]:.0%}\n"
              f"memory of its own at most {most / 1e9:.2f} GB", flush=True)
        if args.diffusers:
            forget(folder)
            lines, _, limit, most = watch("--peer", folder, picture, limit=2 * whole)
            print(f"diffusers: {lines[-1] if lines else 'no word'}\n  ended after {limit:.0f} s "
                  f"(stopped there, if twice our time), with {most / 1e9:.1f} GB of its own")
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        timed(sys.argv[2:])
    elif sys.argv[1:2] == ["--peer"]:
        peer(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
