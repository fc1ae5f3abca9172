"""Runs of train.py: stopped and resumed, recorded, by several processes; Muon."""
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from helpers import make_pipeline, ROOT, run_train
from support import commands, record, resume, stopping
from support.muon import Muon, orthogonal
from tiny import world

# ----------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("kind", ["instructmole", "token"])
def test_resuming_gives_the_same_file(tmp_path, kind, monkeypatch, capsys, short_model):
    common = ["train.py", "--data", "tiny", "--batch-size", "2", "--accumulate", "2",
              "--lr", "1e-3", "--schedule", "cosine", "--method", kind, "--model", str(short_model),
              "--optimizer", "muon" if kind == "instructmole" else "adamw"]
    def command(*rest: object) -> None:
        monkeypatch.setattr(sys, "argv", [*common, *map(str, rest)])
        train.main()
    if kind == "token":                                  # once is enough, and it takes long
        monkeypatch.setattr(train, "previews", lambda *_: {})
    command("--steps", 4, "--save-every", 4, "--out", tmp_path / "whole")
    monkeypatch.setattr(train, "previews", lambda *_: stop())
    calls = iter([True, False, False])
    def stop() -> dict:
        if next(calls):
            raise KeyboardInterrupt                      # killed right after step 2's checkpoint
        return {}
    with pytest.raises(KeyboardInterrupt):
        command("--steps", 4, "--save-every", 2, "--out", tmp_path / "broken")
    command("--steps", 4, "--save-every", 2, "--out", tmp_path / "broken", "--resume")
    assert len({(tmp_path / name / "adapter.safetensors").read_bytes()
                for name in ("whole", "broken")}) == 1
    steps = [json.loads(line)["step"]
             for line in (tmp_path / "broken/log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    (tmp_path / "broken/checkpoint.pt").write_bytes(b"torn")                 # step 2's is left
    (tmp_path / "broken/adapter.safetensors").unlink()
    calls = iter([False, False])
    command("--steps", 4, "--save-every", 4, "--out", tmp_path / "broken", "--resume")
    assert len({(tmp_path / name / "adapter.safetensors").read_bytes()
                for name in ("whole", "broken")}) == 1
    assert "going on from the one before it" in capsys.readouterr().err


def test_killed_at_any_moment_nothing_is_lost(forks, short_model):
    """Three kills here; python tests/kills.py --kills 30 for more."""
    done = forks.run("tests/kills.py", "--kills", 3, "--steps", 6, "--longest", 1.2, "--model",
                     short_model, seconds=250)
    assert done.returncode == 0 and done.stdout.startswith("3 kills"), done.stdout + done.stderr


def test_a_run_begun_under_older_names_goes_on_under_the_new(tmp_path, monkeypatch, short_model):
    """What identifies it, in the checkpoint and in run.json, says "adapter" as it always did."""
    monkeypatch.setattr(train, "previews", lambda *_: stop())
    def stop() -> dict:
        raise KeyboardInterrupt
    common = ["train.py", "--data", "tiny", "--batch-size", "1", "--steps", "2", "--save-every",
              "1", "--model", str(short_model), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*common, "--adapter", "pooled", "--checkpoint"])
    with pytest.raises(KeyboardInterrupt):
        train.main()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and json.loads(state["settings"])["adapter"] == "pooled"
    begun = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert begun["adapter"] == "pooled" and "method" not in begun
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", [*common, "--method", "pooled", "--recompute", "--resume"])
    train.main()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == begun


def test_a_log_forgets_what_a_resumed_run_does_anew(tmp_path):
    """Only the first process writes; of each task the last eight instructions are known."""
    some = world.tiny_test("move", 9)
    log = record.Log(tmp_path, 0, 0)
    for step in range(4):
        log.write(step, {"loss": step + 1 / 3}, 0.123456, some, 0.5)
    assert log.steps() == [{"step": step, "loss": round(step + 1 / 3, 6), "norm": 0.1235,
                            "tasks": ["move"], "seconds": 0.5} for step in range(4)]
    assert list(log.instructions["move"]) == [s.instruction for s in some[1:]]
    other = record.Log(tmp_path, 2, 1)                   # another process leaves the file alone
    other.write(2, {"loss": 9.0}, 0.0, some[:1], 0.0)
    assert len(log.steps()) == 4 and list(other.instructions["move"]) == [some[0].instruction]
    for number in range(30):                             # of many tasks, the last are looked at
        other.write(2, {"loss": 9.0}, 0.0, [replace(some[0], task=str(number % 25))], 0.0)
    assert [*other.instructions] == [str(n) for n in (*range(6, 25), *range(5))]
    again = record.Log(tmp_path, 2, 0)
    assert [entry["step"] for entry in again.steps()] == [0, 1] and not again.instructions
    again.write(2, {"loss": 7.0}, 0.0, some[:1], 0.0)
    assert [entry["loss"] for entry in again.steps()][2:] == [7.0]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_another_number_of_processes_goes_on(tmp_path, monkeypatch, capsys, short_model):
    """Two micro-batches a step by one process, then one: it goes on where the data stopped."""
    seen, real = [], train.accumulate
    monkeypatch.setattr(train, "accumulate", lambda pipe, micro, *rest: seen.extend(
        seed for seed, _ in micro) or real(pipe, micro, *rest))
    common = ["train.py", "--data", "tiny", "--batch-size", "1", "--method", "lora", "--steps",
              "5", "--out", str(tmp_path / "run"), "--resume", "--save-every", "2", "--model",
              str(short_model)]
    monkeypatch.setattr(sys, "argv", [*common, "--accumulate", "2"])
    monkeypatch.setattr(train, "previews", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main()                                     # stopped after two steps
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", common)
    train.main()
    assert seen == list(range(7)) and "micro_batches = 2, not 1" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    """A limit on the size of files stands for the disk; one line, and the run goes on later."""
    common = ["train.py", "--data", "tiny", "--batch-size", "1", "--method", "lora", "--steps",
              "3", "--save-every", "1", "--out", str(tmp_path / "run")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(*_: object) -> dict:                        # after the first checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return {}
    monkeypatch.setattr(train, "previews", full)
    monkeypatch.setattr(sys, "argv", common)
    try:
        with pytest.raises(SystemExit) as stopped:
            commands.run(train.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and printed.startswith("error") and "run" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "adapter.safetensors", "checkpoint.pt", "data.png", "log.jsonl", "run.json"}
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", [*common, "--resume"])
    train.main()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


def test_both_signals_are_noted_and_a_second_ctrl_c_does_not_wait():
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with stopping.stop_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
    with stopping.stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
                                  signal.SIGXCPU])
def test_signals_are_noted_and_handlers_put_back(kind):
    before = signal.getsignal(kind)
    with stopping.stop_signals() as asked:
        signal.raise_signal(kind)
        assert asked == [kind]
    assert signal.getsignal(kind) == before


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stop_signals() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_told_to_stop_saves_and_goes_on(tmp_path, short_model):
    """The step is finished and saved, with all that resuming starts from (tested above)."""
    common = [sys.executable, "train.py", "--data", "tiny", "--batch-size", "1", "--steps", "600",
              "--method", "lora", "--model", str(short_model), "--out"]
    quiet = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "env":
             os.environ | {"OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen([*common, str(tmp_path / "stopped")], **quiet)
    told = ""
    while not re.search(r"[1-9]\d*/600", told):          # training has begun
        letter = process.stderr.read(1)
        assert letter, told
        told += letter
    process.send_signal(signal.SIGTERM)
    told += process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in told, told
    done = int(re.search(r"stopped after (\d+) steps; --resume goes on", told)[1])
    lines = (tmp_path / "stopped/log.jsonl").read_text().splitlines()
    assert 0 < done < 600 and len(lines) == done
    state = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)
    assert state["step"] == state["number"] == done


def test_resuming_asks_for_the_same_run(tmp_path, monkeypatch, capsys, short_model):
    """Another configuration in the same file, a checkpoint that is none: one line, nothing lost."""
    config, out = tmp_path / "config.json", tmp_path / "run"
    config.write_text((ROOT / "tiny/adapter.json").read_text())
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--steps", "1", "--batch-size",
                                      "1", "--config", str(config), "--out", str(out), "--resume",
                                      "--model", str(short_model)])
    train.main()                                         # --resume starts where nothing is there
    log = (out / "log.jsonl").read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            commands.run(train.main)
        printed = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and printed.startswith("error") and words in printed
        assert (out / "log.jsonl").read_bytes() == log
    config.write_text(json.dumps(json.loads(config.read_text()) | {"top_k": 3}))
    refused("config")
    config.write_text((ROOT / "tiny/adapter.json").read_text())
    whole = torch.load(out / "checkpoint.pt", weights_only=True)
    for content in (b"", b"no checkpoint", (out / "checkpoint.pt").read_bytes()[:999],
                    {name: value for name, value in whole.items() if name != "optimizers"},
                    whole | {"settings": "[]"}, [1]):
        if isinstance(content, bytes):
            (out / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, out / "checkpoint.pt")
        refused("checkpoint.pt")


