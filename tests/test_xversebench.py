"""evaluate.py --bench xverse: names, grids, killed and gone on with, answers, what is broken."""
import json
import os
import re
import shlex
import signal
import socket
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from bench_files import LISTS, NAMES, drawn, xverse, xverse_answers
from helpers import ROOT, run_command
from support import benchmarks
from support.results import markdown
from support.words import duration
from support.xverse_answers import dsg_score


BENCH = "xverse"


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """The command -> exit code, stdout, stderr but for the progress bar and texts too long."""
    code, out, err = run_command(monkeypatch, capsys, "evaluate.py", evaluate.main, "--bench",
                                 BENCH, *arguments)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()
             and not re.search("prompt/s|s/prompt|it/s]|the model reads |T5 reads ", line)]
    return code, out, "\n".join(lines)


def saying(picture: Image.Image, pipe, prompt, args) -> Image.Image:
    """A picture that says how it was made, as the model's do."""
    picture.info = {"instruction": prompt.text, "steps": str(args.steps), "seed": "0",
                    "guidance": f"{args.guidance:g}", **pipe.names}
    return picture


def of_boxes(pipe, prompt, given, args, callback) -> list[Image.Image]:
    """In a model's place: a drawing for each seed."""
    return [saying(drawn(seed, given.size), pipe, prompt, args) for seed in prompt.seeds]


@pytest.fixture
def boxes(monkeypatch, trained):
    monkeypatch.setattr(evaluate, "load_pipeline", lambda **_: trained)
    monkeypatch.setattr(evaluate, "benchmark_pictures", of_boxes)


@pytest.fixture
def made(tmp_path, monkeypatch, capsys, boxes):
    """The data and a finished run -> their folders."""
    data, out = xverse(tmp_path / "data"), tmp_path / "out"
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 0, err
    return data, out


def grids(out) -> list:
    return [out / folder / name for folder, names in NAMES.items() for name in names]


# ----------------------------------------------------------------------------------------- pictures

def test_the_whole_way_with_a_model(tmp_path, monkeypatch, capsys, short_model, short_by_default):
    """Six grids, of what sample.edit() makes, where and as XVerse's scorers look for them."""
    data, out = xverse(tmp_path / "data"), tmp_path / "out"
    code, told, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--steps", 1)
    assert code == 0, err
    assert "--bench xverse: 6 prompts; 0 made before, 6 to make" in told
    assert "6 prompts in " in told and "; all 6 take about " in told
    pipe = sample.load_pipeline(short_model, None, "cpu")
    for part, folder in (("single", "XVerseBench_single"), ("multi", "XVerseBench_multi")):
        found = list((out / folder).glob("*.png"))       # a scorer takes all that are there
        assert sorted(file.name for file in found) == sorted(NAMES[folder])
        for i, (prompt, names) in enumerate(LISTS[part]):
            own, = (file for file in found if file.name.split("_")[0] == str(i))
            with Image.open(own) as grid:
                assert grid.size == (128, 128) and grid.info["instruction"] == prompt
                assert grid.info["given"].startswith(f"{len(names)} condition")
                assert grid.info["seed"] == f"{4 * i} to {4 * i + 3}" and grid.info["steps"] == "1"
                quarters = [grid.crop((64 * x, 64 * y, 64 * x + 64, 64 * y + 64))
                            for y in (0, 1) for x in (0, 1)]
            conds = [data / "assets/XVerseBench" / name for name in names]
            for j, quarter in enumerate(quarters if names[0][:5] == "human" and i else ()):
                wanted = sample.edit(pipe, prompt, [], conds, 4 * i + j, steps=1)
                assert np.abs(np.asarray(quarter).astype(int) - np.asarray(wanted)).max() <= 1
    table = (out / "table.md").read_text()
    assert table.startswith("A table with holes: not scored: DPG, ID, IP, AES of single, and DPG")
    assert "| average, XVerse   | 76.72  | 70.08 | 73.40   |" in table and table in told + "\n"
    assert "\n- Not by the protocol: steps 1, not 28.\n" in table
    record = json.loads((out / "scores.json").read_text())
    assert record["bench"] == "xverse" and record["made"] == record["prompts"] == 6
    assert record["published"]["XVerse"] == [76.72, 70.08, 73.40]
    assert record["settings"]["steps"] == "1" and record["settings"]["size"] == "64x64"
    scorers = (out / "scoring.md").read_text()
    for name in NAMES:
        assert f"--input_dir {out / name} --test_list_name {name}" in scorers
    assert Image.open(out / "sheet.png").size == (4 * 132 + 4, 6 * (128 + 28))


