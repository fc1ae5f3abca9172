"""support/files.py: safetensors and their indices, config.json, whole or nothing written."""
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import (load, ONE, PARTS, raw_file, same, SMALL_DIT, SMALL_VAE, write_index,
                     write_shards, written)
from support.files import files_of, read_metadata, read_tensors, replacing, unpickled


def test_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"rank": "4"})
    assert read_metadata(tmp_path / "a.safetensors") == {"rank": "4"}
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors") == {}


BROKEN = {
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 8),
    "no JSON": lambda file: raw_file(file, b"{nope"),
    "header longer than the file":
        lambda file: file.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    "bytes missing": lambda file: raw_file(file, ONE, bytes(8)),
    "bytes to spare": lambda file: raw_file(file, ONE, bytes(24)),
    "shape larger than its bytes":
        lambda file: raw_file(file, {"a": ONE["a"] | {"shape": [5]}}, bytes(16)),
    "negative shape": lambda file: raw_file(file, {"a": ONE["a"] | {"shape": [-4]}}, bytes(16)),
    "shape that overflows":
        lambda file: raw_file(file, {"a": ONE["a"] | {"shape": [2 ** 40, 2 ** 40]}}, bytes(16)),
    "bytes before the first":
        lambda file: raw_file(file, {"a": ONE["a"] | {"data_offsets": [4, 20]}}, bytes(20)),
    "bytes used twice": lambda file: raw_file(file, {"a": ONE["a"], "b": ONE["a"]}, bytes(16)),
    "unknown dtype": lambda file: raw_file(file, {"a": ONE["a"] | {"dtype": "Q4"}}, bytes(16)),
    "unreadable dtype":
        lambda file: raw_file(file, {"a": ONE["a"] | {"dtype": "F6_E2M3", "shape": [16]}},
                              bytes(12)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    BROKEN[kind](file)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        read_tensors([file])


@pytest.mark.parametrize("kept", [0, 0.1, 0.5, -1])
def test_a_checkpoint_that_is_cut_is_said_to_be(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"a": torch.zeros(1000)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if kept < 0 else whole[:int(kept * len(whole))])
    with pytest.raises(ValueError, match="checkpoint.pt: cannot be read .it is cut short"):
        unpickled(file)


def test_what_the_system_says_of_a_cut_file_is_put_in_words(tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(22, "Invalid argument")            # of a cut file of gigabytes
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match="it is cut short"):
        unpickled(tmp_path / "a.pt")


FOREIGN = {
    "is a Git LFS pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid a:1",
    "is a web page.*licence": b"\n  <HTML><head><title>Sign in</title></head></html>",
    "is a web page, not": b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>",
    "is text, perhaps a server's answer": b'{"error": "Invalid username or password."}',
    "server's answer": b"Entry not found",
    "GGUF is not read": b"GGUF\x03\0\0\0{" + bytes(100),
    "is a pickle.*may hold code": b"PK\x03\x04" + bytes(60),
    "is a pickle .*safetensors": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    "is an archive; unpack": b"\x1f\x8b\x08" + bytes(30),
    "HDF5": b"\x89HDF\r\n" + bytes(30),
    "is text, not weights": "once upon a time there was a fil\u00e9".encode()[:-1],
    "is a picture, not weights": b"\x89PNG\r\n\x1a\n" + bytes(30),
    "is a picture, not": b"\xff\xd8\xff\xe0" + bytes(30),
    "begins with zeros: the download did not end": bytes(5000)}


@pytest.mark.parametrize("told", FOREIGN)
def test_what_stands_in_the_place_of_weights_is_named(tmp_path: Path, told: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(FOREIGN[told])
    for read in (lambda file: read_tensors([file]), read_metadata):
        with pytest.raises(ValueError, match=rf"model\.safetensors: .*{told}"):
            read(tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [640, 0x280, 0x4B50 + 0x40000, 0x3C0A])
def test_a_whole_file_is_read_however_its_length_is_spelt(tmp_path: Path, length: int) -> None:
    """The first bytes are a number, and may be those of a pickle, an archive, a page."""
    file = raw_file(tmp_path / "model.safetensors", b"{}".ljust(length))
    assert read_tensors([file]) == {}


@pytest.mark.parametrize("name, told", [
    ("model.safetensors.incomplete", "unfinished download; run `hf download` again"),
    (".cache/huggingface/12ab.incomplete", "12ab.incomplete is an unfinished download"),
    ("another/pytorch_model.bin", None),                 # how much may lie below a home folder
    ("pytorch_model.bin", "pytorch_model.bin is not read; take the .safetensors"), ("notes", None),
    ("flux1-Q4_K.gguf", "flux1-Q4_K.gguf is not read; take the .safetensors")])
def test_what_a_folder_without_weights_holds_is_said(tmp_path: Path, name: str, told: str) -> None:
    folder = written(tmp_path, "vae")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FileNotFoundError, match=f"found 0 files.*{told}" if told else "0 files$"):
        load(folder, "vae")


def test_unfinished_and_lost_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors.incomplete"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="incomplete: is an unfinished download"):
        read_tensors([file])
    with pytest.raises(FileNotFoundError, match="a.safetensors: no such file, but a.safetensors.inc"
                       "omplete, an unfinished download; let it end, or download it again"):
        read_tensors([tmp_path / "a.safetensors"])
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "blobs/12ab")
    with pytest.raises(FileNotFoundError, match="b.safetensors: is a link to .*12ab, which is not"):
        read_tensors([tmp_path / "b.safetensors"])


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    file = written(tmp_path, "vae") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:int(share * len(data))])
    for read in (lambda: load(tmp_path, "vae"), lambda: read_metadata(file)):
        with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
            read()


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """By the name that was asked for, not by the one that it is written to first."""
    file = tmp_path / "gone" / "a.txt"
    with pytest.raises(OSError, match="a.txt: cannot be written .No such file or directory"):
        with replacing(file) as aside:
            aside.write_text("a")
    with pytest.raises(OSError, match="^[^:]*b.txt: cannot be written .No space left on device.$"):
        with replacing(tmp_path / "a.txt"), replacing(tmp_path / "b.txt"):
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- folders of several files