# -------------------------------------------------------------------------------- what a run writes

def test_a_model_is_known_by_its_files_and_not_by_hidden_ones(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    before = record.digest_of(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"of a desktop")
    assert record.digest_of(tmp_path) == before
    (tmp_path / "a.json").write_text("[]")
    assert record.digest_of(tmp_path) != before


def test_a_run_says_how_to_repeat_it(tmp_path, monkeypatch, capsys, short_model):
    """run.json; other data under the same names are noticed by a resumed run."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    folder, rows = tmp_path / "own", []
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"target": f"{i}.png", "instruction": "red"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    common = ["train.py", "--data", str(folder), "tiny", "--batch-size", "1", "--model",
              str(short_model), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*common, "--steps", "1"])
    train.main()
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["arguments"]["data"] == [str(folder), "tiny"]
    assert record["settings"]["config"]["experts"] and record["versions"]["torch"]
    own, endless = record["settings"]["fingerprints"]
    assert len(own) == 16 and endless is None
    (folder / "metadata.jsonl").write_text("".join(rows).replace("red", "dark"))
    monkeypatch.setattr(sys, "argv", [*common, "--steps", "1", "--resume"])
    capsys.readouterr()
    train.main()
    assert "the data are not those it began with" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["fingerprints"][0] != own


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    """A second process finds the lock of the first, whose end leaves nothing behind."""
    with resume.alone(tmp_path, False):
        with pytest.raises(ValueError, match="another process is training in it"):
            with resume.alone(tmp_path, False):
                pass
        with pytest.raises(ValueError, match="another process"):         # the lock is still held
            with resume.alone(tmp_path, False):
                pass
    assert not list(tmp_path.iterdir())
    with resume.alone(tmp_path, False):
        pass
    (tmp_path / "checkpoint.pt").touch()                 # one began, and ended, meanwhile
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        with resume.alone(tmp_path, False):
            pass
    with resume.alone(tmp_path, True):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("size", [None, 1000])
def test_a_finished_run_mends_its_adapter(tmp_path, monkeypatch, capsys, short_model, size):
    """One that was deleted, or cut short, since the last checkpoint."""
    command = ("--data", "tiny", "--steps", 1, "--batch-size", 1, "--out", tmp_path, "--method",
               "lora", "--model", short_model, "--resume")
    file = tmp_path / "adapter.safetensors"
    assert run_train(monkeypatch, capsys, *command)[0] == 0
    whole = file.read_bytes()
    file.write_bytes(whole[:size]) if size else file.unlink()
    code, out, err = run_train(monkeypatch, capsys, *command)
    assert code == 0 and "it is written again, as the checkpoint has it" in err, err
    assert "finished already, at step 1" in out and file.read_bytes() == whole


def test_a_run_leaves_its_files_and_another_is_refused(tmp_path, monkeypatch, capsys, short_model):
    out = tmp_path / "run"

    def refused(*arguments: object) -> str:
        model = () if "--model" in arguments else ("--model", short_model)
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--out", str(out),
                                          *map(str, (*model, *arguments))])
        with pytest.raises(SystemExit) as stopped:
            commands.run(train.main)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and len(printed.splitlines()) == 1
        return printed
    code, _, err = run_train(monkeypatch, capsys, "--data", "tiny", "--steps", 2, "--batch-size", 2,
                             "--save-every", 2, "--out", out, "--method", "lora", "--model",
                             short_model)
    assert code == 0, err
    assert {p.name for p in out.iterdir()} == {"adapter.safetensors", "checkpoint.pt", "data.png",
                                               "log.jsonl", "loss.png", "run.json",
                                               "samples_000002.png"}
    entry = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "flow", "balance", "orthogonality", "tasks", "seconds"} <= entry.keys()
    before = (out / "adapter.safetensors").read_bytes()
    assert "--resume" in refused("--steps", 2)
    (out / "log.jsonl").rename(tmp_path / "log.jsonl")
    assert "--resume" in refused("--steps", 2)           # results are there yet
    (tmp_path / "log.jsonl").rename(out / "log.jsonl")
    record = (out / "run.json").read_bytes()
    assert "steps" in refused("--steps", 3, "--batch-size", 2, "--method", "lora", "--resume")
    shutil.copytree(short_model, tmp_path / "model")           # the same names, other weights
    changed = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-2] + b"\0\0")
    assert "model = " in refused("--steps", 2, "--batch-size", 2, "--method", "lora", "--resume",
                                 "--model", tmp_path / "model", "--config",
                                 ROOT / "tiny/adapter.json")
    assert (out / "run.json").read_bytes() == record
    assert (out / "adapter.safetensors").read_bytes() == before


# -------------------------------------------------------------------------------- several processes

def together(forks, script: object, *arguments: object) -> list[subprocess.CompletedProcess]:
    """What torchrun does: two processes that find each other by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)} for i in range(2)]
    return forks.run_together([(script, *arguments)] * 2, env=env)


