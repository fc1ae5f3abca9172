"""evaluate.py --bench spatial: maps, layout, scores of what is there, what is broken."""
import json
import math
import shlex
from pathlib import Path

import cv2
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import evaluate
from bench_files import content, drawn, spatial
from support import spatial as room
from support.pictures import load_image
from test_xversebench import run as run_xverse, saying, table_of

STEM = "{:03d}_a car red"


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("test_xversebench.BENCH", "spatial")
    return run_xverse(monkeypatch, capsys, *arguments)


@pytest.fixture
def data(tmp_path) -> list[str]:
    return [f"{kind}={path}" for kind, path in spatial(tmp_path / "sets").items()]


@pytest.fixture
def truth_of(monkeypatch, trained):
    """In a model's place: the truth of the row so many after, of which there are three."""
    def use(shift: int = 0) -> list:
        seen = []

        def make(pipe, prompt, given, args, callback):
            seen.append((prompt, given, args))
            number = (int(prompt.name[:3]) + shift) % 3
            picture = drawn(number, (256, 208)).resize(given.size, Image.Resampling.LANCZOS)
            return [saying(picture, pipe, prompt, args)]
        monkeypatch.setattr(evaluate, "load_pipeline", lambda **_: trained)
        monkeypatch.setattr(evaluate, "benchmark_pictures", make)
        return seen
    return use


def maps_of(out: Path, which: str, shift: int = 0) -> None:
    """What a depth estimator and OpenPose would leave: greys, and a person where the row says."""
    for i in range(3):
        file = out / f"{which}_depth_cond" / f"{STEM.format(i)}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("L", (64, 48), 10 * ((i + shift) % 3)).save(file)
        rng = np.random.default_rng((i + shift) % 3)
        points = np.concatenate([rng.uniform(0, 50, (18, 2)), np.ones((18, 1))], 1)
        file = out / f"{which}_pose_keypoints" / f"{STEM.format(i)}_keypoints.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"version": 1.3, "people": [
            {"pose_keypoints_2d": points.ravel().tolist()}]}))


def test_a_map_is_one_clean_condition_of_its_size(tmp_path, monkeypatch, capsys, data, truth_of):
    seen, out = truth_of(), tmp_path / "out"
    monkeypatch.setattr(evaluate.options, "only_size", lambda args: None)
    code, told, err = run(monkeypatch, capsys, "--data", *data, "--out", out)
    assert code == 0 and "--bench spatial: 9 prompts; 0 made before, 9 to make" in told, err
    texts = {prompt.part: prompt.text for prompt, *_ in seen}
    assert texts == {"canny": "a car, red, along the edges", "depth": "a car, red, in the depth of "
                     "the map", "pose": "a car, red, in the pose of the skeleton"}
    for prompt, given, args in seen:
        assert args.native == 0 and len(given.references) == 1 and len(prompt.seeds) == 1
        assert given.size == given.references[0].size == given.truth.size == (256, 208)
        number = int(prompt.name[:3])
        assert prompt.seeds[0] == number and prompt.name == f"{STEM.format(number)}.png"
        if prompt.part == "canny":                       # of the grey picture, as the paper has it
            grey = cv2.cvtColor(np.asarray(drawn(number, (256, 208))), cv2.COLOR_RGB2GRAY)
            wanted = np.repeat(cv2.Canny(grey, 100, 200)[..., None], 3, 2)
        else:
            wanted = np.asarray(drawn(50 + number, (256, 208)))
        assert np.array_equal(np.asarray(given.references[0]), wanted)
        assert np.array_equal(np.asarray(load_image(out / f"gt_{prompt.part}" / prompt.name)),
                              np.asarray(drawn(number, (256, 208))))
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == sorted(f"{which}_{kind}" for which in ("eval", "gt") for kind in room.SETS)
    assert all(len(list((out / folder).glob("*.png"))) == 3 for folder in folders)


def test_a_small_model_s_size_and_a_long_side_of_512(tmp_path, monkeypatch, capsys, truth_of):
    seen = truth_of()
    large = tmp_path / "large"
    large.mkdir()
    rows = [{"image": content(drawn(0, (1000, 600))), "text": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), large / "validation-0.parquet")
    assert run(monkeypatch, capsys, "--data", f"canny={large}", "--out", tmp_path / "a")[0] == 0
    monkeypatch.setattr(evaluate.options, "only_size", lambda args: None)
    assert run(monkeypatch, capsys, "--data", f"canny={large}", "--out", tmp_path / "b")[0] == 0
    assert [given.size for _, given, _ in seen] == [(64, 64), (512, 304)]


