"""The command lines: how they read arguments and end; support/commands.py, options.py, jobs.py."""
import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import baselines
import train
from forks import Forks
from helpers import (described, MODEL, ONE, PARTS, PICTURE, raw_file, ROOT, run_command,
                     run_sample, tensors_of, written)
from support import commands, jobs, plans
from support.training_options import train_options
from support.public_sets import PUBLIC

# ------------------------------------------------------------------------------ support/commands.py

@pytest.mark.parametrize("arguments, told", [
    (["--steps", "x"], "error: --steps invalid int value: 'x'\n"),
    (["--steps", "0"], "error: --steps 0: must be from 1 to 10,000\n"),
    (["--kind", "c"], "error: --kind invalid choice: 'c' (choose from 'a', 'b')\n"),
    (["--gone"], "error: unrecognized arguments: --gone\n")])
def test_a_parser_says_what_is_wrong_in_one_line(monkeypatch, capsys, arguments, told):
    """It raises a ValueError, which run() prints, with exit code 2."""
    parser = commands.Parser()
    parser.add_argument("--steps", type=commands.STEPS)
    parser.add_argument("--kind", choices=["a", "b"])
    with pytest.raises(ValueError):
        parser.parse_args(arguments)
    code, out, err = run_command(monkeypatch, capsys, "x.py", parser.parse_args, *arguments)
    assert (code, out, err) == (2, "", told)


@pytest.mark.parametrize("kind, good, bad", [
    (commands.STEPS, {"1": 1, "10000": 10_000}, ["0", "10001", "1.5", ""]),
    (commands.GUIDANCE, {"0": 0.0, "2.5": 2.5, "100": 100.0}, ["-1", "101", "nan", "x"]),
    (commands.COUNT, {"1": 1, "1000000": 1_000_000}, ["0", "-1", "1.5"]),
    (commands.POSITIVE, {"1e-4": 1e-4}, ["0", "-1", "inf", "nan"]),
    (commands.NOT_NEGATIVE, {"0": 0.0, "0.5": 0.5}, ["-1", "inf", "nan"]),
    (commands.size, {"1024x768": (1024, 768), "16X8192": (16, 8192)},
     ["", "16", "8x16", "100x64", "16x8208", "16x16x16", "-16x16"])])