def test_references_may_be_native(tmp_path, monkeypatch, capsys, boxes):
    """--native 1, --size: as asked, and pictures made in another way are not mixed with them."""
    seen = []
    monkeypatch.setattr(evaluate, "benchmark_pictures", lambda pipe, prompt, given, args, callback:
                        seen.append((args.native, given.size)) or of_boxes(
                            pipe, prompt, given, args, callback))
    common = ["--data", xverse(tmp_path / "data"), "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, *common, "--native", 1, "--size", "32x48",
                       "--limit", 1)
    assert code == 0 and seen == [(1, (32, 48))] * 2, err
    for more in ([], ["--native", 1], ["--native", 1, "--size", "32x48", "--steps", 3],
                 ["--native", 1, "--size", "32x48", "--guidance", 1]):
        code, _, err = run(monkeypatch, capsys, *common, *more)
        assert code == 2 and "0_a_cat_on_a_mat.png: was made with" in err and len(seen) == 2
    assert run(monkeypatch, capsys, *common, "--native", 1, "--size", "32x48")[0] == 0
    assert len(seen) == 6


def test_limit_takes_the_first_of_each_list(tmp_path, monkeypatch, capsys, boxes):
    common = ["--data", xverse(tmp_path / "data"), "--out", tmp_path / "out"]
    code, told, err = run(monkeypatch, capsys, *common, "--limit", 1)
    assert code == 0 and "6 prompts, of which --limit 1 takes 2; 0 made before, 2 to make" in told
    assert "A table with holes: 4 of 6 prompts have no picture; not scored: DPG" in told, err
    files = [file for file in grids(tmp_path / "out") if file.exists()]
    assert [file.name[:2] for file in files] == ["0_", "0_"]
    before = [file.stat().st_mtime_ns for file in files]
    code, told, _ = run(monkeypatch, capsys, *common)
    assert code == 0 and "6 prompts; 2 made before, 4 to make" in told
    assert [file.stat().st_mtime_ns for file in files] == before
    monkeypatch.setattr(evaluate, "load_pipeline", None)     # is not asked: all is there
    code, told, _ = run(monkeypatch, capsys, *common)
    assert code == 0 and "6 made before, 0 to make" in told and "prompts in" not in told


def test_settings_that_are_named_are_compared_though_nothing_is_to_be_made(monkeypatch, capsys,
                                                                           made, tmp_path):
    """Scoring alone needs no model; but settings that are named must be those of the pictures."""
    data, out = made
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    monkeypatch.setattr("support.options.EMBEDDED", tmp_path / "gone")       # with its adapter
    common, kept = ["--data", data, "--out", out], (out / "table.md").read_bytes()
    assert run(monkeypatch, capsys, *common)[0] == 0
    adapter = ROOT / "tiny/adapter.safetensors"
    same = ["--steps", 28, "--guidance", 2.5, "--model", ROOT / "tiny/model", "--adapter", adapter,
            "--dtype", "float32", "--native", 0]
    assert run(monkeypatch, capsys, *common, *same)[0] == 0
    for option, value, name in (("--steps", 50, "steps"), ("--guidance", 3, "guidance"),
                                ("--adapter", "none", "adapters"), ("--native", 1, "benchmark"),
                                ("--model", ROOT / "tiny", "model"),
                                ("--size", "32x32", "benchmark"),
                                ("--adapter", f"{adapter}:0.5", "adapters"),
                                ("--dtype", "bfloat16", "dtype")):
        code, _, err = run(monkeypatch, capsys, *common, option, value)
        assert code == 2 and f"was made with {name} " in err and len(err.splitlines()) == 1, err
    code, _, err = run(monkeypatch, capsys, *common, "--adapter", tmp_path / "gone.safetensors")
    assert code == 2 and "gone.safetensors" in err and (out / "table.md").read_bytes() == kept


