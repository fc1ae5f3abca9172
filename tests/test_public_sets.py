"""The public data sets: small parquet files of the published columns, and the drawn conditions."""
import io
import json
import re
import sys
from collections import Counter

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import data
import train
from helpers import cell, coco, musar, omniedit, SETS, write_set
from support import parquet as parquet_sets, public_sets
from support.bad_rows import Bad
from support.conditions import canny, skeletons
from support.pictures import load_image

DRAWS = 400                                              # a chance is then known to 0.1, 4 sigma


def draws(source, number: int = DRAWS) -> list[data.Sample]:
    return [source.draw(np.random.default_rng(i), 1)[0] for i in range(number)]


def share(samples: list[data.Sample], of) -> float:
    return sum(map(of, samples)) / len(samples)


def test_omniedit(tmp_path):
    """The second wording with 0.7 where there are two; rows without wordings are left out."""
    source = public_sets.OmniEdit(write_set(tmp_path, "omniedit"))
    found = draws(source)
    words = Counter(sample.instruction for sample in found)
    assert set(words) == {"one", "two", "alone"} and words["alone"] / DRAWS == pytest.approx(
        0.25, abs=0.09)
    assert words["two"] / (words["one"] + words["two"]) == pytest.approx(0.7, abs=0.11)
    for sample in found[:9]:                             # the picture to edit has the target's size
        assert sample.target.shape == sample.images[0].shape == (32, 64, 3) and not sample.conds
        assert sample.target[0, 0].tolist() == [0, 0, 255] and sample.images[0][0, 0, 0] > 250
    assert len(source.draw(np.random.default_rng(0), 9)) == 4


def test_musar(tmp_path):
    for sample in draws(public_sets.MUSAR(write_set(tmp_path, "musar")), 9):
        assert re.fullmatch(r"both \d", sample.instruction) and not sample.images
        assert [p.shape[:2] for p in (sample.target, *sample.conds)] == [(48, 64), (64, 32),
                                                                         (32, 32)]
        assert [p[0, 0].argmax() for p in (sample.target, *sample.conds)] == [2, 0, 1]


def test_subjectspatial(tmp_path):
    """One to three conditions, each named by its place; a box where the target has the subject."""
    whole = public_sets.SubjectSpatial(write_set(tmp_path, "subjectspatial"))
    assert all(p.shape == (512, 512, 3) for s in draws(whole, 3) for p in (s.target, *s.conds))
    source = public_sets.SubjectSpatial(tmp_path, (128, 128))
    found = draws(source)
    numbers = Counter(len(sample.conds) for sample in found)
    assert all(numbers[n] / DRAWS == pytest.approx(1 / 3, abs=0.1) for n in (1, 2, 3))
    assert share(found, lambda s: "Recreate" in s.instruction) == pytest.approx(0.3, abs=0.1)
    tasks = Counter(task for sample in found for task in sample.task.split("+"))
    assert all(tasks[task] / sum(tasks.values()) == pytest.approx(0.25, abs=0.08)
               for task in ("subject", "canny", "depth", "fill"))
    looks = {"teapot": (255, 0, 0), "edges": (255, 255, 255), "depth": (128, 128, 128),
             "around": (0, 0, 255)}
    for sample in found:
        assert all(p.shape == (128, 128, 3) for p in (sample.target, *sample.conds))
        assert sample.target[0, 0].tolist() == [0, 0, 255] and "teapot" in sample.instruction
        places = {1: ["the picture"], 2: ["the left", "the right"],
                  3: ["the first", "the second", "the third"]}[len(sample.conds)]
        for place, cond in zip(places, sample.conds):
            phrase, = (part for part in re.split(r" and |[,.]", sample.instruction)
                       if re.search(f"(of|in) {place}", part))
            name, = (name for name in looks if name in phrase)
            assert cond[0, 0].tolist() == list(looks[name]), sample.instruction
    box = next(cond for s in found for cond in s.conds if (cond == 0).all(axis=-1).any())
    black = np.argwhere((box == 0).all(axis=-1))
    assert black.min(0).tolist() == [32, 32] and black.max(0).tolist() == [95, 95]
    assert {len(s.conds): len(source.draw(np.random.default_rng(i), 4)) for i, s in
            enumerate(found[:40])} == {1: 3, 2: 2, 3: 1}                     # three rows there are


