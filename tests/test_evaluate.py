"""evaluate.py: the score of the tiny world, and scores of pairs of one's own."""
import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import evaluate
from data import Folder, Sample
from helpers import ROOT, SETS, run_command
from sample import Pipeline, edit
from support import pairs, scores
from tiny import world
from tiny.world import BASE_TASKS, BIG, FIGURES, NEW_TASKS, SHAPES, SMALL, Scene, Thing

ALL = BASE_TASKS + NEW_TASKS


def scenes() -> list[Scene]:
    """Every shape, small and big, alone and in company, and every figure."""
    found = [Scene("white", (Thing(s, c, 4, r),))
             for s in SHAPES for c in ("yellow", "black") for r in (SMALL, BIG)]
    found += [Scene("yellow", (Thing(s, "orange", 0), Thing("star", "white", 8))) for s in SHAPES]
    return found + [Scene("green", (Thing(f, "red", 4, SMALL, pose),))
                    for f in FIGURES for pose in (0, 9, 17)]


def as_sample(scene: Scene, given: list[np.ndarray]) -> Sample:
    return Sample("", world.draw(scene), given, [], "", scene)


@pytest.mark.parametrize("scene", scenes(),
                         ids=lambda s: f"{s.background} {[str(t) for t in s.things]}")
def test_the_score_takes_the_truth_and_nothing_else(scene, monkeypatch):
    monkeypatch.setattr(world, "draw", cache(world.draw))                  # asked for each picture
    sample = as_sample(scene, [])
    assert evaluate.success(sample.target, sample)
    wrong = [world.draw(other) for other in world.neighbours(scene)]
    wrong = [picture for picture in wrong if not np.array_equal(picture, sample.target)]
    assert len(wrong) >= 30
    assert not any(evaluate.success(picture, sample) for picture in wrong)


def test_neighbours_change_every_attribute():
    scene = Scene("white", (Thing("cross", "yellow", 4),))
    found = {world.draw(other).tobytes() for other in world.neighbours(scene)}
    thing = scene.things[0]
    for other in (Scene("white", (replace(thing, colour="red"),)),
                  Scene("white", (replace(thing, shape="star"),)),
                  Scene("white", (replace(thing, cell=0),)), Scene("white", ()),
                  Scene("red", (thing,)), Scene("white", (thing, Thing("star", "yellow", 8)))):
        assert world.draw(other).tobytes() in found


@pytest.mark.parametrize("task", ALL)
def test_truth_scores_all_and_copies_score_nothing(task):
    samples = world.tiny_test(task, 6)
    score = evaluate.measure(task, [s.target for s in samples], samples)
    assert score.success == 1 and score.psnr == 60
    assert score.copy_success == (None if task == "t2i" else 0)


def test_the_score_forgives_what_the_eye_forgives():
    sample = world.tiny_test("add", 1)[0]
    noisy = np.clip(sample.target + np.random.default_rng(0).normal(0, 12, sample.target.shape),
                    0, 255).astype(np.uint8)
    assert evaluate.success(noisy, sample)
    far = np.clip(sample.target + np.random.default_rng(0).normal(0, 60, sample.target.shape),
                  0, 255).astype(np.uint8)
    assert not evaluate.success(far, sample)             # mean squared error above the threshold


def test_sample_number_i_starts_from_its_own_seed(trained):
    """In a batch as alone, but for rounding."""
    samples = world.tiny_test("add", 2)
    both = evaluate.make_pictures(trained, samples, 2, 2.5, 5)
    for i, s in enumerate(samples):
        alone, other = (evaluate.make_pictures(trained, [s], 2, 2.5, seed)[0]
                        for seed in (5 + i, 6 - i))
        assert scores.psnr(both[i], alone) > 55 > scores.psnr(both[i], other)


OTHER = "fill the box with a red star"


def test_pictures_may_be_routed_by_another_text(trained):
    """As sample.edit() does it, each of a batch; by its own instruction as without."""
    samples = world.tiny_test("add", 2)
    crossed = evaluate.make_pictures(trained, samples, 2, 2.5, route_by=OTHER)
    for i, s in enumerate(samples):
        wanted = edit(trained, s.instruction, Image.fromarray(s.images[0]), seed=i, steps=2,
                      route_by=OTHER)
        assert scores.psnr(crossed[i], np.asarray(wanted)) > 55
    [same], [plain], [other] = (evaluate.make_pictures(trained, samples[:1], 2, 2.5, route_by=text)
                                for text in (samples[0].instruction, None, OTHER))
    assert np.array_equal(same, plain) and not np.array_equal(other, plain)


