"""The public data sets that the paper trains on: train.py --data omniedit=PATH and so on.

train.py hands PUBLIC to data.open_source(); each class says what the rows of its set mean, and the
common ground, reading and drawing rows, is support/parquet.py.
"""
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data import Sample
from support.conditions import pick, random_box, random_canny, skeletons
from support.configs import parse_json
from support.parquet import Public, text_of
from support.pictures import LONGEST, pictures_in
from support.tables import located, read_text

SECOND_PROMPT = 0.7                                      # OmniEdit: of a row's second wording
RECREATE = 0.3                                           # SubjectSpatial200K: of no description
POSE, CAPTION = 0.75, 0.2                                # COCO: a skeleton; a bare caption

# What a condition is called in an instruction, and how a caption is led in by one.
PHRASES = {"subject": "the {item} of {which}", "canny": "the edges in {which}",
           "depth": "the depth map in {which}", "fill": "the picture around the box in {which}"}
STYLES = ("Make a picture from {all}.", "Combine {all}.", "With {all}, make one picture.")
LEADS = {"pose": ("{caption}, in the pose of the skeleton", "follow the pose: {caption}"),
         "canny": ("{caption}, along the edges", "follow the edges: {caption}"),
         "depth": ("{caption}, in the depth of the map", "follow the depth map: {caption}"),
         "fill": ("fill the black part: {caption}", "complete the picture: {caption}")}


class OmniEdit(Public):
    """TIGER-Lab/OmniEdit-Filtered-1.2M: a picture, an edit in one or two wordings, the result."""
    columns = ("edited_img", "src_img", "edited_prompt_list")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample | None:
        wordings = row["edited_prompt_list"] or []
        if not isinstance(wordings, list):
            raise ValueError(f"{where}: 'edited_prompt_list' must be a list of texts")
        if not wordings:
            return None
        second = len(wordings) > 1 and rng.random() < SECOND_PROMPT
        target = self.fit(self.picture(row, "edited_img", where))
        source = self.fit(self.picture(row, "src_img", where), target.shape[1::-1])
        return Sample(text_of(wordings[int(second)], "edited_prompt_list", where), target, [source],
                      task="edit")


class MUSAR(Public):
    """guozinan/MUSAR-Gen: two subjects, and a picture of both."""
    columns = ("tgt_img", "cond_img_0", "cond_img_1", "prompt")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        target, *conds = (self.fit(self.picture(row, name, where))
                          for name in ("tgt_img", "cond_img_0", "cond_img_1"))
        return Sample(text_of(row["prompt"], "prompt", where), target, [], conds, "multi")


