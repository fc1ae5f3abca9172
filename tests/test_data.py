"""data.py: a user's folder or table (support/tables.py), sources and batches."""
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
from helpers import cell, omniedit, write_set
from support import folders
from support.bad_rows import Bad
from support.public_sets import PUBLIC
from support.tables import read_rows
from tiny import world


def test_batches_depend_on_seed_and_number_alone():
    sources = [(world.TinyWorld(), 1.0)]
    run = data.batches(sources, 3, seed=7)
    first = [[s.instruction for s in next(run)] for _ in range(4)]
    later = data.batches(sources, 3, seed=7, start=2)
    assert [[s.instruction for s in next(later)] for _ in range(2)] == first[2:]
    assert [s.instruction for s in next(data.batches(sources, 3, seed=8))] != first[0]


def test_sources_are_drawn_by_their_weights():
    """And each batch is of one source. Of 600 batches 450, give or take 4.7 standard errors, 50."""
    class Of:
        def __init__(self, name: str):
            self.name = name

        def draw(self, rng: np.random.Generator, size: int, nearby: object) -> list[str]:
            return [self.name] * size
    run = data.batches([(Of("often"), 3.0), (Of("rare"), 1.0)], 2, seed=0)
    drawn = Counter(tuple(next(run)) for _ in range(600))
    run.close()
    assert set(drawn) == {("often",) * 2, ("rare",) * 2}
    assert 400 < drawn[("often",) * 2] < 500


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
    firsts = Counter(source.draw(np.random.default_rng(i), 1)[0].instruction for i in range(300))
    assert all(70 < firsts[text] < 130 for text in "abc")        # as likely as its group is large
    sample = next(s for i in range(40) for s in source.draw(np.random.default_rng(i), 1)
                  if s.instruction == "a")
    assert sample.images[0].shape == sample.target.shape == (32, 32, 3)      # the target's size
    assert sample.conds[0].shape == (32, 64, 3) and sample.task == "x"       # its own
    for given, task in ((0, "0"), (None, ""), ("", "")):
        numbered = folder(tmp_path, [{"target": "0.png", "instruction": "a", "task": given}])
        assert numbered.checked_rows[0].task == task
    small = data.Folder(tmp_path / "metadata.jsonl", (64, 64)).draw(np.random.default_rng(0), 1)[0]
    assert small.target.shape == (64, 64, 3)


@pytest.mark.parametrize("row, words", [
    ("{broken", "line 2.*JSON"), ("[1]", "line 2.*object"),
    ({"instruction": "a"}, "line 2.*target"), ({"target": "0.png"}, "line 2.*instruction"),
    ({"task": "a"}, "line 2: needs .* 'target' .*and 'instruction' "),       # both at once
    ({"taget": "0.png", "instruction": "a"}, "line 2: .*'target'.*; no known name is 'taget'$"),
    ({"target": "0.jpg", "instruction": "a"}, "line 2: .*0.jpg: no such.*; there is 0.png$"),
    ({"target": "aftr/0.png", "instruction": "a"}, "line 2: .*; there is no folder aftr/$"),
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
    bad: Bad = {}
    with pytest.raises((ValueError, FileNotFoundError)):
        folder(tmp_path, [*kept, row])
    source = data.Folder(tmp_path, bad=bad)              # one line in ten
    assert len(bad) == 1 and re.search(words.replace("line 2", "line 10"), next(iter(bad)))
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
    return sorted((row.instruction, row.paths, row.sizes, row.natives, row.task)
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
    ("0.png,a,more,even more", "line 3.*more cells.*double quotes"),
    (",a", "line 3.*target"),
    ("0.png", "line 3.*instruction"), ('0.png,a,"[""1.png"""', "line 3.*no such picture file"),
    ("0.png,a,[1.png]", "line 3 'images'.*JSON"), ("0.png,a,[3]", "line 3.*list of paths"),
    ("0.png,a,../1.png", "line 3.*leads out")])
def test_bad_rows_of_a_table_are_named(tmp_path, row, words):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["target,instruction,images", "0.png,a", row, *["1.png,a"] * 9]))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        data.Folder(file)
    bad: Bad = {}
    assert len(told(data.Folder(file, bad=bad))) == 10
    assert len(bad) == 1 and re.search(words, next(iter(bad)))


