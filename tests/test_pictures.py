"""support/pictures.py, sheets.py: files of any kind as a person sees them, sheets of several."""
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFont, ImageOps

from support import sheets
from support.pictures import (LOSSY, checked_size, fitted, given_picture, load_image,
                              save_picture)
from support.sheets import grid

WIDE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322],   # Adobe RGB (1998) at
                 [0.01947, 0.06087, 0.74457]])                               # D50: RGB -> XYZ
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061],
                 [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256


def profile(space: bytes, kind: bytes = b"mntr", pcs: bytes = b"XYZ ", **tags: bytes) -> bytes:
    """An ICC profile of version 2, as its specification lays it out."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    light = struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    head = struct.pack(">I4sI4s4s4s12x4s28x12s48x", start + len(body), b"test", 0x02400000, kind,
                       space, pcs, b"acsp", light)
    return head + struct.pack(">I", len(tags)) + table + body


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


CURVE = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256))
ADOBE = profile(b"RGB ", wtpt=xyz((0.9505, 1, 1.0891)), rXYZ=xyz(WIDE[:, 0]), gXYZ=xyz(WIDE[:, 1]),
                bXYZ=xyz(WIDE[:, 2]), rTRC=CURVE, gTRC=CURVE, bTRC=CURVE)
GREY = profile(b"GRAY", wtpt=xyz((0.9642, 1, 0.8249)), kTRC=b"curv\0\0\0\0" + struct.pack(
    ">IH", 1, round(1.8 * 256)))                         # an old Macintosh's
# Inks of which each, on its own, is the same middle grey (L = 50), black black, and nothing white.
INKS = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(
    ">9i", *(65536 * (i % 4 == 0) for i in range(9))) + bytes(range(256)) * 4 + b"".join(
    bytes([255 if i == 0 else 0 if i % 2 else 128, 128, 128]) for i in range(16)
    ) + bytes(range(256)) * 3
PRESS = profile(b"CMYK", b"prtr", b"Lab ", wtpt=xyz((0.9642, 1, 0.8249)), A2B0=INKS)
OURS = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def as_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] -> 0..255."""
    curved = np.where(linear <= 0.0031308, 12.92 * linear,
                      1.055 * np.clip(linear, 0, 1) ** (1 / 2.4) - 0.055)
    return 255 * np.clip(curved, 0, 1)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "avif"])