def test_the_truth_scores_best_and_another_s_does_not(tmp_path, monkeypatch, capsys, data,
                                                      truth_of):
    """Each score: of edges, of depth, of poses."""
    found = {}
    for shift in (0, 1):
        truth_of(shift)
        out = tmp_path / str(shift)
        common = ["--data", *data, "--out", out, "--size", "256x208"]
        code, told, err = run(monkeypatch, capsys, *common)
        assert code == 0 and "\nA table with holes: not scored: depth, and pose.\n" in told, err
        maps_of(out, "eval", shift)
        maps_of(out, "gt")
        code, told, err = run(monkeypatch, capsys, *common)      # makes nothing again
        assert code == 0 and "9 made before, 0 to make" in told, err
        found[shift] = {name: cells[0] for name, cells in table_of(out).items()}
    best = {"canny: f1": "1.0000", "canny: psnr": "100.00", "canny: ms_ssim": "1.0000",
            "depth: rmse": "0.00"}
    best |= {f"pose: {name} at {threshold}": "1.0000" for threshold in (0.5, 0.25, 0.1)
             for name in ("f1", "precision", "recall", "oks")}
    assert found[0].pop("pose: people without an area, left out") == "0"
    assert found[0].pop("canny: pictures too small for MS-SSIM") == "0"
    assert {name: value for name, value in found[0].items() if name != "score"} == best
    for name, value in best.items():
        other = found[1][name]
        assert other == "–" or float(other) != float(value), name        # –: nobody matches
    assert found[1]["depth: rmse"] == f"{(10 + 10 + 20) / 3:.2f}"
    assert float(found[1]["canny: f1"]) < 0.6 and found[1]["pose: f1 at 0.5"] == "0.0000"


def test_what_is_too_small_has_no_ms_ssim_and_is_said_once(tmp_path, monkeypatch, capsys, data,
                                                           truth_of):
    truth_of()
    code, told, _ = run(monkeypatch, capsys, "--data", data[0], "--out", tmp_path / "out")
    assert code == 0 and "not scored: canny ms_ssim, and depth (no set given), and pose" in told
    assert table_of(tmp_path / "out")["canny: ms_ssim"] == ["–"]
    assert table_of(tmp_path / "out")["canny: pictures too small for MS-SSIM"] == ["3"]
    assert "MS-SSIM of those with at least 176 pixels on the shorter side" in told


def test_pictures_of_another_tool_stay_and_their_truths_are_drawn(tmp_path, monkeypatch, capsys,
                                                                  data, truth_of):
    seen, folder = truth_of(), tmp_path / "out/eval_canny"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 48), "red").save(folder / f"{STEM.format(i)}.png")
    before = [file.read_bytes() for file in sorted(folder.iterdir())]
    code, _, err = run(monkeypatch, capsys, "--data", data[0], "--out", tmp_path / "out",
                       "--size", "64x48")
    assert code == 0 and "taken as they are" in err and not seen, err
    assert [file.read_bytes() for file in sorted(folder.iterdir())] == before
    assert len(list((tmp_path / "out/gt_canny").iterdir())) == 3
    Image.new("RGB", (64, 64)).save(folder / f"{STEM.format(1)}.png")
    code, _, err = run(monkeypatch, capsys, "--data", data[0], "--out", tmp_path / "out",
                       "--size", "64x48")
    assert code == 2 and f"{STEM.format(1)}.png: is 64x64, the truth's 64x48" in err, err


def test_an_empty_caption_is_named_by_its_column(tmp_path, monkeypatch, capsys, truth_of):
    truth_of()
    rows = [{"image": content(drawn(0, (64, 48))), "text": ""}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "validation-0.parquet")
    code, _, err = run(monkeypatch, capsys, "--data", f"canny={tmp_path}", "--out", tmp_path / "o")
    assert code == 2 and "row 0: 'text' holds no text" in err


def test_people_without_an_area_are_left_out_and_counted(tmp_path, monkeypatch, capsys, data,
                                                         truth_of):
    truth_of()
    out = tmp_path / "out"
    assert run(monkeypatch, capsys, "--data", data[2], "--out", out)[0] == 0
    for which in ("eval", "gt"):
        maps_of(out, which)
        for i in range(2):                               # of the first two the nose alone is seen
            points = [20.0, 30.0, 1.0] + [0.0] * 51
            (out / f"{which}_pose_keypoints" / f"{STEM.format(i)}_keypoints.json").write_text(
                json.dumps({"people": [{"pose_keypoints_2d": points}]}))
    code, told, err = run(monkeypatch, capsys, "--data", data[2], "--out", out)
    found = table_of(out)
    assert code == 0 and found["pose: f1 at 0.5"][0] == "1.0000", err
    assert found["pose: people without an area, left out"][0] == "2"
    assert "For COCO's annotated area stands that of the box around a person's keypoints" in told