def test_pictures_of_another_precision_are_not_mixed(tmp_path, monkeypatch, capsys, boxes, trained):
    common = ["--data", xverse(tmp_path / "data"), "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *common, "--limit", 1)[0] == 0
    monkeypatch.setitem(trained.names, "dtype", "bfloat16")      # what "auto" is on another machine
    code, _, err = run(monkeypatch, capsys, *common)
    assert code == 2 and "was made with dtype 'float32', not 'bfloat16'; name another" in err
    assert sum(file.exists() for file in grids(tmp_path / "out")) == 2


def killed_run(arguments: list[str], after: int) -> None:
    """The command in a fork that is killed while it writes its picture number `after`."""
    child = os.fork()
    if child == 0:
        save, left = benchmarks.save_picture, [after]

        def torn(picture, file, about={}):
            left[0] -= 1
            if left[0] < 0:
                file.with_name(f".{file.stem}.new{file.suffix}").write_bytes(b"\x89PNG torn")
                os.kill(os.getpid(), signal.SIGKILL)
            save(picture, file, about)
        benchmarks.save_picture = torn
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.argv = ["evaluate.py", *arguments]
        evaluate.main()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_twice_it_goes_on_and_gives_the_same(tmp_path, monkeypatch, capsys, made):
    data, whole = made
    out = tmp_path / "killed"
    arguments = ["--bench", "xverse", "--data", str(data), "--out", str(out)]
    for after, there in ((2, 2), (1, 3)):
        killed_run(arguments, after)
        assert sum(file.exists() for file in grids(out)) == there
        assert len(list(out.glob("*/.*"))) == 1 and not (out / "table.md").exists()
    code, told, err = run(monkeypatch, capsys, *arguments[2:])
    assert code == 0 and "3 made before, 3 to make" in told, err
    for ours, wanted in zip(grids(out), grids(whole)):
        assert ours.read_bytes() == wanted.read_bytes()
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()
    assert not list(out.glob("*/.*"))                    # what the kills left is gone


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "other", "cut"])
def test_a_picture_cut_short_is_not_taken_for_done(monkeypatch, capsys, made, content):
    data, out = made
    file = grids(out)[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-200] if content is None else content)
    code, told, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 0 and "5 made before, 1 to make" in told
    assert err.startswith(f"note: {file}: cannot be read as a picture (") and "made again" in err
    assert file.read_bytes() == whole and len(err.splitlines()) == 1


def test_pictures_made_elsewhere_are_scored_and_said(tmp_path, monkeypatch, capsys, boxes):
    data, out = xverse(tmp_path / "data"), tmp_path / "out"
    for file in grids(out)[:5]:
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn(1, (128, 128)).save(file)
    code, told, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 0 and "note: 5 pictures in" in err and "do not say how they were made" in err
    assert "Made with what its pictures do not say." in told


def test_two_processes_share_the_work(tmp_path, forks, short_model):
    data, out = xverse(tmp_path / "data"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    env = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)} for i in range(2)]
    command = ("evaluate.py", "--bench", "xverse", "--data", data, "--out", out, "--steps", 1,
               "--limit", 1, "--model", short_model, "--device", "cpu")
    first, second = forks.run_together([command] * 2, env=env)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "2 prompts in" in first.stdout and "by 2 processes" in first.stdout
    assert "--bench" not in second.stdout and "| score" not in second.stdout
    assert "2/2" in first.stderr and "prompts" not in second.stderr
    assert [file.exists() for file in grids(out)] == [True, False, False] * 2


