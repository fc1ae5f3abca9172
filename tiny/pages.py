"""Pages of edits whose right answer is known, one for each family of tasks: explained from within.

Each is the first held-out picture of its task, right or wrong, by the embedded model and adapter.

Run: python -m tiny.pages                                # all four, into runs/pages
     python -m tiny.pages move --out pages               # one of them
     python -m tiny.pages --keep                         # what the README shows, with its picture
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # Ctrl-C during imports ends in a line
import subprocess
import tempfile
from pathlib import Path
from shutil import which

from PIL import Image

import sample
from support.explain import explain
from support.files import write_text
from support.options import EMBEDDED
from support.pictures import save_picture
from support.trace import Trace
from tiny import world

TASKS = ("t2i", "move", "canny", "mixed")                # a task of each family
KEPT, EXAMPLES = "move", Path(__file__).parent / "examples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = (1280, 1060)                                    # pixels of the picture that is kept
ALONE = "header, footer, details, section:not(#{part}) {{ display: none !important; }}"


def page(pipe: sample.Pipeline, task: str) -> str:
    """The page of a task's first held-out sample, beside its right answer."""
    test = world.tiny_test(task, 1)[0]
    trace = Trace(sample.denoise, sample.encode_text)
    picture = sample.edit(pipe, test.instruction, test.images, test.conds, watch=trace)
    return explain(trace, picture, test.images, test.conds, truth=test.target,
                   command=f"python -m tiny.pages {task}")


def write(file: Path, text: str) -> None:
    write_text(file, text)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def browser() -> str:
    """One that is here and needs no screen. Raises: ValueError where there is none."""
    found = next(filter(None, map(which, BROWSERS)), None)
    if found is None:
        raise ValueError(f"--keep: a browser takes the picture, one of {', '.join(BROWSERS)}; "
                         "there is none")
    return found


def photograph(file: Path, part: str, to: Path, browser: str) -> None:
    """A picture of one part of a page, without its code."""
    with tempfile.TemporaryDirectory() as folder:
        shot, shown = Path(folder) / "shot.png", Path(folder) / "part.html"
        style = f"<style>{ALONE.format(part=part)}</style></head>"
        shown.write_text(file.read_text("utf-8").replace("</head>", style, 1), encoding="utf-8")
        subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars",
                        f"--user-data-dir={folder}/profile", f"--screenshot={shot}",
                        f"--window-size={WINDOW[0]},{WINDOW[1]}", shown.as_uri()],
                       check=True, capture_output=True)
        with Image.open(shot) as image:                  # 256 colours: a fifth of the size
            save_picture(image.convert("RGB").quantize(256), to)


def main() -> None:
    parser = commands.Parser(description="Explain edits of the embedded model.",
                             usage="python -m tiny.pages [TASK ...] [options]")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="of the tiny world, by default "
                        f"{', '.join(TASKS)}; any of {', '.join(world.WORDINGS)}")
    parser.add_argument("--out", type=commands.NEW_FOLDER, default=Path("runs/pages"),
                        help="takes a page for each; %(default)s")
    parser.add_argument("--keep", action="store_true", help="make the page in tiny/examples and "
                        "its picture instead")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(world.WORDINGS):
        raise ValueError(f"{min(unknown)}: no such task; there are {', '.join(world.WORDINGS)}")
    if args.keep and args.tasks:
        raise ValueError(f"--keep: makes the page of {KEPT}; leave out {' '.join(args.tasks)}")
    taken_by = browser() if args.keep else ""
    pipe = sample.load_pipeline(EMBEDDED, device="cpu", dtype="float32")
    if args.keep:
        write(EXAMPLES / "explained.html", page(pipe, KEPT))
        photograph(EXAMPLES / "explained.html", "attention", EXAMPLES / "explained.png",
                   taken_by)
    else:
        for task in args.tasks or TASKS:
            write(args.out / f"{task}.html", page(pipe, task))


if __name__ == "__main__":
    commands.run(main)
