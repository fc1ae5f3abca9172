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