# ------------------------------------------------------------------------------------------ answers

PERFECT = {"dpg": ["yes"] * 3, "id": 100, "ip": 100, "aes": 100}


def table_of(out) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in (out / "table.md").read_text().splitlines()
             if line.startswith("|") and not line.startswith("| -")]
    return {cells[0].strip(): [text.strip() for text in cells[1:]] for cells in lines}


def test_the_best_answers_give_the_best_scores_and_others_do_not(monkeypatch, capsys, made):
    data, out = made
    files = [xverse_answers(out, part, kind, value) for part in LISTS
             for kind, value in PERFECT.items()]
    code, told, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", *files)
    assert code == 0 and "\nComplete: all 6 prompts, all scores.\n" in told, err
    assert table_of(out)["average"] == ["100.00"] * 3 and "Not by the protocol" not in told
    for kind, value in {"dpg": ["yes", "no", "yes"], "id": 3, "ip": 3, "aes": 3}.items():
        xverse_answers(out, "single", kind, lambda i, v=value, k=kind: (
            v if i == 2 or k == "id" else PERFECT[k]))   # the last prompt's, or a face's
        assert run(monkeypatch, capsys, "--data", data, "--out", out)[0] == 0
        single, multi, overall = map(float, table_of(out)[kind.upper()])
        assert single < 99 and multi == 100 and abs(overall - (single + 100) / 2) < 0.01
        xverse_answers(out, "single", kind, PERFECT[kind])


def test_means_are_over_what_the_scorers_take_and_averages_as_published(monkeypatch, capsys, made):
    """ID over people, IP over the others, each photograph and picture once; AES over grids."""
    data, out = made
    for part in LISTS:
        for kind, value in (("dpg", ["yes", "no", "yes"]), ("id", lambda i: 10.0 * i),
                            ("ip", lambda i: 10.004 + i), ("aes", lambda i: 50.0 + i)):
            xverse_answers(out, part, kind, value)
    files = sorted(out.glob("XVerseBench_*/*_scores_*.json"))
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", *files)
    assert code == 0, err
    found = table_of(out)
    assert found["DPG"] == ["33.33"] * 3                 # 2 is no, and 3 hangs on it
    assert found["ID"] == ["10.00", "5.00", "7.50"]      # prompt 1; 0 and 1
    assert found["IP"][:2] == ["11.00", "11.20"]         # 0 and 2; 0, twice 1, twice 2
    assert found["AES"] == ["51.00"] * 3
    single = (33.33 + 10 + 11.0 + 51) / 4
    assert found["average"][0] == f"{single:.2f}"
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert scores["single"]["average"] == pytest.approx(single, abs=1e-12)
    assert scores["overall"]["average"] == pytest.approx(
        (single + (33.33 + 5 + 11.2 + 51) / 4) / 2, abs=1e-12)


@pytest.mark.parametrize("no, wanted", [
    ((), 100), ((2,), 50), ((3,), 75), ((4,), 75), ((2, 3), 50), ((1, 2), 0), ((1,), 25)])
def test_a_question_counts_as_no_when_a_parent_is_no(no, wanted):
    """3 hangs on 2, 2 and 4 on 1. If 1 alone is no, 3 counts: 2's own answer is yes."""
    parents = {"1": [0], "2": [1], "3": [2], "4": [1]}
    assert dsg_score({i: int(i) not in no for i in parents}, parents) == wanted


def test_answers_are_remembered(monkeypatch, capsys, made):
    data, out = made
    file = xverse_answers(out, "single", "aes", 50.0)
    assert run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", file)[0] == 0
    code, told, _ = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 0 and f"answers, as before: {file}" in told
    assert table_of(out)["AES"] == ["50.00", "–", "–"]
    file.unlink()
    kept = (out / "table.md").read_bytes()
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 2 and f"{file}: no such file, but" in err and "--scores" in err
    assert (out / "table.md").read_bytes() == kept


