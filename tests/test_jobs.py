"""What sample.py is asked to make: tables of jobs, names that are free, progress; support/jobs.py
and support/plans.py.
"""
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from dit import DiTConfig, FluxTransformer
from helpers import MODEL, PICTURE, ROOT, run_sample
from sample import edit
from support import devices, jobs


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder that commands run in, with a picture in it."""
    monkeypatch.chdir(tmp_path)
    Image.open(PICTURE).save("in.png")
    return tmp_path


def table(file: Path, *rows: dict) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


# ---------------------------------------------------------------------------- what is written over

def test_a_picture_nobody_named_is_not_written_over(folder, monkeypatch, capsys) -> None:
    def run(*more: object) -> str:
        code, out, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--steps", 1, *more)
        assert code == 0, err
        return out + "".join(line for line in err.splitlines() if line.startswith("note"))
    assert "out.png: 64x64" in run() and "note" not in run("--out", "other.png")
    Path("out.png").write_bytes(b"mine")
    told = run()
    assert "note: out.png is there already; the next free name is out_1.png" in told
    assert "out_1.png: 64x64" in told and "out_2.png: 64x64" in run("--seed", 4)
    assert Path("out.png").read_bytes() == b"mine"
    assert "note" not in run("--out", "out.png")         # it is named
    assert Image.open("out.png").size == (64, 64)


def test_a_name_that_is_taken_meanwhile_is_not_written_over(folder) -> None:
    """As by a run on another GPU, which began when the name was free."""
    picture = Image.new("RGB", (16, 16))
    for name, over in (("out.png", False), ("out_1.png", False), ("out_2.png", False),
                       ("out.png", True)):
        assert jobs.save(picture, Path("out.png"), over) == Path(name)
    assert {file.name for file in Path().glob("*.png")} >= {"out.png", "out_1.png", "out_2.png"}


def test_several_pictures_nobody_named_are_not_either(folder, monkeypatch, capsys) -> None:
    Path("out_1.png").write_bytes(b"mine")
    code, out, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--steps", 1,
                                "--num", 3)
    assert code == 0 and "out_1.png is there already; the next free name is out_1_0.png" in err
    assert re.findall(r"^(\S+): .*seed (\d)", out, re.M) == [
        ("out_1_0.png", "0"), ("out_1_1.png", "1"), ("out_1_2.png", "2")]
    assert Path("out_1.png").read_bytes() == b"mine"
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--steps", 1, "--num", 2,
                              "--out", "out.png")
    assert code == 0 and "note" not in err and Image.open("out_1.png").size == (64, 64)


# ------------------------------------------------------------------------------------------ a batch

def test_a_folder_of_training_data_is_a_batch(tmp_path, monkeypatch, capsys) -> None:
    own = ROOT / "tiny/examples/own"
    code, out, err = run_sample(monkeypatch, capsys, "--batch", own, "--steps", 1, "--out",
                                tmp_path / "out")
    rows = (own / "metadata.jsonl").read_text().splitlines()
    assert code == 0 and len(list((tmp_path / "out").iterdir())) == len(rows)
    assert f"{len(rows)} rows with a target" in err
    for path, words in ((tmp_path / "out", "out: holds none of metadata.jsonl, metadata.csv"),
                        (tmp_path / "gone", "gone: no such file")):
        code, _, err = run_sample(monkeypatch, capsys, "--batch", path)
        assert code == 2 and words in err and len(err.splitlines()) == 1


def test_a_batch_is_not_put_into_a_folder_named_like_a_picture(tmp_path, monkeypatch, capsys):
    file = table(tmp_path / "a.jsonl", {"instruction": "a red circle"})
    code, _, err = run_sample(monkeypatch, capsys, "--batch", file, "--out", tmp_path / "b.png")
    assert code == 2 and "must be a folder" in err and not (tmp_path / "b.png").exists()


def test_a_table_with_commas_is_a_batch(folder, capsys) -> None:
    Path("metadata.csv").write_text("prompt,input_image,seed,mask\nred,in.png,7,\nblue,,,\n")
    found = jobs.read_batch(jobs.batch_file(folder), folder, 1)
    assert [(j.instruction, j.images, j.mask, j.outs[0][0]) for j in found] == [
        ("red", [folder / "in.png"], None, 7), ("blue", [], None, 1)]


def test_nulls_are_absent(folder, capsys) -> None:
    file = table(folder / "a.jsonl", {
        "instruction": "a", "images": None, "conds": None, "mask": None, "task": None, "seed": None,
        "out": None, "target": None, "score": None})
    job, = jobs.read_batch(file, folder, 5)
    assert job == jobs.Job("a", [], [], None, "", [(5, folder / "0001.png")])
    assert not capsys.readouterr().err


def test_entries_that_are_left_unread_are_counted(folder, capsys) -> None:
    """But what may be a picture under a name that nobody knows is an error: a typing mistake."""
    rows = [{"instruction": "a", "score": 3, "id": "x"}, {"instruction": "b", "score": 4}]
    assert len(jobs.read_batch(table(folder / "a.jsonl", *rows), folder, 0)) == 2
    err = capsys.readouterr().err
    assert "'id' (in 1 row), 'score' (in 2 rows)" in err and len(err.splitlines()) == 1
    with pytest.raises(ValueError, match="line 1: unknown entry 'imagse'"):
        jobs.read_batch(table(folder / "a.jsonl", {"instruction": "a", "imagse": "gone.png"}),
                        folder, 0)


def test_what_was_skipped_is_said_at_the_end(folder, monkeypatch, capsys) -> None:
    file = table(folder / "a.jsonl", *({"instruction": f"star {i}"} for i in range(5)))
    for name in ("0001", "0002", "0004", "0005"):
        (folder / f"{name}.png").write_bytes(b"mine")
    code, out, _ = run_sample(monkeypatch, capsys, "--batch", file, "--steps", 1, "--out", folder)
    assert code == 0 and out.splitlines()[0].startswith(f"{folder / '0003.png'}: 64x64")
    assert out.splitlines()[1:] == [f"skipped: 4 of 5 pictures are in {folder} by their names "
                                    "already (0001.png, 0002.png, 0004.png, ...)"]


def test_a_skipped_picture_of_another_instruction_is_named(folder, monkeypatch, capsys) -> None:
    def run(*instructions: str) -> str:
        file = table(folder / "a.jsonl", *({"instruction": text} for text in instructions))
        code, _, err = run_sample(monkeypatch, capsys, "--batch", file, "--steps", 1)
        assert code == 0, err
        return err
    Path("out").mkdir()
    Path("out/0003.png").write_bytes(b"mine")            # says nothing
    assert "made of" not in run("star", "square", "circle")
    assert "made of" not in run("star", "square", "circle")
    err = run("star", "a blue square", "circle")
    assert "note: made of other instructions than their lines have now: 0002.png; " in err
    Path("out/0002.png").unlink()
    assert "made of" not in run("star", "a blue square", "circle")


def test_a_table_that_is_left_out_is_named(folder, capsys) -> None:
    for name in ("metadata.jsonl", "metadata.csv", "metadata.json"):
        (folder / name).write_text("[]")
    assert jobs.batch_file(folder) == folder / "metadata.jsonl"
    assert capsys.readouterr().err.splitlines() == [
        f"note: {folder}: metadata.csv is left out, as metadata.jsonl is there",
        f"note: {folder}: metadata.json is left out, as metadata.jsonl is there"]
    assert jobs.batch_file(folder / "metadata.csv") == folder / "metadata.csv"    # it is named
    assert not capsys.readouterr().err


def test_one_bar_is_over_all_pictures(folder, monkeypatch, capsys) -> None:
    file = table(folder / "a.jsonl", *({"instruction": f"star {i}"} for i in range(3)))
    bars: list = []

    class Bar(sample.tqdm):
        def __init__(self, **settings: object):
            super().__init__(**settings)
            self.said: list[str] = []
            bars.append(self)

        def set_description(self, desc: str, refresh: bool = True) -> None:
            super().set_description(desc, refresh)
            self.said.append(desc)
    monkeypatch.setattr(sample, "tqdm", Bar)
    assert run_sample(monkeypatch, capsys, "--batch", file, "--steps", 4)[0] == 0
    bar, = bars
    assert bar.total == bar.n == 12 and list(dict.fromkeys(bar.said)) == [
        "encoding", "picture 1 of 3", "picture 2 of 3", "picture 3 of 3"]
    assert bar.said[0] == bar.said[5] == bar.said[10] == "encoding"


# --------------------------------------------------------------------------------------- conditions

def test_edges_of_a_photograph(folder, monkeypatch, capsys, trained) -> None:
    wanted = edit(trained, "a star", (), "canny:in.png", steps=2)
    assert wanted.tobytes() != edit(trained, "a star", (), "in.png", steps=2).tobytes()
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a star", "--steps", 2,
                              "--cond", "canny:in.png", "--out", "a.png")
    assert code == 0, err
    assert Image.open("a.png").tobytes() == wanted.tobytes()
    (folder / "more").mkdir()
    Image.open("in.png").save("more/there.png")
    file = table(folder / "more/a.jsonl", {"instruction": "a star", "conds": ["canny:there.png"]})
    assert run_sample(monkeypatch, capsys, "--batch", file, "--steps", 2, "--out", "made")[0] == 0
    assert Image.open("made/0001.png").tobytes() == wanted.tobytes()


def test_other_kinds_of_conditions_are_made_elsewhere(folder, monkeypatch, capsys) -> None:
    for given in ("depth:in.png", "pose:in.png", "depth:a/in.png", "a/depth:b/in.png"):
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--cond", given)
        assert code == 2 and f"--cond {given}: no such file, and no condition" in err
        assert "canny:FILE draws edges" in err and len(err.splitlines()) == 1
    file = table(folder / "a.jsonl", {"instruction": "a", "conds": "depth:in.png"})
    code, _, err = run_sample(monkeypatch, capsys, "--batch", file)
    assert code == 2 and "line 1: " in err and "'depth' is drawn here" in err
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--cond", "canny:gone.png")
    assert code == 2 and "gone.png: no such picture file" in err


def test_a_photograph_of_edges_is_not_written_over(folder, monkeypatch, capsys) -> None:
    for option in ("--out", "--routing"):
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--cond",
                                  "canny:in.png", option, "in.png")
        assert code == 2 and "is a picture that is given" in err
    file = table(folder / "a.jsonl", {"instruction": "a", "conds": "canny:in.png"})
    code, _, err = run_sample(monkeypatch, capsys, "--batch", file, "--routing", "in.png")
    assert code == 2 and "is a picture that is given" in err


# ------------------------------------------------------------------------------- what is said of it

def test_a_size_that_the_model_has_not_learnt_is_said(folder, monkeypatch, capsys) -> None:
    for size, told in (("64x64", False), ("96x64", True)):
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--steps", 1, "--size",
                                  size, "--out", "a.png")
        assert code == 0 and ("64x64 alone; expect little of --size 96x64" in err) == told


def test_what_takes_a_while_is_said_before(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(devices, "LARGE", 1e6)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: None)
    monkeypatch.setattr(devices, "check_compiler", lambda: None)
    code, out, err = run_sample(monkeypatch, capsys, "--instruction", "a", "--export-lora",
                                "a.safetensors", "--compile")
    assert code == 0 and [line.split()[0] for line in err.splitlines()] == [
        "loading", "reading", "compiling:", "encoding"]


def test_of_several_processes_the_first_says_that_it_compiles(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: None)
    with torch.device("meta"):
        model = FluxTransformer(DiTConfig(16, 1, 0, 16, 2, 8, 8, (4, 6, 6)))
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        devices.compile_blocks(model)
        assert ("compiling" in capsys.readouterr().err) == told


@pytest.mark.parametrize("option, given, words", [
    ("--adapter", "nope", "--adapter nope: no such file or folder"),
    ("--vae", "nope", "--vae nope: no such file or folder"),
    ("--model", "nope", "--model nope: no such file or folder"),
    ("--tokenizers", "nope", "--tokenizers nope: no such file or folder"),
    ("--vae", MODEL / "transformer", "--vae .*: holds a transformer, not an autoencoder"),
    ("--t5", MODEL / "text_encoder", "--t5 .*: holds a CLIP text encoder, not a T5 text encoder"),
    ("--clip", ROOT / "tiny/adapter.safetensors", "--clip .*: holds no part of a FLUX model")])
def test_parts_that_are_others_are_named(folder, monkeypatch, capsys, option, given, words) -> None:
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a", option, given)
    assert code == 2 and re.search(words, err) and len(err.splitlines()) == 1


def test_a_part_may_be_named_by_the_whole_model_s_folder(folder, monkeypatch, capsys) -> None:
    assert run_sample(monkeypatch, capsys, "--instruction", "a", "--steps", 1, "--vae", MODEL,
                      "--out", "a.png")[0] == 0
