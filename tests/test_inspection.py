"""support/inspection.py: rows that threads look through, as one would; what goes bad in a run."""
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from support import inspection, pictures
from support.bad_rows import Bad
from support.inspection import looked_through
from support.pictures import checked_size, load_image


def rows(bad: Bad | None) -> Iterator[tuple[int]]:
    """0 to 99 without 20 and 97, which are wrong in themselves."""
    for i in range(100):
        if i not in (20, 97):
            yield (i,)
        elif bad is None:
            raise ValueError(f"line {i}")
        else:
            bad.setdefault(f"line {i}")


def check(i: int) -> int:
    time.sleep(0.004 if i % 10 == 0 else 0)              # others overtake it
    if i in (19, 50):
        raise FileNotFoundError(f"picture {i}")
    return i


def test_order_and_errors_are_those_of_one_thread():
    bad: Bad = {}
    found = list(looked_through(rows, check, bad, "rows"))
    assert found == [i for i in range(100) if i not in (19, 20, 50, 97)]
    assert [*bad] == ["picture 19", "line 20", "picture 50", "line 97"]
    found = []
    with pytest.raises(FileNotFoundError, match="picture 19"):
        found.extend(looked_through(rows, check, None, "rows"))
    assert found == list(range(19))
    found.clear()
    with pytest.raises(ValueError, match="line 20"):     # once all before it is looked at
        for i in looked_through(rows, lambda i: i, None, "rows"):
            found.append(i)
    assert found == list(range(20))


def test_several_threads_look_and_end(monkeypatch):
    monkeypatch.setattr(inspection, "THREADS", 3)
    barrier = threading.Barrier(3, timeout=10)           # breaks unless three are there at once
    assert len(list(looked_through(lambda _: ((i,) for i in range(9)),
                                   lambda i: barrier.wait() >= 0, None, "rows"))) == 9
    before = threading.active_count()
    looking = looked_through(lambda _: ((i,) for i in range(99)), check, [], "rows")
    next(looking)
    looking.close()
    assert threading.active_count() <= before


def test_a_bar_shows_that_something_goes_on(monkeypatch, capsys):
    """For long, and by one process."""
    list(looked_through(rows, check, {}, "my data"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(inspection, "QUIET", 0)
    list(looked_through(rows, check, {}, "my data"))
    assert "looking through my data" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    list(looked_through(rows, check, {}, "my data"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode, options", [
    ("RGB", {}), ("RGBA", {}), ("P", {}), ("I;16", {}), ("RGB", {"exif": 6}), ("L", {"exif": 3})])
def test_a_size_is_known_without_colours(tmp_path, monkeypatch, mode, options):
    """Turned as load_image() turns; a cut picture is found, and colours are not converted."""
    exif = Image.Exif()
    exif[0x0112] = options.get("exif", 1)
    Image.new(mode, (48, 32)).save(tmp_path / "a.png", exif=exif)
    wanted, converted = load_image(tmp_path / "a.png").size, []
    monkeypatch.setattr(pictures, "as_rgb", lambda image, *colours: converted.append(image.size))
    assert checked_size(tmp_path / "a.png") == wanted and converted == [(1, 1)]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match="b.png: cannot be read as a picture"):
        checked_size(tmp_path / "b.png")


# -------------------------------------------------------------------------- what goes bad in a run

def folder(path: Path, number: int = 20) -> Path:
    lines = []
    for i in range(number):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(path / f"{i}.png")
        lines.append(json.dumps({"target": f"{i}.png", "instruction": str(i)}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def drawn(source: data.Folder, numbers: range, size: int = 4) -> list[list[str]]:
    return [[s.instruction for s in source.draw(np.random.default_rng(i), size)] for i in numbers]


def test_another_row_is_drawn_for_one_that_goes_bad(tmp_path):
    bad: Bad = {}
    source = data.Folder(folder(tmp_path), bad=bad)
    before = drawn(source, range(40))
    (tmp_path / "3.png").unlink()
    (tmp_path / "7.png").write_bytes(b"torn")
    after = drawn(source, range(40))
    for old, new in zip(before, after):                  # what is good stays, in its order
        assert len(set(new)) == 4 and not {"3", "7"} & set(new)
        kept = [text for text in old if text not in ("3", "7")]
        assert new[:len(kept)] == kept
    assert drawn(source, range(39, -1, -1))[::-1] == after       # whatever was drawn before
    assert len(bad) == 2 and all("line" in line for line in bad)
    assert sorted(s.instruction for s in source.all()) == sorted(
        str(i) for i in range(20) if i not in (3, 7))
    (tmp_path / "9.png").unlink()
    with pytest.raises(ValueError, match="3 of 20 rows are bad, too many.*one in ten, here 2"):
        drawn(source, range(40))
    with pytest.raises(FileNotFoundError, match="line 4: .*3.png"):
        source = data.Folder(tmp_path)
    for i in (3, 7, 9):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    source = data.Folder(tmp_path)
    (tmp_path / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match="line 4: .*3.png: no such picture"):
        drawn(source, range(40))


def test_a_group_that_is_all_bad_is_left(tmp_path):
    """And a batch larger than its group has what is left of it."""
    folder(tmp_path)
    Image.new("RGB", (64, 32)).save(tmp_path / "0.png")          # a group of its own
    bad: Bad = {}
    source = data.Folder(tmp_path, bad=bad)
    assert ["0"] in drawn(source, range(40))
    (tmp_path / "0.png").unlink()
    found = drawn(source, range(40), 30)
    assert all(len(batch) == 19 for batch in found) and len(bad) == 1
