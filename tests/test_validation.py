"""train.py --validate: support/validation.py, and what it writes to the log and draws."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from dit import pack
from helpers import make_pipeline, ROOT, run_train, write_set
from sample import condition, encode_picture
from support import record, report, validation
from support.pictures import to_tensor
from support.public_sets import PUBLIC
from support.validation import HeldOut
from test_runs import together
from tiny.world import TinyWorld

OWN = ROOT / "tiny/examples/own"
COMMON = ("--data", "tiny", "--batch-size", 1, "--save-every", 2, "--lr", 1e-3)


@pytest.fixture
def short(monkeypatch, short_model) -> tuple:
    """Two samples are looked at, and one is shown; the run's own pictures are left out."""
    monkeypatch.setattr(validation, "MOST", 2)
    monkeypatch.setattr(validation, "SHOWN", 1)
    monkeypatch.setattr(train, "sample_sheet", lambda *_: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(report, "can_draw", lambda: False)
    return "--model", short_model


def entries(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def checks(out) -> list[dict]:
    return [entry for entry in entries(out) if "validation" in entry]


def loss_of(held_out: HeldOut, pipe) -> float:
    with torch.no_grad():
        return held_out.loss(pipe, condition, encode_picture, train.matching_loss)


# --------------------------------------------------------------------------------------- the number

def test_the_loss_is_that_of_fixed_times_and_noise():
    """Written out, with nothing dropped; the same however torch's random state stands."""
    pipe = make_pipeline()
    pipe.adapter.eval()
    held_out = HeldOut("own", data.Folder(OWN, (64, 64)))
    wanted = []
    for i, s in enumerate(held_out.samples):
        given = condition(pipe, [s.instruction], [to_tensor([p]) for p in s.images],
                          [to_tensor([p]) for p in s.conds])
        x0 = pack(pipe.vae.encode(to_tensor([s.target])))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i))
        for t in (0.125, 0.375, 0.625, 0.875):
            with torch.no_grad():
                wanted.append(train.matching_loss(pipe, given, x0, noise, torch.tensor([t]), (8, 8),
                                                  False)["flow"].item())
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(loss_of(held_out, pipe))
        assert torch.equal(state, torch.get_rng_state())
    assert len(wanted) == 16 and len(set(wanted)) == 16
    assert found[0] == found[1] == pytest.approx(np.mean(wanted), rel=1e-5)


def test_a_model_that_knows_better_has_a_lower_loss(bare, trained):
    held_out = HeldOut("tiny", TinyWorld(("canny", "depth"), held_out=True))
    held_out.samples = held_out.samples[:6]
    pipe = make_pipeline("lora")                         # with noise for an adapter
    assert loss_of(held_out, trained) < 0.8 * loss_of(held_out, pipe)


def test_which_samples_are_looked_at(tmp_path):
    """Spread over a folder's rows, the first of a public set, held-out scenes; always the same."""
    rows = []
    for i in range(70):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"target": f"{i}.png", "instruction": str(i)}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = HeldOut("a", data.Folder(tmp_path)).samples
    assert [s.instruction for s in found] == [str(2 * i) for i in range(32)]
    tiny = [HeldOut("tiny", TinyWorld(held_out=True)).samples for _ in range(2)]
    assert [s.instruction for s in tiny[0]] == [s.instruction for s in tiny[1]]
    assert len(tiny[0]) == 32 and all(s.scene.held_out() for s in tiny[0])
    assert len({s.task for s in tiny[0]}) > 7
    with pytest.raises(ValueError, match="--validate a: holds no row that can be used"):
        HeldOut("a", type("Empty", (), {"all": lambda *_: iter(())})())


# ------------------------------------------------------------------------------------------- a run

@pytest.mark.parametrize("method", ["instructmole", "race"])
def test_training_does_not_notice(tmp_path, monkeypatch, capsys, short, method):
    """The same adapter, to the byte; a loss and a sheet for each --save-every and the end."""
    for name, rest in (("without", ()), ("with", ("--validate", OWN))):
        code, _, err = run_train(monkeypatch, capsys, *COMMON, *short, "--method", method,
                                 "--accumulate", 2, "--steps", 3, *rest, "--out", tmp_path / name)
        assert code == 0, err
    assert (tmp_path / "with/adapter.safetensors").read_bytes() == (
        tmp_path / "without/adapter.safetensors").read_bytes()
    steps, without = ([entry | {"seconds": 0} for entry in entries(tmp_path / name)
                       if "validation" not in entry] for name in ("with", "without"))
    assert steps == without and sum("flow" in entry for entry in steps) == 3
    found = checks(tmp_path / "with")
    assert [entry["step"] for entry in found] == [1, 2]
    assert all(entry["source"] == str(OWN) for entry in found)
    assert len({entry["validation"] for entry in found}) == 2
    assert re.findall(r"validation=([\d.]+)", err)[-1] == f"{found[-1]['validation']:.4f}"
    more = {p.name for p in (tmp_path / "with").iterdir()} - {
        p.name for p in (tmp_path / "without").iterdir()}
    assert more == {"validation_000002.png", "validation_000003.png"}
    with Image.open(tmp_path / "with/validation_000003.png") as sheet:
        assert sheet.size == (3 * 64, 64 + 14)           # given, made, wanted; a line of text