def test_types_of_options(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            kind(text)


def test_a_variable_that_is_not_set_names_no_folder(tmp_path, monkeypatch, capsys):
    for option in ("--image", "--out", "--model", "--adapter"):
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", option, "")
        assert code == 2 and f"{option}" in err and "is empty; " in err.replace(":", ";"), err
    for kind in (commands.FOLDER, commands.NEW_FOLDER, commands.ANSWERS):
        with pytest.raises(argparse.ArgumentTypeError, match="is empty; name a file or folder"):
            kind("")


def test_folders_as_options(tmp_path):
    (tmp_path / "file").write_text("")
    assert commands.FOLDER(str(tmp_path)) == commands.NEW_FOLDER(str(tmp_path)) == tmp_path
    assert commands.NEW_FOLDER(str(tmp_path / "new")) == tmp_path / "new"
    for kind, name, words in ((commands.FOLDER, "new", "no such folder"),
                              (commands.FOLDER, "file", "no such folder"),
                              (commands.NEW_FOLDER, "file", "is a file, not a folder")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{name}: {words}"):
            kind(str(tmp_path / name))


def test_run_prints_messages_of_many_lines_as_one(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("one\n  two")
    with pytest.raises(SystemExit) as stop:
        commands.run(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: one two\n"


@pytest.mark.parametrize("error, code, words", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 2, "not enough memory"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_run_says_why_it_ends(capsys: pytest.CaptureFixture, error: BaseException, code: int,
                              words: str) -> None:
    def fail() -> None:
        raise error
    with pytest.raises(SystemExit) as stop:
        commands.run(fail)
    err = capsys.readouterr().err
    assert stop.value.code == code and words in err and len(err.strip().splitlines()) == 1


def test_run_leaves_our_own_mistakes_alone() -> None:
    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        commands.run(fail)


def test_little_memory_is_one_line(capsys):
    def greedy() -> None:
        raise MemoryError
    with pytest.raises(SystemExit) as stopped:
        commands.run(greedy)
    assert stopped.value.code == 2 and "not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "weights.py"])
def test_ctrl_c_while_modules_load_is_one_line(tmp_path, script):
    """A stand-in for torch is interrupted as it is imported."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_that_nobody_reads_ends_no_work(monkeypatch, name):
    """Nor one that does not know a letter."""
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(io.FileIO(writer, "w"), "ascii", line_buffering=True)
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, f"__{name}__", stream)
    told = []

    def work() -> None:
        out = getattr(sys, name)
        print("\u6f22 a\udcff", file=out, flush=True)
        told.append(os.read(reader, 100))
        os.close(reader)
        for _ in range(9):
            print("b" * 9999, file=out, flush=True)
        told.append("done")
    commands.run(work)
    assert told == [b"\\u6f22 a\\udcff\n", "done"]


# -------------------------------------------------------------------------------- python weights.py

def test_command_describes_a_folder_and_a_file(tmp_path: Path, forks: Forks) -> None:
    for part in PARTS:
        written(tmp_path / part, part)
    done = forks.run("weights.py", tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[4:] == [f"{tmp_path}: without tokenizer", f"{tmp_path}: without tokenizer_2",
                         f"{tmp_path}: not whole"]
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / part).mkdir()
    assert described(tmp_path)[0].endswith(": not whole")    # they are empty
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ROOT / "tiny/model" / part, tmp_path / part, dirs_exist_ok=True)
    assert described(tmp_path)[0].splitlines()[6:] == [
        f"{tmp_path}: whole", f"python sample.py --instruction TEXT --model {tmp_path}"]
    file = tmp_path / "vae" / next(iter((tmp_path / "vae").glob("*.safetensors"))).name
    file.rename(file.with_suffix(".gone"))               # as a broken download leaves it
    told = described(tmp_path)[0].splitlines()
    assert len(told) == 8 and "vae: expected one .safetensors" in told[6]
    assert told[7] == f"{tmp_path}: not whole"
    file.with_suffix(".gone").rename(file)
    tensors = tensors_of("vae")
    expected = (f"{len(tensors)} tensors, "
                f"{sum(t.numel() for t in tensors.values()):,} parameters, float32")
    assert [line for line in lines if line.endswith(f"vae: vae, Hugging Face, {expected}")]
    alone = described(tmp_path / "vae")[0].splitlines()
    assert alone[0].endswith(expected) and alone[1].endswith("vae: whole")
    assert f"--model ... --vae {tmp_path / 'vae'} --clip ... --t5 ... --tokenizers" in alone[2]


@pytest.mark.parametrize("kind", ["missing path", "truncated file"])
def test_command_fails_in_one_line(tmp_path: Path, kind: str, forks: Forks) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "truncated file":
        raw_file(path, ONE, bytes(8))
    done = forks.run("weights.py", path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------- python sample.py

def wrong_model(path: Path, part: str, change) -> Path:
    """A copy of the embedded model with one file changed."""
    import shutil
    shutil.copytree(MODEL, path / "model")
    file = path / "model" / part
    change(file)
    return path / "model"


@pytest.mark.parametrize("arguments, words", [
    (["--instruction", ""], "empty"), (["--instruction", "  "], "empty"), ([], "--instruction"),
    (["--instruction", "a", "--image", "gone.png"], "gone.png"),
    (["--instruction", "a", "--image", __file__], "test_commands.py"),
    (["--instruction", "a", "--cond", "gone.png"], "gone.png"),
    (["--instruction", "a", "--size", "100x64"], "96x64"),
    (["--instruction", "a", "--size", "big"], "WIDTHxHEIGHT"),
    (["--instruction", "a", "--size", "0x64"], "--size"),
    (["--instruction", "a", "--size", "1000000x1000000"], "8192x8192"),
    (["--instruction", "a", "--steps", "1000000000000"], "--steps"),
    (["--instruction", "a", "--num", "1000000000"], "--num"),
    (["--instruction", "a", "--guidance", "1e38"], "--guidance"),
    (["--instruction", "a\udcff"], "--instruction"),
    (["--instruction", "a", "--device", "meta"], "--device"),
    (["--instruction", "a", "--device", "cpu", "--matmul", "fp8"], "--matmul fp8: cpu does not"),
    (["--instruction", "a", "--steps", "0"], "--steps"),
    (["--instruction", "a", "--guidance", "nan"], "--guidance"),
    (["--instruction", "a", "--seed", "-1"], "--seed"),
    (["--instruction", "a", "--num", "0"], "--num"),
    (["--instruction", "a", "--model", "gone"], "gone"),
    (["--instruction", "a", "--model", str(MODEL.parent / "adapter.safetensors")],
     "no FLUX Kontext transformer"),
    (["--instruction", "a", "--export-lora", "a.bin"], ".safetensors"),
    (["--instruction", "a", "--export-lora", str(MODEL.parent / "adapter.safetensors")], "exists"),
    (["--instruction", "a", "--export-lora", "a.safetensors", "--adapter", "none"], "an adapter"),
    (["--batch", "a.jsonl", "--export-lora", "a.safetensors"], "one --instruction"),
    (["--instruction", "a", "--adapter", "gone"], "gone"),
    (["--instruction", "a", "--adapter", str(PICTURE)], "before.png"),
    (["--instruction", "a", "--device", "cuda:99"], "--device"),
    (["--batch", "gone.jsonl"], "gone.jsonl"),
    (["--batch", "gone.jsonl", "--image", str(PICTURE)], "--image")])
def test_what_a_user_of_sample_gets_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments,
                                                      words):
    out = tmp_path / "out.png"
    out.write_bytes(b"was here")
    code, printed, err = run_sample(monkeypatch, capsys, "--out", out, *arguments)
    assert (code == 2 and words in err and len(err.splitlines()) == 1
            and "Traceback" not in err and not printed)
    assert out.read_bytes() == b"was here" and [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("out, words", [
    ("gone/out.png", "gone"), ("out", "picture file"), (".", "--out"), ("o.xbm", "picture file"),
    ("o.h5", "picture file")])
def test_bad_outputs_are_found_before_the_work(tmp_path, monkeypatch, capsys, out, words):
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--out", tmp_path / out)
    assert code == 2 and words in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--routing"])
@pytest.mark.parametrize("given", ["--image", "--cond"])
def test_pictures_that_are_given_are_not_written_over(tmp_path, monkeypatch, capsys, option, given):
    mine, way = tmp_path / "mine.png", tmp_path / "way.png"
    mine.write_bytes(PICTURE.read_bytes())
    way.symlink_to(mine)                                 # the same file by another name
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", given, mine, option, way)
    assert code == 2 and "is a picture that is given" in err and len(err.splitlines()) == 1
    assert mine.read_bytes() == PICTURE.read_bytes()


def test_pictures_that_a_batch_names_are_not_written_over(tmp_path, monkeypatch, capsys):
    mine, rows = tmp_path / "mine.png", tmp_path / "rows.jsonl"
    mine.write_bytes(PICTURE.read_bytes())
    rows.write_text(json.dumps({"instruction": "a", "conds": ["mine.png"]}))
    code, _, err = run_sample(monkeypatch, capsys, "--batch", rows, "--routing", mine)
    assert code == 2 and "is a picture that is given" in err
    assert mine.read_bytes() == PICTURE.read_bytes()


def test_two_outputs_need_two_names(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.png"
    monkeypatch.chdir(tmp_path)
    for other in (out, "a.png"):                         # the same by another name
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--out", out,
                                  "--routing", other)
        assert code == 2 and "makes that file too" in err and not out.exists()
    batch, first = tmp_path / "b.jsonl", tmp_path / "out/0001.png"
    batch.write_text('{"instruction": "a"}\n')
    first.parent.mkdir()
    code, _, err = run_sample(monkeypatch, capsys, "--batch", batch, "--out", first.parent,
                              "--routing", first)
    assert code == 2 and "makes that file too" in err and not first.exists()


def test_folders_that_may_not_be_written_to_are_found_before_the_work(tmp_path, monkeypatch,
                                                                      capsys):
    monkeypatch.setattr(plans.os, "access", lambda path, mode: Path(path) != tmp_path)
    for arguments in (("--out", tmp_path / "a.png"), ("--routing", tmp_path / "a.png"),
                      ("--export-lora", tmp_path / "a.safetensors")):
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", *arguments)
        assert code == 2 and "may not be written to" in err and arguments[0] in err
    (tmp_path / "jobs.jsonl").write_text('{"instruction": "a star"}')
    code, _, err = run_sample(monkeypatch, capsys, "--batch", tmp_path / "jobs.jsonl", "--out",
                              tmp_path)
    assert code == 2 and "a folder to write to" in err


@pytest.mark.parametrize("part, change, words", [
    ("vae/config.json", lambda f: f.unlink(), "config.json"),
    ("vae/diffusion_pytorch_model.safetensors", lambda f: f.unlink(), "vae"),
    ("transformer/diffusion_pytorch_model.safetensors",
     lambda f: f.write_bytes(f.read_bytes()[:-9]), "transformer"),
    ("text_encoder/model.safetensors", lambda f: f.write_bytes(b"x" * 99), "text_encoder"),
    ("text_encoder_2/model.safetensors",
     lambda f: f.write_bytes((MODEL / "text_encoder/model.safetensors").read_bytes()), "missing"),
    ("transformer/config.json", lambda f: f.write_text(
        f.read_text().replace('"num_layers": 3', '"num_layers": 4')), "missing"),
    ("tokenizer/merges.txt", lambda f: f.unlink(), "merges.txt"),
    ("tokenizer_2/tokenizer.json", lambda f: f.write_text("{}"), "tokenizer.json")])
def test_broken_models_are_named(tmp_path, monkeypatch, capsys, part, change, words):
    folder = wrong_model(tmp_path, part, change)
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--model", folder,
                              "--out", tmp_path / "out.png")
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("row, words", [
    ("{", "JSON"), ("[]", "expected a JSON object"), ('{"instruction": ""}', "instruction"),
    ('{"instruction": "a", "images": ["gone.png"]}', "gone.png"),
    ('{"instruction": "a", "out": "../x.png"}', "out"),
    ('{"instruction": "a", "images": 3}', "images"),
    ('{"instruction": "a", "images": 0}', "images"),
    ('{"instruction": "a", "imagse": "in.png"}', "imagse"),
    ('{"instruction": "a", "image": "in.png"}', "'image' may be the picture to edit or the one"),
    ('{"prompt": "a", "file_name": null, "image": "in.png"}', "'image' may be the picture to edit"),
    ('{"prompt": "a", "control_image": "in.png"}', "'control_image' may be"),
    ('{"prompt": "a", "src_img": "http://a.b/in.png"}', "address"),
    ('{"prompt": "a", "src_img": "hf://a/in.png"}', "address"),
    ('{"instruction": "a\\ud800"}', "Unicode")])
def test_broken_batches_are_named_before_anything_is_made(tmp_path, monkeypatch, capsys, row,
                                                          words):
    (tmp_path / "jobs.jsonl").write_text('{"instruction": "a star"}\n' + row)
    code, _, err = run_sample(monkeypatch, capsys, "--batch", tmp_path / "jobs.jsonl",
                              "--out", tmp_path / "out")
    assert code == 2 and words in err and "line 2" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_rows_of_training_data_are_a_batch(tmp_path, capsys):
    """By the names that data has; the target is what would be made."""
    for name in ("in.png", "depth.png"):
        Image.open(PICTURE).save(tmp_path / name)
    rows = [{"file_name": "out.png", "Text": "a", "input_image": "in.png", "conds": "depth.png"},
            {"edited_image": "out.png", "edit_prompt": "b", "task": "edit"}, {"caption": "c"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = jobs.read_batch(tmp_path / "metadata.jsonl", tmp_path, 0)
    assert [(job.instruction, job.images, job.conds, job.task) for job in found] == [
        ("a", [tmp_path / "in.png"], [tmp_path / "depth.png"], ""), ("b", [], [], "edit"),
        ("c", [], [], "")]
    err = capsys.readouterr().err
    assert "2 rows with a target; it is not looked at" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("given, words", [
    ("https://a.b/c.png", "is an address; save that picture"), ("hf://a/b.png", "is an address"),
    ("data:image/png;base64,iV", "is an address"), ("a:b/c.png", "no such picture file"),
    ("canny:/a/b.png", "no such picture file"), (".", "is a folder; name one")])
def test_what_is_no_picture_file_is_named(tmp_path, monkeypatch, capsys, given, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--image", given)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_compiling_needs_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "make it red", "--compile")
    assert code == 2 and "--compile" in err


@pytest.mark.parametrize("arguments, words", [
    (["--routing", "map.txt"], "picture"), (["--routing", "gone/map.png"], "folder"),
    (["--routing", "map.png", "--adapter", "none"], "needs an adapter")])
def test_routing_that_cannot_be_drawn(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- python train.py

def test_what_options_need(monkeypatch):
    for size in ("-1", "0", "nan"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--dry-run", size])
        with pytest.raises(ValueError, match="must be positive"):
            train.main()
    monkeypatch.setenv("CXX", sys.executable)
    for given, words in ((["--shard"], "torchrun"), (["--compile", "--shard"], "not together"),
                           (["--data-root", "/gone"], "no such folder")):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", *given])
        with pytest.raises(ValueError, match=words):
            train.main()


@pytest.mark.parametrize("arguments, words", [
    (["--data", "gone"], "gone"), (["--data", "tiny:0"], "weight"),
    (["--data", "tiny", "--steps", "0"], "--steps"),
    (["--data", "tiny", "--model", "gone"], "gone"),
    (["--data", "tiny", "--config", "gone.json"], "gone.json"),
    (["--data", "tiny", "--lr", "nan"], "--lr"),
    (["--data", "tiny", "--device", "cpu", "--matmul", "fp8"], "--matmul fp8: cpu does not"),
    (["--data", "tiny", "--recompute", "sometimes"], "--recompute invalid choice"),
    (["--data", "tiny", "--device", "cuda:99"], "--device")])
def test_what_a_user_of_train_gets_wrong_is_one_line(tmp_path, arguments, words, monkeypatch,
                                                     capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.run(train.main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_older_names_of_options_mean_the_same_and_are_not_told(monkeypatch, capsys):
    """--adapter KIND and --checkpoint of train.py are --method and --recompute by now."""
    def options(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", *arguments])
        return vars(train_options(baselines.METHODS, PUBLIC))
    assert options("--adapter", "lora") == options("--method", "lora") != options()
    assert options("--checkpoint") == options("--recompute") != options()
    assert options()["method"] == "instructmole" and options()["recompute"] == "auto"
    with pytest.raises(ValueError, match="--adapter.*'gone'"):
        options("--adapter", "gone")
    with pytest.raises(SystemExit):
        options("--help")
    told = capsys.readouterr().out
    assert "--method" in told and "--recompute" in told
    assert "--adapter" not in told and "--checkpoint" not in told


def test_help_says_what_seed_tiny_and_shift_mean(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "train.py", train.main, "--help")
    told = " ".join(out.split())
    for words in ("--seed SEED of all that is random", "or tiny, the embedded model's drawn world",
                  "above 1, more are near 1, pure noise", "--keep N keep the last N"):
        assert code == 0 and words in told, words
