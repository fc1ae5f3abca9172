"""500 ways to break a good checkpoint: each is refused in one line, or its tensors are unharmed."""
import json
import pickle
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from forks import Forks
from helpers import assert_equal, Bomb, load, write_shards
from support.conditions import pick

PART = "text_encoder_2"
Random = np.random.Generator


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_header(change: Callable[[Random, dict, list[str]], object]) -> Callable:
    """A mutation of one shard's parsed header; names are those of its tensors."""
    def mutate(rng: Random, folder: Path) -> None:
        file = pick(rng, shards(folder))
        content = file.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:end])
        change(rng, header, sorted(header.keys() - {"__metadata__"}))
        head = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(head)) + head + content[end:])
    return mutate


def cut(rng: Random, folder: Path) -> None:
    file = pick(rng, shards(folder))
    file.write_bytes(file.read_bytes()[:int(rng.integers(file.stat().st_size))])


def flip(rng: Random, folder: Path) -> None:
    """One bit of the length or the header; a flip among the numbers themselves nobody can see."""
    file = pick(rng, shards(folder))
    content = bytearray(file.read_bytes())
    at = int(rng.integers(8 + struct.unpack("<Q", content[:8])[0]))
    content[at] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


def lie(rng: Random, folder: Path) -> None:
    """A header that says it is longer or shorter, by little or by exabytes."""
    file = pick(rng, shards(folder))
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    claimed = pick(rng, [length + 1, length - 1, length * 2, 0, 2 ** 31, 2 ** 40, 2 ** 64 - 1,
                         int(rng.integers(2 ** 62))])
    file.write_bytes(struct.pack("<Q", claimed) + content[8:])


def overlap(rng: Random, header: dict, names: list[str]) -> None:
    one, other = rng.permutation(names)[:2]
    header[one]["data_offsets"] = header[other]["data_offsets"]


def retype(rng: Random, header: dict, names: list[str]) -> None:
    header[pick(rng, names)]["dtype"] = pick(rng, ["F64", "F16", "I32", "BOOL", "C64", "Q4", ""])


def reshape(rng: Random, header: dict, names: list[str]) -> None:
    entry = header[pick(rng, names)]
    shape = entry["shape"]
    entry["shape"] = pick(rng, [shape + [1], [int(np.prod(shape))] + [1] * len(shape),
                                [2 ** 40, 2 ** 40], [-1, *shape], ["4"], 4])


def swap(rng: Random, header: dict, names: list[str]) -> None:
    """Two tensors of different shapes have exchanged their names."""
    one = pick(rng, names)
    other = pick(rng, [name for name in names if header[name]["shape"] != header[one]["shape"]])
    header[one], header[other] = header[other], header[one]


def lose(rng: Random, folder: Path) -> None:
    pick(rng, shards(folder)).unlink()


def lead_out(rng: Random, folder: Path) -> None:
    """The index names a file outside of the folder; a good one lies there."""
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    file = pick(rng, shards(folder))
    (folder.parent / "outside.safetensors").write_bytes(file.read_bytes())
    for name, where in value["weight_map"].items():
        if where == file.name:
            value["weight_map"][name] = pick(rng, [
                "../outside.safetensors", str(folder.parent / "outside.safetensors")])
    index.write_text(json.dumps(value))


def pickled(rng: Random, folder: Path) -> None:
    file = pick(rng, shards(folder))
    bomb = Bomb(folder.parent / "executed")
    if rng.random() < 0.5:
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"weight": bomb}, file)


def gguf(rng: Random, folder: Path) -> None:
    pick(rng, shards(folder)).write_bytes(b"GGUF" + rng.bytes(int(rng.integers(200))))


MUTATIONS = {"cut": cut, "flip": flip, "lie": lie, "overlap": edit_header(overlap),
             "retype": edit_header(retype), "reshape": edit_header(reshape),
             "swap": edit_header(swap), "lose": lose, "lead out": lead_out, "pickle": pickled,
             "gguf": gguf}
TIMES = {"cut": 110, "flip": 150, "lie": 40}             # and 25 of each other kind: 500 in all


def mutated(folder: Path, kind: str, number: int) -> Path:
    """A checkpoint in two shards with an index, broken in its own way."""
    write_shards(folder, PART)
    MUTATIONS[kind](np.random.default_rng([number, len(kind)]), folder)
    return folder


@pytest.mark.parametrize("kind", MUTATIONS)
def test_broken_checkpoints_are_refused_or_unharmed(tmp_path: Path, kind: str) -> None:
    unharmed, unit = 0, 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(TIMES.get(kind, 25)):
        folder = mutated(tmp_path / str(number) / "model", kind, number)
        start = time.monotonic()
        try:
            model = load(folder, PART)
        except (ValueError, OSError) as error:           # what the commands print as one line
            assert len(str(error)) < 600 and str(tmp_path) in str(error), error
        else:
            assert_equal(model, PART)
            unharmed += 1
        assert time.monotonic() - start < 5
        assert not (folder.parent / "executed").exists()
    assert unharmed == 0 or kind in ("flip", "lie")      # a letter of the metadata, the same length
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * unit < 200_000_000                    # bytes; a header may claim exabytes


def test_there_are_five_hundred() -> None:
    assert sum(TIMES.get(kind, 25) for kind in MUTATIONS) == 500


@pytest.mark.parametrize("kind", [kind for kind in MUTATIONS if kind != "flip"])
def test_the_command_says_so_in_one_line(tmp_path: Path, kind: str, forks: Forks) -> None:
    folder = mutated(tmp_path / "model", kind, 0)
    done = forks.run("sample.py", "--instruction", "a star", "--t5", folder, "--out",
                     tmp_path / "out.png", seconds=60)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path) in done.stderr and not (tmp_path / "out.png").exists()
    assert not (tmp_path / "executed").exists()