def test_two_processes_have_one_s_gradients(forks, short_model):
    """In fp32 to 1e-6 of a norm, Muon's adapters in float64 to 1e-8; --shard changes no bit.

    """
    both = together(forks, "tests/processes.py", "--steps", 2, "--model", short_model)
    told = "".join(done.stdout for done in both)
    assert all(done.returncode == 0 for done in both) and told.count("split True") == 4, both


def test_a_process_that_dies_ends_the_run_and_one_goes_on(tmp_path, monkeypatch, short_model):
    common = ["--data", "tiny", "--batch-size", "1", "--steps", "4", "--method", "lora",
              "--save-every", "1", "--model", str(short_model), "--out", str(tmp_path / "run")]
    script = tmp_path / "train.py"
    script.write_text(f"import os, sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n"
                      "from support import commands\n"
                      "train.previews = lambda *_: {}\naccumulate = train.accumulate\n"
                      "def dies(pipe, micro_batches, *rest):\n"         # the second, in step 2
                      "    if micro_batches[0][0] == 5:\n"
                      "        os.kill(os.getpid(), 9)\n"
                      "    return accumulate(pipe, micro_batches, *rest)\n"
                      "train.accumulate = dies\ncommands.run(train.main)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           str(script), *common], cwd=ROOT, timeout=120, capture_output=True,
                          text=True)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["train.py", *common, "--accumulate", "2", "--resume"])
    train.main()
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and state["number"] == 8


