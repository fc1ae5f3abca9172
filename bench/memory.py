"""What `train.py --dry-run` says beside what training then takes, on a model that fits here.

A random transformer (width 1,024, 3 + 6 blocks) on the embedded encoders, 512x512 pictures with one
reference. Measured: the most memory of its own that the process ever held, looked at every
millisecond, less what it held once everything was imported; and the transformer's file, which stays
mapped, unless it is converted to fp8. Every tensor has a mapping of its own, as on the C library's
heap there are holes: as much as half again.

Run: python bench/memory.py
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dit                                               # noqa: E402
import train                                             # noqa: E402
from common import memory                                # noqa: E402
from support import commands                             # noqa: E402
from support.configs import config_from                  # noqa: E402
from support.files import files_of, write_part           # noqa: E402

ADAPTER = {"lora_rank": 16, "lora_alpha": 16, "rank": 8, "alpha": 8}
RUNS = ([], ["--batch-size", "2"], ["--recompute"], ["--accumulate", "2"],
        ["--base-dtype", "fp8", "--recompute"], ["--paper"], ["--paper", "--optimizer", "muon"])


def write(folder: Path) -> None:
    shutil.copytree(ROOT / "tiny/model", folder / "model")
    settings = folder / "model/vae/config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sample_size": 512}))
    part = folder / "model/transformer"
    values = json.loads((part / "config.json").read_text()) | {
        "num_layers": 3, "num_single_layers": 6, "num_attention_heads": 8,
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    shutil.rmtree(part)
    model = dit.FluxTransformer(config_from(dit.DiTConfig, values, part))
    write_part(model.state_dict(), values, part, "diffusion_pytorch_model.safetensors",
               torch.float32)
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        picture = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append({"target": f"{i}.png", "images": [f"{i}.png"], "instruction": "make it red"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "small.json").write_text(json.dumps(ADAPTER))
    (folder / "paper.json").write_text("{}")


def measured(arguments: list[str]) -> None:
    """train.py's command in this process, and the most memory of its own that it took."""
    before, sys.argv = memory(), ["train.py", *arguments]
    train.previews = lambda *_: {}
    most, ended = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.001):
            most = max(most, memory())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    commands.run(train.main)
    ended.set()
    watcher.join()
    shutil.rmtree(arguments[arguments.index("--out") + 1])
    print(f"measured {most - before}")


def told(pattern: str, *command: str) -> str:
    """What a Python command prints where the pattern has its group."""
    out = subprocess.run([sys.executable, *command], check=True, text=True, capture_output=True,
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}).stdout
    return re.search(pattern, out)[1]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        transformer = files_of(folder / "model/transformer")[0]
        for options in RUNS:
            config = folder / ("paper.json" if "--paper" in options else "small.json")
            arguments = ["--data", str(folder), "--model", str(folder / "model"), "--config",
                         str(config), "--steps", "2", "--out", str(folder / "run"), "--batch-size",
                         "1", *(option for option in options if option != "--paper")]
            guess = float(told(r"together +([\d.]+)", str(ROOT / "train.py"), *arguments,
                               "--dry-run"))
            found = int(told(r"measured (\d+)", __file__, "--measured", *arguments))
            found += 0 if "fp8" in options else transformer.stat().st_size
            found /= 1e9
            print(f"{' '.join(options) or 'plain':32} estimate {guess:5.2f} GB, measured "
                  f"{found:5.2f} GB, error {guess / found - 1:+.0%}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        measured(sys.argv[2:])
    else:
        main()
