"""OmniContext: characters, objects and scenes by instruction, for evaluate.py --bench omnicontext.

benchmarks.py makes the pictures that read() lists, one each, and has them scored here. A judge,
GPT-4.1, says from 0 to 10 how well a picture follows the instruction (PF) and keeps the subjects
(SC); score: sqrt(PF SC), its mean for each task, and the mean of the tasks.
Reference: Wu et al., 2025, arXiv:2506.18871; github.com/VectorSpaceLab/OmniGen2, omnicontext.
"""
import argparse
import math
from functools import partial
from pathlib import Path

from support.benchmark_table import Scored, command_again
from support.benchmarks import Inputs, Prompt
from support.resolutions import output_size
from support.results import cell
from support.rows import Rows
from support.scores import mean
from support.tables import read_rows, row_text
from support.words import as_typed

NATIVE = 1                                               # the first picture is edited, as in the
                                                         # paper's code; the others are subjects
TEXTS = ("key", "task_type", "instruction", "instruction_language")
SCORES = {"PF": "PF_score", "SC": "SC_score"}            # of an answer
ANSWERS = ("score.jsonl",)                               # files of them
LANGUAGE = "en"                                          # the only one that its statistics count


# ------------------------------------------------------------------------------------------ prompts

def given(rows: Rows, i: int, wanted: tuple[int, int] | None, only: tuple[int, int] | None
          ) -> Inputs:
    """A row's pictures; without a wanted size the preferred one nearest to the first of them."""
    pictures = rows.pictures(i, "input_images")
    return Inputs(pictures, output_size(only, pictures[:1], wanted))


def file_part(row: dict, name: str, where: str) -> str:
    """A text that names a file or folder. Raises: ValueError where it cannot."""
    text = row[name]
    if not isinstance(text, str) or not text or Path(text).name != text or text[0] == ".":
        raise ValueError(f"{where}: {name!r} should be a name without a folder, found {text!a}")
    return text


def read(args: argparse.Namespace, only: tuple[int, int] | None) -> list[Prompt]:
    """All rows, in order. only: (W, H) of all that the model knows, if it is small.

    Raises: FileNotFoundError, ValueError naming file, row and column.
    """
    rows = Rows(Path(args.data[0]), "train", "OmniContext", TEXTS, ("input_images",))
    prompts: dict[Path, Prompt] = {}
    for i, row in enumerate(rows.texts):
        where = rows.where(i)
        task, key = (file_part(row, name, where) for name in ("task_type", "key"))
        out = args.out / "fullset" / task / f"{key}.png"
        if out in prompts:
            raise ValueError(f"{where}: {task} has a row with the key {key!a} already; each needs "
                             "one of its own")
        prompts[out] = Prompt(task, key, row_text(row, "instruction", where), out, range(i, i + 1),
                              partial(given, rows, i, args.size, only))
    return list(prompts.values())


# ------------------------------------------------------------------------------------------- scores

def points(row: dict, name: str, where: str) -> float:
    """Raises: ValueError when it is no number from 0 to 10."""
    value = row.get(name)
    if type(value) not in (int, float) or not 0 <= value <= 10:
        raise ValueError(f"{where}: {name!r} should be a number from 0 to 10, found {value!a}")
    return float(value)


def read_answers(files: list[Path], prompts: list[Prompt]) -> dict[tuple[str, str], dict]:
    """The judge's lines by task and key. Raises: ValueError for a missing or a surplus one."""
    found: dict[tuple[str, str], dict] = {}
    known = {(prompt.part, prompt.name) for prompt in prompts}
    for file in files:
        for where, row in read_rows(file):
            name = str(row.get("task_type")), str(row.get("key"))
            if name not in known:
                raise ValueError(f"{where}: is about {name[0]!a}, {name[1]!a}, of which --out has "
                                 "no picture; name the answers to these pictures")
            if name in found:
                raise ValueError(f"{where}: answers once more for {name[0]}, {name[1]}; name each "
                                 "answer once (combined_score.jsonl repeats the others)")
            found[name] = {short: points(row, entry, where) for short, entry in SCORES.items()}
            found[name]["score"] = math.sqrt(found[name]["PF"] * found[name]["SC"])
            found[name]["counts"] = row.get("instruction_language", LANGUAGE) == LANGUAGE
    if files and (left := [name for name in known if name not in found]):
        raise ValueError(f"{files[0]}: there is no answer for {min(left)[0]}, {min(left)[1]}; have "
                         "the judge see all the pictures in --out, and name all of its files")
    return found


def score(done: list[Prompt], args: argparse.Namespace) -> Scored:
    """The table of answers that were given. Raises: ValueError, FileNotFoundError."""
    answers = read_answers(args.scores, done)
    values: dict[str, dict[str, float | None]] = {}
    for task in dict.fromkeys(prompt.part for prompt in done):
        own = [answer for name, answer in answers.items() if name[0] == task and answer["counts"]]
        values[task] = {name: mean([one[name] for one in own]) for name in (*SCORES, "score")}
    values["average"] = {name: mean([one[name] for one in values.values() if one[name] is not None])
                         for name in (*SCORES, "score")}
    rows = [[task, *map(cell, own.values())] for task, own in values.items()]
    unscored = [task for task, own in values.items() if own["score"] is None]
    left_open = ([f"{task} (no English answers)" for task in unscored] if answers else
                 ["PF and SC of all tasks"])
    others = sum(not answer["counts"] for answer in answers.values())
    return Scored(["task", *SCORES, "score"], rows, values, {}, left_open, [
        "Published: OmniGen2's paper, arXiv:2506.18871; its figures could not be checked here, and "
        "InstructMoLE's own could not be found.",
        "Protocol: one picture an instruction. Ours: the preferred size nearest to the first "
        "reference, else 1024x1024 (a model of smaller squares makes those; the paper's own code "
        "always 1024x1024: --size 1024x1024), 28 steps, guidance 2.5, the seed, a row's place. The "
        "first reference is native, as in the paper's own code: what a picture is edited from or "
        "begins with; the others, subjects, are clean conditions.",
        "Score: sqrt(PF SC) of each picture, the mean of each task, the mean of the tasks; of "
        f"English instructions, as its own statistics have it ({others:,} answers are about "
        "others)."])


def scorers(args: argparse.Namespace) -> str:
    """What computes the two scores, as text."""
    folder, name = (as_typed([part]) for part in (args.out.absolute().parent, args.out.name))
    return f"""# What scores OmniContext's pictures

A judge, GPT-4.1 behind OpenAI's service (with your key, for your money: two questions a picture,
each with all its references), asked by the paper's copy of OmniGen2's code, in
eval/image_editing_eval/omnicontext of a checkout of github.com/yanq095/InstructMoLE; DATA is
OmniGen2/OmniContext as datasets.load_dataset(...).save_to_disk(DATA) writes its split train. It
reads fullset/TASK/KEY.png:

    python test_omnicontext_score.py --test_data DATA --result_dir {folder} \\
        --model_name {name} --openai_key KEY

and writes gpt4dot1/TASK/score.jsonl beside fullset. Then, for the table:

    {command_again("--scores", args.out)}"""
