"""The tiny world, its score, pictures from files, and a user's folder."""
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
from data import Sample
from support.pictures import fitted, grid, load_image
from support.public_sets import PUBLIC
from support.tables import read_rows
from tiny import world
from tiny.world import (BASE_TASKS, BIG, EDITS, FIGURES, NEW_TASKS, SHAPES, SMALL, Scene,
                        Thing)

ALL = BASE_TASKS + NEW_TASKS


def draws(task: str, number: int, held_out: bool) -> list[Sample]:
    rng = np.random.default_rng(5)
    return [world.tiny_sample(rng, task, held_out) for _ in range(number)]


@pytest.mark.parametrize("task", ALL)
def test_samples_are_given_what_their_task_says(task):
    natives = 1 if task in EDITS else 0
    cleans = {"multi": 2, "mixed": 2}.get(task, 1 if task in NEW_TASKS else 0)
    for sample in draws(task, 20, False):
        assert (len(sample.images), len(sample.conds), sample.task) == (natives, cleans, task)
        assert np.array_equal(sample.target, world.draw(sample.scene))
        assert (sample.instruction.strip() and "{" not in sample.instruction
                and "a orange" not in sample.instruction)
        assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8
                   for p in [sample.target, *sample.images, *sample.conds])


@pytest.mark.parametrize("task", ALL)
def test_held_out_scenes_and_wordings_never_occur_in_training(task):
    assert not any(sample.scene.held_out() for sample in draws(task, 60, False))
    assert all(sample.scene.held_out() for sample in draws(task, 10, True))
    kept = world.WORDINGS[task][-2:]
    starts = [wording.split("{")[0].strip() for wording in kept]
    seen = [sample.instruction.lower() for sample in draws(task, 60, False)]
    assert not any(text.startswith("please") for text in seen)       # every last wording begins so
    assert starts[-1].startswith("please")


def test_edits_hold_out_the_scene_before_too():
    rng, found = np.random.default_rng(1), []
    for _ in range(400):
        before, after, _ = world.edited(rng, "recolour")
        sample = world.edit_sample(np.random.default_rng(1), "recolour", False)
        found.append(before.held_out())
        assert sample is None or not sample.scene.held_out()
    assert any(found)                                    # such scenes are drawn, and then refused
    pictures = {world.draw(b).tobytes()
                for b, _, _ in (world.edited(rng, "recolour") for _ in range(300)) if b.held_out()}
    assert not any(s.images[0].tobytes() in pictures for s in draws("recolour", 300, False))


def test_one_scene_in_ten_is_held_out_and_the_hash_is_stable():
    rng = np.random.default_rng(0)
    share = np.mean([world.random_scene(rng, 2).held_out() for _ in range(4000)])
    assert 0.08 < share < 0.12
    first, second = Thing("circle", "red", 0), Thing("star", "blue", 5)
    assert Scene("white", (first, second)).held_out() == Scene("white", (second, first)).held_out()
    assert [Scene(c, (first,)).held_out() for c in (
        "green", "blue", "yellow", "purple", "orange", "white", "black")] == HELD_OUT


HELD_OUT = [False, False, True, False, False, False, False]          # written down once, for ever


def test_test_samples_are_fixed():
    once, again = world.tiny_test("move", 5), world.tiny_test("move", 5)
    assert [s.instruction for s in once] == [s.instruction for s in again]
    assert all(np.array_equal(a.target, b.target) for a, b in zip(once, again))
    assert [s.instruction for s in world.tiny_test("move", 5, seed=1)] != [
        s.instruction for s in once]


def test_batches_depend_on_seed_and_number_alone():
    sources = [(world.TinyWorld(), 1.0)]
    run = data.batches(sources, 3, seed=7)
    first = [[s.instruction for s in next(run)] for _ in range(4)]
    later = data.batches(sources, 3, seed=7, start=2)
    assert [[s.instruction for s in next(later)] for _ in range(2)] == first[2:]
    assert [s.instruction for s in next(data.batches(sources, 3, seed=8))] != first[0]


def test_a_batch_is_given_the_same_number_of_pictures_and_every_task_occurs():
    source, seen = world.TinyWorld(), Counter()
    for i in range(60):
        batch = source.draw(np.random.default_rng(i), 4)
        assert len({(len(s.images), len(s.conds)) for s in batch}) == 1
        seen.update(s.task for s in batch)
    assert set(seen) == set(ALL)
    assert {s.task for i in range(30) for s in
            world.TinyWorld(BASE_TASKS).draw(np.random.default_rng(i), 2)} <= set(BASE_TASKS)


