"""What other tools have estimated of a benchmark's pictures: maps of depth, keypoints of people.

spatial.score_depth() and score_pose() read them, from folders in --out; scoring.md, which is there
too, says how they are made.
"""
from pathlib import Path

import numpy as np

from support.configs import json_object, of_kind
from support.tables import read_text

POINTS = 18                                              # of OpenPose's model COCO
FOLDERS = {"depth": "{}_depth_cond", "pose": "{}_pose_keypoints"}        # of results, truths


def found_in(out: Path, kind: str, names: set[str]) -> tuple[Path, Path] | None:
    """The folders with another tool's maps of results and truths, or None where there is none.

    Raises: ValueError where one lacks a map, or has one too many.
    """
    folders = tuple(out / FOLDERS[kind].format(which) for which in ("eval", "gt"))
    if not any(folder.is_dir() for folder in folders):
        return None
    suffixes = {Path(name).suffix for name in names}     # others, as Thumbs.db, are not asked
    for folder in folders:
        there = {file.name for file in folder.glob("[!.]*") if file.suffix in suffixes}
        for wrong, what in ((names - there, "has no"), (there - names, "has a surplus")):
            if wrong:
                raise ValueError(f"{folder}: {what} {min(wrong)}; make the maps of all pictures "
                                 "that are in --out, or take the folder away")
    return folders


def people_in(file: Path) -> list[np.ndarray]:
    """Those of a file that OpenPose has written, each (18, 3). Raises: ValueError."""
    people = json_object(read_text(file), file).get("people")
    lists = [one.get("pose_keypoints_2d") if isinstance(one, dict) else None
             for one in people] if isinstance(people, list) else [None]
    for numbers in lists:
        if not isinstance(numbers, list) or len(numbers) != 3 * POINTS or not all(
                of_kind(number, float) for number in numbers):
            raise ValueError(f"{file}: 'people' should hold 'pose_keypoints_2d' of {POINTS} points "
                             "each, x, y and a score, as OpenPose writes them with --model_pose "
                             "COCO")
    return [np.reshape(numbers, (POINTS, 3)).astype(float) for numbers in lists]
