"""1,000 broken inputs: each is refused in one line that names it, or harmlessly works."""
import csv
import io
import json
import re
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import data
from forks import Forks
from helpers import SETS
from support.bad_rows import Bad
from support.conditions import pick
from support.parquet import shapes_of
from support.public_sets import PUBLIC

Random = np.random.Generator
KINDS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


def picture(rng: Random, kind: str = "PNG") -> bytes:
    """A small picture, of a mode that its kind knows, at times with an EXIF rotation."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    mode = pick(rng, {"PNG": ["RGB", "RGBA", "L", "P", "I;16"], "TIFF": ["RGB", "L", "P"]}.get(
        kind, ["RGB"]))
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).convert(
        "L" if mode == "I;16" else mode)
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") and rng.random() < 0.5 else {}
    image.convert(mode).save(file, kind, **options)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks)


def cut(rng: Random, kind: str) -> bytes:
    content = picture(rng, kind)
    return content[:int(rng.integers(len(content)))]


def flipped(rng: Random, kind: str) -> bytes:
    """A few bits of the head, where a picture says what it is, or of anywhere."""
    content = bytearray(picture(rng, kind))
    for _ in range(int(rng.integers(1, 6))):
        content[int(rng.integers(pick(rng, [60, 200, len(content)])) % len(content))] ^= (
            1 << int(rng.integers(8)))
    return bytes(content)


def lying(rng: Random, kind: str) -> bytes:
    """Sizes, lengths and counts replaced by large, small or negative ones, checksums made good."""
    content = bytearray(picture(rng, kind))
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.integers(4, min(len(content), pick(rng, [40, 120, 4000])) - 4))
        value = pick(rng, [0, 1, 2 ** 15, 2 ** 16 - 1, 2 ** 31 - 1, 2 ** 32 - 1])
        content[at:at + 4] = struct.pack(pick(rng, ["<I", ">I"]), value)
    if kind == "PNG" and rng.random() < 0.7:
        width, height = (pick(rng, [0, 1, 9, 4000, 30000, 2 ** 31 - 1]) for _ in range(2))
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    if kind == "TIFF" and rng.random() < 0.7:            # an entry of its list has another type
        content = bytearray(picture(rng, kind))
        first = struct.unpack("<I", content[4:8])[0] + 2
        content[first + 12 * int(rng.integers(9)) + 2] = int(rng.integers(1, 14))
    return bytes(content)


def bomb(rng: Random, kind: str) -> bytes:
    """Much from little: a picture of many pixels, texts and profiles that unpack to megabytes."""
    head = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    body, end = (b"IDAT", zlib.compress(bytes(8 * 25))), (b"IEND", b"")
    much = zlib.compress(bytes(40_000_000), 1)
    wide = (b"IHDR", struct.pack(">IIBBBBB", 2 ** 16, 2 ** 15, 8, 2, 0, 0, 0))
    tall = (b"IHDR", struct.pack(">IIBBBBB", 2 ** 20, 64, 8, 2, 0, 0, 0))
    deep = bytearray(picture(rng, "JPEG"))
    at = deep.index(b"\xff\xc0") + 5
    deep[at:at + 4] = struct.pack(">HH", 65535, 65535)
    return pick(rng, [
        png(tall, body, end), png(wide, body, end),
        png(head, (b"zTXt", b"a\0\0" + much), body, end),
        png(head, (b"iTXt", b"a\0\1\0\0\0" + much), body, end),
        png(head, (b"iCCP", b"a\0\0" + much), body, end), png(head, (b"IDAT", much), end),
        png(head, *[(b"tEXt", b"a\0" + bytes(100_000))] * 100, body, end), bytes(deep),
        b"P6 40000 40000 255\n" + bytes(99), b"P6 " + b"9" * 10_000 + b" 1 255\n"])


def in_a_folder(broken: Callable[[Random, str], bytes]) -> Callable[[Random, Path], str]:
    """One of a folder's pictures, the target or a reference, is broken."""
    def make(rng: Random, folder: Path) -> str:
        kind = pick(rng, list(KINDS))
        name = f"broken.{KINDS[kind]}"
        (folder / name).write_bytes(broken(rng, kind))
        (folder / "good.png").write_bytes(picture(rng))
        target, image = pick(rng, [(name, "good.png"), ("good.png", name)])
        (folder / "metadata.jsonl").write_text(json.dumps(
            {"target": target, "instruction": "a", "images": [image]}))
        return str(folder)
    return make