@pytest.mark.parametrize("content, words", [
    (b'target,text\n0.png,"a\nb\nc', "line 2.*CSV"), (b'target,text\n"0.png"x,a', "line 2.*CSV"),
    (b"target,text\n0.png," + b"a" * 200_000, "line 2.*CSV"), (b"target,text\n\xff", "UTF-8"),
    (b"image,image,text\n0.png,1.png,a", "two columns"), (b"", "no rows"),
    (b"target,text\n", "no rows"), (b"a,b\n", "'a,b'; it must name the columns: target"),
    (b"0.png,make it red\n1.png,b", "names no known column: '0.png,make it red'"),
    (b"File_Name;Prompt\n0.png;a", "separated by semicolons"),
    (b'"target"\t"instruction"\n0.png\ta', "separated by tabs"),
    ("target,text\n0.png,a".encode("utf-16"), "UTF-16.*as UTF-8"),
    ("target,text\n0.png,a".encode("utf-16-be"), "UTF-16.*as UTF-8"),
    ("target,text\n0.png,caf\u00e9".encode("latin-1"), "Latin-1.*byte 22 is 0xe9.*as UTF-8")])
def test_a_broken_table_is_refused(tmp_path, content, words):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    (tmp_path / "rows.csv").write_bytes(content)
    for bad in (None, {}):                               # nobody can say which rows are good
        with pytest.raises(ValueError, match=f"rows.csv.*{words}"):
            data.Folder(tmp_path / "rows.csv", bad=bad)


def test_lines_of_a_table_have_the_numbers_that_an_editor_shows(tmp_path):
    """Of a row whose cell has several lines that of the first."""
    file = tmp_path / "rows.csv"
    file.write_bytes(b'\r\n,,\r\ntarget,text\r\n\r\n0.png,"a\r\nb"\r\n1.png,c,,\r\n')
    assert list(read_rows(file)) == [(f"{file} line 5", {"target": "0.png", "text": "a\nb"}),
                                     (f"{file} line 7", {"target": "1.png", "text": "c"})]


@pytest.mark.parametrize("name, spoken", [("rows.csv", True), ("rows.jsonl", False)])
def test_spreadsheets_are_spoken_of_where_one_may_have_been_at_work(tmp_path, name, spoken):
    (tmp_path / name).write_text("target,text", "utf-16")
    with pytest.raises(ValueError, match="UTF-16.*; save it as UTF-8") as error:
        list(read_rows(tmp_path / name))
    assert ("a spreadsheet calls" in str(error.value)) == spoken


