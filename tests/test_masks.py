"""--mask: what it holds stays to the byte, what it frees changes; support/masks.py."""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import dit
import sample
from helpers import PICTURE, run_sample
from sample import edit
from support.masks import held, laid_over, read_mask

TEXT = "the background should be purple"
SIDE = 64


def mask_of(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (SIDE, SIDE),
            level: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, fill=level)
    return mask


LEFT = mask_of((0, 0, 31, 63))


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


# ------------------------------------------------------------------------------- the whole, by edit

@pytest.mark.parametrize("box", [(0, 0, 31, 63), (20, 20, 43, 43), (7, 9, 8, 63)])
def test_outside_the_picture_stays_to_the_byte_and_inside_it_changes(trained, box) -> None:
    mask, picture = mask_of(box), Image.open(PICTURE)
    found, before = array(edit(trained, TEXT, picture, mask=mask, steps=8)), array(picture)
    outside = np.asarray(mask) == 0
    assert (found[outside] == before[outside]).all()
    assert np.abs(found - before)[~outside].mean() > 5


def test_the_edit_goes_on_to_the_edge(trained) -> None:
    """Held latents are the given picture's: the free half is as purple as without a mask."""
    found = array(edit(trained, TEXT, PICTURE, mask=LEFT))[4:28, 2:24]
    free = array(edit(trained, TEXT, PICTURE))[4:28, 2:24]
    assert np.abs(found - free).mean() < 20 < np.abs(free - array(Image.open(PICTURE))[4:28, 2:24]
                                                     ).mean()


def test_a_mask_that_is_white_all_over_is_none(trained) -> None:
    white = Image.new("L", (SIDE, SIDE), 255)
    assert edit(trained, TEXT, PICTURE, mask=white, steps=3).tobytes() == edit(
        trained, TEXT, PICTURE, steps=3).tobytes()


def test_grey_is_between(trained) -> None:
    grey = Image.new("L", (SIDE, SIDE), 51)              # a fifth
    free, before = (array(p) for p in (edit(trained, TEXT, PICTURE, steps=3), Image.open(PICTURE)))
    found = array(edit(trained, TEXT, PICTURE, mask=grey, steps=3))
    assert np.abs(found - (before + (free - before) / 5)).max() <= 0.5


def test_beside_other_pictures_and_at_another_size(trained) -> None:
    """The first picture is meant, of which all latents come first."""
    picture = Image.open(PICTURE)
    mask = mask_of((0, 0, 31, 63))
    others = [Image.effect_noise((90, 90), 60).convert("RGB")]
    found = array(edit(trained, TEXT, [picture, *others], conds=others, mask=mask, size=(96, 64),
                       steps=4))
    wanted = array(picture.resize((96, 64), Image.Resampling.LANCZOS))
    assert found.shape == (64, 96, 3) and (found[:, 50:] == wanted[:, 50:]).all()
    assert (found[:, :46] != wanted[:, :46]).any()


