"""evaluate.py --bench omnicontext: layout, sizes, the judge's answers, what is broken."""
import json
import math
import shlex

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import evaluate
from bench_files import omnicontext
from test_xversebench import of_boxes, run as run_xverse, table_of

TASKS = ("single_object", "multi_character")


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("test_xversebench.BENCH", "omnicontext")
    return run_xverse(monkeypatch, capsys, *arguments)


@pytest.fixture
def seen(monkeypatch, trained):
    """Pictures by a drawing in a model's place -> what it was given."""
    found = []

    def make(pipe, prompt, given, args, callback):
        sizes = [image.size for image in given.references]
        found.append((prompt.name, list(prompt.seeds), args.native, sizes, given.size))
        return of_boxes(pipe, prompt, given, args, callback)
    monkeypatch.setattr(evaluate, "load_pipeline", lambda **_: trained)
    monkeypatch.setattr(evaluate, "benchmark_pictures", make)
    return found


@pytest.fixture
def made(tmp_path, monkeypatch, capsys, seen):
    data, out = omnicontext(tmp_path / "data"), tmp_path / "out"
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out)
    assert code == 0, err
    return data, out


def judged(out, points=lambda task, i: (10, 10)) -> list:
    """As the judge's code writes them, a file for each task."""
    files = []
    for task in TASKS:
        files.append(out / "gpt4dot1" / task / "score.jsonl")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text("".join(json.dumps({
            "key": f"{task}_{i}", "task_type": task, "instruction_language": "en",
            "PF_score": points(task, i)[0], "SC_score": points(task, i)[1],
            "PF_score_reason": "r"}) + "\n" for i in range(3)))
    return files


