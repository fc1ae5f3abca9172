"""How long a command takes before it does anything, beside importing torch alone.

Each is a process of its own; they take turns, and find their modules compiled, as any run but the
first does. Then the first picture of the embedded model, from the command to the file. What a
command imports is told by `python -X importtime sample.py --help`.

Run: python bench/startup.py --rounds 5                  # a minute and a half
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import median, timings                       # noqa: E402

FLOOR = "import torch"
COMMANDS = ("sample.py", "train.py", "evaluate.py", "weights.py")
EDIT = ("--instruction", "make the green circle blue", "--image",
        str(ROOT / "tiny/examples/before.png"))


def run(folder: str, *arguments: str) -> None:
    """Python, in the project's root, with nothing on the screen. folder: for compiled modules."""
    settings = os.environ | {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, capture_output=True,
                   env=settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        found = timings({FLOOR: lambda: run(folder, "-c", FLOOR)} | {
            f"{command} --help": lambda command=command: run(folder, command, "--help")
            for command in COMMANDS}, rounds)
        edit = ("sample.py", *EDIT, "--out", str(Path(folder) / "out.png"))
        found |= timings({"the first picture": lambda: run(folder, *edit)}, rounds)
    for name, seconds in found.items():
        beyond = seconds[0] - found[FLOOR][0]
        print(f"{name:20} least {seconds[0]:.2f} s, median {median(seconds):.2f} s"
              + (f"; beyond {FLOOR}: {beyond:.2f} s" if name != FLOOR else ""))


if __name__ == "__main__":
    main()