def test_answers_may_be_named_by_their_folder(monkeypatch, capsys, made):
    """--out itself, of which not every answer is there yet; one that holds none is told."""
    data, out = made
    files = [xverse_answers(out, part, "id", 20.0) for part in LISTS]
    code, told, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", out)
    assert code == 0 and table_of(out)["ID"] == ["20.00"] * 3, err
    answers = json.loads((out / "scores.json").read_text())["answers"]
    assert sorted(answers) == sorted(map(str, files))
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", data)
    assert code == 2 and len(err.splitlines()) == 1
    assert f"--scores {data}: neither in it nor below it is a file called dpg_scores_" in err


def test_the_command_that_scores_is_the_one_that_was_given(tmp_path, monkeypatch, capsys, boxes):
    """With its settings, for a shell: it runs, though paths have spaces, and makes nothing."""
    data, out = xverse(tmp_path / "the data"), tmp_path / "my out"
    common = ["--data", data, "--out", out, "--limit", 1, "--native", 1, "--size", "32x48",
              "--adapter", ROOT / "tiny/adapter.safetensors", "--model", ROOT / "tiny/model"]
    assert run(monkeypatch, capsys, *common)[0] == 0
    scoring = (out / "scoring.md").read_text()
    assert f"--input_dir '{out / 'XVerseBench_multi'}' --test" in scoring
    command = shlex.split(scoring.splitlines()[-1])
    assert command == ["python", "evaluate.py", "--bench", "xverse", *map(str, common), "--scores",
                       str(out)]
    for part in LISTS:
        file = xverse_answers(out, part, "aes", 60)
        file.write_text(json.dumps({"0": 60}))
    code, told, err = run(monkeypatch, capsys, *command[4:])
    assert code == 0 and "0 to make" in told and table_of(out)["AES"] == ["60.00"] * 3, err
    assert shlex.split((out / "scoring.md").read_text().splitlines()[-1]) == command


def changed(answers: dict, change) -> dict:
    change(answers)
    return answers


@pytest.mark.parametrize("kind, change, words", [
    ("dpg", lambda a: a.pop("1"), "has no answer for prompt 1 of XVerseBench_single; run its"),
    ("aes", lambda a: a.update({"7": 1.0}), "answers for prompt '7', of which there is no picture"),
    ("dpg", lambda a: a["1"].pop(), "prompt 1: should be a list of 4, one for each picture"),
    ("dpg", lambda a: a["0"][0].pop("Is 2 there?"), "prompt 0: each picture's answers should be"),
    ("id", lambda a: a["0"][0].update({"human_9.jpg": 1}), "should be called nothing; found"),
    ("ip", lambda a: a["0"][0].update({"animal_0_a cat.jpg": "much"}), "should be a number, found"),
    ("aes", lambda a: a.update({"1": None}), "prompt 1: should be a number, found None"),
    ("aes", lambda a: a.update({"1": 10 ** 400}), "prompt 1: should be a number, found 1000"),
    ("aes", lambda a: a.update({"0": 5.5, "1": 10.0, "2": 1}), "no value is above 10, as if")])
def test_wrong_answers_are_one_line(monkeypatch, capsys, made, kind, change, words):
    data, out = made
    file = xverse_answers(out, "single", kind, PERFECT[kind])
    file.write_text(json.dumps(changed(json.loads(file.read_text()), change)))
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", file)
    assert code == 2 and words in err and str(file) in err and len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


@pytest.mark.parametrize("name, words", [
    ("XVerseBench_single/vqa_scores_1.json", "expected a file like XVerseBench_single/dpg_scores_"),
    ("elsewhere/dpg_scores_1.json", "expected a file like"),
    ("XVerseBench_single/aes_scores_2.json", "is of the same kind; name one of them")])
def test_files_of_answers_have_their_scorers_names(tmp_path, monkeypatch, capsys, made, name,
                                                   words):
    data, out = made
    first, file = xverse_answers(out, "single", "aes", 1.0), tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", first, file)
    assert code == 2 and words in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------- broken