def test_two_processes_fill_one_cache(tmp_path, forks, short_model):
    """Each encodes its share, once; the end of a resumed run needs no more."""
    script = tmp_path / "train.py"                       # without its sheet of samples, for speed
    script.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n"
                      "from support import commands\n"
                      "train.previews = lambda *_: {}\ncommands.run(train.main)\n")
    common = ["--data", ROOT / "tiny/examples/own", "--batch-size", "2", "--method", "lora",
              "--model", short_model, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    both = together(forks, script, *common, "--steps", "1")
    assert all(done.returncode == 0 for done in both), both
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    found = [load_file(file).keys() for file in files]
    assert len(files) == 2 and len(found[0] & found[1]) == 2     # the empty text, T5's and CLIP's
    assert len(found[0] | found[1]) == 2 * (1 + 4 + 8)   # four texts, before and after
    again = together(forks, script, *common, "--steps", "1", "--resume")
    assert all(done.returncode == 0 for done in again), again
    assert sorted((tmp_path / "cache").glob("*.safetensors")) == files


def test_two_processes_are_two_micro_batches(tmp_path, monkeypatch, forks):
    """Each takes its own samples; their gradients' mean is that of one process's accumulation.

    Expert Race, because it also has thresholds, which follow the batches without a gradient.
    """
    common = ["--data", "tiny", "--batch-size", "2", "--steps", "2", "--lr", "1e-3",
              "--method", "race"]
    script = tmp_path / "train.py"                       # without its sheet of samples, for speed
    script.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n"
                      "from support import commands\n"
                      "train.previews = lambda *_: {}\ncommands.run(train.main)\n")
    both = together(forks, script, *common, "--out", tmp_path / "two")
    assert all(done.returncode == 0 for done in both), both
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["train.py", *common, "--accumulate", "2", "--out",
                                      str(tmp_path / "one")])
    train.main()
    two, one = (load_file(tmp_path / name / "adapter.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name in two:                                     # AdamW enlarges tiny gradients' rounding
        near = (two[name] - one[name]).norm() <= 1e-3 * (one[name].norm() + 1e-3)
        assert near or name.endswith("threshold"), name  # it moves once a step, not once a batch
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
            for name in ("two", "one")]
    for name in ("flow", "norm"):                        # AdamW would not see a forgotten division
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3)
    moved = [float(t) for name, t in two.items() if name.endswith("threshold")]
    assert all(moved) and len(moved) == 9


