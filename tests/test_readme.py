"""README.md is true: line counts, options, files. And the house keeps its rules.

The rules: which file stands at the top and how long it may be; which way imports go; functions that
fit on a page; rooms of support that say who calls them.
"""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import test_describe
import test_layouts
import test_public_sets
import train
import weights
from dit import DiTConfig, FluxTransformer
from helpers import (assert_equal, MODEL, ROOT, run_sample, run_train, SETS, write_set,
                     write_shards, written)
from support import adapters, layouts, research
from support.configs import config_from, read_json
from support.files import read_tensors
from support.implied import RELEASED
from support.fp8 import NarrowLinear
from support.public_sets import PUBLIC

README = (ROOT / "README.md").read_text()
LINES = {"mole": 270, "dit": 340, "vae": 200, "text_encoder": 310, "weights": 270, "sample": 330,
         "data": 240, "train": 340, "baselines": 130, "evaluate": 270}       # at most
IDEA = list(LINES)[:8]
TOP = {*(f"{name}.py" for name in LINES), "support", "tiny", "tests", "bench", "README.md",
       "requirements.txt", "LICENSE", ".ci", ".gitignore", "pytest.ini", "ruff.toml"}
COMMANDS = ["sample.py", "train.py", "evaluate.py", "weights.py"]
SUPPORT = sorted((ROOT / "support").glob("*.py"))
TINY = sorted((ROOT / "tiny").glob("*.py"))
PRODUCT = [*(ROOT / f"{name}.py" for name in LINES), *SUPPORT, *TINY]