@pytest.mark.parametrize("keep", [False, True])
def test_of_a_picture_of_another_size(trained, keep) -> None:
    """The pixels of the picture at the output's size; with keep_size its own, to the byte."""
    picture = Image.effect_noise((150, 70), 60).convert("RGB")
    mask = mask_of((0, 0, 70, 69), size=picture.size)
    found = edit(trained, TEXT, picture, mask=mask, steps=2, keep_size=keep)
    if keep:
        wanted, outside = picture, np.asarray(mask) == 0
    else:
        wanted = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        outside = np.zeros((SIDE, SIDE), bool)
        outside[:, 71 * SIDE // 150 + 2:] = True         # the edge itself falls between pixels
    assert found.size == wanted.size
    assert (array(found)[outside] == array(wanted)[outside]).all()
    assert (array(found) != array(wanted)).any()


def test_a_blurred_edge_fades_inwards(trained) -> None:
    soft = edit(trained, TEXT, PICTURE, mask=LEFT, mask_blur=6, steps=8)
    found, before = array(soft), array(Image.open(PICTURE))
    assert (found[:, 32:] == before[:, 32:]).all()       # as without the blur
    change = np.abs(found - before).mean((0, 2))         # by column
    assert change[0] > 20 and 0 < change[28] < change[24] < change[18]


# -------------------------------------------------------------------------------- latents and masks

def test_at_each_time_what_is_held_is_the_picture_with_that_much_noise(bare) -> None:
    """x_t = (1 - t) x0 + t noise, the noise from which all began; and x0 itself in the end."""
    x0, noise = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 8, 8)
    hold = held(mask_of((0, 0, 7, 63)), (SIDE, SIDE), dit.pack(x0), noise)
    x = torch.randn(1, 16, 8, 8)
    for t in (1.0, 0.3, 0.0):
        found = dit.unpack(hold(dit.pack(x), t), 8, 8)
        assert torch.equal(found[..., :1], x[..., :1])   # a column of latents: 8 pixels
        assert torch.equal(found[..., 1:], ((1 - t) * x0 + t * noise)[..., 1:])
    one = held(mask_of((40, 9, 40, 9), level=1), (SIDE, SIDE), dit.pack(x0), noise)
    changed = (dit.unpack(one(dit.pack(x), 0.0), 8, 8) != x0).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 5]]        # the one that has the pixel


def test_every_step_is_held(trained) -> None:
    """Not the last alone: the latents that a callback sees."""
    seen: list[torch.Tensor] = []
    picture = Image.open(PICTURE)
    pictures = sample.prepare((SIDE, SIDE), [picture], [], (SIDE, SIDE))
    given = sample.condition(trained, [TEXT], *pictures)
    x0, noise = dit.unpack(given.ref, 8, 8), sample.seeded_noise([0], (SIDE, SIDE))
    edit(trained, TEXT, picture, mask=LEFT, steps=4, callback=lambda _, x: seen.append(x))
    for t, x in zip(dit.schedule(4, 16).tolist()[1:], seen, strict=True):
        wanted = (1 - t) * x0 + t * noise
        assert torch.allclose(x[..., 4:], wanted[..., 4:], atol=1e-6)
        assert not torch.allclose(x[..., :4], wanted[..., :4], atol=1e-2)


def test_shares_are_exact_at_both_ends() -> None:
    one, two = (Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 256, 3), np.uint8))
                for i in range(2))
    levels = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1)))
    found = array(laid_over(one, two, levels))
    assert (found[:, 0] == array(two)[:, 0]).all() and (found[:, 255] == array(one)[:, 255]).all()
    share = np.arange(256)[:, None] / 255
    assert np.abs(found - (share * array(one) + (1 - share) * array(two))).max() <= 0.5


def test_a_jpeg_is_a_mask_too(tmp_path) -> None:
    """Its blacks and whites are not quite that, near an edge, and are taken as what they mean."""
    LEFT.rotate(3, Image.Resampling.BILINEAR, fillcolor=255).save(tmp_path / "mask.jpg", quality=90)
    given = np.asarray(Image.open(tmp_path / "mask.jpg"))
    found = np.asarray(read_mask(tmp_path / "mask.jpg", [Image.open(PICTURE)], 0))
    assert ((0 < given) & (given < 16)).sum() > 9 < ((239 < given) & (given < 255)).sum()
    assert (found[given < 16] == 0).all() and (found[given > 239] == 255).all()
    between = (given >= 16) & (given <= 239)
    assert (found[between] == given[between]).all() and between.any()


# --------------------------------------------------------------------------------- what is no mask

@pytest.mark.parametrize("mask, blur, words", [
    (mask_of((0, 0, 9, 9), size=(32, 64)), 0, "m: is 32x64, the picture to edit 64x64"),
    (mask_of((0, 0, 9, 9), size=(128, 128)), 0, "is 128x128.*the very size of that picture"),
    (mask_of(), 0, "m: is black all over, so nothing may change; paint white"),
    (mask_of((9, 9, 10, 10)), 20, "black all over once its edge is blurred"),
    (Image.new("RGB", (SIDE, SIDE), "red"), 0, "m: has colours; a mask is white where")])