# --------------------------------------------------------------------------------------------- Muon

@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonal_keeps_the_directions(shape):
    """The polynomial brings singular values near 1, not to it: 0.7 to 1.2."""
    torch.manual_seed(0)
    W = torch.randn(3, *shape, dtype=torch.float64)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    made = U.mT @ orthogonal(W) @ V.mT                   # diagonal, if the directions are kept
    values = made.diagonal(dim1=1, dim2=2)
    assert (made - torch.diag_embed(values)).abs().max() < 1e-9
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.allclose(orthogonal(-7 * W), -orthogonal(W), atol=1e-6)


def test_two_steps_are_the_peers(monkeypatch):
    """torch.optim.Muon computes in bf16, three digits; ours in the weights' type."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(16, 24)), torch.nn.Parameter(torch.randn(24, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.95, nesterov=True,
                            adjust_lr_fn="match_rms_adamw")
    own = Muon(ours, 0.1, 0.01)
    for _ in range(2):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        own.step(), peer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (p - before).norm()


def test_what_it_takes():
    """The matrices A and B, at twice the rate; the routers keep theirs; all else has the first."""
    pipe = make_pipeline()
    rest, matrices = train.make_optimizers(pipe.adapter, 1e-3, 5e-4, "muon")
    rates = {id(p): (type(optimizer).__name__, group["lr"]) for optimizer in (rest, matrices)
             for group in optimizer.param_groups for p in group["params"]}
    names = pipe.adapter.tensors()
    assert rates.keys() == {id(p) for p in names.values()}
    for name, p in names.items():
        assert rates[id(p)] == (("Muon", 2e-3) if name.endswith(("_A", "_B")) else
                                ("AdamW", 5e-4 if name.endswith("router.weight") else 1e-3))
    lora = train.make_optimizers(make_pipeline("lora").adapter, 1e-3, 5e-4, "muon")
    assert [type(optimizer).__name__ for optimizer in lora] == ["Muon"]


@pytest.mark.parametrize("rest", [[], ["--resume"]])
def test_an_adapter_without_a_checkpoint_is_not_written_over(tmp_path, monkeypatch, rest):
    """As where somebody has moved the checkpoints away, or names the embedded model's folder."""
    (tmp_path / "adapter.safetensors").write_bytes(b"precious")
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--steps", "1", "--out",
                                      str(tmp_path), *rest])
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        train.main()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"precious"]