def edit_list(name: str, change):
    def do(data) -> None:
        file = data / f"XVerseBench_{name}.json"
        rows = json.loads(file.read_text())
        change(rows)
        file.write_text(json.dumps(rows))
    return do


@pytest.mark.parametrize("damage, words", [
    (lambda data: (data / "assets/XVerseBench/object/2_cup.jpg").unlink(),
     ["XVerseBench_single.json prompt 2: ", "object/2_cup.jpg: no such picture file"]),
    (lambda data: (data / "assets/XVerseBench/object/2_cup.jpg").write_bytes(b"x"),
     ["prompt 2: ", "cannot be read as a picture"]),
    (lambda data: (data / "XVerseBench_multi_DSG.json").unlink(),
     ["XVerseBench_multi_DSG.json: no such file; --data names the folder with"]),
    (lambda data: (data / "XVerseBench_multi.json").write_text("{}"),
     ["XVerseBench_multi.json: expected a JSON list"]),
    (edit_list("single", lambda rows: rows[1].update(prompt=7)),
     ["XVerseBench_single.json prompt 1: 'prompt' should be a text, found 7"]),
    (edit_list("multi", lambda rows: rows[0].update(modulation=[])),
     ["XVerseBench_multi.json prompt 0: 'modulation' should hold one object"]),
    (edit_list("multi", lambda rows: rows[0]["modulation"][0]["src_inputs"][0].pop("image_path")),
     ["prompt 0: each of 'src_inputs' needs an 'image_path'"]),
    (edit_list("multi", lambda rows: rows[2]["modulation"][0]["src_inputs"][0].update(
        image_path="../../x.jpg")), ["prompt 2: '../../x.jpg' leads out of"]),
    (edit_list("single_DSG", lambda rows: rows.pop()), ["has questions for 2 prompts, its list"]),
    (edit_list("single_DSG", lambda rows: rows[1].update(prompt="x")), ["prompt 1: is for 'x'"]),
    (edit_list("single_DSG", lambda rows: rows[1].update(qid2question={})), ["'qid2question'"]),
    (edit_list("single_DSG", lambda rows: rows[1].update(qid2dependency={"1": ["0"]})),
     ["'qid2dependency' should hold lists of numbers"])])
def test_broken_lists_are_one_line_before_a_model_is_read(tmp_path, monkeypatch, capsys, damage,
                                                          words):
    data = xverse(tmp_path / "data")
    damage(data)
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    code, out, err = run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert all(text in err for text in words), err


@pytest.mark.parametrize("arguments, words", [
    ([], "give either --bench tiny or --data SOURCE, or --bench xverse"),
    (["--data", "a", "b"], "--data a b: name one; only --bench spatial takes more"),
    (["--data", "gone"], "gone/XVerseBench_single.json: no such file"),
    (["--data", "gone", "--number", 3], "--number: not together with --bench xverse"),
    (["--data", "gone", "--tasks", "add"], "--tasks: not together with --bench xverse"),
    (["--data", "gone", "--scores", "x"], "--scores x: no such file or folder"),
    (["--data", "gone", "--scores", ROOT / "tiny"], "gone/XVerseBench_single.json: no such file"),
    (["--data", "gone", "--native", 2], "--native 2: must be 0 or 1"),
    (["--data", "gone", "--limit", 0], "--limit"), (["--data", "gone", "--size", "9"], "--size")])
def test_what_does_not_go_together_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    code, _, err = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "out")
    assert code == 2 and words in err and len(err.splitlines()) == 1, err


def test_options_of_a_benchmark_alone(tmp_path, monkeypatch, capsys):
    for option, value in (("--limit", 2), ("--native", 0)):
        code, _, err = run_command(monkeypatch, capsys, "evaluate.py", evaluate.main, "--data",
                                   ROOT / "tiny/examples/own", option, value, "--out",
                                   tmp_path / "o")
        assert code == 2 and f"{option}: not together with --data" in err


