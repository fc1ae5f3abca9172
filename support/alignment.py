"""How well a picture keeps to a map: edges, depth, poses, by the field's definitions.

support/spatial.py scores by them, for evaluate.py --bench spatial. Maps are (H, W) uint8; a person
is (18, 3): OpenPose's points, each x and y in pixels and how sure it is, 0 where it is not seen.
"""
import numpy as np

from support.conditions import EDGES, canny
from support.scores import mean, ms_ssim

WHITE = 100                                              # of 255: a map is an edge above it
EQUAL = 100.0                                            # dB, of equal maps, as the paper has it
SURE = 0.1                                               # of a point that counts as seen
THRESHOLDS = (0.5, 0.25, 0.1)                            # of OKS, for a match
# COCO's constants of its 17 points, in OpenPose's order: nose, neck, right shoulder, elbow, wrist,
# the left ones, right hip, knee, ankle, the left ones, eyes, ears. The neck has the shoulders'.
SIGMAS = np.array([0.026, 0.079, *(0.079, 0.072, 0.062) * 2, *(0.107, 0.087, 0.089) * 2,
                   0.025, 0.025, 0.035, 0.035])


def edges(picture: np.ndarray) -> np.ndarray:
    """The edges of a picture (H, W, 3), for scoring -> (H, W), 255 or 0.

    Of the coloured picture: the paper's code scores so, though it conditions on the grey one's.
    """
    return canny(picture, *EDGES, colours=True)[..., 0]


def edge_f1(found: np.ndarray, wanted: np.ndarray) -> float:
    """The harmonic mean of precision and recall, 1 for equal maps; 0 where neither has an edge.

    Eq.: 2 TP / (2 TP + FP + FN), pixel by pixel.
    """
    a, b = found > WHITE, wanted > WHITE
    both = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / both if both else 0.0


def edge_psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two maps, in dB; EQUAL where they are.

    Eq.: -10 log10(mean squared difference), of values in 0..1.
    """
    error = np.square((found.astype(float) - wanted) / 255).mean()
    return float(-10 * np.log10(error)) if error else EQUAL


def edge_scores(found: np.ndarray, wanted: np.ndarray) -> dict[str, float | None]:
    """All scores of two maps of edges, by name; None: no MS-SSIM of maps so small."""
    return {"f1": edge_f1(found, wanted), "psnr": edge_psnr(found, wanted),
            "ms_ssim": ms_ssim(found[..., None], wanted[..., None], reflected=True)}


def depth_rmse(found: np.ndarray, wanted: np.ndarray) -> float:
    """The root of the mean squared difference of two maps, in grey levels, 0..255; 0 if equal."""
    return float(np.sqrt(np.square(found.astype(float) - wanted).mean()))


# -------------------------------------------------------------------------------------------- poses

def area(person: np.ndarray) -> float:
    """Of the box around the points that are seen, in square pixels; 0 of none, one, or a row."""
    points = person[person[:, 2] > SURE, :2]             # (seen, 2)
    return float(np.prod(np.ptp(points, axis=0))) if len(points) else 0.0


def oks(found: np.ndarray, wanted: np.ndarray) -> float:
    """Object keypoint similarity of two people, 1 where every wanted point is met.

    Eq.: the mean over the points that are seen in `wanted` of exp(-d^2 / (2 area k^2)), with
    k = 2 sigma, and the area of the box around those points, or, where they have none, around those
    found; COCO has an annotated area. 0 where no point is seen.
    Reference: the COCO keypoint challenge, cocodataset.org/#keypoints-eval.
    """
    # Deviation: the paper's code has k = sigma, and COCO's order for OpenPose's points: lower OKS.
    seen = wanted[:, 2] > SURE
    if not seen.any():
        return 0.0
    scale = area(wanted) or area(found) or np.spacing(1.0)       # the last is COCO's, too
    distances = np.square(found[seen, :2] - wanted[seen, :2]).sum(1)         # (seen,)
    return float(np.exp(-distances / (2 * scale * (2 * SIGMAS[seen]) ** 2)).mean())


def matches(found: list[np.ndarray], wanted: list[np.ndarray], threshold: float
            ) -> dict[int, float]:
    """OKS of the pairs that match by place in `found`, best first, each person in one at most."""
    table = np.array([[oks(a, b) for b in wanted] for a in found])           # (found, wanted)
    pairs = {}
    while table.size and table.max() >= threshold:
        row, column = np.unravel_index(table.argmax(), table.shape)
        pairs[int(row)] = float(table[row, column])
        table[row], table[:, column] = -1, -1
    return pairs


def pose_scores(pictures: list[tuple[list[np.ndarray], list[np.ndarray]]], threshold: float
                ) -> dict[str, float | None]:
    """Over all people of all pictures; None where nothing is there that could be divided by.

    pictures: of each the people found and those wanted. Eq.: TP pairs match; precision TP / found,
    recall TP / wanted, F1 their harmonic mean; oks: the mean of the pairs that match. As in COCO's
    code, who is wanted but has no area is left out, and so is who matches such a one alone.
    """
    pairs, there, asked = [], 0, 0
    for found, wanted in pictures:
        measured = [one for one in wanted if area(one)]
        left_out = [one for one in wanted if not area(one)]
        own = matches(found, measured, threshold)
        rest = [one for i, one in enumerate(found) if i not in own]
        pairs += own.values()
        there += len(found) - len(matches(rest, left_out, threshold))
        asked += len(measured)
    return {"f1": 2 * len(pairs) / (there + asked) if there + asked else None,
            "precision": len(pairs) / there if there else None,
            "recall": len(pairs) / asked if asked else None,
            "oks": mean(pairs)}