# --------------------------------------------------------- pictures that go bad, adapters to keep

def own_pictures(path, number: int = 20):
    path.mkdir()
    for i in range(number):
        Image.new("RGB", (64, 64), (9 * i, 0, 0)).save(path / f"{i}.png")
    (path / "metadata.jsonl").write_text("\n".join(
        json.dumps({"target": f"{i}.png", "instruction": f"{i}"}) for i in range(number)))
    return path


@pytest.mark.parametrize("skip", [[], ["--skip-bad"]])
def test_a_picture_that_goes_bad_costs_no_step(tmp_path, monkeypatch, capsys, short_model, skip):
    """Saved after the step before, and said how to go on; or another is drawn in its place."""
    folder, real, done = own_pictures(tmp_path / "own"), train.accumulate, []
    content = (folder / "0.png").read_bytes()

    def accumulate(pipe, micro, *rest):                  # all but a few are gone after step 3
        done.append([s.instruction for _, batch in micro for s in batch])
        if len(done) == 3:
            for i in range(2 if skip else 20):
                (folder / f"{i}.png").write_bytes(b"torn")
        return real(pipe, micro, *rest)
    monkeypatch.setattr(train, "accumulate", accumulate)
    monkeypatch.setattr(train, "previews", lambda *_: {})
    common = ["--data", folder, "--batch-size", 8, "--steps", 12, "--method", "lora", "--model",
              short_model, "--out", tmp_path / "run", *skip]
    code, _, err = run_train(monkeypatch, capsys, *common)
    if skip:
        assert code == 0 and len(done) == 12, err
        assert "bad lines of the data, skipped: 2" in err and "0.png" in err and "1.png" in err
        late = [text for batch in done[6:] for text in batch]
        assert not {"0", "1"} & set(late) and len(late) == 48
        return
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert code == 2 and 3 <= state["step"] == len(done) < 12, err
    last = err.splitlines()[-1]
    assert re.search(r"error: .*line \d+: .*/\d+.png: cannot be read as a picture", last)
    assert f"stopped after {len(done)} steps, which are saved" in last
    assert "--skip-bad" in last and "--resume goes on" in last and "Traceback" not in err
    for i in range(20):
        (folder / f"{i}.png").write_bytes(content)
    code, _, err = run_train(monkeypatch, capsys, *common, "--resume")
    assert code == 0 and len(done) == 12, err


def test_a_picture_that_goes_bad_in_another_process_is_told_by_the_first(tmp_path, forks,
                                                                         short_model):
    """All end after the same step, which is saved."""
    script = tmp_path / "train.py"
    script.write_text(f"import os, sys\nsys.path[0] = {str(ROOT)!r}\nimport data, train\n"
                      "from support import commands\n"
                      "train.previews, batches = lambda *_: {}, data.batches\n"
                      "def torn(*args):\n"
                      "    for i, batch in enumerate(batches(*args)):\n"
                      "        if i == 2 and os.environ['RANK'] == '1':\n"
                      "            raise FileNotFoundError('3.png: gone')\n"
                      "        yield batch\n"
                      "data.batches = torn\ncommands.run(train.main)\n")
    first, second = together(forks, script, "--data", "tiny", "--batch-size", 1, "--steps", 9,
                             "--method", "lora", "--model", short_model, "--out", tmp_path / "run")
    assert first.returncode == second.returncode == 2, (first, second)
    assert first.stderr.splitlines()[-1] == (
        "error: 3.png: gone; stopped after 2 steps, which are saved: mend it, or add --skip-bad to "
        "draw others instead, and --resume goes on")
    assert "error" not in second.stderr
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2


