"""Answers of XVerseBench's scorers: read, checked, and the single values in them.

xversebench.score() takes their means. A file of answers has an entry for each prompt, by its number
in the list: of dpg_scores_*.json an object for each of the four pictures, with the answer to each
question; of id_ and ip_scores_*.json such with a number for each photograph; of aes_ a number, ten
times what the predictor says.
"""
from dataclasses import dataclass
from pathlib import Path

from support.benchmarks import Prompt
from support.configs import json_object, of_kind
from support.tables import read_text

PARTS = {"single": "XVerseBench_single", "multi": "XVerseBench_multi"}
KINDS = {"dpg": "DPG", "id": "ID", "ip": "IP", "aes": "AES"}
UNSCALED = 10.0                                          # the aesthetic predictor's most
GRID = 4                                                 # pictures of a prompt
BESIDE = ("average_score_with_dependency", "average_score_without_dependency")   # not answers


@dataclass
class Asked:
    """What the answers about a prompt's pictures must be about."""
    subjects: set[str]                                   # as scorers call the photographs
    questions: dict[str, str]                            # by number
    parents: dict[str, list[int]]                        # questions that must be yes first


def dsg_score(yes: dict[str, bool], parents: dict[str, list[int]]) -> float:
    """Percent of a picture's questions that count as yes: its own answer and its parents' are.

    yes: by number; parents: numbers of the questions that must be yes first, 0 none.
    Reference: Cho et al., 2023, arXiv:2310.18235, Davidsonian scene graph.
    """
    # Quirk: a parent counts by its own answer, though that be struck out for its own parent's.
    counted = [own and all(yes.get(str(i), True) for i in parents.get(number, []))
               for number, own in yes.items()]
    return 100 * sum(counted) / len(counted)


def read_answers(file: Path, prompts: list[Prompt]) -> dict:
    """A scorer's answers by prompt. Raises: ValueError for a missing or a surplus one."""
    answers = json_object(read_text(file), file)
    for prompt in prompts:
        if prompt.name not in answers:
            raise ValueError(f"{file}: has no answer for prompt {prompt.name} of "
                             f"{PARTS[prompt.part]}; run its scorer again, on all the pictures in "
                             "--out")
    if surplus := sorted(answers.keys() - {prompt.name for prompt in prompts}):
        raise ValueError(f"{file}: answers for prompt {surplus[0][:60]!a}, of which there is no "
                         "picture in --out; name the answers to these pictures")
    return answers


def number(value: object, where: str) -> float:
    """Raises: ValueError when it is none."""
    if not of_kind(value, float):
        raise ValueError(f"{where}: should be a number, found {value!a}")
    return float(value)


def of_pictures(entries: object, names: set[str], where: str) -> list[dict]:
    """The entries of a grid's pictures, which must hold these names. Raises: ValueError."""
    if not isinstance(entries, list) or len(entries) != GRID:
        raise ValueError(f"{where}: should be a list of {GRID}, one for each picture of the grid")
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() - set(BESIDE) != names:
            held = sorted(entry) if isinstance(entry, dict) else entry
            raise ValueError(f"{where}: each picture's answers should be called "
                             f"{', '.join(sorted(names)) or 'nothing'}; found {held!a}"[:600])
    return entries


def values_in(kind: str, answer: object, asked: Asked, where: str) -> list[float]:
    """All values in the answer to one prompt. Raises: ValueError."""
    if kind == "aes":                                    # of the grid as a whole
        return [number(answer, where)]
    if kind == "dpg":
        values = []
        for entry in of_pictures(answer, set(asked.questions.values()), where):
            yes = {i: str(entry[text]).strip().lower() == "yes"
                   for i, text in asked.questions.items()}
            values.append(dsg_score(yes, asked.parents))
        return values
    names = {name for name in asked.subjects if name.startswith("human") == (kind == "id")}
    return [number(value, where) for entry in of_pictures(answer, names, where)
            for value in entry.values()]


def values_of(kind: str, file: Path, prompts: list[Prompt]) -> list[float]:
    """All single values that a score is the mean of, from a scorer's file. Raises: ValueError."""
    answers, values = read_answers(file, prompts), []
    for prompt in prompts:
        where = f"{file} prompt {prompt.name}"
        values += values_in(kind, answers[prompt.name], prompt.about, where)
    if kind == "aes" and values and max(values) <= UNSCALED:
        raise ValueError(f"{file}: no value is above {UNSCALED:g}, as if these were the "
                         "predictor's own, 1 to 10; XVerse's scorer writes ten times as much")
    return values


def sorted_out(files: list[Path]) -> dict[tuple[str, str], Path]:
    """Files of answers by kind and part. Raises: ValueError for one of no kind, or two of one."""
    found: dict[tuple[str, str], Path] = {}
    parts = {name: part for part, name in PARTS.items()}
    for file in files:
        kind, part = file.name.partition("_scores_")[0], parts.get(file.absolute().parent.name)
        if kind not in KINDS or part is None or file.suffix != ".json":
            raise ValueError(f"--scores {file}: expected a file like XVerseBench_single/"
                             "dpg_scores_20250101-12.json (or id, ip, aes; or multi), as XVerse's "
                             "scorers write them into the pictures' folder")
        if (kind, part) in found:
            raise ValueError(f"--scores {file}: {found[kind, part].name} is of the same kind; name "
                             "one of them")
        found[kind, part] = file
    return found