def test_scores_may_be_of_another_routing(tmp_path, monkeypatch, capsys, trained):
    """So say scores.json and the table; an adapter without a routing has no other."""
    monkeypatch.setattr(evaluate, "load_pipeline", lambda **_: trained)
    asked = []
    monkeypatch.setattr(evaluate, "make_pictures", lambda _, samples, *rest, route_by: (
        asked.append(route_by), [s.target for s in samples])[1])
    for arguments in (["--data", OWN], ["--bench", "tiny", "--tasks", "add", "--number", 2]):
        code, _, err = run(monkeypatch, capsys, *arguments, "--route-by", OTHER,
                           "--out", tmp_path / arguments[0])
        assert code == 0, err
        table = (tmp_path / arguments[0] / "table.md").read_text()
        assert table.endswith(f"|\n\nRouted by: {OTHER}\n")
    assert asked == 5 * [OTHER]
    assert json.loads((tmp_path / "--data/scores.json").read_text())["route_by"] == OTHER
    of_tiny = json.loads((tmp_path / "--bench/scores.json").read_text())
    assert of_tiny["route_by"] == OTHER and of_tiny["steps"] == 12
    assert [score["task"] for score in of_tiny["scores"]] == ["add"]
    monkeypatch.setattr(trained, "adapter", None)
    code, _, err = run(monkeypatch, capsys, "--data", OWN, "--route-by", "a", "--out",
                       tmp_path / "s")
    assert code == 2 and err.startswith("error: --route-by 'a': no layer here is routed by")


# ------------------------------------------------------------------------------- pairs of one's own

OWN = ROOT / "tiny/examples/own"


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """The command -> exit code, stdout, stderr but for the progress bar."""
    code, out, err = run_command(monkeypatch, capsys, "evaluate.py", evaluate.main, *arguments)
    return code, out, "\n".join(line for line in err.splitlines() if "it/s]" not in line).strip()


def told_truth(monkeypatch, bare: Pipeline, shift: int = 0) -> list[tuple[int, int, float]]:
    """Have each row answered by the target of a row so many after it -> seeds, steps, guidance."""
    asked, targets = [], [s.target for s in Folder(OWN, (64, 64)).all()]

    def make(_: object, samples: list, steps: int, guidance: float, first: int,
             route_by: str | None) -> list:
        asked.append((first, steps, guidance))
        assert np.array_equal(samples[0].target, targets[first])
        return [targets[(first + shift) % len(targets)]]
    monkeypatch.setattr(evaluate, "make_pictures", make)
    monkeypatch.setattr(evaluate, "load_pipeline", lambda **_: bare)
    return asked


def test_a_row_s_picture_is_what_its_place_as_seed_makes(tmp_path, monkeypatch, capsys, trained):
    """The whole way, with the embedded model; numbers, table and sheet are of these pictures."""
    code, out, err = run(monkeypatch, capsys, "--data", OWN, "--steps", 2, "--number", 3,
                         "--guidance", 2, "--out", tmp_path / "s")
    assert code == 0, err
    assert out.splitlines()[:3] == [f"{OWN}: 4 samples; scored: the first 3",
                                    "  rows with 1 reference (4)", "  targets of 64x64 (4)"]
    found = json.loads((tmp_path / "s/scores.json").read_text())
    assert found["data"] == str(OWN) and found["steps"] == 2 and found["guidance"] == 2
    assert found["adapters"] == [f"{ROOT}/tiny/adapter.safetensors:1"]
    rows = list(Folder(OWN, (64, 64)).all())[:3]
    for place, (s, row) in enumerate(zip(rows, found["rows"], strict=True)):
        picture = evaluate.make_pictures(trained, [s], 2, 2, place)[0]
        assert row["place"] == place and row["instruction"] == s.instruction
        assert row["where"].endswith(f"metadata.jsonl line {place + 1}") and row["size"] == [64, 64]
        assert row["model"]["psnr"] == pytest.approx(scores.psnr(picture, s.target), abs=0.5)
        assert row["model"]["ssim"] == pytest.approx(scores.ssim(picture, s.target), abs=0.02)
        assert row["copy"] == pairs.scores(s.images[0], s.target)
        assert row["model"]["ms_ssim"] is None
    mean = np.mean([row["model"]["psnr"] for row in found["rows"]])
    assert found["means"]["model"]["psnr"] == pytest.approx(mean)
    text = (tmp_path / "s/table.md").read_text()
    assert f"| mean of all | 3        | {mean:.1f} dB |" in text and text in out
    assert err == ("note: MS-SSIM needs 176 pixels on the shorter side; 3 of 3 pictures have "
                   "fewer, and no MS-SSIM")
    with Image.open(tmp_path / "s/sheet.png") as sheet:
        assert sheet.size == (3 * 68 + 4, 3 * (64 + 28))


