"""What a row's entries are called: by us, and by public trainers and sets.

data.Folder and sample.py's --batch (support/jobs.py) have their rows put under our names here. What
has two readings is refused: nothing is guessed.
"""
import os
import re
from collections import defaultdict
from pathlib import Path

from support.pictures import PICTURES

NAMES = {
    "target": ("target", "target_image", "tgt_image", "edited_image", "output_image",
               "result_image", "after", "after_image"),
    "instruction": ("instruction", "prompt", "caption", "text", "edit_instruction", "edit_prompt",
                    "editing_instruction", "editing_prompt"),
    "images": ("images", "input_image", "edit_image", "source_image", "src_image", "before",
               "before_image", "original_image", "reference_image", "ref_image", "kontext_image",
               "init_image", "control_path", "cond_image"),
    "conds": ("conds", "cond")}
OWN = "file_name", "image"                               # the target, where no other name says it
EITHER = ("control", "control_image", "conditioning", "conditioning_image", "condition",
          "condition_image", "hint", "hint_image")       # the picture to edit, or a map
MEANINGS = {"task": "task"} | {name: meaning for meaning, known in (
    *NAMES.items(), ("own", OWN), ("either", EITHER)) for name in known}
PICTURED = "target", "own", "images", "conds", "either"  # meanings of entries that are pictures
SEVERAL = "images", "conds", "either"                    # of these, the ones that may hold several
FILE = re.compile(r"_(path|file|file_?name)(s?)$")       # says no more than that it is a file
MOST_TEXTS = 1000                                        # of an unread entry that are looked at
ALSO = {meaning: ", ".join(known[1:] + (OWN if meaning == "target" else ()))
        for meaning, known in NAMES.items()}             # what else may be written, for errors
KNOWN = "; ".join(f"{meaning} (or {names})" for meaning, names in ALSO.items())


def plain(name: str) -> str:
    """The name in small letters and whole words: Src-Img -> src_image, fileName -> file_name."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    name = re.sub(r"[\s._-]+", "_", name.lower())
    name = re.sub(r"(?<![a-z])img(?=s?(?![a-z]))", "image", name)
    return "file_name" if name == "filename" else name


def meaning_of(name: str) -> str | None:
    """What an entry means, by its name: a key of NAMES, "own", "either", "task", or None."""
    name = plain(name)
    if name in MEANINGS:
        return MEANINGS[name]
    bare = FILE.sub(r"\2", name)                         # a prompt's file is no prompt
    found, several = MEANINGS.get(bare), MEANINGS.get(bare.removesuffix("s"))
    if found in PICTURED:
        return found
    return several if several in SEVERAL else None


def read_name(name: str) -> tuple[str, int, str | None]:
    """An entry's name, its number (-1: none) and its meaning: control_path_2 is one of several."""
    meaning, found = meaning_of(name), re.fullmatch(r"(.+?)_?(\d{1,9})", plain(name))
    if meaning is None and found:
        meaning = meaning_of(found[1])
        if meaning in SEVERAL:
            return found[1], int(found[2]), meaning
        meaning = None
    return plain(name), -1, meaning


def texts_in(value: object) -> list[str]:
    """The texts in an entry, however deep."""
    texts, left = [], [value]
    while left and len(texts) < MOST_TEXTS:
        one = left.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, (list, dict)):
            left.extend(one.values() if isinstance(one, dict) else one)
    return texts


def pictures_named(value: object) -> list[str]:
    """The texts in an entry, or a whole row, that are called as picture files are."""
    return [text for text in texts_in(value) if text.lower().endswith(PICTURES)]


def ours(row: dict, where: str) -> tuple[dict, dict]:
    """A row's entries under our names, and those that have no known name.

    Nulls and empty lists count as absent. Entries control_path_0, control_path_1, ... become
    one list, in that order.
    Raises: ValueError for two entries of one meaning, or an entry that has two.
    """
    given: dict[str, dict[str, list]] = defaultdict(dict)        # meaning, name -> numbers, names
    rest = {}
    for name, value in row.items():
        stem, number, meaning = read_name(name)
        if meaning == "either" and not pictures_named(value):
            meaning = None
        if meaning is None:
            rest[name] = value
        elif value not in (None, []):
            given[meaning].setdefault(stem, []).append((number, name))
    if given["either"]:
        name = next(iter(given["either"].values()))[0][1]
        raise ValueError(f"{where}: {name!r} may be the picture to edit or a map (edges, "
                         "depth, pose); call it 'images' or 'conds'")
    if given["own"] and given["target"]:
        target, other = (next(iter(given[meaning].values()))[0][1] for meaning in ("target", "own"))
        raise ValueError(f"{where}: of {target!r} and {other!r} the second may be the picture to "
                         "edit or the target again; call them 'target' and 'images'")
    given["target"] |= given.pop("own")
    return {meaning: one_entry(row, meaning, stems, where)
            for meaning, stems in given.items() if stems}, rest


def one_entry(row: dict, meaning: str, stems: dict[str, list], where: str) -> object:
    """The value of the entries that have one meaning. Raises: ValueError for more than one."""
    entries = sorted(entry for numbered in stems.values() for entry in numbered)
    numbers, names = zip(*entries)
    if len(stems) > 1 or len(set(numbers)) < len(numbers):
        raise ValueError(f"{where}: {names[0]!r} and {names[1]!r} both mean {meaning!r}; keep one")
    return row[names[0]] if numbers == (-1,) else [row[name] for name in names]


def check_unread(rest: dict, folder: Path, used: list[Path], where: str) -> None:
    """Raises: ValueError when an entry that has no known name holds a picture that is there.

    used: the pictures that the row's other entries name; an entry may repeat them.
    """
    for name, value in rest.items():
        for text in pictures_named(value):
            whole = os.path.abspath(folder / text)
            if Path(whole) not in used and os.path.isfile(whole):
                raise ValueError(f"{where}: {name[:60]!r} holds a picture, {text[:200]!a}, but is "
                                 f"no known name; leave it out or call it {KNOWN}")