def test_the_next_item_is_there_before_this_one_is_used():
    """What it raises is known in time; a first one that is none is raised at once."""
    def items(last: int):
        yield from range(last)
        raise FileNotFoundError("gone")
    asked: list = []
    ahead = stopping.one_ahead(items(3), asked)
    assert [next(ahead), next(ahead), asked] == [0, 1, []]
    assert next(ahead) == 2 and [str(error) for error in asked] == ["gone"]
    with pytest.raises(FileNotFoundError):
        next(stopping.one_ahead(items(0), []))
    with pytest.raises(ValueError, match="gone; stopped after 3 steps, which are saved"):
        stopping.leave(3, asked)


def test_the_last_adapters_are_kept(tmp_path, monkeypatch, capsys, short_model):
    """Counted over stops; what is not the run's own stays."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    out = tmp_path / "run"
    common = ["--data", "tiny", "--batch-size", 1, "--method", "lora", "--save-every", 1, "--model",
              short_model, "--steps", 5, "--out", out, "--keep", 2]
    out.mkdir()
    others = {"adapter_000001.safetensors": b"mine", "adapter_best.safetensors": b"best",
              "adapter_7.safetensors": b"seven"}
    for name, content in others.items():
        (out / name).write_bytes(content)
    real = train.accumulate

    def stops(pipe, micro, *rest):
        if micro[0][0] == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(pipe, micro, *rest)
    monkeypatch.setattr(train, "accumulate", stops)
    code, _, err = run_train(monkeypatch, capsys, *common)
    assert code == 128 + signal.SIGTERM and "adapter_000001.safetensors is of another run" in err

    def kept() -> list[int]:
        return [int(file.stem[8:]) for file in sorted(out.glob("adapter_0*"))
                if file.read_bytes() != b"mine"]
    assert kept() == [2, 3]
    (out / "adapter_000009.safetensors").write_bytes(
        (out / "adapter_000003.safetensors").read_bytes())       # a copy under another name
    code, _, err = run_train(monkeypatch, capsys, *common, "--resume")
    assert code == 0 and kept() == [4, 5, 9], err
    assert all((out / name).read_bytes() == content for name, content in others.items())
    assert (out / "adapter_000005.safetensors").read_bytes() == (
        out / "adapter.safetensors").read_bytes()
    code, out_, _ = run_train(monkeypatch, capsys, *common, "--resume")
    assert code == 0 and "finished already, at step 5; nothing to do" in out_
    common[common.index("--steps") + 1] = 7
    code, _, err = run_train(monkeypatch, capsys, *common, "--resume")
    assert code == 2 and "began with steps = 5, not 7; go on with --steps as it was, or " in err
    assert "another --out" in err and kept() == [4, 5, 9]


def test_the_first_batch_is_shown(tmp_path, monkeypatch, capsys, short_model):
    """As the model gets it: pictures resized, and where a text is cut; a resumed run leaves it."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    texts, real = [], record.grid
    monkeypatch.setattr(record, "grid", lambda rows, told, **how: (
        texts.append((rows, told)) or real(rows, told, **how)))
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("RGB", (200, 100), "red").save(folder / "a.png")
    long = "make the red circle on the left blue " * 9
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(
        {"target": "a.png", "instruction": text, "images": "a.png"}) for text in (long, "short")))
    common = ["--data", folder, "--batch-size", 2, "--steps", 1, "--method", "lora", "--model",
              short_model, "--out", tmp_path / "run"]
    code, _, err = run_train(monkeypatch, capsys, *common)
    assert code == 0 and (tmp_path / "run/data.png").is_file(), err
    (rows, told), = texts
    assert {p.shape for row in rows for p in row} == {(64, 64, 3)} and len(rows[0]) == 2
    cut, short = sorted(told, key=len, reverse=True)
    read, _, rest = cut.partition(" | not read: ")
    assert short == "short" and read + rest == long and long.startswith(read) and len(read) > 50
    (tmp_path / "run/data.png").unlink()
    code, _, err = run_train(monkeypatch, capsys, *common, "--resume")
    assert code == 0 and not (tmp_path / "run/data.png").exists()
