"""Spatial alignment: pictures from maps of edges, depth, poses: evaluate.py --bench spatial.

benchmarks.py makes the pictures that read() lists and has them scored here: from the first 500 rows
of limingcv's MultiGen-20M_canny_eval, MultiGen-20M_depth_eval and Captioned_COCOPose. The result's
own map, drawn again, is compared with that of the picture that was described (alignment.py): edges
are drawn here; maps of depth and keypoints are read where another tool has put them.
Folders: eval_canny, gt_canny, ... as the paper's code calls them, eval/eval_conditions.py of
github.com/yanq095/InstructMoLE.
"""
import argparse
import re
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.alignment import THRESHOLDS, area, depth_rmse, edge_scores, edges, pose_scores
from support.benchmark_table import Scored, command_again
from support.benchmarks import Inputs, Prompt
from support.conditions import EDGES, canny
from support.estimates import found_in, people_in
from support.parquet import text_of
from support.pictures import fitted, load_image, resize
from support.public_sets import LEADS
from support.results import cell
from support.rows import Rows
from support.scores import SMALLEST, mean
from support.words import as_typed

NATIVE = 0                                               # a map is a clean condition
MOST = 500                                               # rows
LEFT_OUT = "people without an area, left out"            # of the truths
SMALL = "pictures too small for MS-SSIM"
SIDE = 512                                               # the longer side of a picture, pixels
# Of each condition: columns of the text, of the picture that it describes, and of the map.
SETS = {"canny": ("MultiGen-20M_canny_eval", "text", "image", None),
        "depth": ("MultiGen-20M_depth_eval", "text", "image", "control_depth"),
        "pose": ("Captioned_COCOPose", "caption", "image", "control_pose")}


# ------------------------------------------------------------------------------------------ prompts

def sources(data: list[str]) -> dict[str, Path]:
    """--data canny=PATH depth=PATH pose=PATH, any of them. Raises: ValueError."""
    found: dict[str, Path] = {}
    for text in data:
        kind, equals, path = text.partition("=")
        if not equals or kind not in SETS:
            raise ValueError(f"--data {text}: with --bench spatial write canny=PATH depth=PATH "
                             "pose=PATH, any of them")
        if kind in found:
            raise ValueError(f"--data {text}: {kind} is given twice")
        found[kind] = Path(path)
    return found


def given(rows: Rows, i: int, kind: str, wanted: tuple[int, int] | None) -> Inputs:
    """The map and the picture of a row, both at the size that is made."""
    _, _, truth, column = SETS[kind]
    picture, = rows.pictures(i, truth)
    size = wanted or fitted(picture.size, SIDE)
    shown = resize(picture, size)
    drawn = (canny(shown, *EDGES) if column is None
             else resize(rows.pictures(i, column)[0], size))
    return Inputs([Image.fromarray(drawn)], size, Image.fromarray(shown))


def caption_of(row: dict, column: str, where: str) -> str:
    """A row's text, or the first of several. Raises: ValueError."""
    text = row[column]
    return text_of(text[0] if isinstance(text, list) and text else text, column, where)


def read(args: argparse.Namespace, only: tuple[int, int] | None) -> list[Prompt]:
    """The rows of each set that --data names. only: (W, H) of all that the model knows, if small.

    Raises: FileNotFoundError, ValueError naming file, row and column.
    """
    if args.scores:
        raise ValueError("--scores: --bench spatial reads maps of depth and keypoints from folders "
                         f"in --out; {args.out}/scoring.md says which")
    prompts = []
    for kind, path in sources(args.data).items():
        whose, text, truth, column = SETS[kind]
        rows = Rows(path, "validation", whose, (text,), (truth, column) if column else (truth,),
                    MOST)
        for i, row in enumerate(rows.texts):
            caption = caption_of(row, text, rows.where(i))
            # Deviation: the paper's code leaves the number out, so that like captions share a file.
            stem = f"{i:03d}_" + re.sub(r"[^\w -]", "", caption, flags=re.ASCII)[:50].strip()
            prompts.append(Prompt(
                kind, f"{stem}.png", LEADS[kind][0].format(caption=caption),
                args.out / f"eval_{kind}" / f"{stem}.png", range(i, i + 1),
                partial(given, rows, i, kind, args.size or only),
                args.out / f"gt_{kind}" / f"{stem}.png"))
    return prompts


# ------------------------------------------------------------------------------------------- scores