def test_colour_profiles_are_honoured(tmp_path: Path, kind: str) -> None:
    """Adobe RGB by its own definition; a profile that is sRGB changes nothing at all."""
    levels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = levels.repeat(16, 0).repeat(16, 1)          # large even ones: a JPEG keeps them
    lossless = {} if kind in ("png", "tif") else {"quality": 100, "subsampling": 0} if (
        kind == "jpg") else {"lossless": True} if kind == "webp" else {
        "quality": 100, "subsampling": "4:4:4"}
    for name, icc in (("wide", ADOBE), ("same", OURS), ("bare", None)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.{kind}", **lossless, icc_profile=icc)
    wide, same, bare = (np.asarray(load_image(tmp_path / f"{name}.{kind}")).astype(float)
                        for name in ("wide", "same", "bare"))
    assert (same == bare).all()
    wanted = as_srgb((bare / 255) ** GAMMA @ (np.linalg.inv(SRGB) @ WIDE).T)
    assert np.abs(wide - wanted).max() < 2 and np.abs(wide - bare).max() > 20


def test_profiles_of_greys_palettes_and_alpha(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    grey.save(tmp_path / "grey.png", icc_profile=GREY)
    wanted = as_srgb((np.arange(256).reshape(16, 16, 1) / 255) ** 1.8)
    assert np.abs(np.asarray(load_image(tmp_path / "grey.png")) - wanted).max() < 2
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    deep.save(tmp_path / "deep.png", icc_profile=GREY)
    assert np.abs(np.asarray(load_image(tmp_path / "deep.png")) - wanted).max() < 2
    for name, icc in (("wrong.png", ADOBE), ("plain.png", None)):            # another space's
        grey.save(tmp_path / name, icc_profile=icc)
    assert load_image(tmp_path / "wrong.png").tobytes() == load_image(
        tmp_path / "plain.png").tobytes()
    green = tuple(as_srgb((np.linalg.inv(SRGB) @ WIDE) @ (np.array([60, 200, 90]) / 255) ** GAMMA))
    image = Image.new("RGBA", (4, 4), (60, 200, 90, 255))
    image.putpixel((0, 0), (60, 200, 90, 0))
    image.save(tmp_path / "alpha.png", icc_profile=ADOBE)
    image.convert("RGB").quantize(4).save(tmp_path / "palette.png", transparency=9,
                                             icc_profile=ADOBE)
    alpha, palette = (load_image(tmp_path / f"{name}.png") for name in ("alpha", "palette"))
    assert alpha.getpixel((0, 0)) == (255, 255, 255)
    for found in (alpha, palette):
        assert found.getpixel((2, 2)) == pytest.approx(green, abs=2)


def test_other_spaces(tmp_path: Path) -> None:
    """CIELAB by its own definition; without a profile, inks as Pillow mixes them."""
    for lab, linear in (((128, 128, 128), 0.184), ((255, 128, 128), 1.0), ((0, 128, 128), 0.0)):
        Image.new("LAB", (4, 4), lab).save(tmp_path / "lab.tif")
        found = load_image(tmp_path / "lab.tif").getpixel((0, 0))
        assert found == pytest.approx((float(as_srgb(np.array(linear))),) * 3, abs=2)
    Image.new("LAB", (4, 4), (140, 190, 170)).save(tmp_path / "lab.tif")     # reddish
    red, green, blue = load_image(tmp_path / "lab.tif").getpixel((0, 0))
    assert red > 200 > green and red > blue
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "ink.tif")
    assert load_image(tmp_path / "ink.tif").getpixel((0, 0)) == (255, 0, 0)
    middle = float(as_srgb(np.array(0.184)))
    for kind in ("jpg", "tif"):
        for inks, grey in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), middle), ((0, 255, 0, 0), middle),
                           ((0, 0, 0, 255), 0)):
            Image.new("CMYK", (16, 16), inks).save(tmp_path / f"ink.{kind}", icc_profile=PRESS)
            found = load_image(tmp_path / f"ink.{kind}").getpixel((8, 8))
            assert found == pytest.approx((grey,) * 3, abs=3)