def test_shards_of_a_variant_have_an_index_of_its_name(tmp_path: Path) -> None:
    """As save_pretrained(variant="fp16") writes them."""
    weight_map = write_shards(tmp_path)
    whole = read_tensors(files_of(tmp_path))
    for file in {*weight_map.values()}:
        (tmp_path / file).rename(tmp_path / file.replace("model-", "model.fp16-"))
    index, = tmp_path.glob("*.index.json")
    names = {name: file.replace("model-", "model.fp16-") for name, file in weight_map.items()}
    index.unlink()
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": names}))
    assert same(read_tensors(files_of(tmp_path)), whole)


def test_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, "vae")
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match="found 2 files"):
        load(folder, "vae")


@pytest.mark.parametrize("outside", ["../other.safetensors", "/other.safetensors",
                                     "sub/other.safetensors", "..", "", "config.json"])
def test_index_that_names_other_files_is_refused(tmp_path: Path, outside: str) -> None:
    weight_map = write_shards(tmp_path / "vae")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    write_index(tmp_path / "vae", weight_map | {"decoder.conv_in.bias": outside})
    with pytest.raises(ValueError, match="files of the same folder"):
        load(tmp_path / "vae", "vae")


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {"a": 3}, {"a": None}])
def test_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        load(tmp_path, "vae")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    told = "00002-of-00002.safetensors: no such file.*again fetches what is missing"
    with pytest.raises(FileNotFoundError, match=told):
        load(tmp_path, "vae")


def test_a_shards_name_without_an_index_that_names_it_is_any_name(tmp_path: Path) -> None:
    """Beside no index, or beside one of other files; a part of such a name, too."""
    for write in (lambda folder: None, write_shards):
        write(tmp_path)
        for name in ("model-00003-of-00004.safetensors", "model"):
            with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder$"):
                read_tensors([tmp_path / name])


def test_index_that_forgets_a_shard_leaves_tensors_missing(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    write_index(tmp_path, {name: file for name, file in weight_map.items() if "00001" in file})
    with pytest.raises(ValueError, match="missing"):
        load(tmp_path, "vae")


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"decoder.conv_in.bias": torch.zeros(16)}, second)
    with pytest.raises(ValueError, match=r"00002.*decoder\.conv_in\.bias occurs in another shard"):
        load(tmp_path, "vae")


# -------------------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("part", PARTS)
def test_missing_config_entries_are_named(tmp_path: Path, part: str) -> None:
    folder = written(tmp_path, part)
    needed = [name for name in PARTS[part][0] if name != "guidance_embeds"]
    for name in needed:
        (folder / "config.json").write_text(json.dumps(
            {k: v for k, v in PARTS[part][0].items() if k != name}))
        with pytest.raises(ValueError, match=rf"config\.json: has no entry '{name}'"):
            load(folder, part)


@pytest.mark.parametrize("entry, value", [
    ("layers_per_block", "1"), ("layers_per_block", 1.5), ("layers_per_block", None),
    ("layers_per_block", True), ("block_out_channels", 8), ("block_out_channels", "8"),
    ("block_out_channels", ["8", "16"]), ("block_out_channels", []),
    ("block_out_channels", [8.0, 16.0]), ("block_out_channels", [8, 0]),
    ("scaling_factor", "0.3611"), ("scaling_factor", []), ("latent_channels", -4)])
def test_config_entries_of_another_kind_are_named(tmp_path: Path, entry: str,
                                                  value: object) -> None:
    folder = written(tmp_path, "vae")
    (folder / "config.json").write_text(json.dumps(SMALL_VAE | {entry: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {entry} should be"):
        load(folder, "vae")


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_must_divide_the_widths(tmp_path: Path, groups: int) -> None:
    folder = written(tmp_path, "vae")
    (folder / "config.json").write_text(json.dumps(SMALL_VAE | {"norm_num_groups": groups}))
    with pytest.raises(ValueError, match=f"norm_num_groups {groups}"):
        load(folder, "vae")


def test_guidance_must_be_true_or_false(tmp_path: Path) -> None:
    folder = written(tmp_path, "transformer")
    (folder / "config.json").write_text(json.dumps(SMALL_DIT | {"guidance_embeds": 1}))
    with pytest.raises(ValueError, match="guidance_embeds should be bool, found 1"):
        load(folder, "transformer")


def test_config_may_hold_whole_numbers_for_floats_and_other_entries(tmp_path: Path) -> None:
    folder = written(tmp_path, "vae")
    (folder / "config.json").write_text(json.dumps(
        SMALL_VAE | {"scaling_factor": 1, "_class_name": "AutoencoderKL"}))
    assert load(folder, "vae").config.scaling_factor == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe{}", b"{'a': 1}",
                                     b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}",
                                     b'{"a": {"b": 1, "b": 1}}'])
def test_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path, "vae")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        load(folder, "vae")
