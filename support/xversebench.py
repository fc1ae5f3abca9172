"""XVerseBench: 300 prompts about one to three subjects, for evaluate.py --bench xverse.

benchmarks.py makes the pictures that read() lists and has them scored here. Four pictures of
1024x1024 for each prompt, 28 steps, guidance 2.5, in a grid of 2x2, as XVerse's own code makes
them; its scorers find a grid by the number that its name begins with. Scores, each in percent:
DPG, questions that a VQA model answers with yes; ID, cosine of faces; IP, cosine of DINO features
of the other subjects; AES, an aesthetic predictor's value times 10.
Reference: Chen et al., 2025, arXiv:2506.21416; github.com/bytedance/XVerse, eval/tools.
"""
import argparse
import re
from functools import partial
from pathlib import Path

from support.benchmark_table import Scored, command_again
from support.benchmarks import Inputs, Prompt
from support.configs import parse_json
from support.pictures import checked_size, load_image
from support.results import cell
from support.scores import mean
from support.tables import checked_text, located, read_text
from support.words import as_typed
from support.xverse_answers import GRID, KINDS, PARTS, Asked, sorted_out, values_of

NATIVE = 0                                               # all subjects are clean conditions
SIZE = (1024, 1024)
ANSWERS = tuple(f"{kind}_scores_*.json" for kind in KINDS)       # files of them
MOST = 3                                                 # subjects
# Averages of single, multi, overall.
PUBLISHED = {"OmniGen": (72.57, 61.48, 67.03), "UNO": (68.47, 59.59, 64.03),
             "OmniGen2": (70.36, 62.73, 66.55), "DreamO": (74.46, 64.04, 69.25),
             "XVerse": (76.72, 70.08, 73.40), "MOSAIC": (80.05, 72.03, 76.04)}


# ------------------------------------------------------------------------------------------ prompts

def read_list(file: Path) -> list[dict]:
    """A JSON list of objects. Raises: FileNotFoundError, ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --data names the folder with XVerseBench's "
                                "four lists, or a checkout of XVerse")
    rows = parse_json(read_text(file), file)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: expected a JSON list of objects")
    return rows


def checked_prompt(row: dict, where: str) -> tuple[str, list[str]]:
    """A row's prompt and the paths of its photographs. Raises: ValueError."""
    prompt, groups = row.get("prompt"), row.get("modulation")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: 'prompt' should be a text, found {prompt!a}")
    inputs = (groups[0].get("src_inputs") if isinstance(groups, list) and len(groups) == 1
              and isinstance(groups[0], dict) else None)
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MOST:
        raise ValueError(f"{where}: 'modulation' should hold one object, its 'src_inputs' one to "
                         f"{MOST} subjects")
    paths = [one.get("image_path") if isinstance(one, dict) else None for one in inputs]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: each of 'src_inputs' needs an 'image_path'")
    return checked_text(prompt, where), paths


def check_questions(row: dict, prompt: str, where: str) -> None:
    """Raises: ValueError where a prompt's questions are another's, or are none."""
    asked, parents = row.get("qid2question"), row.get("qid2dependency")
    if row.get("prompt") != prompt:
        raise ValueError(f"{where}: is for {row.get('prompt')!a}, the list's is {prompt!a}")
    if not isinstance(asked, dict) or not asked or not all(
            isinstance(text, str) for text in asked.values()):
        raise ValueError(f"{where}: 'qid2question' should hold texts by number")
    if not isinstance(parents, dict) or not all(
            isinstance(ids, list) and all(type(i) is int for i in ids)
            for ids in parents.values()):
        raise ValueError(f"{where}: 'qid2dependency' should hold lists of numbers by number")


def file_name(place: int, prompt: str) -> str:
    """As XVerse's code calls a grid; what a file system may refuse is an underscore, too."""
    return f"{place}_" + re.sub(r"[\s/\\:*?\"<>|\x00-\x1f]", "_", prompt[:40]) + ".png"


def given(photographs: list[Path], size: tuple[int, int]) -> Inputs:
    return Inputs([load_image(path) for path in photographs], size)