def test_what_cannot_be_a_mask_is_refused(mask, blur, words) -> None:
    with pytest.raises(ValueError, match=words) as error:
        read_mask(mask, [Image.open(PICTURE)], blur, "m")
    assert len(str(error.value).splitlines()) == 1


def test_the_command_takes_a_mask(tmp_path, monkeypatch, capsys, trained) -> None:
    LEFT.save(tmp_path / "left.png")
    out, mask = tmp_path / "out.png", tmp_path / "left.png"
    arguments = ("--instruction", TEXT, "--steps", 2, "--out", out)
    code, _, err = run_sample(monkeypatch, capsys, *arguments, "--image", PICTURE, "--mask", mask,
                              "--mask-blur", 4)
    assert code == 0, err
    assert Image.open(out).tobytes() == edit(trained, TEXT, PICTURE, mask=mask, mask_blur=4,
                                             steps=2).tobytes()
    assert "changes all pixels a little" not in err
    code, _, err = run_sample(monkeypatch, capsys, *arguments[:4], "--out", tmp_path / "out.jpg",
                              "--image", PICTURE, "--mask", mask)
    assert code == 0 and "out.jpg: a .jpg file changes all pixels a little" in err
    out.unlink()
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "black.png")
    for more, words in ((["--mask", mask], "--mask .*left.png: needs the picture.*--image"),
                        (["--image", PICTURE, "--mask", tmp_path / "gone.png"], "gone.png"),
                        (["--image", PICTURE, "--mask", tmp_path / "black.png"], "black all over"),
                        (["--image", PICTURE, "--mask-blur", 3], "--mask-blur: there is no --mask"),
                        (["--image", PICTURE, "--mask", mask, "--out", mask], "is given")):
        code, _, err = run_sample(monkeypatch, capsys, *arguments[:4], *more)
        assert code == 2 and len(err.splitlines()) == 1
        assert re.search(words, err)
        assert not out.exists()


def test_a_mask_is_not_written_over(tmp_path, monkeypatch, capsys) -> None:
    LEFT.save(tmp_path / "left.png")
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", TEXT, "--image", PICTURE,
                              "--mask", tmp_path / "left.png", "--out", tmp_path / "left.png")
    assert code == 2 and "is a picture that is given" in err


def test_lines_of_a_batch_have_their_own(tmp_path, monkeypatch, capsys, trained) -> None:
    Image.open(PICTURE).save(tmp_path / "in.png")
    LEFT.save(tmp_path / "left.png")
    rows = [{"instruction": TEXT, "images": "in.png", "mask": "left.png"},
            {"instruction": TEXT, "images": "in.png", "mask": None}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ("--batch", tmp_path / "jobs.jsonl", "--steps", 2, "--out", tmp_path / "out")
    assert run_sample(monkeypatch, capsys, *arguments)[0] == 0
    for name, mask in (("0001.png", LEFT), ("0002.png", None)):
        assert Image.open(tmp_path / "out" / name).tobytes() == edit(
            trained, TEXT, PICTURE, mask=mask, steps=2).tobytes()
    for row, words in (({"mask": "left.png"}, "line 1: mask .*left.png: needs the picture"),
                       ({"images": "in.png", "mask": "in.png"}, "line 1: mask .*has colours"),
                       ({"images": "in.png", "mask": ["left.png", "in.png"]}, "one path"),
                       ({"images": "in.png", "mask": 3}, "'mask' must be a path")):
        (tmp_path / "jobs.jsonl").write_text(json.dumps({"instruction": TEXT} | row))
        code, _, err = run_sample(monkeypatch, capsys, *arguments)
        assert code == 2 and re.search(words, err), err
    code, _, err = run_sample(monkeypatch, capsys, *arguments, "--mask", tmp_path / "left.png")
    assert code == 2 and "leave out --mask" in err
