"""support/pictures.py: files of any kind as a person sees them, sheets of several."""
import numpy as np
import pytest
from PIL import Image

from support.pictures import fitted, grid, load_image


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