def test_the_adapter_is_in_eval_mode_and_goes_on_in_training(tmp_path, monkeypatch, capsys, short):
    modes, real = [], HeldOut.loss
    def watched(self, pipe, *rest):
        modes.append((pipe.adapter.training, torch.is_grad_enabled()))
        return real(self, pipe, *rest)
    monkeypatch.setattr(HeldOut, "loss", watched)
    accumulate = train.accumulate
    monkeypatch.setattr(train, "accumulate", lambda pipe, *rest: modes.append(
        (pipe.adapter.training, torch.is_grad_enabled())) or accumulate(pipe, *rest))
    code, _, err = run_train(monkeypatch, capsys, *COMMON, *short, "--validate", "tiny", "--steps",
                             4, "--out", tmp_path / "run")
    assert code == 0 and modes == [(True, True), (True, True), (False, False)] * 2, err


def test_what_fails_is_a_note_and_training_goes_on(tmp_path, monkeypatch, capsys, short):
    """No picture, or a loss that is no number, which is not logged."""
    def fails(*_: object) -> None:
        raise ValueError("numbers that are not finite")
    monkeypatch.setattr(train, "answer", fails)
    code, _, err = run_train(monkeypatch, capsys, *COMMON, *short, "--validate", OWN, "--method",
                             "lora", "--steps", 2, "--out", tmp_path / "run")
    assert code == 0 and len(checks(tmp_path / "run")) == 1
    assert "note: no validation is shown after step 2: numbers that are not finite" in err
    real = HeldOut.loss
    monkeypatch.setattr(HeldOut, "loss", lambda self, pipe, encode, picture, _: real(
        self, pipe, encode, picture, lambda *_, **__: {"flow": torch.tensor(float("nan"))}))
    code, _, err = run_train(monkeypatch, capsys, *COMMON, *short, "--validate", OWN, "--method",
                             "lora", "--steps", 2, "--out", tmp_path / "other")
    assert code == 0 and len(entries(tmp_path / "other")) == 2
    assert "note: no validation loss after step 2: it is no number" in err


def test_a_resumed_run_goes_on_with_its_checks(tmp_path, monkeypatch, capsys, short):
    """As if it had not stopped; torn lines and what is done anew are forgotten."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = (*COMMON, *short, "--steps", 4, "--validate", OWN, "--method", "lora")
    assert run_train(monkeypatch, capsys, *common, "--out", whole)[0] == 0
    update = train.update
    def killed(args, adapter, optimizers, step, loss):
        if step == 3:
            raise KeyboardInterrupt
        return update(args, adapter, optimizers, step, loss)
    monkeypatch.setattr(train, "update", killed)
    assert run_train(monkeypatch, capsys, *common, "--out", broken)[0] == 130
    assert [entry["step"] for entry in entries(broken)] == [0, 1, 1, 2]
    monkeypatch.setattr(train, "update", update)
    assert run_train(monkeypatch, capsys, *common, "--out", broken, "--resume")[0] == 0
    assert [entry["step"] for entry in entries(broken)] == [0, 1, 1, 2, 3, 3]
    assert checks(broken) == checks(whole)
    assert (broken / "adapter.safetensors").read_bytes() == (
        whole / "adapter.safetensors").read_bytes()


def test_a_log_keeps_the_checks_of_the_steps_that_are_done(tmp_path):
    log = record.Log(tmp_path, 0, 0)
    assert log.told({"loss": 1}) == {"loss": "1.0000"}
    for step in range(3):
        log.write(step, {"flow": 1.0}, 0.0, [], 0.0)
        log.check(step, step + 0.25, "a")
    assert log.told({"loss": 1}) == {"loss": "1.0000", "validation": "2.2500"}
    (tmp_path / "log.jsonl").write_text(log.file.read_text()[:-5])       # torn
    for done, steps in ((3, [0, 0, 1, 1, 2]), (2, [0, 0, 1, 1]), (0, [])):
        assert [entry["step"] for entry in record.Log(tmp_path, done, 0).steps()] == steps
    other = record.Log(tmp_path, 0, 1)                   # another process leaves the file alone
    other.check(0, 0.5, "a")
    assert log.file.read_text() == "" and other.told({}) == {"validation": "0.5000"}


def test_a_plot_shows_the_checks_of_the_last_source():
    """Black points on the flow loss's panel; those of another source are left out."""
    steps = [{"step": i, "flow": 1.0, "balance": 1.0, "orthogonality": 1.0, "norm": 1.0}
             for i in range(10)]
    def black(*found: tuple[int, str]) -> int:
        whole = report.draw_losses(steps + [
            {"step": step, "validation": 1.0, "source": source} for step, source in found])
        return int((whole[30:280, 40:440] < 40).all(-1).sum())
    none, one, two = black(), black((4, "a")), black((4, "a"), (8, "a"))
    assert none < one < two
    assert black((2, "b"), (4, "a")) == one