class SubjectSpatial(Public):
    """Xuan-World/SubjectSpatial200K: a subject beside a picture of it, with that one's maps."""
    columns = ("image", "bbox", "canny", "depth", "description")
    conditions = (1, 2, 3)

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        both, about = self.picture(row, "image", where), row["description"]
        if not isinstance(about, dict):
            raise ValueError(f"{where}: 'description' must have an item and a description_0")
        left, right = (both.crop((x, 0, x + both.width // 2, both.height))
                       for x in (0, both.width // 2))
        side = min(self.longest, max(LONGEST, left.height // 16 * 16))       # not enlarged for it
        size = self.size or (side, side)
        names = [str(name) for name in rng.choice(list(PHRASES), number, replace=False)]
        conds = [self.fit(right, size) if name == "subject" else
                 self.blacked(left, row["bbox"], size, where) if name == "fill" else
                 self.fit(self.picture(row, name, where), size) for name in names]
        places = {1: ["the picture"], 2: ["the left picture", "the right picture"],
                  3: [f"the {nth} picture" for nth in ("first", "second", "third")]}[number]
        item = text_of(about.get("item"), "description.item", where)
        phrases = [PHRASES[name].format(item=item, which=place)
                   for name, place in zip(names, places)]
        told = " and ".join(phrases[i] for i in rng.permutation(number))
        tail = (f"Recreate the {item}." if rng.random() < RECREATE else
                text_of(about.get("description_0"), "description.description_0", where))
        style = pick(rng, STYLES)
        return Sample(f"{style.format(all=told)} {tail}", self.fit(left, size), [], conds,
                      "+".join(sorted(names)))

    def blacked(self, left: Image.Image, bbox: object, size: tuple[int, int],
                where: str) -> np.ndarray:
        """The left half with a black box; bbox is (x, y, w, h) of its centre, of the whole's."""
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(
                isinstance(v, (int, float)) and 0 <= v <= 1 for v in bbox):
            raise ValueError(f"{where}: 'bbox' must be four numbers in [0, 1]")
        picture = self.fit(left, size).copy()
        (x, y, w, h), (height, width) = bbox, picture.shape[:2]
        top, bottom = (int(np.clip(v * height, 0, height)) for v in (y - h / 2, y + h / 2))
        first, last = (int(np.clip(v * 2 * width, 0, width)) for v in (x - w / 2, x + w / 2))
        if top >= bottom or first >= last:
            raise ValueError(f"{where}: 'bbox' has nothing of the left half")
        picture[top:bottom, first:last] = 0
        return picture


def points_of(value: object, column: str, where: str) -> list[float]:
    """A person's 17 (x, y, seen) in one list, empty if nothing of them is seen."""
    if not isinstance(value, list) or len(value) != 51 or not all(
            type(v) in (int, float) and abs(v) < 1e5 for v in value):
        raise ValueError(f"{where}: {column!r} must be 51 numbers")
    return value if any(value[2::3]) else []


class COCO(Public):
    """wangherr/coco2017_train_512x_image_caption_openpose: a picture, its skeletons, a caption."""
    columns = ("image", "conditioning_image", "text")

    def sample(self, row: dict, rng: np.random.Generator, number: int, where: str) -> Sample:
        image = self.picture(row, "image", where)
        pose, text = row["conditioning_image"], row["text"]
        target, others = self.fit(image), ("canny", "fill", "depth")[:3 if row.get("depth") else 2]
        task = "pose" if rng.random() < POSE and pose != () else pick(rng, others)
        if task == "pose":
            cond = (skeletons(pose, image.size, target.shape) if isinstance(pose, tuple) else
                    self.fit(self.picture(row, "conditioning_image", where)))
        elif task == "depth":
            cond = self.fit(self.picture(row, "depth", where), target.shape[1::-1])
        else:
            cond = (random_canny if task == "canny" else random_box)(rng, target)
        caption = text_of(pick(rng, text) if isinstance(text, tuple) else text, "text", where)
        if rng.random() >= CAPTION:
            caption = pick(rng, LEADS[task]).format(caption=caption)
        return Sample(caption, target, [], [cond], task)


class COCOFolder(COCO):
    """COCO 2017 as its authors give it: a folder with train2017/ and annotations/.

    A row has all captions and people of a picture, in tuples, which parquet files cannot have: one
    caption is drawn, and all skeletons. Where depth/ has its stem, that is the picture's depth map.
    """

    def find_groups(self, path: Path) -> None:
        folder, notes = path / "train2017", path / "annotations"
        depth = {picture.stem: picture for picture in pictures_in(path / "depth")}
        rows: dict[int, dict] = {}
        for column, name, key, check in (
                ("text", "captions", "caption", text_of),
                ("conditioning_image", "person_keypoints", "keypoints", points_of)):
            file = notes / f"{name}_train2017.json"
            whole = parse_json(read_text(file), file)     # hundreds of megabytes: one at a time
            if column == "text":                         # this file names the pictures too
                for number, picture in self.entries(
                        file, whole, "images", "id", "file_name", lambda name, key, where: located(
                            text_of(name, key, where), folder, folder, where)):
                    rows[number] = {"image": picture, "conditioning_image": (), "text": (),
                                    "depth": depth.get(picture.stem)}
            for number, value in self.entries(file, whole, "annotations", "image_id", key, check):
                if value and number in rows:
                    rows[number][column] += (value,)
        self.listed = [row for row in rows.values() if row["text"]]
        self.groups, self.sizes = [(folder, 0, 0)][:len(self.listed)], [len(self.listed)]

    def entries(self, file: Path, whole: object, part: str, id_: str, key: str,
                check: Callable[[object, str, str], object]) -> Iterator[tuple[int, object]]:
        """A picture's number, and what is said of it, for each entry in a part of a file."""
        entries = whole.get(part) if isinstance(whole, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file}: holds no list {part!r}, as COCO's files do")
        self.sizes = [len(entries)]                      # what skipping() counts bad ones by
        for i, entry in enumerate(entries):
            with self.skipping():
                where = f"{file} {part} {i}"
                if not isinstance(entry, dict) or type(entry.get(id_)) is not int:
                    raise ValueError(f"{where}: {id_!r} must be a whole number")
                yield entry[id_], check(entry.get(key), key, where)
        if self.bad:                                     # all sources' have them; the next part
            self.bad.clear()                             # counts anew

    def read(self, number: int) -> list[dict]:
        return self.listed

    def contents(self) -> Iterator[tuple]:
        for row in self.listed:
            yield row["image"].name, row["text"]

    def where(self, number: int, i: int) -> str:
        return str(self.listed[i]["image"])


def open_coco(path: str | Path, *options: object) -> COCO:
    """COCO in either form."""
    plain = any((Path(path) / name).is_dir() for name in ("annotations", "train2017"))
    return (COCOFolder if plain else COCO)(path, *options)


PUBLIC = {"omniedit": OmniEdit, "musar": MUSAR, "subjectspatial": SubjectSpatial, "coco": open_coco}