def test_broken_profiles_are_not_used_and_told_once_each(tmp_path: Path, capsys) -> None:
    """As viewers do: the picture is there, and its numbers are taken as sRGB."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", icc_profile=ADOBE[:200])
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.png", icc_profile=b"no profile")
    for name in ("a.png", "b.png", "a.png"):
        assert load_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)
    assert capsys.readouterr().err.count("profile is broken") == 2


def tiff(bits: int, photometric: int, form: int, pixels: bytes) -> bytes:
    """A grey picture of two pixels."""
    entries = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1),
               (279, len(pixels)), (339, form)]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(
        struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in entries) + bytes(4)
    assert len(head) == 122
    return head + pixels


@pytest.mark.parametrize("bits, photometric, form, pixels, wanted", [
    (16, 1, 1, struct.pack("<HH", 65535, 257 * 9), (255, 9)),
    (16, 0, 1, struct.pack("<HH", 65535, 257 * 9), (0, 246)),                # white is 0
    (8, 0, 1, bytes([255, 9]), (0, 246)), (12, 1, 1, bytes([0xff, 0xf8, 0x08]), (255, 128)),
    (16, 1, 2, struct.pack("<hh", 9999, -5), "32 bits or with a sign"),
    (32, 1, 1, struct.pack("<II", 2 ** 31, 5), "32 bits or with a sign"),
    (32, 1, 3, struct.pack("<ff", 0.5, float("nan")), "floats"),
    (16, 1, 3, bytes(4), "identify")])
def test_depths_of_grey(tmp_path: Path, bits, photometric, form, pixels, wanted) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(bits, photometric, form, pixels))
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=f"a.tif: cannot be read.*{wanted}"):
            load_image(tmp_path / "a.tif")
    else:
        found = load_image(tmp_path / "a.tif")
        assert tuple(np.asarray(found)[0, :, 0]) == wanted


def test_16_bits_of_colour_or_of_a_grey_that_is_clear(tmp_path: Path) -> None:
    for kind, extra, values, wanted in (
            (2, b"", (65535, 257 * 9, 0), (255, 9, 0)),
            (6, b"", (65535, 257 * 9, 0, 65535), (255, 9, 0)), (4, b"", (257 * 9, 0), (255,) * 3),
            (0, struct.pack(">H", 257 * 9), (257 * 9,), (255,) * 3),
            (0, struct.pack(">H", 257 * 9 + 1), (257 * 9,), (9,) * 3)):
        parts = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)), (b"tRNS", extra),
                 (b"IDAT", zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))),
                 (b"IEND", b"")]
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in parts if body or name == b"IEND"))
        assert load_image(tmp_path / "a.png").getpixel((0, 0)) == wanted


@pytest.mark.parametrize("kind, words", [("gif", "moves"), ("webp", "moves"), ("png", "moves"),
                                         ("avif", "moves"), ("tiff", "several pages")])
def test_files_of_several_pictures_are_refused(tmp_path: Path, kind: str, words: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=f"a.{kind}: .*{words}.*save the one"):
        load_image(tmp_path / f"a.{kind}")
    frames[0].save(tmp_path / f"b.{kind}")
    assert load_image(tmp_path / f"b.{kind}").getpixel((0, 0))[0] > 250


def test_a_camera_s_other_pictures_are_no_pages(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")      # as telephones call them
    for name, pages in (("a.tif", []), ("b.tif", [Image.new("RGB", (16, 16))])):
        small = Image.new("RGB", (8, 8), "blue")
        small.encoderinfo = {"tiffinfo": {254: 1}}       # a smaller copy
        Image.new("RGB", (16, 16), "red").save(
            tmp_path / name, save_all=True, append_images=[small, *pages])
    for name in ("a.jpg", "a.tif"):
        assert load_image(tmp_path / name).getpixel((0, 0))[0] > 250
    with pytest.raises(ValueError, match="b.tif: .*several pages"):          # the third is one
        load_image(tmp_path / "b.tif")


def test_a_telephone_s_kind_needs_a_package(tmp_path: Path, monkeypatch) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="a.HEIC: .*pip install pillow-heif; or save it as"):
        load_image(tmp_path / "a.HEIC")
    asked: list[bool] = []
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(
        register_heif_opener=lambda: asked.append(True)))
    assert load_image(tmp_path / "a.HEIC").getpixel((0, 0)) == (255, 0, 0) and asked


def test_pictures_are_read_as_a_person_sees_them(tmp_path):
    picture = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6                                     # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)
    for tag, kind in ((0x128, 2), (0x213, 1), (0x102, 4)):       # of other types than they should
        entries = [(0x112, 3, 1, b"\0\6\0\0"), (tag, kind, 1, b"\0\1\x11\x70")]
        picture.save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\2" + b"".join(
            struct.pack(">HHI4s", *entry) for entry in entries) + bytes(4))
        assert load_image(tmp_path / "odd.jpg").size == (2, 4)
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


@pytest.mark.parametrize("kind, options", [
    ("jpg", {}), ("png", {}), ("webp", {"lossless": True}), ("tif", {}),
    ("tif", {"compression": "tiff_lzw"})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_once(tmp_path: Path, kind: str, options: dict,
                                  orientation: int) -> None:
    """As Pillow's own function turns it; and not again when what was read is given on."""
    exif, file = Image.Exif(), tmp_path / f"a.{kind}"
    exif[0x0112] = orientation
    corner = np.zeros((16, 32, 3), np.uint8)
    corner[:8, :8] = 255
    Image.fromarray(corner).save(file, exif=exif, **options)
    with Image.open(file) as image:
        wanted = ImageOps.exif_transpose(image).convert("RGB")
    found = load_image(file)
    assert found.tobytes() == wanted.tobytes() and checked_size(file) == wanted.size
    assert given_picture(found).tobytes() == wanted.tobytes()


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:600])
    Image.new("1", (2 ** 16, 1)).save(tmp_path / "long.png")         # no camera's
    for name in ("text.png", "empty.png", "cut.png", "long.png"):
        with pytest.raises(ValueError, match=name) as error:
            load_image(tmp_path / name)
        assert str(error.value).count(name) == 1         # said once
        assert ("it is empty" in str(error.value)) == (name == "empty.png")
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


