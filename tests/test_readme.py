"""The README is true: line counts, options, files, and the house's rules."""
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FILES = ["mole.py", "dit.py", "vae.py", "text_encoder.py", "weights.py", "data.py", "train.py",
         "sample.py", "evaluate.py", "baselines.py"]


def blocks(language: str = "sh") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("file", FILES)
def test_line_counts(file):
    stated = re.search(rf"\| `{re.escape(file)}` \| (\d+) \|", README)
    assert stated and int(stated[1]) == len((ROOT / file).read_text().splitlines())


def test_quick_start_has_two_commands_that_install_what_they_need():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    found = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert len(found) == 2
    assert "-r requirements.txt" in found[0] and "sample.py --instruction" in found[0]
    assert "-r tests/requirements.txt" in found[1] and "pytest" in found[1]


@cache
def known_options(script: str) -> str:
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=True).stdout


@pytest.mark.parametrize("line", sorted({
    line for block in blocks() for line in block.splitlines()
    if re.search(r"python (sample|train|evaluate|weights)\.py", line)}))
def test_commands_in_the_readme_use_options_that_exist(line):
    script = re.search(r"python (\w+\.py)", line)[1]
    for option in re.findall(r"(--[a-z-]+)", line):
        assert option in known_options(script), f"{script} has no {option}"


def test_files_that_the_readme_shows_exist():
    for path in (re.findall(r"!\[.*?\]\((.*?)\)", README)
                 + re.findall(r"(tiny/[\w/.]+\.\w+)", README)):
        assert (ROOT / path).exists(), path


def test_committed_weights_stay_small():
    size = sum(file.stat().st_size for file in (ROOT / "tiny").rglob("*.safetensors"))
    assert 0 < size <= 16_000_000


def test_no_imports_against_the_arrows():
    """Models know weights alone; mole and data know no other file of the project."""
    allowed = {"weights.py": set(), "mole.py": set(), "data.py": set(), "dit.py": {"weights"},
               "vae.py": {"weights"}, "text_encoder.py": {"weights"}, "baselines.py": {"mole"}}
    ours = {Path(file).stem for file in FILES}
    for file, may in allowed.items():
        found = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / file).read_text(), re.M)) & ours
        assert found <= may, f"{file} imports {found - may}"