def in_parquet(broken: Callable[[Random, str], bytes]) -> Callable[[Random, Path], str]:
    """Two of a public set's pictures are broken."""
    def make(rng: Random, folder: Path) -> str:
        name = pick(rng, list(SETS))
        rows = SETS[name]()[:3]
        for row in rows[:2]:
            column = pick(rng, [c for c in row if isinstance(row[c], dict) and "bytes" in row[c]])
            row[column] = {"bytes": broken(rng, pick(rng, list(KINDS)))}
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
        return f"{name}={folder}"
    return make


def odd(rng: Random, folder: Path) -> object:
    """What does not belong where a path, a text, a number or a list is expected."""
    deep: object = "a"
    for _ in range(int(rng.integers(1, 900))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return pick(rng, [
        None, 3, -1, 1.5, True, [], {}, "", " ", [[]], [None], [3], ["0.png", 3], {"a": 1}, deep,
        "0\0.png", "\0", "../0.png", "/etc/hostname", str(folder.parent / "0.png"), "a/../../b.png",
        ".", "..", "/", "~", "C:\\0.png", "a" * 300, "a/" * 3000, "a" * 200_000, "a\nb.png",
        "\ud800.png", "\udcff.png", "[", "[]", "[1]", "metadata.jsonl", "sub", "0.png/", "0.png/a",
        "file:///etc/hostname", float("nan"), float("inf"), 10 ** 30, ["0.png"] * 9, "é" * 300])


def good_row(rng: Random) -> dict:
    return {"target": "0.png", "instruction": "a", "images": ["0.png"], "conds": [], "task": "x"}


def jsonl(rng: Random, folder: Path) -> str:
    """A line with an entry that does not belong there, or no JSON, no text or no end."""
    (folder / "0.png").write_bytes(picture(rng))
    (folder / "sub").mkdir()
    row, names = good_row(rng), ["target", "instruction", "images", "conds", "task", "prompt",
                                 "file_name", "control_path", "control_path_0", "control_path_10",
                                 "control_path_" + "9" * 20, "\ud800", "\0", ""]
    for name in rng.choice(names, pick(rng, [1, 1, 2])):
        row[str(name)] = odd(rng, folder)
    if rng.random() < 0.3:
        del row[pick(rng, list(row))]
    line = json.dumps(row, ensure_ascii=bool(rng.random() < 0.9)).encode(
        "utf-8", "surrogatepass")
    line = pick(rng, [
        line, line, line, line[:int(rng.integers(len(line)))], line.replace(b'"', b"'"),
        b"\xff" + line,
        line + line, b"[" * 100_000, b'{"a":' * 100_000, b'{"task": ' + b"9" * 10_000 + b"}",
        b"\0" * 99, line.decode("utf-8", "replace").encode("utf-16"), b"[" + line + b"]", b"null",
        b'{"instruction": "' + b"a" * 3_000_000, b'"' + b"a" * 3_000_000 + b'"', b"3", b"{}",
        b"{,}",
        b"\xef\xbb\xbf" * 2 + line, line + b"\x1a", b"\x1b[2J" + line])
    (folder / "metadata.jsonl").write_bytes(json.dumps(good_row(rng)).encode() + b"\n" + line)
    return str(folder)


def table(rng: Random, folder: Path) -> str:
    """A .csv file with odd cells, a broken quote, a wrong number of cells, other separators."""
    (folder / "0.png").write_bytes(picture(rng))
    (folder / "sub").mkdir()
    names = pick(rng, [["file_name", "prompt", "images"], ["target", "instruction", "images"],
                       ["target", "target", "instruction"], ["image", "target", "text"], [],
                       ["file_name", "", "text"], ["target", "instruction", "control_path_0"],
                       ["target", "instruction", "task"], ["a", "b", "c"],
                       [" target", " text ", ""]])
    rows = [["0.png", "a", ""], ["0.png", "a", '["0.png", "0.png"]'], ["0.png", "a", "0.png"]]
    row = pick(rng, rows)
    value = odd(rng, folder)
    row[int(rng.integers(3))] = pick(rng, [
        str(value), json.dumps(value), "[" * 50_000 + "]", '["0.png"', "[0.png]", '[3]', "[null]",
        '{"a": 1}', "b" * 140_000, "0.png, 0.png", 'a"b', "a\r\nb"])
    rows[-1] += pick(rng, [[], [], ["more"], [""], ["0.png"] * 5])
    if rng.random() < 0.2:
        row.pop()
    file = io.StringIO()
    csv.writer(file, delimiter=pick(rng, [",", ",", ",", ";", "\t"]), lineterminator=pick(
        rng, ["\n", "\r\n", "\r"])).writerows([names, *rows])
    content = file.getvalue().encode("utf-8", "surrogatepass")
    content = pick(rng, [
        content, content, content, content[:int(rng.integers(len(content)))], content + b'"open, ',
        content.replace(b'"', b"'"), content.replace(b",", b'",'), b"\xef\xbb\xbf" + content,
        content.decode("utf-8", "replace").encode("utf-16"), content + b"\0\0", content + b"\xff",
        b"", b"\n\n\n", b'"' * 999, b"," * 99_999, content + b"," * 99_999, content * 2,
        content.replace(b"0.png", b'"0.png"x')])
    (folder / "metadata.csv").write_bytes(content)
    return str(pick(rng, [folder, folder / "metadata.csv"]))


def pairs(rng: Random, folder: Path) -> str:
    """Pictures and texts of one stem, of which one is broken, misnamed or no file."""
    (folder / "control").mkdir()
    for name in ("1.png", "2.png", "control/1.png", "control/2_0.png", "control/2_1.png"):
        (folder / name).write_bytes(picture(rng))
    for name in ("1.txt", "2.txt"):
        (folder / name).write_text("make it red")
    victim = folder / pick(rng, ["1.png", "1.txt", "control/1.png", "control/2_1.png"])
    content = victim.read_bytes()
    victim.unlink()
    pick(rng, [
        lambda: None, victim.mkdir, lambda: victim.write_bytes(b""), lambda: victim.symlink_to("x"),
        lambda: victim.write_bytes(content[:9]), lambda: victim.write_bytes(b"\xff\xfe\0"),
        lambda: victim.write_bytes(b" \n"), lambda: victim.write_bytes(b"a" * 2_000_000),
        lambda: victim.symlink_to(victim.name), lambda: victim.write_bytes(b"\0"),
        lambda: victim.with_stem("3").write_bytes(content),
        lambda: victim.with_stem(f"1_{'9' * 200}").write_bytes(content),
        lambda: victim.with_stem("1_\u0664").write_bytes(content),
        lambda: victim.with_stem("1_\u00b2").write_bytes(content)])()
    return str(folder)


def damaged(rng: Random, folder: Path) -> str:
    """Bytes of a parquet file cut off, flipped, or its lengths replaced, mostly in its footer."""
    name = pick(rng, list(SETS))
    file = folder / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(SETS[name]()), file, compression=pick(
        rng, ["snappy", "none", "gzip", "zstd"]), use_dictionary=bool(rng.integers(2)))
    content = bytearray(file.read_bytes())
    foot = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(pick(rng, [0, foot]), len(content) - 8))
        if rng.random() < 0.5:
            content[at] ^= 1 << int(rng.integers(8))
        else:                                            # a length of the file's own notation
            content[at:at + 5] = pick(rng, [b"\xff\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x08"])
    if rng.random() < 0.2:
        content[-8:-4] = struct.pack("<I", pick(rng, [0, 1, 2 ** 31, 2 ** 32 - 1, len(content)]))
    if rng.random() < 0.2:
        del content[int(rng.integers(len(content))):]
    file.write_bytes(content)
    return f"{name}={folder}"