def name_of(file: Path) -> str:
    """As it is imported."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(file) for file in PRODUCT}


def number_of_lines(file: Path) -> int:
    return len(file.read_text().splitlines())


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


# ----------------------------------------------------------------------------- what the README says

def blocks(language: str = "sh") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("file", [f"{name}.py" for name in LINES])
def test_line_counts(file):
    """In a row of a table, | `file.py` | lines | ..., or in a sentence, `file.py` (lines ...)."""
    stated = re.findall(rf"`{re.escape(file)}` (?:\| |\()([\d,]+)\b", README)
    assert stated and {number(text) for text in stated} == {number_of_lines(ROOT / file)}


def test_line_counts_of_the_whole():
    """Those of support/, its number of rooms, and those of the eight files."""
    lines, rooms = re.search(r"`support/` \(([\d,]+) lines in (\d+) rooms", README).groups()
    assert number(lines) == sum(map(number_of_lines, SUPPORT)) and int(rooms) == len(SUPPORT)
    idea = re.search(r"([\d,]+) lines in eight files", README)[1]
    assert number(idea) == sum(number_of_lines(ROOT / f"{name}.py") for name in IDEA)


def test_every_row_of_a_table_that_counts_lines_is_right():
    """Whatever file it names."""
    for file, lines in re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", README, re.M):
        assert number(lines) == number_of_lines(ROOT / file), file


def test_quick_start_has_two_commands_that_install_what_they_need():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    found = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert len(found) == 2
    assert "-r requirements.txt" in found[0] and "sample.py --instruction" in found[0]
    assert "-r tests/requirements.txt" in found[1] and "pytest" in found[1]


@pytest.fixture(scope="module")
def known_options(forks):
    """What --help of each command says."""
    return {script: forks.run(script, "--help").stdout for script in COMMANDS}


@pytest.mark.parametrize("line", sorted({
    line for block in blocks() for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"python (sample|train|evaluate|weights)\.py", line)}))
def test_commands_in_the_readme_use_options_that_exist(line, known_options):
    script = re.search(r"python (\w+\.py)", line)[1]
    for option in re.findall(r"(--[a-z0-9-]+)", line):
        assert re.search(rf"{option}(?![\w-])", known_options[script]), f"{script} has no {option}"


def test_three_lines_of_python_make_the_picture_that_is_shown(monkeypatch):
    """But for rounding, which may move a value by a few steps on another processor."""
    code, found = blocks("python")[0], {}
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(ROOT)
    exec(code, found)
    shown = Image.open(ROOT / "tiny/examples/after.png")
    assert np.abs(np.asarray(found["picture"]).astype(int) - np.asarray(shown)).max() <= 8


def test_files_that_the_readme_shows_exist():
    for path in (re.findall(r"!\[.*?\]\((.*?)\)", README)
                 + re.findall(r"(tiny/[\w/.]+\.\w+)", README)):
        assert (ROOT / path).exists(), path


def test_committed_weights_stay_small():
    size = sum(file.stat().st_size for file in (ROOT / "tiny").rglob("*.safetensors"))
    assert 0 < size <= 16_000_000


# --------------------------------------------------------------------------------------- what loads

def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def test_your_own_data_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """The two commands, in one step each and elsewhere; all files that they name are there."""
    train_line, sample_line = re.findall(r"```sh\n(.*?)```", section("Your own data"),
                                         re.S)[0].splitlines()
    words = {"--steps 20": "--steps 1", "runs/own": str(tmp_path / "own"),
             "own.png": f"{tmp_path / 'own.png'} --steps 1"}
    for run, line in ((run_train, train_line), (run_sample, sample_line)):
        for old, new in words.items():
            line = line.replace(old, new)
        monkeypatch.setattr(train, "previews", lambda *_: {})
        code, _, err = run(monkeypatch, capsys, *shlex.split(line)[2:])
        assert code == 0, err
    assert {"own", "own.png"} <= {path.name for path in tmp_path.iterdir()}


def model_folder(folder: Path) -> None:
    for part in weights.PARTS:
        written(folder / "one" / part, part)
        write_shards(folder / "shards" / part, part)
        assert_equal(weights.load(part, folder / "one" / part), part)
        assert_equal(weights.load(part, folder / "shards" / part), part)
    cached = folder / "models--a--b/snapshots/0a"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(MODEL)
    assert layouts.model_paths(folder / "models--a--b")["vae"] == cached / "vae"


def one_part(part: str, folder: Path) -> None:
    wanted = test_layouts.from_folder(part, folder / part)
    for prefix in ("", layouts.PREFIXES[part][0]):
        for tensors in (test_layouts.original(part), test_layouts.tensors_of(part)):
            save_file({prefix + name: t for name, t in tensors.items()}, folder / "a.safetensors")
            test_layouts.assert_same(part, weights.load(part, folder / "a.safetensors"), wanted)


def in_fp8(folder: Path) -> None:
    for scaled, old, new in ((False, "", ""), (True, "", ""),
                             (True, ".scale_weight", ".weight_scale")):
        tensors, _ = test_layouts.in_fp8(test_layouts.original("transformer"), scaled)
        save_file({name.replace(old, new): t for name, t in tensors.items()},
                  folder / "a.safetensors")
        model = weights.load("transformer", folder / "a.safetensors")
        layer = model.transformer_blocks[0].attn.to_k
        assert isinstance(layer, NarrowLinear) and (layer.scale is not None) == scaled
    test_layouts.test_fp8_may_have_a_scale_for_each_row_under_the_newer_names(folder, (-1, 1))


def adapter(path: Path, model: str = "released") -> int:
    """Put it on the model without weights that it is for -> its number of layers."""
    file = MODEL / "transformer/config.json"
    config = RELEASED if model == "released" else config_from(DiTConfig, read_json(file), file)
    with torch.device("meta"):
        return len(weights.load_adapters(FluxTransformer(config), [(path, 1.0)]).layers)


def of_train(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run/adapter.safetensors").symlink_to(ROOT / "tiny/adapter.safetensors")
    assert adapter(folder / "run", "tiny") == adapter(folder / "run/adapter.safetensors", "tiny")


def of_the_paper(folder: Path) -> None:
    file = ROOT / "tiny/adapter.safetensors"
    research.write(*adapters.read(file), file, folder / "four")
    assert len(list((folder / "four").iterdir())) == 4
    assert adapter(folder / "four", "tiny") == adapter(file, "tiny")


def lora_of(kind: str, layers: int, folder: Path) -> None:
    """By its file, and by its folder."""
    path = test_describe.LORAS[kind][0](folder)
    assert adapter(path) == adapter(folder) == layers


def of_kohya_with_text(folder: Path) -> None:
    file = test_describe.kohya(folder)
    more = {f"{stem}.lora_{side}.weight": torch.ones(1, 1) for side in ("down", "up") for stem in (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_a")}
    save_file(read_tensors([file]) | more, folder / "more.safetensors")
    assert adapter(folder / "more.safetensors") == adapter(file) == 3


def under_another_prefix(folder: Path) -> None:
    tensors = read_tensors([test_describe.bfl(folder)])
    save_file({f"student.{name}": t for name, t in tensors.items()}, folder / "lora.safetensors")
    assert adapter(folder / "lora.safetensors") == 4


def draws(source: str | Path, named: dict | None = None) -> None:
    found, _ = data.open_source(str(source), {}, named or {})
    assert found.draw(np.random.default_rng(0), 1)[0].instruction


def tables_of_data(folder: Path) -> None:
    own = folder / "own"
    shutil.copytree(ROOT / "tiny/examples/own", own)
    draws(own)
    rows = [json.loads(line) for line in (own / "metadata.jsonl").read_text().splitlines()]
    (own / "metadata.jsonl").rename(own / "list.jsonl")
    draws(own / "list.jsonl")
    (own / "metadata.csv").write_text("target,instruction,images\n" + "\n".join(
        f"{row['target']},{row['instruction']},{row['images'][0]}" for row in rows))
    draws(own)
    (own / "metadata.csv").rename(own / "list.csv")
    draws(own / "list.csv")
    (own / "metadata.json").write_text(json.dumps(rows, indent=4))
    draws(own)
    (own / "metadata.json").rename(own / "list.json")
    draws(own / "list.json")


def with_texts(folder: Path) -> None:
    (folder / "control").mkdir()
    shutil.copy(ROOT / "tiny/examples/own/after/1.png", folder / "1.png")
    shutil.copy(ROOT / "tiny/examples/own/before/1.png", folder / "control/1.png")
    (folder / "1.txt").write_text("make it red")
    draws(folder)


def public_sets_of_data(folder: Path) -> None:
    for name in SETS:
        (folder / name).mkdir()
        write_set(folder / name, name)
        draws(f"{name}={folder / name}", PUBLIC)
    (folder / "plain").mkdir()
    draws(f"coco={test_public_sets.coco_folder(folder / 'plain')}", PUBLIC)


LOADS = {
    "a model's folder": model_folder, "a transformer's file": partial(one_part, "transformer"),
    "a transformer in fp8": in_fp8, "an adapter of `train.py`": of_train,
    "an autoencoder, CLIP, T5": lambda folder: [one_part(part, folder) for part in (
        "vae", "text_encoder", "text_encoder_2")],
    "an adapter of the paper's code": of_the_paper,
    "a LoRA of diffusers": partial(lora_of, "diffusers, rank-stabilised", 1),
    "a LoRA in the original's names": partial(lora_of, "BFL", 4),
    "a LoRA of kohya's scripts": of_kohya_with_text,
    "a LoRA of PEFT": partial(lora_of, "PEFT", 1), "a LoRA of XLabs": partial(lora_of, "XLabs", 3),
    "a LoRA under another prefix": under_another_prefix,
    "`metadata.jsonl`, `.csv`, `.json`": tables_of_data, "pictures with texts": with_texts,
    "a public set": public_sets_of_data}


def test_every_row_of_what_loads_is_known_here():
    table = section("Your own data").split("**What loads**")[1]
    assert sorted(re.findall(r"^\| (.+?) \|", table, re.M)[1:]) == sorted(LOADS)


@pytest.mark.parametrize("row", LOADS)
def test_what_loads_does(row, tmp_path):
    LOADS[row](tmp_path)


# -------------------------------------------------------------------------------------------- files

def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no repository")
    assert {file.split("/")[0] for file in listed.stdout.splitlines()} == TOP


@pytest.mark.parametrize("name", LINES)
def test_files_at_the_top_stay_short(name):
    assert number_of_lines(ROOT / f"{name}.py") <= LINES[name]


def test_the_idea_is_read_in_an_afternoon():
    assert sum(number_of_lines(ROOT / f"{name}.py") for name in IDEA) <= 2300


@pytest.mark.parametrize("file", SUPPORT, ids=lambda file: file.stem)
def test_rooms_are_short_and_say_who_calls_them(file):
    """In the lines below the first, naming a file, a function or an option."""
    assert number_of_lines(file) < 230
    first, *rest = ast.get_docstring(parsed(file)).splitlines()
    assert first.endswith(".") and re.search(r"\.py\b|\w\(\)|--\w|[a-z]\.\w", " ".join(rest))


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_functions_fit_on_a_page(file):
    for node in ast.walk(parsed(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 62, node.name


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------- arrows

def targets(node: ast.AST, package: str) -> set[str]:
    """Modules of the project that an import statement names, or those in all below a node."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            base = ".".join(filter(None, (package * (child.level > 0), child.module)))
            found |= {base} | {f"{base}.{alias.name}" for alias in child.names}
    return found & MODULES


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports of the project, wherever in it the import stands."""
    return {name_of(file): targets(parsed(file), name_of(file).rpartition(".")[0])
            for file in PRODUCT}


def allowed(name: str) -> set[str]:
    """Where a module's arrows may go."""
    models, commands = {"mole", "dit", "vae", "text_encoder"}, {"train", "evaluate"}
    studies = {f"tiny.{name}" for name in (
        "autoencoder", "base", "conflict", "design", "drawings", "experiment", "findings", "leads",
        "pages", "pretrain", "probe", "vocabularies")}
    below = {module for module in MODULES if module.startswith("support.")} | models
    own = {"mole": set(), "dit": set(), "vae": set(), "text_encoder": {"support.configs"},
           "baselines": {"mole"}, "weights": below | {"baselines"}, "data": below - models,
           "sample": below | {"weights"}, "support.public_sets": below | {"data"},
           "tiny.world": below | {"data"},
           "tiny.vocabularies": below | {"tiny.world"},
           "tiny.autoencoder": below | {"weights", "tiny.world"},
           "tiny.base": below | {"weights", "sample", "tiny.world", "tiny.autoencoder",
                                 "tiny.vocabularies"},
           "tiny.pretrain": below | {"tiny.autoencoder", "tiny.base", "tiny.vocabularies"},
           "tiny.pages": below | {"sample", "tiny.world"},
           "tiny.conflict": below | {"data", "tiny.world"},
           "tiny.probe": MODULES - studies | {"tiny.conflict"},
           "tiny.design": MODULES - studies | {"tiny.conflict", "tiny.probe"},
           "tiny.experiment": MODULES - {"tiny.findings", "tiny.leads", "tiny.drawings"},
           "tiny.leads": below | {"tiny.conflict", "tiny.design"},
           "tiny.drawings": below | {"tiny.conflict", "tiny.design", "tiny.leads", "tiny.world"},
           "tiny.findings": MODULES - commands - {"tiny.experiment"}}
    if name in commands:
        return MODULES - commands - studies
    return own.get(name, below if name.startswith("support.") else set())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_go_one_way(name):
    wrong = arrows()[name] - allowed(name) - {name}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_there_are_no_circles():
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in arrows()[name]:
            visit(other, (*path, name))
    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("file", PRODUCT, ids=name_of)
def test_imports_stand_at_the_top(file):
    """But for a heavy room that most runs of a command do without."""
    functions = [node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef)]
    inside = set().union(*(targets(node, name_of(file).rpartition(".")[0]) for node in functions))
    assert inside <= {"train.py": {"support.dry_run"},
                      "sample.py": {"support.explain"}}.get(file.name, set())
