"""support/summary.py: what a training says of its data at its start."""
import io
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import train
from helpers import MODEL, SETS
from support import summary
from support.training_options import train_options
from support.validation import HeldOut
from text_encoder import T5Tokenizer


def told(monkeypatch, capsys, *arguments: object) -> str:
    """What is said of sources, as train.main() has it said."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "gone", *map(str, arguments)])
    args = train_options(["lora"], ["coco"])
    summary.tell(args, train.open_sources(args, None), HeldOut(None))
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """14 rows: eight with a reference, four with two and a condition, two with nothing."""
    for name, size in (("a.png", (64, 64)), ("b.png", (64, 32))):
        Image.new("RGB", size).save(tmp_path / name)
    long = "make the red circle on the left blue " * 9
    rows = [{"target": "a.png", "instruction": long if i < 3 else f"{i}", "images": ["b.png"],
             "note": "n"} for i in range(8)]
    rows += [{"target": "b.png", "text": f"b{i}", "images": ["a.png", "a.png"], "conds": "b.png",
              "url": "https://a.b/c.png"} for i in range(4)]
    rows += [{"target": "a.png", "text": "c"}, {"target": "a.png", "text": long}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_folder_is_told_of(folder: Path, monkeypatch, capsys) -> None:
    head, given, sizes, pressed, unread, cut = told(
        monkeypatch, capsys, "--data", folder, "--batch-size", 4, "--steps", 8).splitlines()
    assert head == (f"{folder}: 14 rows; a pass over them takes about 4 steps, 3.7 in a batch; "
                    "8 steps: 2.1 passes")            # (8 * 4 + 4 * 4 + 2 * 2) / 14 in a batch
    assert given == ("  rows with 1 reference (8), 2 references and 1 condition (4), "
                     "0 references (2)")
    assert sizes == "  targets of 64x64 (14)"            # the embedded model's
    assert pressed == "  pictures pressed into another shape: 64x32 to 64x64 (16)"
    assert unread == "  left unread, entries without a known name: note (8), url (4)"
    tokens = T5Tokenizer(MODEL / "tokenizer_2")
    assert cut.startswith(f"  the model reads {tokens.length} tokens, and not the end of 4 texts; "
                          "the first: make the red circle on") and len(cut) < 200


def test_a_pass_counts_weights_processes_and_accumulation(folder: Path, monkeypatch,
                                                          capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = told(monkeypatch, capsys, "--data", f"{folder}:1", "tiny:3", "--batch-size", 1,
                 "--accumulate", 2, "--steps", 1).splitlines()
    assert lines[0].endswith("about 14 steps, 1 in a batch; 1 step: 0.071 passes")
    assert lines[-1] == "tiny:3: samples without end"
    monkeypatch.setenv("RANK", "1")                      # one process speaks for all
    assert told(monkeypatch, capsys, "--data", "tiny") == ""
    monkeypatch.delenv("WORLD_SIZE")                     # this one is alone, whatever it is called
    assert told(monkeypatch, capsys, "--data", "tiny")


def test_a_public_set_is_told_of(tmp_path: Path, monkeypatch, capsys) -> None:
    """With one, two or three conditions a batch of 6 has 6, 3 or 2 rows."""
    rows = SETS["subjectspatial"]()[:2] * 11
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert told(monkeypatch, capsys, "--data", f"subjectspatial={tmp_path}", "--batch-size", 6,
                "--steps", 12).splitlines() == [
        f"subjectspatial={tmp_path}: 22 rows; a pass over them takes about 6 steps, 3.7 in a "
        "batch; 12 steps: 2 passes"]


def test_what_is_left_out_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.caption").write_text("a")
    lines = told(monkeypatch, capsys, "--data", tmp_path).splitlines()
    assert lines[-1].startswith("  left out: files, 1 (b.caption): ") and len(lines) == 4


def test_what_a_table_does_not_name_is_told(folder: Path, monkeypatch, capsys) -> None:
    assert "left out" not in told(monkeypatch, capsys, "--data", folder)
    (folder / "metadata.csv").write_text("target,text\na.png,a\n")
    (folder / "sub").mkdir()
    (folder / "sub/.hidden").mkdir()
    for name in ("d.jpg", ".d.jpg", ".hidden/d.jpg"):
        Image.new("RGB", (32, 32)).save(folder / "sub" / name)
    monkeypatch.chdir(folder)
    first, second = [line for line in told(monkeypatch, capsys, "--data", ".").splitlines()
                     if "left out" in line]
    assert first == "  left out: metadata.csv, as metadata.jsonl is there"
    assert second == "  left out: pictures that no row names, 1 (sub/d.jpg)"


def test_no_name_and_no_terminal_stops_it(tmp_path: Path, monkeypatch) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(
        {"target": "a.png", "text": "\u00e4\u6f22\n" * 60, "\ud800\x1b[2J": 1, "\u6f22": 2}))
    # What some terminals speak, escaped as commands.run() has it.
    file = io.TextIOWrapper(io.BytesIO(), "cp1252", "backslashreplace")
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path), "--out", "gone"])
    args = train_options(["lora"], ["coco"])
    summary.tell(args, train.open_sources(args, None), HeldOut(None))
    file.flush()
    written = file.buffer.getvalue().decode("cp1252")
    assert written.count("\n") == 6 and "\ud800" not in written and "\x1b" not in written
    assert "\\ud800\\x1b[2J (1), \\u6f22 (1)" in written and "\u00e4\\u6f22" in written


def test_a_run_is_not_laid_among_its_data(folder: Path, monkeypatch) -> None:
    for data in (str(folder), f"{folder}:2"):
        with pytest.raises(ValueError, match="--out .*: is the folder of --data; name another"):
            train_options(["lora"], ["coco"], ["--data", data, "--out", f"{folder}/."])


@pytest.mark.usefixtures("short_by_default")
def test_training_and_its_dry_run_say_it(folder: Path, monkeypatch, capsys) -> None:
    arguments = ["train.py", "--data", str(folder), "--method", "lora", "--steps", "1", "--out",
                 str(folder / "run")]
    heads = []
    for more in ([], ["--dry-run"]):
        monkeypatch.setattr(sys, "argv", arguments + more)
        monkeypatch.setattr(train, "run_training", lambda *_: None)
        train.main()
        heads.append(capsys.readouterr().out.split("memory for")[0])
    assert heads[0] == heads[1] and heads[0].count("\n") == 6