def test_an_object_over_several_lines_is_told_so(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{\n"target": "0.png"\n}')
    with pytest.raises(ValueError, match="line 1: not valid JSON .*column 2.*; a line of a .jsonl"):
        data.Folder(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("start", ["", "\ufeff", "\n "])
def test_one_json_list_is_read_too(tmp_path, start):
    """By itself, under any name, and as a folder's metadata.json, unless that is no list."""
    rows = [{"target": "0.png", "instruction": "a"}, {"image": "0.png", "prompt": "b"}]
    folder(tmp_path, rows)
    (tmp_path / "metadata.jsonl").unlink()
    for path in (tmp_path / "rows.jsonl", tmp_path / "metadata.json"):
        path.write_text(start + json.dumps(rows, indent=4), encoding="utf-8")
        found = data.Folder(path.parent if path.stem == "metadata" else path)
        assert [row.instruction for row in found.checked_rows] == ["a", "b"]
    rows[1] = "b"
    path.write_text(json.dumps(rows * 10))
    with pytest.raises(ValueError, match="metadata.json entry 2: expected a JSON object.* str"):
        data.Folder(tmp_path)
    path.write_text(json.dumps(9 * rows[:1] + rows))     # one of eleven
    assert len(data.Folder(tmp_path, bad={}).checked_rows) == 10
    path.write_text(json.dumps(rows)[:-1])
    with pytest.raises(ValueError, match="metadata.json: not valid JSON"):
        data.Folder(tmp_path, bad={})
    path.write_text('{"0.png": {"caption": "a"}}')       # as some tools have
    with pytest.raises(FileNotFoundError, match="0.txt .without metadata.jsonl.*metadata.json"):
        data.Folder(tmp_path)


@pytest.mark.parametrize("name, words", [
    ("rows.tsv", "save it as .jsonl, or as .csv"), ("rows.xlsx", "save it as .jsonl"),
    ("rows.parquet", "save it as .jsonl")])
def test_other_tables_are_named(tmp_path, name, words):
    (tmp_path / name).write_text('[{"target": "0.png", "instruction": "a"}]')
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        data.Folder(tmp_path / name)


@pytest.mark.parametrize("row", [
    {"Target_Image": "1.png", "src_img": "0.png", "edit_prompt": "a"},
    {"edited_image": "1.png", "original_image": "0.png", "Edit-Instruction": "a"},
    {"after": "1.png", "before": ["0.png"], "Caption": "a"},
    {"File_Name": "1.png", "reference_images": ["0.png"], "TEXT": "a", "mask": None},
    {"outputNote": "x", "tgt_img_path": "1.png", "input image": "0.png", "text": "a"},
    {"targetImagePath": "1.png", "inputImages": ["0.png"], "editPrompt": "a", "srcImg": None},
    {"target": "1.png", "images": [], "srcImg": "0.png", "instruction": "a", "conds": []},
    {"image": "1.png", "ref_img_0": "0.png", "prompt": "a", "control": "strong"},
    {"edited_image_file_name": "1.png", "kontext_images": "0.png", "prompt": "a", "id": "1.png"}])
def test_the_names_of_public_sets_are_known(tmp_path, row):
    sample, = folder(tmp_path, [row]).all()
    assert sample.target.shape == (32, 48, 3) and sample.instruction == "a"
    assert len(sample.images) == 1 and not sample.conds
    picture = folder(tmp_path, [row]).groups.popitem()[1][0].paths[1]
    assert picture == tmp_path / "0.png"


def test_a_table_of_capital_names_with_numbers(tmp_path):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    (tmp_path / "a.csv").write_text("File_Name,Prompt,Input_Image_2,Input_Image_1,Conds,Note\n"
                                    '0.png,b,2.png,1.png,"[""2.png""]",n\n')
    source = data.Folder(tmp_path / "a.csv")
    (row,), = source.groups.values()
    assert [path.name for path in row.paths] == ["0.png", "1.png", "2.png", "2.png"]
    assert row.natives == 2 and source.unread == {"Note": 1}


@pytest.mark.parametrize("row, words", [
    ({"target": "0.png", "control_images": ["1.png"]}, "'control_images' may be.*'conds'"),
    ({"target": "0.png", "Conditioning Image": "1.png"}, "'Conditioning Image' may be.*'images'"),
    ({"target": "0.png", "hint_1": "gone.jpg"}, "'hint_1' may be"),
    ({"image": "0.png", "target_image": "1.png"}, "of 'target_image' and 'image' the second may"),
    ({"image": "0.png", "file_name": "1.png"}, "'file_name' and 'image' both mean 'target'"),
    ({"target": "0.png", "src_img": "1.png", "before": "2.png"}, "both mean 'images'"),
    ({"target": "0.png", "Image": "1.png", "image": "2.png"}, "may be the picture to edit"),
    ({"target": "0.png", "Before": "1.png", "before": "2.png"}, "both mean 'images'"),
    ({"target": "0.png", "prompt": "b"}, "both mean 'instruction'"),
    ({"target": "0.png", "picture_of_cat": "1.png"},
     "'picture_of_cat' holds a picture, '1.png'.*known name.*input_image"),
    ({"target": "0.png", "more": {"deep": [[1, {"a": "./2.png"}]]}}, "'more' holds a picture"),
    ({"target": "0.png", "images": "https://a.b/c.png"}, "address; save that picture as a file"),
    ({"target": "S3://a/b.png"}, "address"), ({"target": "data:image/png;base64,iV"}, "address"),
    ({"target": "0.png", "images": "sub\\1.png"}, "1.png: no such.*write folders with /"),
    ({"target": "0.png", "images": "sub"}, "sub: is a folder.*name one picture")])
def test_what_has_two_readings_or_none_is_refused(tmp_path, row, words):
    (tmp_path / "sub").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=f"line 1: .*{words}") as error:
        folder(tmp_path, [{"instruction": "a"} | row])
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    folder(tmp_path, [{"instruction": str(i), "target": "0.png"} for i in range(10)])
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"instruction": "a"} | row))
    bad: Bad = {}
    assert len(list(data.Folder(tmp_path, bad=bad).all())) == 10 and len(bad) == 1


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
    bad: Bad = {}
    assert len(told(data.Folder(tmp_path, bad=bad))) == 10 and "b.png" in next(iter(bad))
    for path in (tmp_path / "control").iterdir():
        path.unlink()
    assert all(references == 0 for *_, references, _ in told(data.Folder(tmp_path)))