def test_an_edit_counts_half_and_a_pair_twice():
    assert np.allclose(world.TinyWorld().chances, np.array([1, 3, 5, 4]) / 13)
    assert np.allclose(world.TinyWorld(BASE_TASKS).chances, [1 / 4, 3 / 4])


@pytest.mark.parametrize("task", BASE_TASKS)
def test_a_base_sees_big_things_that_its_tests_do_not_hold(task):
    """A quarter of 200 samples: 50, standard deviation 6; held-out scenes move it little."""
    rng = np.random.default_rng(0)
    seen = [world.tiny_sample(rng, task) for _ in range(200)]
    big = [sample for sample in seen if sample.scene.things[0].radius == BIG]
    assert 25 <= len(big) <= 75
    if task == "t2i":                                    # an edit shows the size; here words say it
        assert all(("big" in s.instruction) == (s.scene.things[0].radius == BIG) for s in seen)
    if task == "move":                                   # which of two were in front is not said
        assert all(len(sample.scene.things) == 1 for sample in big)
    assert all(thing.radius == SMALL for sample in world.tiny_test(task, 50)
               for thing in sample.scene.things)


# ------------------------------------------------------------------------------------------- score

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
def test_the_score_takes_the_truth_and_nothing_else(scene):
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


def test_psnr_and_error_are_in_the_units_they_claim():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert evaluate.squared_error(black, white) == 4     # from -1 to 1
    assert evaluate.psnr(black, white) == 0


# ---------------------------------------------------------------------------------------- pictures