def test_letters_that_pillow_s_font_lacks_are_the_machine_s(monkeypatch):
    """The first font that is there; Pillow's, with boxes for the letters, where there is none."""
    own, machine = ImageFont.load_default(10), ImageFont.load_default(12)

    def truetype(name, size):
        if name != "arial.ttf":
            raise OSError("cannot open resource")
        return machine
    monkeypatch.setattr(sheets.ImageFont, "truetype", truetype)
    monkeypatch.setattr(sheets.ImageFont, "load_default", lambda size: own)
    assert sheets.font_for("make it bigger", 10) is own
    assert sheets.font_for("mach es größer", 10) is machine
    monkeypatch.setattr(sheets.ImageFont, "truetype", lambda *_: truetype("none", 10))
    assert sheets.font_for("mach es größer", 10) is own


def test_a_grid_has_rows_side_by_side_with_gaps_and_frames():
    """Two rows across, of which the second failed; a third one below, and longer texts."""
    red, blue, green = (np.full((32, 32, 3), colour, np.uint8)
                        for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0)))
    rows = [[red, blue, green], [blue, green], [green, blue]]
    sheet = grid(rows, ["a", "b " * 99, "c"], 2, lines=2, gap=4, failed=[False, True, False])
    width, height = 3 * (32 + 4) + 4, 32 + 2 * 14        # of a row
    assert sheet.shape == (2 * height, 2 * width, 3) and sheet.dtype == np.uint8
    def picture(left: int, top: int, column: int) -> np.ndarray:
        edge = left + 36 * column
        return sheet[top:top + 32, edge:edge + 32]
    assert all((picture(0, 0, i) == rows[0][i]).all() for i in range(3))
    assert (picture(width, 0, 0) == 128).all() and (picture(width, 0, 2) == green).all()
    assert (picture(0, height, 1) == green).all() and (picture(0, height, 2) == blue).all()
    result = picture(width, 0, 1)                        # the last but one, with its frame
    assert (result[3:-3, 3:-3] == blue[0, 0]).all()
    frame = np.ones((32, 32), bool)
    frame[3:-3, 3:-3] = False
    assert (result[frame] == red[0, 0]).all()
    assert (sheet[:32, 32:36] == 128).all()              # a gap beside a picture, two beside a row
    assert (sheet[:32, width - 4:width + 36] == 128).all() and (sheet[height:, width:] == 128).all()
    for line in range(2):                                # the long text has two lines, others one
        top = 32 + 14 * line
        assert len(np.unique(sheet[top + 2:top + 13, width:])) > 1
    assert len(np.unique(sheet[32 + 15:32 + 28, :width])) == 1


def test_fitted_keeps_aspect_and_never_enlarges():
    assert fitted((1000, 500)) == (512, 256) and fitted((100, 60)) == (96, 64)


def test_pictures_are_written_as_well_as_a_kind_can(tmp_path: Path) -> None:
    """Noise comes back to the byte but where a kind is LOSSY, and there better than by default."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def error(file: Path) -> float:
        return float(np.abs(np.asarray(Image.open(file).convert("RGB"), int) - noise).mean())
    for ending in ("png", "webp", "bmp", "tif", "tga", "ppm", "qoi", "jpg", "avif", "gif"):
        ours, plain = (tmp_path / f"{name}.{ending}" for name in ("ours", "plain"))
        save_picture(noise, ours)
        Image.fromarray(noise).save(plain)
        assert (error(ours) > 0) == (f".{ending}" in LOSSY)
        assert error(ours) < error(plain) / 2 or ending not in ("jpg", "avif")