@pytest.mark.parametrize("shift", [0, 1])
def test_the_truth_scores_best_and_another_row_s_does_not(tmp_path, monkeypatch, capsys, bare,
                                                          shift):
    asked = told_truth(monkeypatch, bare, shift)
    assert run(monkeypatch, capsys, "--data", OWN, "--out", tmp_path)[0] == 0
    assert asked == [(place, 28, 2.5) for place in range(4)]             # steps as sample.py's
    for row in json.loads((tmp_path / "scores.json").read_text())["rows"]:
        if shift:
            assert row["model"]["psnr"] < 30 and row["model"]["ssim"] < 0.95
        else:
            assert row["model"]["psnr"] == 60 and row["model"]["ssim"] == 1


def test_what_is_cut_and_what_gives_no_picture_is_said(tmp_path, monkeypatch, capsys, bare):
    shutil.copytree(OWN, tmp_path / "own")
    file = tmp_path / "own/metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["instruction"] = "make the red circle on the left blue " * 9
    rows[1] |= {"images": [], "task": "made|new"}
    rows[2]["note"] = "n"
    file.write_text("\n".join(map(json.dumps, rows)))
    told_truth(monkeypatch, bare)
    monkeypatch.setattr(evaluate, "make_pictures",
                        lambda _, samples, *rest, route_by: [samples[0].target])
    code, out, err = run(monkeypatch, capsys, "--data", tmp_path / "own", "--out", tmp_path / "s")
    assert code == 0 and "left unread, entries without a known name: note (1)" in out
    assert "note: the model reads 28 tokens, and not the end of 1 text; the first: make" in err
    assert "note: 1 of 4 rows give no picture that could be copied" in err
    found = json.loads((tmp_path / "s/scores.json").read_text())
    assert sum(row["copy"] is None for row in found["rows"]) == 1
    table = (tmp_path / "s/table.md").read_text().splitlines()           # a line for each task
    assert [line.split("|")[1].strip() for line in table[2:]] == ["–", "made/new", "mean of all"]
    assert [cell.strip() for cell in table[3].split("|")[3:-1]] == [
        "60.0 dB", "–", "1.000", "–", "–", "–"]


def test_public_sets_and_bad_rows(tmp_path, monkeypatch, capsys, bare):
    """As train.py takes them; with --skip-bad the bad rows are listed at the end."""
    told_truth(monkeypatch, bare)
    monkeypatch.setattr(evaluate, "make_pictures",
                        lambda _, samples, *rest, route_by: [samples[0].target])
    rows = SETS["omniedit"]() * 6
    rows[1] = rows[1] | {"src_img": {"bytes": b"no picture", "path": None}}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = ("--data", f"omniedit={tmp_path}/a.parquet")
    code, _, err = run(monkeypatch, capsys, *source, "--out", tmp_path / "s")
    assert code == 2 and "row 1" in err and not (tmp_path / "s").exists()
    code, out, err = run(monkeypatch, capsys, *source, "--out", tmp_path / "s", "--skip-bad")
    assert code == 0 and "bad lines of the data, skipped: 1" in err
    found = json.loads((tmp_path / "s/scores.json").read_text())
    assert len(found["rows"]) == 23                      # of 36; 12 have no instruction
    parquet.write_table(pyarrow.Table.from_pylist(SETS["subjectspatial"]()), tmp_path / "b.parquet")
    code, out, _ = run(monkeypatch, capsys, "--data", f"subjectspatial={tmp_path}/b.parquet",
                       "--number", 4, "--out", tmp_path / "b")               # 1, 2 or 3 conditions
    assert code == 0 and "b.parquet: 9 samples; scored: the first 4\n  read from b.parquet; " in out
    assert len(json.loads((tmp_path / "b/scores.json").read_text())["rows"]) == 4
    none = [row | {"edited_prompt_list": []} for row in rows]                # no instruction
    parquet.write_table(pyarrow.Table.from_pylist(none), tmp_path / "a.parquet")
    code, _, err = run(monkeypatch, capsys, *source, "--out", tmp_path / "n")
    assert code == 2 and "no row that can be used" in err and not (tmp_path / "n").exists()