def test_pictures_lie_where_the_judge_looks(made, seen):
    _, out = made
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*/*.png")) == [
        f"fullset/{task}/{task}_{i}.png" for task in sorted(TASKS) for i in range(3)]
    assert seen[0] == ("single_object_0", [0], 1, [(96, 48)], (64, 64))      # the model's own size
    assert seen[4] == ("multi_character_1", [4], 1, [(96, 48), (64, 48)], (64, 64))
    scorers = (out / "scoring.md").read_text()
    assert f"--result_dir {out.parent} \\\n        --model_name {out.name} --openai_key" in scorers


def test_the_size_is_the_preferred_one_nearest_the_first_reference(tmp_path, monkeypatch, capsys,
                                                                   seen):
    monkeypatch.setattr(evaluate.options, "only_size", lambda args: None)
    data = omnicontext(tmp_path / "data")
    assert run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "a", "--limit", 1)[0] == 0
    assert [size for *_, size in seen] == [(1456, 720)] * 2                  # of 96x48
    assert Image.open(tmp_path / "a/fullset/single_object/single_object_0.png").size == (1456, 720)
    assert run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "b", "--limit", 1, "--size",
               "1024x1024", "--native", 0)[0] == 0
    assert [one[2::2] for one in seen[2:]] == [(0, (1024, 1024))] * 2


def test_the_best_answers_score_best_and_tasks_count_alike(monkeypatch, capsys, made):
    data, out = made
    common = ["--data", data, "--out", out]
    code, told, err = run(monkeypatch, capsys, *common, "--scores", *judged(out))
    assert code == 0 and "\nComplete: all 6 prompts, all scores.\n" in told, err
    assert table_of(out)["average"] == ["10.00"] * 3
    judged(out, lambda task, i: (4, 9) if task == TASKS[0] else (8, 2 * i))
    assert run(monkeypatch, capsys, *common)[0] == 0
    found = table_of(out)
    assert found["single_object"] == ["4.00", "9.00", "6.00"]                # sqrt(4 * 9)
    other = (0 + math.sqrt(8 * 2) + math.sqrt(8 * 4)) / 3
    assert found["multi_character"] == ["8.00", "2.00", f"{other:.2f}"]
    assert found["average"] == ["6.00", "5.50", f"{(6 + other) / 2:.2f}"]


def test_other_languages_are_left_out_of_the_means_and_told(monkeypatch, capsys, made):
    data, out = made
    files = judged(out, lambda task, i: (0, 0) if i == 2 else (10, 10))
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[2]["instruction_language"] = "zh"
        file.write_text("\n".join(map(json.dumps, rows)))
    code, told, _ = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", *files)
    assert code == 0 and table_of(out)["average"] == ["10.00"] * 3
    assert "(2 answers are about others)" in told


def test_a_task_without_english_answers_is_a_hole(monkeypatch, capsys, made):
    data, out = made
    files = judged(out)
    files[0].write_text(files[0].read_text().replace('"en"', '"zh"'))
    code, told, _ = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", *files)
    assert code == 0 and table_of(out)["average"] == ["10.00"] * 3
    assert "A table with holes: not scored: single_object (no English answers).\n" in told


def test_answers_may_be_named_by_their_folder(monkeypatch, capsys, made):
    """As scoring.md says; what repeats the others there is not read."""
    data, out = made
    judged(out)[0].with_name("combined_score.jsonl").write_text("{}\n")
    command = shlex.split((out / "scoring.md").read_text().splitlines()[-1])
    assert command[2:] == ["--bench", "omnicontext", "--data", str(data), "--out", str(out),
                           "--scores", str(out)]
    code, told, err = run(monkeypatch, capsys, *command[4:])
    assert code == 0 and "Complete: all 6 prompts" in told, err


@pytest.mark.parametrize("change, words", [
    (lambda rows: rows.pop(), "there is no answer for single_object, single_object_2; have the"),
    (lambda rows: rows.append(rows[0] | {"key": "x"}), "is about 'single_object', 'x', of which"),
    (lambda rows: rows.append(rows[0]), "answers once more for single_object, single_object_0"),
    (lambda rows: rows[0].update(PF_score="9"), "'PF_score' should be a number from 0 to 10"),
    (lambda rows: rows[0].update(SC_score=11), "'SC_score' should be a number from 0 to 10"),
    (lambda rows: rows[0].pop("key"), "is about 'single_object', 'None'")])
def test_wrong_answers_are_one_line(monkeypatch, capsys, made, change, words):
    data, out = made
    files = judged(out)
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    change(rows)
    files[0].write_text("\n".join(map(json.dumps, rows)))
    kept = (out / "table.md").read_bytes()
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", out, "--scores", *files)
    assert code == 2 and words in err and "score.jsonl" in err and len(err.splitlines()) == 1, err
    assert (out / "table.md").read_bytes() == kept


@pytest.mark.parametrize("change, words", [
    ({"key": "a/b"}, "'key' should be a name without a folder, found 'a/b'"),
    ({"key": ""}, "'key' should be a name without a folder, found ''"),
    ({"task_type": "../x"}, "'task_type' should be a name without a folder"),
    ({"instruction": " "}, "needs a non-empty text under 'instruction'"),
    ({"key": "single_object_1"}, "single_object has a row with the key 'single_object_1' already"),
    ({"input_images": []}, "'input_images': holds no picture"),
    ({"input_images": [{"bytes": b"x", "path": None}]}, "cannot be read as a picture")])
def test_broken_rows_are_one_line(tmp_path, monkeypatch, capsys, seen, change, words):
    data = omnicontext(tmp_path / "data")
    file = next(data.rglob("*.parquet"))
    rows = parquet.read_table(file).to_pylist()
    rows[0] |= change
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and words in err and len(err.splitlines()) == 1, err
    assert " row " in err


def test_another_set_is_told(tmp_path, monkeypatch, capsys, seen):
    data = omnicontext(tmp_path / "data")
    file = next(data.rglob("*.parquet"))
    table = parquet.read_table(file)
    parquet.write_table(table.drop(["key"]), file)
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and "has no column 'key', as OmniContext has; is it another set?" in err
    file.rename(file.with_name("other.parquet"))
    code, _, err = run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and "holds no file train-*.parquet, as OmniContext has" in err
    parquet.write_table(table, file.with_name("other.parquet"))
    assert run(monkeypatch, capsys, "--data", file.with_name("other.parquet"), "--out",
               tmp_path / "out")[0] == 0                 # named itself
