"""support/scores.py and pairs.py: as torchmetrics, at their best for the truth, tables of them."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import (peak_signal_noise_ratio,
                                           structural_similarity_index_measure)

from helpers import ROOT
from support import pairs, scores
from support.pictures import load_image, resize

FILES = sorted((ROOT / "tiny/examples/own").glob("*/*.png"))
RANGE = dict(data_range=255.0)


def pair(kind: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures: a drawing before and after an edit, or one beside itself with noise."""
    rng, base = np.random.default_rng(0), resize(load_image(FILES[0]), (width, height))
    if kind == "edit":
        return base, resize(load_image(FILES[4]), (width, height))
    if kind == "negative":
        return base, 255 - base
    noise = rng.normal(0, 30, base.shape) if kind == "noise" else rng.uniform(-255, 255, base.shape)
    return base, np.clip(base + noise, 0, 255).astype(np.uint8)


def as_theirs(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.astype(float)).permute(2, 0, 1)[None]    # (1, 3, H, W)


KINDS = pytest.mark.parametrize("kind", ["edit", "noise", "chaos", "negative"])


@KINDS
@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (16, 32)])
def test_psnr_and_ssim_are_torchmetrics(kind, height, width):
    """Of its map the windows that lie inside are taken; it has some that reflect the edges."""
    a, b = pair(kind, height, width)
    wanted = peak_signal_noise_ratio(as_theirs(a), as_theirs(b), **RANGE).item()
    assert scores.psnr(a, b) == pytest.approx(wanted, abs=1e-4)
    _, whole = structural_similarity_index_measure(as_theirs(a), as_theirs(b),
                                                   return_full_image=True, **RANGE)
    assert scores.ssim(a, b) == pytest.approx(whole[..., 5:-5, 5:-5].mean().item(), abs=1e-9)
    assert pairs.scores(a, b) == pairs.scores(b, a)          # no order


@KINDS
def test_ms_ssim_is_the_product_of_torchmetrics_scales(kind):
    """Contrasts of four scales, SSIM of the fifth, in its windows that lie inside."""
    a, b = pair(kind, 176, 208)
    x, y, wanted = as_theirs(a), as_theirs(b), 1.0
    for scale, power in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        _, contrast = structural_similarity_index_measure(x, y, return_contrast_sensitivity=True,
                                                          **RANGE)
        _, whole = structural_similarity_index_measure(x, y, return_full_image=True, **RANGE)
        part = whole[..., 5:-5, 5:-5].mean() if scale == 4 else contrast
        wanted *= max(part.item(), 0) ** power
        x, y = (torch.nn.functional.avg_pool2d(t, 2) for t in (x, y))
    assert scores.ms_ssim(a, b) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("name", list(pairs.COLUMNS))
def test_the_truth_scores_best_and_nothing_else_does(name):
    """Each of the eight drawings against all, at a size that every score takes."""
    pictures, best = [resize(load_image(file), (176, 176)) for file in FILES], {"psnr": 60}
    for i, target in enumerate(pictures):
        for j, picture in enumerate(pictures):
            found = getattr(scores, name)(picture, target)
            if i == j:
                assert found == pytest.approx(best.get(name, 1), abs=1e-12)
            elif not np.array_equal(picture, target):
                assert found < best.get(name, 1) * 0.99


def test_psnr_and_error_are_in_the_units_they_claim():
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert scores.squared_error(black, white) == 4       # from -1 to 1
    assert scores.psnr(black, white) == 0
    assert scores.ssim(black, white) == pytest.approx(scores.C1 / (255 ** 2 + scores.C1))


def test_small_pictures_have_no_ms_ssim():
    for height, width, there in ((175, 300, False), (300, 160, False), (176, 176, True)):
        picture = np.zeros((height, width, 3), np.uint8)
        assert (scores.ms_ssim(picture, picture) is not None) == there


def test_a_copy_takes_the_target_s_size():
    target, given = resize(load_image(FILES[0]), (32, 48)), np.asarray(load_image(FILES[1]))
    found = pairs.compare(target, target, [given, target])
    assert found["model"]["psnr"] == 60
    assert found["copy"] == pairs.scores(resize(Image.fromarray(given), (32, 48)), target)
    assert pairs.compare(target, target, [])["copy"] is None


def test_a_table_has_the_means_of_each_task():
    def row(task: str, psnr: float, ms_ssim: float | None, copied: bool) -> dict:
        own = {"psnr": psnr, "ssim": 0.5, "ms_ssim": ms_ssim}
        return {"task": task, "model": own, "copy": own if copied else None}
    rows = [row("a", 10, None, True), row("b", 20, 0.25, False), row("b", 40, 0.75, True)]
    assert [line.split() for line in pairs.pairs_table(rows).splitlines()[2:]] == [
        "| a | 1 | 10.0 dB | 10.0 dB | 0.500 | 0.500 | – | – |".split(),
        "| b | 2 | 30.0 dB | 40.0 dB | 0.500 | 0.500 | 0.500 | 0.750 |".split(),
        "| mean of all | 3 | 23.3 dB | 25.0 dB | 0.500 | 0.500 | 0.500 | 0.750 |".split()]
    assert [line[:6] for line in pairs.left_open(rows)] == ["MS-SSI", "1 of 3"]
    assert "; 1 of 3 pictures" in pairs.left_open(rows)[0] and pairs.left_open(rows[2:]) == []
    assert len(pairs.pairs_table(rows[:1]).splitlines()) == 3           # one task, that of all