def pair(ours: Path, truth: Path, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures as arrays of a mode of Pillow's. Raises: ValueError where sizes differ."""
    one, two = (load_image(file).convert(mode) for file in (ours, truth))
    if one.size != two.size:
        raise ValueError(f"{ours}: is {one.width}x{one.height}, the truth's {two.width}x"
                         f"{two.height}; make both by one tool")
    return np.asarray(one), np.asarray(two)


def score_canny(done: list[Prompt], args: argparse.Namespace) -> dict[str, float | None]:
    """Means of the scores of all pictures' edges; MS-SSIM of those that are large enough."""
    with tqdm(done, desc="edges", leave=False) as bar:   # gone before an error is told
        found = [edge_scores(*map(edges, pair(prompt.out, prompt.truth, "RGB"))) for prompt in bar]
    return {name: mean([one[name] for one in found if one[name] is not None])
            for name in ("f1", "psnr", "ms_ssim")} | {
                SMALL: sum(one["ms_ssim"] is None for one in found)}


def score_depth(done: list[Prompt], args: argparse.Namespace) -> dict[str, float | None]:
    """The mean error of all maps of depth, None where there are none. Raises: ValueError."""
    folders, errors = found_in(args.out, "depth", {prompt.name for prompt in done}), []
    for prompt in done if folders else []:
        errors.append(depth_rmse(*pair(*(folder / prompt.name for folder in folders), "L")))
    return {"rmse": mean(errors)}


def score_pose(done: list[Prompt], args: argparse.Namespace) -> dict[str, float | None]:
    """F1, precision, recall and mean OKS at each threshold, None where there are no keypoints."""
    files = [f"{prompt.out.stem}_keypoints.json" for prompt in done]
    folders = found_in(args.out, "pose", set(files))
    people = [tuple(people_in(folder / file) for folder in folders)
              for file in files] if folders else []
    left_out = sum(area(one) == 0 for _, wanted in people for one in wanted)
    return {f"{name} at {threshold}": value for threshold in THRESHOLDS
            for name, value in pose_scores(people, threshold).items()} | {
                LEFT_OUT: left_out if folders else None}


def score(done: list[Prompt], args: argparse.Namespace) -> Scored:
    """The table of what can be scored by what is there. Raises: ValueError."""
    values, rows, left_open = {}, [], []
    shapes = {"psnr": "{:.2f}", "rmse": "{:.2f}", LEFT_OUT: "{:.0f}", SMALL: "{:.0f}"}
    for kind, measure in (("canny", score_canny), ("depth", score_depth), ("pose", score_pose)):
        own = [prompt for prompt in done if prompt.part == kind]
        if own:
            values[kind] = measure(own, args)
            rows += [[f"{kind}: {name}", cell(value, shapes.get(name, "{:.4f}"))]
                     for name, value in values[kind].items()]
            missing = [name for name, value in values[kind].items() if value is None]
            whole = len(missing) == len(values[kind])
            left_open += [kind] if whole else [f"{kind} {name}" for name in missing]
        else:
            left_open.append(f"{kind} (no set given)")
    return Scored(["score", "this run"], rows, values, {}, left_open, [
        "Published: InstructMoLE's own figures could not be found, so none stand here.",
        f"Protocol: the first {MOST} rows of a set, one picture each, from the caption in a "
        f"sentence that names the map. Ours: {SIDE} pixels on the longer side (a model of smaller "
        "squares makes those), 28 steps, guidance 2.5, the seed, a row's place.",
        "Canny: thresholds 100 and 200, of the coloured picture, as the paper's code scores; F1 of "
        "maps above 100, PSNR (100 dB if equal) and MS-SSIM of 0..1, means over pictures; "
        f"MS-SSIM of those with at least {SMALLEST} pixels on the shorter side.",
        "Depth: RMSE in grey levels, 0..255.",
        "Pose: OKS by COCO's definition, people matched best first. For COCO's annotated area "
        "stands that of the box around a person's keypoints; who has none (one point, or all in a "
        "row) is left out, as by COCO who has no keypoint. The paper's code has other constants, "
        "so that its OKS is lower."])


def scorers(args: argparse.Namespace) -> str:
    """What makes the maps that are not drawn here, as text."""
    out = args.out.absolute()
    whole, eval_pose, gt_pose = (as_typed([path]) for path in (
        out, out / "eval_pose", out / "gt_pose"))
    return f"""# What makes the maps of depth and the keypoints

Edges are drawn and scored without further tools. Depth is compared where these folders hold a map,
in grey of 8 bits, for each picture, under its name: {out}/eval_depth_cond of results,
{out}/gt_depth_cond of truths. The paper makes them with Depth Anything small
(huggingface.co/LiheYoung/depth-anything-small-hf), by eval/generate_conditions.py of
github.com/yanq095/InstructMoLE:

    python eval/generate_conditions.py --task depth --input_dir {whole}
    python eval/generate_conditions.py --task depth --input_dir {whole} --gen_gt_cond

Poses are compared where OpenPose (github.com/CMU-Perceptual-Computing-Lab/openpose) has written the
keypoints of each picture, as NAME_keypoints.json:

    openpose.bin --model_pose COCO --display 0 --render_pose 0 \\
        --image_dir {eval_pose} --write_json {eval_pose}_keypoints
    openpose.bin --model_pose COCO --display 0 --render_pose 0 \\
        --image_dir {gt_pose} --write_json {gt_pose}_keypoints

The paper's own scorer, eval/eval_conditions.py --anno_dir {whole} --pred_dir {whole}, reads all of
this too, where --task canny has made maps of edges as well.

Then the same command once more, which makes no picture again:

    {command_again()}"""