def retyped(rng: Random, folder: Path) -> str:
    """A public set of which a column has another type, or is missing."""
    name = pick(rng, list(SETS))
    rows = SETS[name]()[:3]
    column, value = pick(rng, list(rows[0])), pick(rng, [
        None, 3, 1e300, float("nan"), True, "a", b"\xff\xfe", [], [3], [None], [["a"]], {"a": 1},
        {"bytes": None}, {"bytes": "text"}, {"bytes": 3}, {"bytes": b""}, {"item": None},
        {"bytes": [1]}, [0.5, float("nan"), 0.1, 0.1], [0.5] * 3, [1e300] * 4, ["a"] * 4, [""],
        {"item": "a", "description_0": 3}, {"item": " "}, [{"bytes": b""}], "a" * 100_000])
    made = pyarrow.Table.from_pylist([row | {column: value} for row in rows])
    if rng.random() < 0.2:
        made = made.drop_columns([column])
    elif rng.random() < 0.3:
        kind, what = pick(rng, [
            (pyarrow.date32(), 2 ** 31 - 1), (pyarrow.timestamp("ms"), 2 ** 62),
            (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("a", 1)]), (pyarrow.time32("s"), -1),
            (pyarrow.large_binary(), b"\xff"), (pyarrow.duration("s"), 2 ** 62)])
        made = made.drop_columns([column]).append_column(column, pyarrow.array(
            [what] * len(made), kind))
    parquet.write_table(made, folder / "a.parquet")
    return f"{name}={folder}"


