"""support/foreign.py through the commands: what stands where weights should, in one line each.

How files and names are told apart is tested beside those who ask: test_files.py, test_layouts.py.
"""
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weights
from helpers import run_command, run_sample

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 344\n"
PAGE = b"<!doctype html><html><head><title>Sign in</title></head></html>"


def bytes_of(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content)


def tensors_of(name: str) -> Callable[[Path], None]:
    return lambda file: save_file({name: torch.zeros(3, 2)}, file)


# file's name; what it holds; what is said of it
THERE = {
    "Git LFS pointer": ("a.safetensors", bytes_of(POINTER), "is a Git LFS pointer"),
    "web page": ("a.safetensors", bytes_of(PAGE), "is a web page, not weights"),
    "server's answer": ("a.safetensors", bytes_of(b'{"error": "x"}'), "a server's answer"),
    "pickle": ("a.pt", lambda file: torch.save({"a": torch.zeros(2)}, file), "is a pickle"),
    "GGUF": ("a.gguf", bytes_of(b"GGUF\x03\0\0\0" + bytes(90)), "GGUF is not read"),
    "unfinished": ("a.safetensors.part", tensors_of("x"), "is an unfinished download"),
    "zeros": ("a.safetensors", bytes_of(bytes(4096)), "the download did not end"),
    "bitsandbytes": ("a.safetensors", tensors_of("x_embedder.weight.absmax"),
                     "is quantised by bitsandbytes"),
    "nunchaku": ("a.safetensors", tensors_of("single_transformer_blocks.0.mlp_fc1.wscales"),
                 "is quantised by nunchaku")}


def cut(file: Path) -> None:
    save_file({"transformer.x_embedder.lora_A.weight": torch.zeros(200, 64)}, file)
    file.write_bytes(file.read_bytes()[:5000])


THERE["cut"] = ("a.safetensors", cut, "not a whole safetensors file")


def refused(monkeypatch, capsys, told: str, *arguments: object) -> None:
    """sample.py, or weights.py where no option is given, says so in one line, and ends with 2."""
    if len(arguments) == 1:
        found = run_command(monkeypatch, capsys, "weights.py", weights.main, *arguments)
    else:
        if (folder := Path(arguments[-1]).parent).is_dir():      # where no out.png is yet
            monkeypatch.chdir(folder)
        found = run_sample(monkeypatch, capsys, "--instruction", "a", *arguments)
    code, out, err = found
    assert code == 2 and told in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("kind", THERE)
def test_what_stands_in_the_place_of_weights_ends_a_command_in_one_line(
        tmp_path: Path, monkeypatch, capsys, kind: str) -> None:
    """Named to weights.py, as an adapter, as a model, as a part; nothing is made."""
    name, write, told = THERE[kind]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    for before in ([], ["--adapter"], ["--model"], ["--vae"]):
        refused(monkeypatch, capsys, told, *before, name)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("option", [[], ["--adapter"], ["--model"], ["--t5"], ["--tokenizers"]])
def test_a_repositorys_name_is_answered_with_the_command_that_fetches_it(
        tmp_path: Path, monkeypatch, capsys, option: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    refused(monkeypatch, capsys, "fetch it first, hf download someone/Some-Model --local-dir "
            "Some-Model, then name the folder Some-Model", *option, "someone/Some-Model")


def test_a_download_that_goes_on_is_said_where_its_file_is_not_yet(tmp_path: Path, monkeypatch,
                                                                   capsys) -> None:
    (tmp_path / "a.safetensors.crdownload").write_bytes(b"some")
    told = "a.safetensors: no such file, but a.safetensors.crdownload, an unfinished download"
    for option in ([], ["--adapter"], ["--model"]):
        refused(monkeypatch, capsys, told, *option, tmp_path / "a.safetensors")