@pytest.mark.parametrize("what", [
    ["--data", OWN], ["--bench", "tiny", "--tasks", "t2i", "--number", 1, "--steps", 1]],
    ids=["data", "bench"])
def test_scores_are_not_written_over_unasked(tmp_path, monkeypatch, capsys, bare, what):
    """They join a run's files; one of theirs that is there is refused, before a model is read."""
    (tmp_path / "adapter.safetensors").write_bytes(b"precious")
    told_truth(monkeypatch, bare)
    if what[0] == "--bench":
        monkeypatch.undo()
    assert run(monkeypatch, capsys, *what, "--out", tmp_path)[0] == 0
    files = {"scores.json", "table.md", "sheet.png"}
    assert {file.name for file in tmp_path.iterdir()} == files | {"adapter.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_pipeline", None)       # is not asked
        for name in sorted(files):
            for file in files - {name}:
                (tmp_path / file).unlink(missing_ok=True)
            (tmp_path / name).write_bytes(b"kept")
            code, out, err = run(patch, capsys, *what, "--out", tmp_path)
            assert code == 2 and not out and len(err.splitlines()) == 1
            assert f"holds {name} already; name another --out, or add --overwrite" in err
            assert (tmp_path / name).read_bytes() == b"kept"
    assert run(monkeypatch, capsys, *what, "--out", tmp_path, "--overwrite")[0] == 0
    assert all((tmp_path / name).read_bytes() != b"kept" for name in files)
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("arguments, words", [
    ([], "give either --bench tiny or --data SOURCE"),
    (["--bench", "tiny", "--data", OWN], "give either --bench tiny or --data SOURCE"),
    (["--data", ""], "--data is empty"), (["--bench", "gone"], "--bench"),
    (["--data", "gone"], "--data gone: not found"),
    (["--data", f"{OWN}:2"], f"--data {OWN}:2: not found"),              # one source, no weight
    (["--data", "cooc=gone"], "--data cooc=gone: no public set 'cooc'"),
    (["--data", "coco=gone"], "gone: not found"), (["--data", "tiny"], "--bench tiny"),
    (["--data", OWN, "--tasks", "t2i"], "--tasks: not together with --data"),
    (["--bench", "tiny", "--tasks", "gone"], "--tasks"),
    (["--bench", "tiny", "--route-by", " "], "--route-by is empty"),
    (["--bench", "xverse", "--data", OWN, "--route-by", "a"], "--route-by: not together with"),
    (["--bench", "tiny", "--skip-bad"], "--skip-bad: not together with --bench"),
    (["--bench", "tiny", "--data-root", "."], "--data-root: not together with --bench"),
    (["--data", OWN, "--data-root", "gone"], "--data-root"),
    (["--data", OWN, "--number", "0"], "--number"), (["--data", OWN, "--steps", "0"], "--steps"),
    (["--data", OWN, "--guidance", "-1"], "--guidance"),
    (["--data", OWN, "--out", __file__], "--out"),
    (["--data", OWN, "--out", f"{__file__}/below"], "--out"),
    (["--data", OWN, "--data", OWN], "--data: given twice")])
def test_what_a_user_gets_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(evaluate, "load_pipeline", None)     # is not asked
    out = [] if "--out" in arguments else ["--out", tmp_path / "s"]
    code, _, err = run(monkeypatch, capsys, *arguments, *out)
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", [["--bench", "tiny"], ["--data", OWN]])
def test_several_processes_are_for_the_benchmarks_alone(tmp_path, monkeypatch, capsys, what):
    """Each would score all, and write over the others' files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(monkeypatch, capsys, *what, "--out", tmp_path / "s")
    assert code == 2 and "torchrun: only the paper's benchmarks are shared" in err