@pytest.mark.parametrize("block, words", [
    (lambda out: (out / "XVerseBench_multi").write_text("x"), "XVerseBench_multi is a file, not a"),
    (lambda out: (out / "table.md").mkdir(), "table.md in it is a folder, where a file is to go"),
    (lambda out: (out / "scoring.md").mkdir(), "scoring.md in it is a folder"),
    (lambda out: out.rmdir() or out.write_text("x"), "is a file, not a folder, or may not be")])
def test_an_out_that_cannot_be_written_is_told_before_a_model_is_read(tmp_path, monkeypatch, capsys,
                                                                      block, words):
    data, out = xverse(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    block(out)
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 2 and words in err and "--out" in err and len(err.splitlines()) == 1, err


def test_a_folder_that_is_read_only_is_told_before_a_model_is_read(tmp_path, monkeypatch, capsys):
    data, folder = xverse(tmp_path / "data"), tmp_path / "out/XVerseBench_single"
    folder.mkdir(parents=True)
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and f"--out: {folder} is a file, not a folder, or may not be written to" in err


def test_pictures_of_no_prompt_are_told(monkeypatch, capsys, made):
    """Of prompts that --limit leaves out there may be some: they are not strangers."""
    data, out = made
    common = ["--data", data, "--out", out, "--limit", 1]
    assert run(monkeypatch, capsys, *common)[2] == ""
    stray = out / "XVerseBench_multi/7_another.png"
    drawn(1).save(stray)
    code, _, err = run(monkeypatch, capsys, *common)
    assert code == 0 and err == ("note: beside the benchmark's own: 1 picture of no prompt, the "
                                 f"first {stray}; take such away before a scorer looks there")


@pytest.mark.parametrize("there", ['{"data": "other"}', '[{"task": "add"}]', "[", '"xverse"',
                                   '{"bench": "omnicontext", "answers": ["gone"]}'])
def test_other_scores_are_not_written_over(monkeypatch, capsys, made, there):
    """Of other benchmarks, of the tiny world, which has a list, or not from here at all."""
    data, out = made
    (out / "scores.json").write_text(there)
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 2 and "holds scores.json already; name another --out, or add --over" in err
    assert run(monkeypatch, capsys, "--data", data, "--out", out, "--overwrite")[0] == 0


def test_lists_may_lie_where_xverse_has_them(tmp_path, monkeypatch, capsys, boxes):
    data = xverse(tmp_path / "data")
    (data / "eval/tools").mkdir(parents=True)
    for file in data.glob("*.json"):
        file.rename(data / "eval/tools" / file.name)
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "out")
    assert code == 0 and all(file.exists() for file in grids(tmp_path / "out")), err


def test_all_are_counted_now_and_then_by_the_first_process(monkeypatch):
    looks = []

    class Out:
        def exists(self) -> bool:
            looks.append(self)
            return True
    todo = [benchmarks.Prompt("", str(i), "", Out(), range(1), None) for i in range(200)]
    monkeypatch.setattr(benchmarks, "make_one", lambda *_: None)
    benchmarks.make(todo, (0, 1), None, None)
    assert len(looks) <= 5 * len(todo)                   # 40,000 after each
    monkeypatch.setattr(benchmarks, "COUNTED", 0)
    looks.clear()
    benchmarks.make(todo, (1, 2), None, None)
    assert not looks
    benchmarks.make(todo, (0, 2), None, None)
    assert len(looks) == 100 * 200


def test_words_for_time_and_tables():
    assert [duration(s) for s in (4.26, 119, 120, 3599, 3600, 86400, 200_000)] == [
        "4.3 s", "119.0 s", "2 min", "60 min", "1.0 h", "24.0 h", "2.3 days"]
    assert markdown(["a", "bb"], [["1", "2"], ["333", "4"]]) == (
        "| a   | bb |\n| --- | -- |\n| 1   | 2  |\n| 333 | 4  |")
