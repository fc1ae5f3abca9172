"""The whole model on a small machine: a random checkpoint of the real size, sampled by sample.py.

Writes a Hugging Face folder of 34 GB in bf16 (removed afterwards), then runs sample.py's own
command on it at 512x512 with one reference: time to the first step, seconds per step, and the most
memory that was its own (not the operating system's cache of files). Beside them two floors from the
same run: reading the transformer's files once, and its matrix products at the rate of a large one.

Where there is a GPU, sample.py takes it, and so do the floor and the peer. --train measures a few
steps of train.py's command too, with the paper's adapter.

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
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dit                                               # noqa: E402
import sample                                            # noqa: E402
import train                                             # noqa: E402
from common import block_flops, finish, memory, product_rate     # noqa: E402
from support import commands, devices                    # noqa: E402
from support.configs import config_from                  # noqa: E402
from support.files import replacing                      # noqa: E402
from weights import PARTS                                # noqa: E402

SHARD = 2 * 10 ** 9                                      # bytes
TEXT = 512                                               # T5 tokens
GPU = torch.cuda.is_available()


def build(part: str) -> tuple[torch.nn.Module, dict]:
    """One part at its real size, on the meta device, and its config.json."""
    what = PARTS[part]
    values = json.loads((ROOT / f"tests/keys/config_{part}.json").read_text())
    with torch.device("meta"):
        return what.model(config_from(what.config, values, part)), values


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


def floor(dtype: torch.dtype, side: int) -> tuple[float, float]:
    """FLOPs of a step's matrix products, and the rate of one large product, per second."""
    c, tokens = build("transformer")[0].config, TEXT + 2 * (side // 16) ** 2
    blocks = c.num_layers + c.num_single_layers
    return blocks * block_flops(tokens, c.width), product_rate(
        tokens, c.width, dtype, device="cuda" if GPU else "cpu")


def told(*what: object) -> None:
    finish()
    print("@" + what[0], time.time(), *what[1:], flush=True)


def timed(command: str, *arguments: str) -> None:
    """sample.py's or train.py's command in this process; says when each pass of the model began."""
    forward, train.previews = dit.FluxTransformer.forward, lambda *_: {}

    def noted(*args: object, **named: object) -> torch.Tensor:
        told("step", args[1].dtype)
        out = forward(*args, **named)
        told("done")
        return out
    dit.FluxTransformer.forward = noted
    sys.argv = [f"{command}.py", *arguments]
    commands.run({"sample": sample.main, "train": train.main}[command])
    told("end", torch.cuda.max_memory_allocated() if GPU else 0)


def peer(folder: Path, picture: Path, side: int, steps: int) -> None:
    """The same by diffusers."""
    from diffusers import FluxKontextPipeline
    pipe = FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    if GPU:
        pipe.to("cuda")
    forward = pipe.transformer.forward

    def noted(*args: object, **named: object) -> object:
        told("step", torch.bfloat16)
        out = forward(*args, **named)
        told("done")
        return out
    pipe.transformer.forward = noted
    pipe(prompt="make it red", image=Image.open(picture).resize((side, side)), height=side,
         width=side, max_area=side ** 2, num_inference_steps=steps, _auto_resize=False)
    told("end", torch.cuda.max_memory_allocated() if GPU else 0)


def times(lines: list[str], what: str) -> list[float]:
    """When it was told, in seconds since 1970; the progress bar stands between."""
    return [float(at) for at in re.findall(rf"@{what} ([\d.]+)", " ".join(lines))]


def summary(who: str, lines: list[str], began: float, whole: float, most: int) -> list[float]:
    """Print what watch() found; -> seconds of each pass of the transformer, forward."""
    steps, done = times(lines, "step"), times(lines, "done")
    each = [end - start for start, end in zip(steps, done)]
    if not each:
        print(f"{who}: no pass in {whole:.0f} s, {most / 1e9:.2f} GB of its own;", *lines[-1:])
        return each
    gpu = re.search(r"@end \S+ (\d+)", " ".join(lines))
    first = ", ".join(f"{seconds:.3g}" for seconds in each[:3])
    print(f"{who}: {whole:.1f} s in all{'' if gpu else ', when it was stopped'}; first pass after "
          f"{steps[0] - began:.1f} s; passes of {first} s, half of all within "
          f"{sorted(each)[(len(each) - 1) // 2]:.4g} s; {most / 1e9:.2f} GB of its own"
          + (f", {int(gpu[1]) / 1e9:.1f} GB of the GPU" if GPU and gpu else ""), flush=True)
    return each


def watch(*command: object, limit: float = float("inf")) -> tuple[list[str], float, float, int]:
    """Run this file's `command`; -> its lines, start, seconds, most bytes of memory of its own.

    It is ended after `limit` seconds, and before it takes all the memory there is.
    """
    began, most, room = time.time(), 0, 0.9 * devices.memory(torch.device("cpu"))
    with subprocess.Popen([sys.executable, __file__, *map(str, command)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            most = max(most, memory(process.pid))
            if most > room or time.time() - began > limit:
                process.kill()
            time.sleep(0.1)
        lines = process.stdout.read().splitlines()
    return lines, began, time.time() - began, most


def training(folder: Path, picture: Path) -> None:
    """A few steps of train.py with the paper's adapter, and what --dry-run says of its memory."""
    data, out = folder / "data", folder / "run"
    data.mkdir(exist_ok=True)
    with Image.open(picture) as img:
        img.resize((512, 512)).save(data / "a.png")
    row = {"target": "a.png", "images": ["a.png"], "instruction": "make it red"}
    (data / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "adapter.json").write_text("{}")           # the published sizes
    for more in ([], ["--base-dtype", "fp8"]):
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["--data", data, "--model", folder, "--config", folder / "adapter.json",
                     "--out", out, "--steps", 8, "--batch-size", 1, "--recompute", *more]
        dry = subprocess.check_output([sys.executable, ROOT / "train.py", *map(str, arguments),
                                       "--dry-run"], text=True)
        print("train.py", *more, "--dry-run:", re.search(r"together +[\d.]+", dry)[0], "GB")
        if summary("train.py", *watch("--timed", "train", *arguments)):
            lines = map(json.loads, (out / "log.jsonl").open())
            seconds = [line["seconds"] for line in lines if "seconds" in line]
            print(f"  steps of {', '.join(f'{s:.3g}' for s in seconds)} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed afterwards")
    parser.add_argument("--keep", action="store_true", help="let it stay; use it if it is there")
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--diffusers", action="store_true", help="see how far diffusers comes")
    parser.add_argument("--train", action="store_true", help="some steps of train.py too")
    parser.add_argument("--options", nargs="*", default=[], help="more options of sample.py, "
                        "without their dashes")
    args = parser.parse_args()
    folder, picture = args.folder / "random-kontext", ROOT / "tiny/examples/before.png"
    try:
        if not folder.exists():
            began = time.time()
            with replacing(folder) as aside:
                for part in PARTS:
                    write(part, aside / part)
                copy_rest(aside)
            print(f"written in {time.time() - began:.0f} s")
        forget(folder)
        seconds, size = reading(folder / "transformer")
        print(f"reading the transformer's {size / 1e9:.1f} GB once: {seconds:.1f} s", flush=True)
        forget(folder)
        found = watch(
            "--timed", "sample", "--model", folder, "--instruction", "make it red", "--image",
            picture, "--size", f"{args.side}x{args.side}", "--steps", args.steps, "--out",
            folder / "out.png", *(f"--{option}" for option in args.options))
        print(*found[0][-2:-1])
        each = summary("sample.py", *found)
        kind = re.search(r"@step \S+ (\S+)", " ".join(found[0]))[1]
        flops, rate = floor(getattr(torch, kind.removeprefix("torch.")), args.side)
        print(f"matrix products in {kind}: {flops / 1e12:.1f} TFLOP, {flops / rate:.3g} s at the "
              f"{rate / 1e9:.0f} GFLOP/s of one large product; reached "
              f"{flops / rate / each[-1]:.0%}", flush=True)
        if args.diffusers:
            forget(folder)
            summary("diffusers, uncompiled, for at most twice as long", *watch(
                "--peer", folder, picture, args.side, args.steps, limit=2 * found[2]))
        if args.train:
            training(folder, picture)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        timed(*sys.argv[2:])
    elif sys.argv[1:2] == ["--peer"]:
        peer(Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        main()