def test_coco(tmp_path):
    found = draws(public_sets.COCO(write_set(tmp_path, "coco")))
    tasks = Counter(sample.task for sample in found)
    assert tasks["pose"] / DRAWS == pytest.approx(0.75, abs=0.09)
    assert tasks["canny"] / DRAWS == pytest.approx(0.125, abs=0.07)
    assert share(found, lambda s: s.instruction == "a dog") == pytest.approx(0.2, abs=0.08)
    assert all("a dog" in sample.instruction for sample in found)
    for sample in found:
        cond, = sample.conds
        assert cond.shape == sample.target.shape and sample.images == []
        if sample.task == "pose":
            assert cond[0, 0].tolist() == [0, 128, 0]
        if sample.task == "fill":
            black = (cond == 0).all(axis=-1).mean()
            assert 0.05 < black < 0.95 and set(map(tuple, cond.reshape(-1, 3).tolist())) == {
                (0, 0, 0), (0, 0, 255)}


def coco_folder(folder, number: int = 4, depth: bool = False):
    """COCO's plain folder; the first half of the pictures has a person of one left arm."""
    for name in ("train2017", "annotations", *(["depth"] if depth else [])):
        (folder / name).mkdir()
    points = np.zeros((17, 3), int)
    points[[5, 7, 9]] = [[8, 8, 2], [40, 8, 1], [40, 40, 2]]         # shoulder, elbow, wrist
    for i in range(number):
        Image.new("RGB", (64, 48), "blue").save(folder / f"train2017/{i:03}.jpg")
        if depth:
            Image.new("L", (32, 24), 77).save(folder / f"depth/{i:03}.png")
    write_coco(folder, "captions", {
        "images": [{"id": 7 + i, "file_name": f"{i:03}.jpg", "width": 64} for i in range(number)],
        "annotations": [{"id": i, "image_id": 7 + i % number, "caption": pick} for i, pick in
                        enumerate(["a dog"] * number + ["a cat\n"] * number)]})
    write_coco(folder, "person_keypoints", {"annotations": [
        {"image_id": 7 + i % number, "keypoints": (points * (i >= number)).ravel().tolist()}
        for i in range(number + number // 2)]})          # and each one of whom nothing is seen
    return folder


def write_coco(folder, name: str, content: object) -> None:
    (folder / f"annotations/{name}_train2017.json").write_text(json.dumps(content))


@pytest.mark.parametrize("depth", [False, True])
def test_coco_as_a_plain_folder(tmp_path, depth):
    """The chances of the parquet form; pose where there are people, depth where there are maps."""
    source, _ = data.open_source(f"coco={coco_folder(tmp_path, depth=depth)}",
                                 public=public_sets.PUBLIC)
    found = [sample for i in range(DRAWS // 2) for sample in
             source.draw(np.random.default_rng(i), 4)]
    tasks, others = Counter(sample.task for sample in found), 2 + depth
    assert len(found) == 2 * DRAWS and set(tasks) == {"pose", "canny", "fill"} | (
        {"depth"} if depth else set())
    assert tasks["pose"] / len(found) == pytest.approx(0.75 / 2, abs=0.07)
    for task in set(tasks) - {"pose"}:
        assert tasks[task] / len(found) == pytest.approx((1 - 0.75 / 2) / others, abs=0.07)
    assert share(found, lambda s: s.instruction in ("a dog", "a cat")) == pytest.approx(
        0.2, abs=0.06)
    assert share(found, lambda s: "a cat" in s.instruction) == pytest.approx(0.5, abs=0.07)
    for sample in found:
        cond, = sample.conds
        assert cond.shape == sample.target.shape == (48, 64, 3) and sample.images == []
        assert any(words.format(caption=caption) == sample.instruction for caption in (
            "a dog", "a cat") for words in ("{caption}", *public_sets.LEADS[sample.task]))
        if sample.task == "pose":                        # elbow and wrist, and the arm between them
            assert cond[8, 40].tolist() == [0, 255, 0] and cond[40, 40].tolist() == [0, 255, 85]
            assert cond[24, 40].tolist() == [51, 153, 0] and not cond[24, 50].any()
        if sample.task == "depth":
            assert (cond == 77).all()
    assert [len(list(source.all(i, 3))) for i in range(3)] == [2, 1, 1]
    assert len(source.draw(np.random.default_rng(0), 9)) == 4


def test_the_parquet_form_and_the_plain_folder_draw_alike(tmp_path):
    """By the same numbers, where a picture has one caption and one person, and size is given."""
    plain = public_sets.open_coco(coco_folder(tmp_path, 2), (64, 64), None, 3)
    table = public_sets.COCO(write_set(tmp_path, "coco", coco()[:2]), (64, 64), None, 3)
    for row in plain.listed:
        row |= {"text": "a dog", "conditioning_image": plain.listed[0]["conditioning_image"]}
    for i in range(30):
        one, other = (source.draw(np.random.default_rng(i), 2) for source in (plain, table))
        assert [(s.instruction, s.task) for s in one] == [(s.instruction, s.task) for s in other]
    assert [s.task for s in plain.all()] == [s.task for s in table.all()]
    assert len(list(plain.all())) == 6


def test_skeletons_have_the_colours_and_joints_of_openpose():
    """The neck is between the shoulders; what is not seen is not drawn; a sheet has any size."""
    body = [(0, 50, 20), (1, 54, 16), (2, 46, 16), (3, 58, 18), (4, 42, 18), (5, 70, 30),
            (6, 30, 30), (7, 80, 60), (8, 20, 60), (9, 80, 90), (10, 20, 90), (11, 60, 80),
            (12, 40, 80), (13, 62, 120), (14, 38, 120), (15, 62, 150), (16, 38, 150)]
    person = [value for _, x, y in body for value in (2 * x, 2 * y, 1)]
    sheet = skeletons((person,), (200, 320), (160, 100, 3))
    colours = {0: (255, 0, 0), 6: (255, 170, 0), 8: (255, 255, 0), 10: (170, 255, 0),
               5: (85, 255, 0), 7: (0, 255, 0), 9: (0, 255, 85), 12: (0, 255, 170),
               14: (0, 255, 255), 16: (0, 170, 255), 11: (0, 85, 255), 13: (0, 0, 255),
               15: (85, 0, 255), 2: (170, 0, 255), 1: (255, 0, 255), 4: (255, 0, 170),
               3: (255, 0, 85)}
    assert all(tuple(sheet[y, x].tolist()) == colours[i] for i, x, y in body)
    assert sheet[30, 50].tolist() == [255, 85, 0]
    assert sheet[25, 50].tolist() == [0, 0, 153]         # the neck's limb to the nose: hue 13 of 18
    assert sheet[30, 40].any() and not sheet[150, 50].any()
    alone = person[:18] + [60, 60, 0] + [0] * 30         # one shoulder makes no neck
    sheet = skeletons((alone,), (200, 320), (160, 100, 3))
    assert sheet[30, 70].any() and not sheet[28:32, 25:55].any() and not sheet[:3, :3].any()


@pytest.mark.parametrize("name, part, at, change, words", [
    ("captions", "images", 1, {"file_name": "../0.jpg"}, "captions.*images 1.*leads out"),
    ("captions", "images", 1, {"file_name": "gone.jpg"},
     "train2017/gone.jpg: no such picture file"),
    ("captions", "images", 1, {"file_name": 3}, "captions.*images 1.*file_name"),
    ("captions", "images", 1, {"id": "7"}, "captions.*images 1.*id"),
    ("captions", "annotations", 3, {"caption": " "}, "captions.*annotations 3.*caption"),
    ("captions", "annotations", 3, {"caption": "\ud800"}, "captions.*annotations 3.*Unicode"),
    ("captions", "annotations", 3, {"image_id": None}, "captions.*annotations 3.*image_id"),
    ("person_keypoints", "annotations", 2, {"keypoints": [1] * 50}, "keypoints_.*tions 2.*51"),
    ("person_keypoints", "annotations", 2, {"keypoints": [1e300] * 51}, "tions 2.*51")])
def test_bad_entries_of_coco(tmp_path, name, part, at, change, words):
    folder = coco_folder(tmp_path, 20)
    whole = json.loads((folder / f"annotations/{name}_train2017.json").read_text())
    whole[part][at] |= change
    write_coco(folder, name, whole)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        list(public_sets.open_coco(folder).all())
    bad: Bad = {}
    kept = list(public_sets.open_coco(folder, None, bad).all())
    assert len(bad) == 1 and re.search(words, next(iter(bad))) and len(kept) >= 19


def test_a_folder_that_is_not_cocos(tmp_path):
    folder = coco_folder(tmp_path)
    for content, words in (([], "no list 'images'"), ({"images": []}, "no list 'annotations'"),
                           ({"images": [], "annotations": []}, "holds no rows")):
        write_coco(folder, "captions", content)
        with pytest.raises(ValueError, match=words):
            public_sets.open_coco(folder)
    (folder / "annotations/captions_train2017.json").write_text("{")
    with pytest.raises(ValueError, match="captions_train2017.json.*JSON"):
        public_sets.open_coco(folder)
    (folder / "annotations/captions_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="captions_train2017.json"):
        public_sets.open_coco(folder)


def test_pictures_turned_by_exif_do_not_meet_others_in_a_batch(tmp_path):
    """Their head says another size than they will have."""
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), "red").save(turned, "JPEG", exif=exif)
    rows = coco()
    rows[0]["image"] = {"bytes": turned.getvalue(), "path": None}
    source = public_sets.COCO(write_set(tmp_path, "coco", rows))
    for i in range(20):
        drawn = source.draw(np.random.default_rng(i), 3)
        assert len({str(parquet_sets.shapes_of(s)) for s in drawn}) == 1


def test_pictures_of_other_sizes_are_not_decoded(tmp_path, monkeypatch):
    small = {name: cell("red", (32, 32)) for name in ("image", "conditioning_image")}
    rows = coco() + [row | small for row in coco()]
    source, real, read = public_sets.COCO(write_set(tmp_path, "coco", rows)), load_image, []
    monkeypatch.setattr(parquet_sets, "load_image", lambda *of: read.append(of[1]) or real(*of))
    for i in range(9):
        read.clear()
        assert len(source.draw(np.random.default_rng(i), 9)) == 3
        assert len([where for where in read if where.endswith("'image'")]) == 3


def test_pictures_without_a_head_are_named_or_skipped(tmp_path):
    """Sizes are compared before pictures are read: what has none is a bad row, too."""
    rows = coco() * 10
    rows[0] = rows[0] | {"image": {"bytes": b"no picture", "path": None}}
    file, bad = write_set(tmp_path, "coco", rows), {}
    with pytest.raises(ValueError, match="row 0 'image'"):
        public_sets.COCO(file).draw(np.random.default_rng(0), 99)
    assert len(public_sets.COCO(file, bad=bad).draw(np.random.default_rng(0), 99)) == 29
    assert len(bad) == 1 and "row 0 'image'" in next(iter(bad))


def test_a_row_group_that_cannot_be_read_is_skipped_once(tmp_path, monkeypatch):
    file = write_set(tmp_path, "coco", coco() * 20, row_group_size=30)
    source, calls = public_sets.COCO(file, bad={}), []
    read = source.read
    monkeypatch.setattr(source, "kept", lambda number: calls.append(number) or (
        read(number) if number else broken()))

    def broken():
        raise ValueError(f"{file} rows 0 to 30: cannot be read as parquet")
    assert len(list(source.all())) == 30 and calls == [0, 1]
    assert len(source.bad) == 1
    assert all(source.draw(np.random.default_rng(i), 2) for i in range(9)) and len(calls) < 40


def plain_canny(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """The same, pixel by pixel, as it is told in books."""
    grey = np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(int)
    height, width = grey.shape

    def at(i: int, j: int) -> int:
        return int(grey[min(max(i, 0), height - 1), min(max(j, 0), width - 1)])

    def gradient(i: int, j: int) -> tuple[int, int]:
        x = sum(w * (at(i + d, j + 1) - at(i + d, j - 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        y = sum(w * (at(i + 1, j + d) - at(i - 1, j + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
        return x, y

    def size(i: int, j: int) -> int:
        return sum(map(abs, gradient(i, j))) if 0 <= i < height and 0 <= j < width else 0
    ridge = {}
    for i in range(height):
        for j in range(width):
            x, y = gradient(i, j)
            angle = np.degrees(np.arctan2(abs(y), abs(x)))
            down, right = ((0, 1) if angle < 22.5 else (1, 0) if angle > 67.5 else
                           (1, 1) if (x < 0) == (y < 0) else (-1, 1))
            if size(i, j) > max(low, size(i - down, j - right)) and (
                    size(i, j) >= size(i + down, j + right) + bool(down and right)):
                ridge[i, j] = size(i, j)
    found = {place for place, value in ridge.items() if value > high}
    while more := {(i + a, j + b) for i, j in found for a in (-1, 0, 1) for b in (-1, 0, 1)
                   if (i + a, j + b) in ridge} - found:
        found |= more
    edges = np.zeros((height, width, 3), np.uint8)
    for place in found:
        edges[place] = 255
    return edges


def test_canny_is_what_books_tell():
    rng = np.random.default_rng(0)
    for number in range(6):
        rough = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        picture = np.asarray(rough.resize((29, 23), Image.Resampling.BICUBIC))
        low = 20 * (number + 1)
        edges = canny(picture, low, 2 * low)
        assert np.array_equal(edges, plain_canny(picture, low, 2 * low))
        assert 0 < (edges > 0).mean() < 0.5
    half = np.zeros((9, 9, 3), np.uint8)
    half[:, 5:] = 255
    assert (canny(half, 100, 200)[..., 0] > 0).sum(0).tolist() in (
        [0, 0, 0, 0, 9, 0, 0, 0, 0], [0, 0, 0, 0, 0, 9, 0, 0, 0])            # one line, once
    assert not canny(np.full((5, 1, 3), 7, np.uint8), 1, 2).any()


@pytest.mark.usefixtures("short_by_default")
@pytest.mark.parametrize("name", SETS)
def test_training_on_each_set(tmp_path, name, monkeypatch):
    write_set(tmp_path, name)
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", f"{name}={tmp_path}:2", "--method",
                                      "lora", "--steps", "2", "--batch-size", "2", "--out",
                                      str(tmp_path / "run")])
    train.main()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2


def test_batches_depend_on_their_number_and_neighbours_share_a_row_group(tmp_path):
    rows = [row | {"text": str(i)} for i, row in enumerate(coco() * 20)]
    source = public_sets.COCO(write_set(tmp_path, "coco", rows, row_group_size=5))
    def told(start: int, stride: int, number: int) -> list[list[str]]:
        batches = data.batches([(source, 1.0)], 2, 7, start, stride)
        return [[s.instruction for s in next(batches)] for _ in range(number)]
    whole = told(0, 1, 64)
    assert told(5, 1, 20) == whole[5:25] and told(1, 2, 20) == whole[1:41:2]
    groups = [int(re.search(r"\d+", words)[0]) // 5 for batch in whole for words in batch]
    near = 2 * data.NEIGHBOURS
    assert all(len(set(groups[i:i + near])) == 1 for i in range(0, len(groups), near))
    assert len(set(groups)) > 1 and source.kept.cache_info().misses <= 10


@pytest.mark.parametrize("name, change, words", [
    ("omniedit", {"edited_prompt_list": [" "]}, "row 0.*edited_prompt_list"),
    ("omniedit", {"src_img": {"bytes": b"no picture", "path": None}}, "row 0.*src_img"),
    ("omniedit", {"src_img": {"bytes": cell("red")["bytes"][:60], "path": None}}, "row 0.*src_img"),
    ("musar", {"tgt_img": None}, "row 0.*tgt_img"), ("musar", {"prompt": None}, "row 0.*prompt"),
    ("subjectspatial", {"bbox": [0.5, 0.5, 2.0, 0.5]}, "row 0.*bbox"),
    ("subjectspatial", {"description": None}, "row 0.*item"),
    ("subjectspatial", {"bbox": [0.9, 0.5, 0.1, 0.5]}, "row 0.*bbox"),
    ("coco", {"text": ""}, "row 0.*text")])
def test_bad_rows(tmp_path, name, change, words):
    good = SETS[name]()
    file = write_set(tmp_path, name, [good[0] | change] + good[1:] * 9)
    made = public_sets.PUBLIC[name](file, (64, 64))
    with pytest.raises(ValueError, match=words):
        for i in range(60):
            made.draw(np.random.default_rng(i), 9)
    bad: Bad = {}
    lenient = public_sets.PUBLIC[name](file, (64, 64), bad)
    for i in range(60):
        lenient.draw(np.random.default_rng(i), 9)
    assert len(bad) == 1 and re.search(words, next(iter(bad)))


def test_too_many_bad_rows_and_none_that_is_good(tmp_path):
    good, worse = musar()[0], musar()[0] | {"prompt": ""}
    bad: Bad = {}
    source = public_sets.MUSAR(write_set(tmp_path, "musar", [good] * 8 + [worse] * 2), bad=bad)
    with pytest.raises(ValueError, match="too many"):
        for i in range(50):
            source.draw(np.random.default_rng(i), 5)
    source = public_sets.OmniEdit(write_set(tmp_path, "omniedit", [
        row for row in omniedit() if not row["edited_prompt_list"]]))
    with pytest.raises(ValueError, match="no row that can be used"):
        source.draw(np.random.default_rng(0), 1)


@pytest.mark.parametrize("name, column, value", [
    ("omniedit", "edited_prompt_list", "make it red"), ("omniedit", "edited_prompt_list", 3),
    ("subjectspatial", "description", "a teapot"), ("coco", "image", 3), ("musar", "prompt", 3),
    ("subjectspatial", "bbox", "0 0 1 1"), ("musar", "tgt_img", {"path": "x.png"})])
def test_columns_of_another_kind(tmp_path, name, column, value):
    source = public_sets.PUBLIC[name](write_set(tmp_path, name, [row | {column: value}
                                                          for row in SETS[name]()]), (64, 64))
    with pytest.raises(ValueError, match=column):
        for i in range(20):
            source.draw(np.random.default_rng(i), 2)


def test_an_empty_row_group_is_passed_and_held_out_files_too(tmp_path):
    source = public_sets.OmniEdit(write_set(tmp_path, "omniedit", row_group_size=1))
    assert {s.instruction for s in draws(source, 60)} == {"one", "two", "alone"}
    parquet.write_table(pyarrow.Table.from_pylist(musar()), tmp_path / "dev-00000.parquet")
    for name in ("Test-0.parquet", "omniedit-val.parquet", "._x.parquet"):   # the last a Finder's
        parquet.write_table(pyarrow.Table.from_pylist(musar()), tmp_path / name)
    (tmp_path / "values").mkdir()                        # no "val"
    (tmp_path / "omniedit.parquet").rename(tmp_path / "values/latest.parquet")
    for folder in ("validation", "test-1"):              # as converted sets have them
        (tmp_path / folder).mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(musar()), tmp_path / folder / "0000.parquet")
    assert len(public_sets.OmniEdit(tmp_path).sizes) == 6
    (tmp_path / "dev-00000.parquet").rename(tmp_path / "other-00000.parquet")
    with pytest.raises(ValueError, match="other-00000.parquet: has no column"):      # is looked at
        public_sets.OmniEdit(tmp_path)


def test_bad_rows_of_one_source_do_not_count_for_another(tmp_path):
    good, worse = musar()[0], musar()[0] | {"prompt": ""}
    bad: Bad = dict.fromkeys(f"another source's line {i}" for i in range(90))
    source = public_sets.MUSAR(write_set(tmp_path, "musar", [good] * 19 + [worse]), bad=bad)
    for i in range(40):
        source.draw(np.random.default_rng(i), 5)
    assert len(bad) == 91 and len(list(source.all())) == 19
    assert sum(len(list(source.all(i, 3))) for i in range(3)) == 19


def test_files_that_are_no_such_set(tmp_path, monkeypatch):
    file = write_set(tmp_path, "musar")
    with pytest.raises(ValueError, match="no column 'edited_img' or 'src_img' or 'edited_p"):
        data.open_source(f"omniedit={file}", public=public_sets.PUBLIC)
    (tmp_path / "torn.parquet").write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="torn.parquet.*parquet"):
        public_sets.MUSAR(tmp_path)
    for path in (tmp_path / "gone", tmp_path / "gone.parquet"):
        with pytest.raises(FileNotFoundError, match="gone"):
            public_sets.MUSAR(path)
    (tmp_path / "torn.parquet").unlink()
    content = bytearray(file.read_bytes())
    content[4:150] = bytes(146)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="rows 0 to 4.*cannot be read"):
        public_sets.MUSAR(file).draw(np.random.default_rng(0), 1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        public_sets.MUSAR(file)
