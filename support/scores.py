"""How near a picture comes to the one that is wanted: squared error, PSNR, SSIM, MS-SSIM.

evaluate.py scores by them, and so does validation.HeldOut, for its sheet. Each takes two pictures
of one size, (H, W, 3) uint8, in any order, and gives a number.
"""
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SIDE = 11                                                # of the window, in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2            # against division by zero, (K range)^2
SCALES = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])      # exponents, fine to coarse
SMALLEST = SIDE * 2 ** (len(SCALES) - 1)                 # side of which the coarsest has a window
BELL = np.exp(-0.5 * (np.arange(SIDE) - SIDE // 2) ** 2 / 1.5 ** 2)
WINDOW = BELL / BELL.sum()                               # Gaussian, sigma 1.5


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference, in units of [-1, 1]: 4 between black and white."""
    return float(np.square((a.astype(np.float32) - b) / 127.5).mean())


def psnr(picture: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, at most 60. Eq.: 10 log10(range^2 / squared error)."""
    return float(10 * np.log10(4 / max(squared_error(picture, target), 4e-6)))


def smoothed(x: np.ndarray) -> np.ndarray:
    """Weighted means in all windows that lie inside, (H, W, 3) -> (H - 10, W - 10, 3)."""
    rows = sliding_window_view(x, SIDE, axis=0) @ WINDOW                     # (H - 10, W, 3)
    return sliding_window_view(rows, SIDE, axis=1) @ WINDOW                  # (H - 10, W - 10, 3)


def similarities(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Means over windows and channels of l c, which is SSIM, and of c alone; floats in 0..255.

    Eq.: l = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1), from the windows' means;
    c = (2 s_ab + C2) / (s_aa + s_bb + C2), from their variances and covariance.
    """
    mean_a, mean_b = smoothed(a), smoothed(b)                                # (H - 10, W - 10, 3)
    products, squares = mean_a * mean_b, mean_a ** 2 + mean_b ** 2
    c = (2 * (smoothed(a * b) - products) + C2) / (smoothed(a * a + b * b) - squares + C2)
    l_c = (2 * products + C1) / (squares + C1) * c
    return float(l_c.mean()), float(c.mean())


def ssim(picture: np.ndarray, target: np.ndarray) -> float:
    """Structural similarity, 1 for equal pictures; sides of 11 pixels or more.

    A Gaussian window of 11x11, sigma 1.5, K1 = 0.01, K2 = 0.03, a range of 255; the mean over
    channels, and over the windows that lie inside, as in the authors' code (others reflect the
    picture at its edges). Eq.: mean of l c, as in similarities().
    Reference: Wang et al., 2004, "Image quality assessment: from error visibility to structural
    similarity".
    """
    return similarities(picture.astype(float), target.astype(float))[0]


def shrunk(x: np.ndarray, side: int = 2) -> np.ndarray:
    """Means of squares, (H, W, 3) -> (H // side, W // side, 3); lines beyond are left out."""
    h, w = x.shape[0] // side, x.shape[1] // side
    return x[:side * h, :side * w].reshape(h, side, w, side, -1).mean((1, 3))


def ms_ssim(picture: np.ndarray, target: np.ndarray, reflected: bool = False) -> float | None:
    """SSIM over five scales, 1 for equal pictures; None where a side is below 176 pixels.

    Eq.: product over the scales of c^exponent, and l c in the coarsest one; each scale's mean is
    taken first, a negative one as 0. reflected: whether the coarsest scale has windows around every
    pixel, the picture reflected at its edges, as in torchmetrics, by which others score.
    Reference: Wang et al., 2003, "Multiscale structural similarity for image quality assessment".
    """
    if min(picture.shape[:2]) < SMALLEST:
        return None
    a, b, found = picture.astype(float), target.astype(float), []
    for scale in range(len(SCALES)):
        if reflected and scale == len(SCALES) - 1:
            a, b = (np.pad(x, [(SIDE // 2,) * 2] * 2 + [(0, 0)], mode="reflect") for x in (a, b))
        whole, contrast = similarities(a, b)
        found.append(contrast)
        a, b = shrunk(a), shrunk(b)
    return float(np.prod(np.maximum([*found[:-1], whole], 0) ** SCALES))


def mean(values: list[float]) -> float | None:
    """Their mean, None of none."""
    return float(np.mean(values)) if values else None