def test_files_of_a_desktop_are_no_maps(tmp_path, monkeypatch, capsys, data, truth_of):
    truth_of()
    common = ["--data", *data, "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *common)[0] == 0
    for which in ("eval", "gt"):
        maps_of(tmp_path / "out", which)
        for name in ("depth_cond/Thumbs.db", "pose_keypoints/desktop.ini", "depth_cond/.DS_Store"):
            (tmp_path / f"out/{which}_{name}").touch()
    code, _, err = run(monkeypatch, capsys, *common)
    assert code == 0, err


def test_commands_are_for_a_shell(tmp_path, monkeypatch, capsys, truth_of):
    truth_of()
    sets, out = spatial(tmp_path / "the sets"), tmp_path / "my out"
    common = ["--data", f"pose={sets['pose']}", "--size", "64x64", "--out", str(out)]
    assert run(monkeypatch, capsys, *common)[0] == 0
    scoring = (out / "scoring.md").read_text().replace("\\\n", " ")
    assert shlex.split(scoring.splitlines()[-1]) == ["python", "evaluate.py", "--bench", "spatial",
                                                     *common]
    openpose = [shlex.split(line) for line in scoring.splitlines() if "openpose.bin" in line]
    assert [line[-3:] for line in openpose] == [
        [str(out / f"{which}_pose"), "--write_json", str(out / f"{which}_pose_keypoints")]
        for which in ("eval", "gt")]


def test_a_set_without_rows_is_one_line(tmp_path, monkeypatch, capsys, truth_of):
    truth_of()
    file = spatial(tmp_path)["canny"] / "validation-00000-of-00001.parquet"
    parquet.write_table(parquet.read_table(file).slice(0, 0), file)
    code, _, err = run(monkeypatch, capsys, "--data", f"canny={file}", "--out", tmp_path / "out")
    assert code == 2 and f"{file}: holds no row; name the files of MultiGen-20M_canny_eval" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda out: (out / f"eval_depth_cond/{STEM.format(1)}.png").unlink(),
     "eval_depth_cond: has no 001_a car red.png; make the maps of all pictures"),
    (lambda out: (out / "gt_depth_cond/more.png").touch(), "gt_depth_cond: has a surplus more.png"),
    (lambda out: Image.new("L", (9, 9)).save(out / f"eval_depth_cond/{STEM.format(2)}.png"),
     "002_a car red.png: is 9x9, the truth's 64x48; make both by one tool"),
    (lambda out: (out / f"gt_pose_keypoints/{STEM.format(0)}_keypoints.json").write_text("{}"),
     "000_a car red_keypoints.json: 'people' should hold 'pose_keypoints_2d' of 18 points"),
    (lambda out: (out / f"eval_pose_keypoints/{STEM.format(0)}_keypoints.json").write_text(
        json.dumps({"people": [{"pose_keypoints_2d": [0.5] * 75}]})), "--model_pose COCO"),
    (lambda out: (out / f"eval_pose_keypoints/{STEM.format(0)}_keypoints.json").write_text(
        json.dumps({"people": [{"pose_keypoints_2d": [math.nan] * 54}]})), "of 18 points")])
def test_wrong_maps_are_one_line(tmp_path, monkeypatch, capsys, data, truth_of, damage, words):
    truth_of()
    common = ["--data", *data, "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *common)[0] == 0
    maps_of(tmp_path / "out", "eval")
    maps_of(tmp_path / "out", "gt")
    damage(tmp_path / "out")
    code, _, err = run(monkeypatch, capsys, *common)
    assert code == 2 and words in err and len(err.splitlines()) == 1, err


def test_a_truth_that_is_gone_is_made_again(tmp_path, monkeypatch, capsys, data, truth_of):
    truth_of()
    common = ["--data", data[0], "--out", tmp_path / "out"]
    assert run(monkeypatch, capsys, *common)[0] == 0
    (tmp_path / f"out/gt_canny/{STEM.format(1)}.png").unlink()
    code, told, err = run(monkeypatch, capsys, *common)
    assert code == 0 and "2 made before, 1 to make" in told, err


def test_the_first_rows_alone_are_taken(tmp_path, monkeypatch, capsys, truth_of):
    monkeypatch.setattr(room, "MOST", 3)
    truth_of()
    sets = spatial(tmp_path / "sets", number=5)          # in groups of two
    code, told, err = run(monkeypatch, capsys, "--data", f"depth={sets['depth']}", "--out",
                          tmp_path / "out")
    assert code == 0 and "--bench spatial: 3 prompts;" in told, err


@pytest.mark.parametrize("arguments, words", [
    (["--data", "x"], "--data x: with --bench spatial write canny=PATH depth=PATH pose=PATH"),
    (["--data", "edges=x"], "--data edges=x: with --bench spatial write"),
    (["--data", "canny=x", "canny=y"], "--data canny=y: canny is given twice"),
    (["--data", "canny=gone"], "gone: no such file or folder"),
    (["--data", "canny=gone", "--scores", __file__], "--scores: --bench spatial reads maps of")])
def test_what_a_user_gets_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    code, _, err = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "out")
    assert code == 2 and words in err and len(err.splitlines()) == 1, err