def test_two_processes(tmp_path, forks, short_model):
    """The first one's losses are those of one process; with --shard both compute them."""
    script = tmp_path / "train.py"                       # little to look at, for speed
    script.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport numpy, train\n"
                      "from support import commands, validation\n"
                      "validation.MOST, validation.SHOWN = 2, 1\n"
                      "train.report.can_draw = lambda: False\n"
                      "train.sample_sheet = lambda *_: numpy.zeros((8, 8, 3), 'uint8')\n"
                      "commands.run(train.main)\n")
    common = ("--data", "tiny", "--batch-size", 1, "--steps", 2, "--save-every", 2, "--model",
              short_model, "--lr", 1e-3, "--method", "lora", "--validate", OWN)
    alone = forks.run(script, *common, "--accumulate", 2, "--out", tmp_path / "one")
    assert alone.returncode == 0, alone
    one = checks(tmp_path / "one")
    for name, split in (("two", ()), ("split", ("--shard",))):
        both = together(forks, script, *common, *split, "--out", tmp_path / name)
        assert all(done.returncode == 0 for done in both), both
        assert sum("4 rows; loss on 2 of them" in done.stdout for done in both) == 1
        two = checks(tmp_path / name)
        assert [entry["step"] for entry in two] == [1]
        assert [entry["validation"] for entry in two] == pytest.approx(
            [entry["validation"] for entry in one], rel=1e-3)
        assert (tmp_path / name / "validation_000002.png").is_file()


# ---------------------------------------------------------------------------------- what is said

def test_what_was_understood_is_said(tmp_path, bare):
    """summary.tell() prints it: see the runs above and below."""
    shutil.copytree(OWN, tmp_path / "own")
    file = tmp_path / "own/metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"instruction": "make the red circle on the left blue " * 9, "note": "n"}
    file.write_text("\n".join(map(json.dumps, rows)))
    own, other = (data.Folder(folder, (64, 64)) for folder in (tmp_path / "own", OWN))
    told = HeldOut("own", own).about(bare.t5_tokens, [other, TinyWorld()])
    assert told == [
        "--validate own: 4 rows; loss on 4 of them, at 4 times each; shown: 4",
        "  rows with 1 reference (4)", "  targets of 64x64 (4)",
        "  left unread, entries without a known name: note (1)",
        "  of these, the model reads 28 tokens, and not the end of 1 text; the first: make the "
        "red circle on the left blue make the red circle on ...",
        "  of these, T5 reads 1 word letter by letter, or not at all: please"]
    assert "trained on too" in HeldOut("own", own).about(bare.t5_tokens, [own, other])[4]
    assert HeldOut("tiny", TinyWorld(held_out=True)).about(bare.t5_tokens, [TinyWorld()]) == [
        "--validate tiny: samples without end; loss on 32 of them, at 4 times each; shown: 8",
        "  of these, T5 reads 3 words letter by letter, or not at all: please, Image, Please"]
    assert HeldOut(None).about(bare.t5_tokens, []) == []


def test_a_public_set_says_which_files_it_reads(tmp_path, bare):
    """A folder's held-out files are those that training leaves out: one is named itself."""
    for name in ("dev", "train"):
        write_set(tmp_path, "musar").rename(tmp_path / f"{name}.parquet")
    for path, name in ((tmp_path, "train"), (tmp_path / "dev.parquet", "dev")):
        source = data.open_one(f"musar={path}", {}, PUBLIC, (64, 64), option="--validate")
        lines = HeldOut("m", source).about(bare.t5_tokens, [])
        assert lines[0].startswith("--validate m: 4 rows; loss on 4 of them")
        assert lines[1].startswith(f"  read from {name}.parquet; of a folder those called dev, ")


@pytest.mark.parametrize("value, words", [
    ("gone", "--validate gone: not found"), (f"{OWN}:2", f"--validate {OWN}:2: not found"),
    ("cooc=gone", "--validate cooc=gone: no public set 'cooc'"), ("coco=gone", "gone: not found"),
    (str(ROOT / "tiny/model"), "model: holds no data"), ("tiny:1", "--validate tiny:1: not found")])
def test_what_a_user_gets_wrong_is_one_line(tmp_path, monkeypatch, capsys, value, words):
    monkeypatch.setattr(train, "load_pipeline", None)        # is not asked
    code, out, err = run_train(monkeypatch, capsys, "--data", "tiny", "--validate", value, "--out",
                               tmp_path / "run")
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_skipped_and_listed_if_asked(tmp_path, monkeypatch, capsys, short):
    shutil.copytree(OWN, tmp_path / "own")
    file = tmp_path / "own/metadata.jsonl"
    file.write_text(file.read_text() * 4 + "{}\n")
    command = ("--data", OWN, *short, "--validate", tmp_path / "own", "--dry-run")
    code, _, err = run_train(monkeypatch, capsys, *command)
    assert code == 2 and "metadata.jsonl line 17" in err
    code, out, err = run_train(monkeypatch, capsys, *command, "--skip-bad")
    assert code == 0 and "own: 16 rows" in out and "bad lines of the data, skipped: 1" in err