def coco(rng: Random, folder: Path) -> str:
    """The plain folder, of which an entry, a list, a file or a picture is not what it should be."""
    (folder / "train2017").mkdir()
    (folder / "annotations").mkdir()
    (folder / "train2017/0.png").write_bytes(picture(rng))
    points = rng.integers(0, 40, 51).tolist()
    captions = {"images": [{"id": i, "file_name": "0.png"} for i in range(2)], "annotations": [
        {"image_id": i % 2, "caption": "a dog"} for i in range(4)]}
    people = {"annotations": [{"image_id": 0, "keypoints": points}]}
    whole = {"captions": captions, "person_keypoints": people}
    name = pick(rng, list(whole))
    part = pick(rng, list(whole[name]))
    entry = pick(rng, whole[name][part])
    value = odd(rng, folder) if rng.random() < 0.7 else pick(rng, [
        points[:50], points + [1], [1e300] * 51, [float("nan")] * 51, [10 ** 400] * 51, ["1"] * 51,
        [True] * 51, [[1, 1, 2]] * 17, [-9.9e4] * 51, [9.9e4, -9.9e4, 2] * 17, [0] * 51])
    pick(rng, [lambda: entry.update({pick(rng, list(entry)): value}), lambda: entry.clear(),
               lambda: entry.update({pick(rng, list(entry)): value}),
               lambda: entry.update({pick(rng, list(entry)): value}),
               lambda: whole[name].update({part: value}), lambda: whole[name].pop(part),
               lambda: whole.update({name: value}), lambda: whole[name][part].append(value)])()
    for name, content in whole.items():
        text = json.dumps(content).encode()
        if rng.random() < 0.1:
            text = pick(rng, [text[:int(rng.integers(len(text)))], b"\xff" + text, b"[" * 99_999,
                              b"", text.decode().encode("utf-16"), text + b"\0"])
        (folder / f"annotations/{name}_train2017.json").write_bytes(text)
    if rng.random() < 0.1:
        pick(rng, sorted(folder.rglob("*.*"))).unlink()
    if rng.random() < 0.2:
        (folder / "depth").mkdir()
        (folder / "depth/0.png").write_bytes(pick(rng, [cut, flipped, lying, bomb])(rng, "PNG"))
    return f"coco={folder}"