def read(args: argparse.Namespace, only: tuple[int, int] | None) -> list[Prompt]:
    """All prompts of both lists. only: (W, H) of all that the model knows, if small.

    Raises: FileNotFoundError, ValueError naming list, prompt and field.
    """
    data, size, prompts, known = Path(args.data[0]), args.size or only or SIZE, [], set()
    for part, name in PARTS.items():
        inside = data / f"eval/tools/{name}.json"        # of a checkout of XVerse
        file = inside if inside.is_file() else data / f"{name}.json"
        asked_file = file.with_name(f"{name}_DSG.json")
        rows, questions = read_list(file), read_list(asked_file)
        if len(rows) != len(questions):
            raise ValueError(f"{asked_file}: has questions for {len(questions)} prompts, its list "
                             f"has {len(rows)}")
        for place, (row, asked) in enumerate(zip(rows, questions)):
            where = f"{file} prompt {place}"
            text, paths = checked_prompt(row, where)
            check_questions(asked, text, f"{asked_file} prompt {place}")
            photographs = [located(path, data, None, where) for path in paths]
            for path in set(photographs) - known:
                checked_size(path, where)
            known.update(photographs)
            names = {"_".join(path.split("/")[-2:]) for path in paths}
            prompts.append(Prompt(
                part, str(place), text, args.out / name / file_name(place, text),
                range(GRID * place, GRID * (place + 1)), partial(given, photographs, size),
                about=Asked(names, asked["qid2question"], asked["qid2dependency"])))
    return prompts


# ------------------------------------------------------------------------------------------- scores

def whole_mean(values: list[float | None]) -> float | None:
    """Their mean, None where one is not there."""
    return None if None in values else sum(values) / len(values)


def score(done: list[Prompt], args: argparse.Namespace) -> Scored:
    """The table of answers that were given. Raises: ValueError, FileNotFoundError."""
    files = sorted_out(args.scores)
    values: dict[str, dict[str, float | None]] = {}
    for part in PARTS:
        own = [prompt for prompt in done if prompt.part == part]
        found = {kind: mean(values_of(kind, files[kind, part], own))
                 if (kind, part) in files else None for kind in KINDS}
        rounded = [None if value is None else round(value, 2) for value in found.values()]
        values[part] = found | {"average": whole_mean(rounded)}      # as XVerse's code has it
    values["overall"] = {name: whole_mean([values[part][name] for part in PARTS])
                         for name in (*KINDS, "average")}
    rows = [[KINDS.get(name, name), *(cell(values[part][name]) for part in values)]
            for name in (*KINDS, "average")]
    rows += [[f"average, {name}", *map(cell, numbers)] for name, numbers in PUBLISHED.items()]
    holes = {part: [KINDS[kind] for kind in KINDS if values[part][kind] is None] for part in PARTS}
    left_open = [f"{', '.join(names)} of {part}" for part, names in holes.items() if names]
    return Scored(["score", *values], rows, values, PUBLISHED, left_open, [
        "Published averages: XVerse's paper, arXiv:2506.21416, and MOSAIC's, arXiv:2509.01977; "
        "InstructMoLE's own could not be found.",
        f"Protocol: {GRID} pictures a prompt, {SIZE[0]}x{SIZE[1]} (a model of smaller squares "
        "makes those), 28 steps, guidance 2.5. Ours: the seed, a picture's place in its list; the "
        "subjects are clean conditions. The paper's own code gives the first as native reference: "
        "--native 1.",
        "Overall: the mean of single and multi. ID is over references with people, IP over the "
        "others, AES over whole grids, as in XVerse's code."])


def scorers(args: argparse.Namespace) -> str:
    """What computes the four scores, as text."""
    commands = "\n".join(
        f"    accelerate launch --num_processes 2 -m eval.tools.{module} \\\n        --input_dir "
        f"{as_typed([(args.out / name).absolute()])} --test_list_name {name}"
        for name in PARTS.values()
        for module in ("idip_dpg_score", "idip_face_score", "idip_sam-dino_score",
                       "idip_aes_score"))
    return f"""# What scores XVerseBench's pictures

XVerse's own scorers, in a checkout of github.com/bytedance/XVerse with the models that its README
names (mPLUG for DPG, RetinaFace and IR-SE50 for ID, Florence-2, SAM 2 and DINO ViT-S/16 for IP, the
aesthetic predictor 2.5 for AES). They read the prompts from eval/tools, the photographs from
assets, and need all pictures of a list, no other picture beside them, and two GPUs or more: with
one process they stop.

{commands}

Each writes its answers beside the pictures. Then, for the table:

    {command_again("--scores", args.out)}"""
