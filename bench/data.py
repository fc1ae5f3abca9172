"""What the loader gives: samples per second of the public sets, alone, and its memory over time.

Writes each set's columns into small parquet files of 512x512 JPEGs, then draws batches of four from
an equal mixture. Canny's cost is shown by itself, beside Pillow's own decoding of one such picture.

Run: python bench/data.py --samples 20000
"""
import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image, ImageFilter
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                              # noqa: E402
from common import in_turns, memory                      # noqa: E402
from support.conditions import canny                     # noqa: E402
from support.public_sets import PUBLIC                   # noqa: E402


def jpeg(rng: np.random.Generator, size: tuple[int, int] = (512, 512)) -> bytes:
    """A picture with as much detail as a photograph: blurred noise at two scales."""
    rough = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    fine = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.blend(Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC),
                          Image.fromarray(fine).filter(ImageFilter.GaussianBlur(1.5)), 0.3)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def write(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    pictures = [{"bytes": jpeg(rng), "path": None} for _ in range(16)]
    pairs = [{"bytes": jpeg(rng, (1024, 512)), "path": None} for _ in range(8)]

    def some(of: list[dict]) -> dict:
        return of[int(rng.integers(len(of)))]
    tables = {
        "omniedit": [{"src_img": some(pictures), "edited_img": some(pictures),
                      "edited_prompt_list": ["make it red", "paint it red"]} for _ in range(rows)],
        "musar": [{"cond_img_0": some(pictures), "cond_img_1": some(pictures),
                   "tgt_img": some(pictures), "prompt": "both"} for _ in range(rows)],
        "subjectspatial": [{"image": some(pairs), "bbox": [0.2, 0.5, 0.2, 0.5],
                            "canny": {"bytes": some(pictures)["bytes"]},
                            "depth": {"bytes": some(pictures)["bytes"]},
                            "description": {"item": "cup", "description_0": "A cup."}}
                           for _ in range(rows)],
        "coco": [{"image": some(pictures), "conditioning_image": some(pictures), "text": "a dog"}
                 for _ in range(rows)]}
    for name, table in tables.items():
        parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{name}.parquet",
                            row_group_size=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=400, help="in each set's file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.rows)
        sources = [data.open_source(f"{name}={folder}/{name}.parquet", public=PUBLIC)
                   for name in PUBLIC]
        batches, drawn, pictures, own = data.batches(sources, 4, 0), Counter(), 0, []
        for _ in range(20):                              # every set's first row groups are read
            next(batches)
        began = time.time()
        while drawn.total() < args.samples:
            for sample in next(batches):
                drawn[sample.task] += 1
                pictures += 1 + len(sample.images) + len(sample.conds)
            if drawn.total() > len(own) * args.samples / 10:
                own.append(memory() / 1e6)
        seconds = time.time() - began
        batches.close()
        print(f"{drawn.total()} samples, {pictures} pictures in {seconds:.1f} s: "
              f"{drawn.total() / seconds:.0f} samples, {pictures / seconds:.0f} pictures a second\n"
              f"memory at every tenth, MB: {' '.join(f'{value:.0f}' for value in own)}")
        content = jpeg(np.random.default_rng(1))
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        for name, seconds in in_turns({
                "decoding a picture": lambda: Image.open(io.BytesIO(content)).load(),
                "Canny": lambda: canny(picture, 100, 200)}, rounds=20).items():
            print(f"{name}: {1000 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
