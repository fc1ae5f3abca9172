"""support/origin.py: a picture tells how it was made, and python weights.py PICTURE says it."""
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import weights
from helpers import described, MODEL, PICTURE, ROOT, run_command, run_sample
from support import origin
from support.pictures import save_picture

TEXT = "make the green circle blue"


def chunks(file: Path) -> list[tuple[bytes, bytes]]:
    """A PNG's chunks: kind, content."""
    content, found, at = file.read_bytes(), [], 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at:at + 8])
        found.append((kind, content[at + 8:at + 8 + length]))
        at += 12 + length
    return found


def made(monkeypatch, capsys, out: Path, *arguments: object) -> Path:
    code, _, err = run_sample(monkeypatch, capsys, "--steps", 2, "--out", out, *arguments)
    assert code == 0, err
    return out


def test_a_picture_remembers_how_it_was_made(tmp_path, monkeypatch, capsys) -> None:
    out = made(monkeypatch, capsys, tmp_path / "a.png", "--instruction", TEXT, "--image", PICTURE,
               "--seed", 5, "--guidance", 3)
    digest = origin.digest(ROOT / "tiny/adapter.safetensors")
    assert re.fullmatch("[0-9a-f]{16}", digest)
    told = Image.open(out).text
    assert told == {
        "instruction": TEXT, "seed": "5", "steps": "2", "guidance": "3", "size": "64x64",
        "model": "model", "adapters": f"adapter.safetensors (sha256 {digest})",
        "given": "1 reference", "dtype": "float32", "torch": torch.__version__, "parameters":
        f"{TEXT}\nSeed: 5, Steps: 2, Guidance: 3, Size: 64x64, Given: 1 reference, Model: model, "
        f"Adapters: adapter.safetensors (sha256 {digest}), Dtype: float32, "
        f"Torch: {torch.__version__}"}
    assert str(MODEL.parent) not in str(told)            # names, no folders
    kinds = {kind for kind, _ in chunks(out)}
    assert kinds == {b"IHDR", b"tEXt", b"IDAT", b"IEND"}                     # no time


def test_the_same_command_gives_the_same_file(tmp_path, monkeypatch, capsys) -> None:
    one, two = (made(monkeypatch, capsys, tmp_path / f"{i}.png", "--instruction", TEXT)
                for i in range(2))
    assert one.read_bytes() == two.read_bytes()


def test_what_the_size_says_makes_the_picture_again(tmp_path, monkeypatch, capsys) -> None:
    """With --keep-size too: it is the one that was made, not the one that was saved."""
    Image.open(PICTURE).resize((150, 40)).save(tmp_path / "wide.png")
    out = made(monkeypatch, capsys, tmp_path / "a.png", "--instruction", TEXT, "--image",
               tmp_path / "wide.png", "--keep-size")
    assert Image.open(out).size == (150, 40) and Image.open(out).text["size"] == "64x64"


def test_any_language_is_kept(tmp_path, monkeypatch, capsys) -> None:
    """As iTXt, which is UTF-8; Latin letters, accents too, as tEXt, which more viewers show."""
    for text, kind in (("mach es rot, façon café", b"tEXt"), ("赤くして 🎈", b"iTXt")):
        out = made(monkeypatch, capsys, tmp_path / "a.png", "--instruction", text)
        found = [kind for kind, content in chunks(out) if content.startswith(b"instruction\0")]
        assert found == [kind]
        code, printed, _ = run_command(monkeypatch, capsys, "weights.py", weights.main, out)
        assert code == 0 and f"instruction: {text}\n" in printed


def test_weights_tells_it(tmp_path, monkeypatch, capsys) -> None:
    out = made(monkeypatch, capsys, tmp_path / "a.png", "--instruction", TEXT, "--adapter", "none")
    code, printed, err = run_command(monkeypatch, capsys, "weights.py", weights.main, out)
    assert code == 0 and not err
    assert printed.splitlines() == [
        f"{out}: a picture (PNG, 64x64), made by sample.py", f"instruction: {TEXT}", "seed: 0",
        "steps: 2", "guidance: 2.5", "size: 64x64", "given: nothing", "model: model",
        "adapters: none", "dtype: float32", f"torch: {torch.__version__}"]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif", "gif", "avif", "ppm"])
def test_other_pictures_say_that_they_hold_nothing(tmp_path, monkeypatch, capsys, kind) -> None:
    """Neither foreign ones nor those of ours that are no .png; what they show is the same."""
    foreign = tmp_path / f"foreign.{kind}"
    Image.open(PICTURE).save(foreign)
    assert "holds nothing of how it was made" in described(foreign)[0]
    if kind != "png":
        out = made(monkeypatch, capsys, tmp_path / f"a.{kind}", "--instruction", TEXT)
        assert "holds nothing of how" in described(out)[0]
        assert Image.open(out).size == (64, 64)


def test_a_picture_is_whole_whatever_its_texts_say(tmp_path, monkeypatch, capsys) -> None:
    out = made(monkeypatch, capsys, tmp_path / "a.png", "--instruction", TEXT, "--route-by",
               "a star: not whole")
    told, whole = described(out)
    assert told.endswith(": not whole") and whole


def test_a_checkpoint_is_no_picture(tmp_path) -> None:
    """Pillow takes some headers of safetensors files for a .tga's."""
    for file in MODEL.rglob("*.safetensors"):
        assert "tensors" in described(file)[0]


def test_pictures_of_arrays_carry_nothing(tmp_path) -> None:
    save_picture(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png")
    assert {kind for kind, _ in chunks(tmp_path / "a.png")} == {b"IHDR", b"IDAT", b"IEND"}


def test_what_is_neither_is_named(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "a.txt").write_text("my notes\n")
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:60])
    for name, words in (("a.txt", "a.txt: is text, not"), ("cut.png", "cut.png: cannot be")):
        code, _, err = run_command(monkeypatch, capsys, "weights.py", weights.main, tmp_path / name)
        assert code == 2 and words in err and len(err.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["weights.py", str(PICTURE), "--to-research", "x"])
    with pytest.raises(ValueError, match="before.png: is a picture, not weights"):
        weights.main()