def test_what_a_folder_of_pairs_leaves_out_is_told(tmp_path):
    """Counted, with examples; what systems leave in folders is not."""
    for part in ("control", "set 2/deep", "notes", "__MACOSX"):
        (tmp_path / part).mkdir(parents=True)
    for name in ("a.jfif", "b.AVIF", "c.ppm", "control/a.png", "control/b_1.tga", "control/c.jpe",
                 "control/d.png", "set 2/1.png", "set 2/deep/2.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    for name in ("a.TXT", "b.txt", "c.txt", "e.txt", "f.caption", "g.psd", "h.mp4", "Thumbs.db",
                 "desktop.ini", ".DS_Store", "control/Thumbs.db", "notes/x.txt", "control/n.json"):
        (tmp_path / name).write_text("make it red")
    source = data.Folder(tmp_path)
    assert [[path.name for path in row.paths] for row in source.checked_rows] == [
        ["a.jfif", "a.png"], ["b.AVIF", "b_1.tga"], ["c.ppm", "c.jpe"]]
    files, folders = source.left_out()
    assert re.match(r"files, 6 \(e.txt, f.caption, g.psd, ...\): neither", files)
    assert re.match(r"pictures in folders below, 2 \(set 2/1.png, set 2/deep/2.png\): ", folders)
    for name in ("e.txt", "f.caption", "g.psd", "h.mp4", "control/n.json", "control/d.png"):
        (tmp_path / name).unlink()
    assert len(data.Folder(tmp_path).left_out()) == 1
    (tmp_path / "b.txt").rename(tmp_path / "b.caption")
    with pytest.raises(FileNotFoundError, match=r"b.AVIF: .*missing, b.txt .*out: .*b.caption"):
        data.Folder(tmp_path)


def test_two_targets_of_one_stem_are_refused(tmp_path):
    """Nobody knows whose the caption is. Elsewhere, both may be skipped."""
    for i in range(20):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    Image.new("RGB", (32, 32)).save(tmp_path / "3.jpg")
    with pytest.raises(ValueError, match=r"3.jpg: another picture has the same name .*3.txt"):
        data.Folder(tmp_path)
    bad: Bad = {}
    source = data.Folder(tmp_path, bad=bad)
    assert len(told(source)) == 19 and [line.split(": ")[0][-5:] for line in bad] == [
        "3.jpg", "3.png"]