BROKEN = {"cut": in_a_folder(cut), "flipped": in_a_folder(flipped), "lying": in_a_folder(lying),
          "bomb": in_a_folder(bomb), "cut cells": in_parquet(cut), "flipped cells": in_parquet(
              flipped), "lying cells": in_parquet(lying), "jsonl": jsonl, "csv": table,
          "pairs": pairs, "damaged": damaged, "retyped": retyped, "coco": coco}
TIMES = {"flipped": 190, "bomb": 20, "jsonl": 150, "csv": 120, "coco": 120, "damaged": 120}
EACH = 40                                                # of every other kind
MOSTLY = 0.4                                             # a flipped bit may change a colour only


def broken(kind: str, number: int, folder: Path) -> str:
    """A source of that kind, broken in its own way."""
    folder.mkdir()
    return BROKEN[kind](np.random.default_rng([number, len(kind)]), folder)


def use(text: str, bad: Bad | None = None) -> list[data.Sample]:
    """All that training does with a source."""
    size = (32, 32) if text.startswith("subjectspatial") else None           # its own is 512 x 512
    source, _ = data.open_source(text, {}, PUBLIC, bad=bad, size=size)
    batches = [source.draw(np.random.default_rng(i), 2) for i in range(4)]
    for batch in batches:
        assert len({str(shapes_of(sample)) for sample in batch}) == 1
    return [*source.all(), *(sample for batch in batches for sample in batch)]


@pytest.mark.filterwarnings("ignore::UserWarning")       # Pillow's, which data.py leaves out
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data_is_refused_in_one_line_or_harmless(tmp_path: Path, kind: str) -> None:
    refused, unit = 0, 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(TIMES.get(kind, EACH)):
        folder = tmp_path / str(number)
        text = broken(kind, number, folder)
        for bad in (None, {}):
            start = time.monotonic()
            try:
                samples = use(text, bad)
            except (ValueError, FileNotFoundError) as error:
                refused += bad is None
                line = str(error)
                assert str(folder) in line and len(line) < 4000, line[:9999]
                assert not re.search(r"[\n\r\0]", line), repr(line)
            else:
                assert samples and all(
                    p.dtype == np.uint8 and p.shape[2:] == (3,) and min(p.shape[:2]) >= 16
                    for s in samples for p in (s.target, *s.images, *s.conds))
                assert all((s.instruction + s.task).strip().encode() for s in samples)
            assert time.monotonic() - start < 3
    number = TIMES.get(kind, EACH)
    assert refused == number if "cut" in kind else MOSTLY * number <= refused
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * unit < 200_000_000                    # bytes; a head may claim gigabytes


def test_there_are_a_thousand() -> None:
    assert sum(TIMES.get(kind, EACH) for kind in BROKEN) == 1000


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_says_so_in_one_line(tmp_path: Path, forks: Forks, short_model: Path) -> None:
    """Ten kinds, each broken in the first way that a first batch notices."""
    commands: dict[Path, str] = {}
    for kind in list(BROKEN)[:10]:
        for number in range(99):
            folder = tmp_path / f"{kind}-{number}".replace(" ", "-")
            text = broken(kind, number, folder)
            if kind == "cut" and not (folder / "broken.tif").exists():
                continue                                 # at which Pillow warns
            try:
                next(data.batches([data.open_source(text, {}, PUBLIC, size=(64, 64))], 4, 0))
            except (ValueError, FileNotFoundError):
                commands[folder] = text
                break
    assert len(commands) == 10
    for folder, text in commands.items():
        done = forks.run("train.py", "--data", text, "--steps", 1, "--out", tmp_path / "out",
                         "--model", short_model)
        assert done.returncode == 2, done
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr) and str(folder) in done.stderr