def test_pictures_are_read_as_a_person_sees_them(tmp_path):
    picture = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6                                     # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGB", (2, 2), "blue").quantize(4).save(tmp_path / "palette.png")
    assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == (0, 0, 255)
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((2, 2), 32768, np.uint16)).save(tmp_path / "half.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "half.png").getpixel((0, 0)) == (128, 128, 128)
    Image.new("L", (50, 1), 7).save(tmp_path / "line.png")
    assert load_image(tmp_path / "line.png").size == (50, 1)
    assert fitted((50, 1)) == (48, 16)


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:600])
    Image.new("1", (2 ** 16, 1)).save(tmp_path / "long.png")         # no camera's
    for name in ("text.png", "cut.png", "long.png"):
        with pytest.raises(ValueError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        load_image(tmp_path / "gone.png")


def test_pictures_of_floats_are_refused(tmp_path):
    """Their white may be 1, 255, 65535 or a distance."""
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float.tiff: cannot .*\(it holds floats"):
        load_image(tmp_path / "float.tiff")


def test_a_grid_aligns_rows_and_writes_below_them():
    red, blue = (np.full((64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = grid([[red, blue], [blue]], ["make it blue", "a" * 99])
    height = len(sheet) // 2
    assert sheet.shape == (2 * height, 128, 3) and height > 64
    assert (sheet[:64, :64] == red).all() and (sheet[:64, 64:] == blue).all()
    assert (sheet[height:height + 64, :64] == 128).all()                     # nothing was given
    assert (sheet[height:height + 64, 64:] == blue).all()
    for top in (64, height + 64):                        # a text in each strip
        assert len(np.unique(sheet[top:top + height - 64])) > 1


def test_fitted_keeps_aspect_and_never_enlarges():
    assert fitted((1000, 500)) == (512, 256) and fitted((100, 60)) == (96, 64)


# ---------------------------------------------------------------------------------- a user's folder

def folder(path, rows: list) -> data.Folder:
    for i in range(3):
        Image.new("RGB", (32 + 16 * i, 32), "red").save(path / f"{i}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return data.Folder(path)


def test_a_folder_of_pictures(tmp_path):
    source = folder(tmp_path, [
        {"target": "0.png", "instruction": "a", "images": ["1.png"], "conds": "2.png", "task": "x"},
        {"file_name": "0.png", "text": "b"}, {"target": "0.png", "instruction": "c"}])
    sizes = Counter()
    for i in range(40):
        batch = source.draw(np.random.default_rng(i), 5)
        assert len({(len(s.images), len(s.conds)) for s in batch}) == 1
        assert len({s.instruction for s in batch}) == len(batch)
        sizes[tuple(sorted(s.instruction for s in batch))] += 1
    assert set(sizes) == {("a",), ("b", "c")}            # other references, other batches
    sample = next(s for i in range(40) for s in source.draw(np.random.default_rng(i), 1)
                  if s.instruction == "a")
    assert sample.images[0].shape == sample.target.shape == (32, 32, 3)      # the target's size
    assert sample.conds[0].shape == (32, 64, 3) and sample.task == "x"       # its own
    small = data.Folder(tmp_path / "metadata.jsonl", (64, 64)).draw(np.random.default_rng(0), 1)[0]
    assert small.target.shape == (64, 64, 3)


@pytest.mark.parametrize("row, words", [
    ("{broken", "line 2.*JSON"), ("[1]", "line 2.*object"),
    ({"instruction": "a"}, "line 2.*target"), ({"target": "0.png"}, "line 2.*instruction"),
    ({"target": "0.png", "instruction": " "}, "line 2.*instruction"),
    ({"target": "gone.png", "instruction": "a"}, "line 2.*gone.png"),
    ({"target": "0.png", "instruction": "\ud800" + "a" * 9999}, "line 2.*not valid Unicode"),
    ({"target": "0.png", "instruction": "a", "task": "\ud800"}, "line 2.*not valid Unicode"),
    ({"target": "a" * 300, "instruction": "a"}, "line 2.*no such picture file"),
    ({"target": "a/" * 3000, "instruction": "a"}, "line 2.*cannot be a path"),
    ({"target": "a\nb.png", "instruction": "a"}, "line 2.*cannot be a path"),
    ({"target": "0.png", "instruction": "a", "images": [3]}, "line 2.*images"),
    ({"target": "0.png", "instruction": "a", "image": "1.png"}, "line 2.*'target' and 'image'")])
def test_bad_rows_are_named(tmp_path, row, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        folder(tmp_path, [{"target": "0.png", "instruction": "a"}, row])
    assert len(str(error.value)) < 1000
    kept = [{"target": "0.png", "instruction": str(i)} for i in range(9)]
    bad: list[str] = []
    with pytest.raises((ValueError, FileNotFoundError)):
        folder(tmp_path, [*kept, row])
    source = data.Folder(tmp_path, bad=bad)              # one line in ten
    assert len(bad) == 1 and re.search(words.replace("line 2", "line 10"), bad[0])
    assert sum(map(len, source.groups.values())) == 9
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="too many"):
        data.Folder(tmp_path, bad=bad)
    assert len(bad) == 1


def test_paths_stay_in_the_folder(tmp_path):
    """As written; a link inside the folder may lead anywhere."""
    inner = tmp_path / "inner"
    inner.mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "out.png")
    (inner / "link.png").symlink_to(tmp_path / "out.png")
    for path in ("../out.png", str(tmp_path / "out.png"), "a/../../out.png", "../innermost/x.png"):
        for row in ({"target": path}, {"target": "link.png", "images": [path]}):
            with pytest.raises(ValueError, match="line 1.*leads out"):
                folder(inner, [row | {"instruction": "a"}])
    source = folder(inner, [{"target": "link.png", "instruction": "a", "conds": "./0.png"}])
    assert source.draw(np.random.default_rng(0), 1)[0].conds
    with pytest.raises(ValueError, match="leads out"):
        folder(inner, [{"target": "../out.png", "instruction": "a"}])
    data.Folder(inner, root=tmp_path)


def test_lines_end_at_line_feeds_only(tmp_path):
    """Captions may hold U+2028; files may begin with a byte order mark."""
    file = tmp_path / "rows.jsonl"
    file.write_text('\ufeff{"instruction": "a\u2028b"}\r\n\n{"instruction": "c"}\n', newline="")
    assert [row["instruction"] for _, row in read_rows(file)] == ["a\u2028b", "c"]


def told(source: data.Folder) -> list[tuple]:
    """All that a folder says, without where it says it."""
    return sorted((row.instruction, row.paths, row.sizes, row.references, row.task)
                  for rows in source.groups.values() for row in rows)


def test_a_table_says_what_lines_of_json_say(tmp_path):
    """With the marks of a spreadsheet: a byte order mark, CRLF, quotes, a row of empty cells."""
    lines = folder(tmp_path, [
        {"target": "0.png", "instruction": 'a, "b"\nc', "images": ["1.png"], "conds": ["2.png"]},
        {"file_name": "1.png", "text": "[b] c", "task": "x"},
        {"target": "2.png", "instruction": "d", "conds": ["0.png", "1.png"]}])
    (tmp_path / "rows.CSV").write_bytes((
        '\ufeffinstruction,target, images,conds,task,,note\r\n'
        '"a, ""b""\r\nc",0.png, "[""1.png""]",2.png,,,n\r\n[b] c,1.png,,,x,,\r\n,,,,,,\r\n'
        'd,2.png,,"[""0.png"", ""1.png""]"\r\n').encode())
    assert told(data.Folder(tmp_path / "rows.CSV")) == told(lines)
    (tmp_path / "metadata.csv").write_text("file_name,prompt\n0.png,e\n")
    assert told(data.Folder(tmp_path)) == told(lines)    # the .jsonl goes first
    (tmp_path / "metadata.jsonl").unlink()
    assert [row[0] for row in told(data.Folder(tmp_path))] == ["e"]


@pytest.mark.parametrize("row, words", [
    ("0.png,a,more,even more", "line 3.*more cells"), (",a", "line 3.*target"),
    ("0.png", "line 3.*instruction"), ('0.png,a,"[""1.png"""', "line 3.*no such picture file"),
    ("0.png,a,[1.png]", "line 3 'images'.*JSON"), ("0.png,a,[3]", "line 3.*list of paths"),
    ("0.png,a,../1.png", "line 3.*leads out")])
def test_bad_rows_of_a_table_are_named(tmp_path, row, words):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["target,instruction,images", "0.png,a", row, *["1.png,a"] * 9]))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        data.Folder(file)
    bad: list[str] = []
    assert len(told(data.Folder(file, bad=bad))) == 10
    assert len(bad) == 1 and re.search(words, bad[0])


@pytest.mark.parametrize("content, words", [
    (b'target,text\n0.png,"a', "line 2.*CSV"), (b'target,text\n"0.png"x,a', "line 2.*CSV"),
    (b"target,text\n0.png," + b"a" * 200_000, "line 2.*CSV"), (b"target,text\n\xff", "UTF-8"),
    (b"image,image,text\n0.png,1.png,a", "two columns"), (b"", "no rows"), (b"a,b\n", "no rows")])
def test_a_broken_table_is_refused(tmp_path, content, words):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    (tmp_path / "rows.csv").write_bytes(content)
    for bad in (None, []):                               # nobody can say which rows are good
        with pytest.raises(ValueError, match=f"rows.csv.*{words}"):
            data.Folder(tmp_path / "rows.csv", bad=bad)


def test_numbered_paths_count_together(tmp_path):
    rows = [{"target": "0.png", "instruction": "a", "control_path_10": "0.png",
             "control_path_2": "2.png", "control_path_1": None, "control_path_0": "1.png"}]
    source = folder(tmp_path, rows)
    assert [path.name for path in told(source)[0][1]] == ["0.png", "1.png", "2.png", "0.png"]
    source = folder(tmp_path, [rows[0] | {"control_path": "0.png"}])
    assert [path.name for path in told(source)[0][1]][1:3] == ["0.png", "1.png"]
    for other in ({"images": "1.png"}, {"control_path_3": ["1.png"]}):
        with pytest.raises(ValueError, match="line 1.*'images'"):
            folder(tmp_path, [rows[0] | other])


def test_a_folder_without_metadata(tmp_path):
    """Instructions of the same stem, references of the same stem or numbered, in control/."""
    (tmp_path / "control").mkdir()
    for name in ("a.png", "a_2.JPG", "control/a_10.png", "control/a_9.webp", "control/a_2.png",
                 "control/none.png", "._a.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffmake it red\n")
    (tmp_path / "a_2.txt").write_text("make it blue")
    assert [(words, [str(path.relative_to(tmp_path)) for path in paths], references)
            for words, paths, _, references, _ in told(data.Folder(tmp_path))] == [
        ("make it blue", ["a_2.JPG", "control/a_2.png"], 1),
        ("make it red", ["a.png", "control/a_9.webp", "control/a_10.png"], 2)]
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match="b.png.*b.txt"):
        data.Folder(tmp_path)
    (tmp_path / "b.txt").write_text("c")
    with pytest.raises(FileNotFoundError, match="b.png.*reference.*control"):
        data.Folder(tmp_path)
    for i in range(8):
        for name in (f"b{i}.png", f"control/b{i}.png"):
            Image.new("RGB", (32, 32)).save(tmp_path / name)
        (tmp_path / f"b{i}.txt").write_text("d")
    bad: list[str] = []
    assert len(told(data.Folder(tmp_path, bad=bad))) == 10 and "b.png" in bad[0]
    for path in (tmp_path / "control").iterdir():
        path.unlink()
    assert all(references == 0 for *_, references, _ in told(data.Folder(tmp_path)))


def test_missing_or_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data.*metadata.jsonl"):
        data.Folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: not found.*metadata.jsonl"):
        data.Folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="no rows"):
        folder(tmp_path, [])


def test_sources_and_weights(tmp_path):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    named = {"tiny": world.TinyWorld}
    assert data.open_source("tiny:2.5", named)[1] == 2.5 and isinstance(
        data.open_source("tiny", named)[0], world.TinyWorld)
    assert isinstance(data.open_source(f"{tmp_path}:3")[0], data.Folder)
    with pytest.raises(ValueError, match="no public set 'cooc'; there are omniedit, "):
        data.open_source(f"cooc={tmp_path}", public=PUBLIC)
    for text in ("tiny:0", "tiny:-1", "tiny:nan", "tiny:inf"):
        with pytest.raises(ValueError, match="weight"):
            data.open_source(text)