def test_pictures_of_skipped_rows_are_named_by_them(tmp_path):
    """What no row names is told; what a bad row names is not."""
    rows = [{"target": "0.png", "instruction": str(i)} for i in range(30)]
    folder(tmp_path, [*rows, {"target": "1.png", "instruction": "x"}])
    for name in ("c.png", "d.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"target": "2.png", "images": ["./c.png"]}))      # no text
        file.write("\n" + json.dumps({"target": "1.png", "instruction": "a", "images": "gone.png"}))
    bad: Bad = {}
    source = data.Folder(tmp_path, bad=bad)
    assert len(bad) == 2 and source.left_out() == ["pictures that no row names, 1 (d.png)"]


def test_looking_below_a_folder_ends_and_is_one_process_s(tmp_path, monkeypatch):
    """However much there is; and not before it is asked for."""
    source = folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    for i in range(4):
        (tmp_path / f"sub{i}").mkdir()
        for j in range(5):
            Image.new("RGB", (32, 32)).save(tmp_path / f"sub{i}/{j}.png")
    assert source.left_out() == ["pictures that no row names, 22 (1.png, 2.png, sub0/0.png, ...)"]
    monkeypatch.setattr(folders, "LOOKED_AT", 8)
    assert source.left_out() == [
        "pictures that no row names, 7 (1.png, 2.png, sub0/0.png, ...) among the first 9 files"]
    monkeypatch.setattr(folders.os, "walk", None)
    data.Folder(tmp_path)


@pytest.mark.parametrize("text, words", [
    ("omniedit=nope", "--data omniedit=nope: not found"), ("nope:2", "--data nope: not found"),
    ("0.png", "0.png: is a picture; name its folder, or a .jsonl or .csv file")])
def test_what_is_no_source_is_named(tmp_path, monkeypatch, text, words):
    folder(tmp_path, [{"target": "0.png", "instruction": "a"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        data.open_source(text, {}, PUBLIC)


def test_the_longest_side(tmp_path):
    """Of a folder's pictures and of a public set's."""
    Image.new("RGB", (1600, 800)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"target": "a.png", "instruction": "a"}))
    for longest, shape in ((512, (256, 512, 3)), (1024, (512, 1024, 3))):
        sample, = data.open_source(str(tmp_path), longest=longest)[0].all()
        assert sample.target.shape == shape
    rows = omniedit()[:1]
    rows[0] |= {"edited_img": cell("blue", (1600, 800))}
    file = write_set(tmp_path, "omniedit", rows)
    subject = write_set(tmp_path, "subjectspatial")
    for longest, shape in ((512, (256, 512, 3)), (1024, (512, 1024, 3))):
        sample, = data.open_source(f"omniedit={file}", {}, PUBLIC, longest=longest)[0].draw(
            np.random.default_rng(0), 1)
        assert sample.target.shape == shape
        sample, = data.open_source(f"subjectspatial={subject}", {}, PUBLIC, longest=longest)[
            0].draw(np.random.default_rng(0), 1)
        assert sample.target.shape == (512, 512, 3)      # never enlarged beyond that


def test_missing_or_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no data.*metadata.jsonl"):
        data.Folder(tmp_path)
    (tmp_path / "10_cat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "10_cat/1.png")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no data.*metadata.json.* below, 1 .10_cat/1.png"):
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
    (tmp_path / "set:2").mkdir()                         # a name that ends as a weight does
    folder(tmp_path / "set:2", [{"target": "0.png", "instruction": "a"}])
    assert data.open_source(f"{tmp_path / 'set:2'}")[1] == 1
    assert data.open_source(f"{tmp_path / 'set:2'}:3")[1] == 3
    with pytest.raises(FileNotFoundError, match="no public set 'cooc'; there are omniedit, "):
        data.open_source(f"cooc={tmp_path}", {}, PUBLIC)
    for text in ("tiny:0", "tiny:-1", "tiny:nan", "tiny:inf"):
        with pytest.raises(ValueError, match="weight"):
            data.open_source(text)


def test_a_folder_may_still_have_a_sign_in_its_name(tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"target": "0.png", "instruction": "a"}))
    assert isinstance(data.open_source(str(folder))[0], data.Folder)
