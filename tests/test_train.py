"""Training: gradients, resuming, files, and what a user can get wrong."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import dit
import mole
import sample
import train
import weights
from sample import load_pipeline
from support import commands, dry_run, report, resume, routing_maps
from support.pictures import to_tensor
from tiny import world

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny/model"


def make_pipeline(kind: str = "instructmole", seed: int = 0):
    torch.manual_seed(seed)
    pipe = load_pipeline(MODEL, None, "cpu", "float32")
    config = weights.adapter_config(kind, ROOT / "tiny/adapter.json")
    pipe.adapter = weights.new_adapter(pipe.dit, config).train()
    with torch.no_grad():                                # not zero, so that every gradient is alive
        for p in pipe.adapter.tensors().values():
            p.add_(0.02 * torch.randn_like(p))
    return pipe


def gradients(pipe) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in pipe.adapter.tensors().items()
             if p.grad is not None}
    pipe.adapter.zero_grad()
    return found


def samples(task: str, number: int = 2) -> list[data.Sample]:
    return world.tiny_test(task, number)


@pytest.mark.parametrize("task", ["t2i", "move", "canny", "multi"])
def test_accumulation_is_the_gradient_of_the_sum(task):
    pipe, batches = make_pipeline(), [(3, samples(task)), (4, samples("recolour"))]
    single = []
    for batch in batches:
        train.accumulate(pipe, [batch], 0.7)
        single.append(gradients(pipe))
    losses = train.accumulate(pipe, batches, 0.7)
    both = gradients(pipe)
    assert losses["loss"] == pytest.approx(
        losses["flow"] + 0.7 * (losses["balance"] + losses["orthogonality"]), rel=1e-6)
    for name, gradient in both.items():                  # another order: fp32 rounding of two terms
        wanted = single[0].get(name, 0) + single[1].get(name, 0)
        assert torch.allclose(gradient, wanted, rtol=1e-5,
                              atol=1e-7 * float(wanted.norm()) + 1e-12), name


def test_compiled_blocks_train_alike():
    """Traced by torch.compile, run as traced: the same losses and gradients, noise included."""
    pipe, batch, graphs = make_pipeline(), [(3, samples("canny"))], []
    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward
    plain = train.accumulate(pipe, batch, 1.0), gradients(pipe)
    torch._dynamo.reset()
    for block in (*pipe.dit.transformer_blocks, *pipe.dit.single_transformer_blocks):
        block.compile(backend=counted, fullgraph=True)
    losses = train.accumulate(pipe, batch, 1.0, recompute=True)
    assert len(graphs) == 4                              # of 9 blocks, as first and last differ
    assert losses == pytest.approx(plain[0], rel=1e-6)
    for name, grad in gradients(pipe).items():           # fp32 sums in another order
        assert (grad - plain[1][name]).norm() <= 1e-5 * plain[1][name].norm(), name


def test_checkpointing_leaves_losses_and_gradients_exact():
    pipe, batch = make_pipeline(), [(5, samples("mixed"))]
    plain = train.accumulate(pipe, batch, 1.0), gradients(pipe)
    again = train.accumulate(pipe, batch, 1.0, recompute=True), gradients(pipe)
    assert plain[0] == again[0] and plain[1].keys() == again[1].keys()
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


def test_shift_moves_every_time_towards_noise(monkeypatch):
    """The model is told the shifted t, and given the mixture of that very t."""
    pipe, seen, velocity = make_pipeline(), [], sample.velocity
    def watch(model, xt, t, *rest):
        seen.append((t, xt))
        return velocity(model, xt, t, *rest)
    monkeypatch.setattr(train, "velocity", watch)
    for shift in (1.0, 6.0):
        train.flow_loss(pipe, samples("move", 8), 3, shift=shift)
    (plain, x), (shifted, y) = seen
    assert plain.min() < 0.3 and torch.allclose(shifted, 6 * plain / (1 + 5 * plain), atol=1e-6)
    x0 = dit.pack(pipe.vae.encode(to_tensor([s.target for s in samples("move", 8)])))
    noise = (y - (1 - shifted)[:, None, None] * x0) / shifted[:, None, None]
    mixed = (1 - plain)[:, None, None] * x0 + plain[:, None, None] * noise
    assert (x - mixed).abs().mean() < 0.3 * (x - y).abs().mean()             # up to the VAE's noise


def test_only_the_adapter_is_trained_and_in_fp32():
    pipe = make_pipeline()
    train.accumulate(pipe, [(1, samples("move"))], 1.0)
    names = pipe.adapter.tensors()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in names.values())
    trained = {id(p) for p in names.values()}
    frozen = [p for m in (pipe.dit, pipe.vae, pipe.t5, pipe.clip) for p in m.parameters()
              if id(p) not in trained]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_routers_have_their_own_rate():
    pipe = make_pipeline()
    optimizer, = train.make_optimizers(pipe.adapter, 1e-4, 5e-5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in pipe.adapter.tensors().items():
        assert rates[id(p)] == (5e-5 if name.endswith("router.weight") else 1e-4)
    assert len(rates) == len(pipe.adapter.tensors())


def test_the_auxiliary_factor_is_a_cosine_from_1_to_1e_minus_5():
    assert train.auxiliary_factor(0, 100) == 1
    assert train.auxiliary_factor(50, 100) == pytest.approx(0.500005)
    assert train.auxiliary_factor(100, 100) == pytest.approx(1e-5)


def test_dropped_conditions_lose_tokens_and_ids(monkeypatch):
    pipe, seen = make_pipeline(), []
    real = sample.velocity
    def watch(model, xt, t, guidance, given, h, w, run):
        seen.append((None if given.cond is None else given.cond.shape[1],
                     None if given.cond_ids is None else len(given.cond_ids)))
        return real(model, xt, t, guidance, given, h, w, run)
    monkeypatch.setattr(train, "velocity", watch)
    monkeypatch.setattr(train, "CONDITION_DROPOUT", 0.5)
    for seed in range(12):
        train.flow_loss(pipe, samples("multi", 1), seed)
    assert {count for count, _ in seen} == {None, 16, 32}                    # none, one, both left
    assert all(tokens == ids for tokens, ids in seen)


def test_instructions_are_dropped_with_their_chance(monkeypatch):
    pipe, seen = make_pipeline(), []
    real = sample.condition
    monkeypatch.setattr(train, "condition", lambda pipe, texts, *rest:
                        seen.append(texts) or real(pipe, texts, *rest))
    monkeypatch.setattr(train, "INSTRUCTION_DROPOUT", 0.5)
    for seed in range(12):
        train.flow_loss(pipe, samples("t2i"), seed)
    assert all(len(set(map(bool, texts))) == 1 for texts in seen)            # a whole batch or none
    assert 0 < sum(not texts[0] for texts in seen) < 12


def test_kinds_of_adapter():
    file = ROOT / "tiny/adapter.json"
    whole = weights.adapter_config("instructmole", file)
    assert whole == replace(mole.AdapterConfig(), **json.loads(file.read_text()))
    assert not weights.adapter_config("lora", file).mole_targets
    assert weights.adapter_config("instructmole", None) == mole.AdapterConfig()


# --------------------------------------------------------------------------------- the command

def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "train.py", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["instructmole", "token"])
def test_resuming_gives_the_same_file(tmp_path, kind, monkeypatch, capsys):
    common = ["train.py", "--data", "tiny", "--batch-size", "2", "--accumulate", "2",
              "--lr", "1e-3", "--schedule", "cosine", "--adapter", kind,
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


def test_killed_at_any_moment_nothing_is_lost():
    """Three kills here; python tests/kills.py --kills 30 for more."""
    done = subprocess.run([sys.executable, ROOT / "tests/kills.py", "--kills", "3", "--steps", "6",
                           "--longest", "1.2"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and done.stdout.startswith("3 kills"), done.stdout + done.stderr


def test_a_base_in_fp8(tmp_path, monkeypatch, capsys):
    """It trains, says so in the run, and its results are not those of the base as stored."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    common = ["train.py", "--data", "tiny", "--batch-size", "2", "--steps", "2", "--adapter",
              "lora", "--out"]
    flows = []
    for name, rest in (("fp8", ["--base-dtype", "fp8"]), ("plain", [])):
        monkeypatch.setattr(sys, "argv", [*common, str(tmp_path / name), *rest])
        train.main()
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        flows.append([json.loads(line)["flow"] for line in log])
    assert flows[0] != flows[1] and flows[0] == pytest.approx(flows[1], rel=0.1)
    monkeypatch.setattr(sys, "argv", [*common, str(tmp_path / "fp8"), "--resume"])
    with pytest.raises(SystemExit):
        commands.run(train.main)
    assert "base_dtype" in capsys.readouterr().err


def test_another_number_of_processes_goes_on(tmp_path, monkeypatch, capsys):
    """Two micro-batches a step by one process, then one: it goes on where the data stopped."""
    seen, real = [], train.accumulate
    monkeypatch.setattr(train, "accumulate", lambda pipe, micro, *rest: seen.extend(
        seed for seed, _ in micro) or real(pipe, micro, *rest))
    common = ["train.py", "--data", "tiny", "--batch-size", "1", "--adapter", "lora", "--steps",
              "5", "--out", str(tmp_path / "run"), "--resume", "--save-every", "2"]
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
    common = ["train.py", "--data", "tiny", "--batch-size", "1", "--adapter", "lora", "--steps",
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
        "adapter.safetensors", "checkpoint.pt", "log.jsonl", "run.json"}
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", [*common, "--resume"])
    train.main()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


def test_both_signals_are_noted_and_a_second_ctrl_c_does_not_wait():
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with resume.stop_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
    with resume.stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]


def test_a_run_that_is_told_to_stop_saves_and_goes_on(tmp_path):
    """The step is finished and saved, with all that resuming starts from (tested above)."""
    common = [sys.executable, "train.py", "--data", "tiny", "--batch-size", "1", "--steps", "600",
              "--adapter", "lora", "--out"]
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
    assert process.returncode == 130 and "Traceback" not in told, told
    done = int(re.search(r"stopped after (\d+) steps; --resume goes on", told)[1])
    lines = (tmp_path / "stopped/log.jsonl").read_text().splitlines()
    assert 0 < done < 600 and len(lines) == done
    state = torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)
    assert state["step"] == state["number"] == done


def test_two_processes_have_one_s_gradients():
    """In fp32 to 1e-6 of a norm, adapters after steps in float64 to 1e-8; --shard as well."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           ROOT / "tests/processes.py", "--steps", "2"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count("split True") == 4, done.stdout + done.stderr


def test_a_process_that_dies_ends_the_run_and_one_goes_on(tmp_path, monkeypatch):
    common = ["--data", "tiny", "--batch-size", "1", "--steps", "4", "--adapter", "lora",
              "--save-every", "1", "--out", str(tmp_path / "run")]
    script = tmp_path / "train.py"
    script.write_text(f"import os, sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n"
                      "from support import commands\n"
                      "train.previews = lambda *_: {}\nupdate = train.update\n"
                      "def dies(*args):\n"
                      "    if args[3] == 2 and os.environ['RANK'] == '1':\n"
                      "        os.kill(os.getpid(), 9)\n"
                      "    return update(*args)\n"
                      "train.update = dies\ncommands.run(train.main)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           str(script), *common], cwd=ROOT, timeout=120, capture_output=True)
    assert done.returncode != 0
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["train.py", *common, "--accumulate", "2", "--resume"])
    train.main()
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and state["number"] == 8


def test_two_processes_are_two_micro_batches(tmp_path, monkeypatch):
    """Each takes its own samples; their gradients' mean is that of one process's accumulation.

    Expert Race, because it also has thresholds, which follow the batches without a gradient.
    """
    common = ["--data", "tiny", "--batch-size", "2", "--steps", "2", "--lr", "1e-3",
              "--adapter", "race"]
    script = tmp_path / "train.py"                       # without its sheet of samples, for speed
    script.write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\nimport train\n"
                      "from support import commands\n"
                      "train.previews = lambda *_: {}\ncommands.run(train.main)\n")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    str(script), *common, "--out", str(tmp_path / "two")], cwd=ROOT, check=True)
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


def told_by_dry_run(monkeypatch, capsys, *arguments: str) -> dict[str, float]:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--dry-run", *arguments])
    train.main()
    found = re.findall(r"^  (.+?) +([\d.]+) GB$", capsys.readouterr().out, re.M)
    return {name: float(value) for name, value in found}


def test_dry_run_counts_what_a_step_takes(monkeypatch, capsys):
    """Played with shapes alone, a step takes what it takes with numbers; parts add up."""
    pipe = make_pipeline()
    monkeypatch.setattr(dry_run, "GB", 1)                  # bytes: the tiny model has few
    told = told_by_dry_run(monkeypatch, capsys, "--batch-size", "2")
    own = 4 * sum(p.numel() for p in pipe.adapter.tensors().values())
    assert told["adapter, fp32"] == told["gradients"] == own
    assert 0 <= told["optimizer"] - 2 * own < 4000       # each tensor's count of steps
    assert told["transformer, frozen"] == sum(
        t.nbytes for name, t in pipe.dit.named_parameters() if t.dtype == torch.float32
        and (".base." in name or name.replace(".base", "") not in pipe.adapter.tensors())
        and not name.endswith(("_A", "_B", "router.weight")))
    assert told["together"] == pytest.approx(
        sum(told.values()) - told["together"], rel=1e-6)
    optimizers = train.make_optimizers(pipe.adapter, 1e-3, 1e-3)
    sample = max((samples("multi", 1) + samples("mixed", 1)), key=lambda s: len(s.conds))
    with dry_run.LiveBytes() as live:
        for _ in range(2):                               # the second has the optimizer's states
            before = live.now
            passes, _ = dry_run.step_bytes(
                lambda batch: train.empty_loss(pipe, sample, batch, False), 2, pipe.adapter,
                optimizers, 1, live)
    real = passes - before                               # beyond weights, adapter and states
    assert told["activations"] + told["gradients"] == pytest.approx(real, rel=0.02)
    other = told_by_dry_run(monkeypatch, capsys, "--batch-size", "4", "--recompute", "--base-dtype",
                            "fp8", "--method", "lora")
    assert other["activations"] < told["activations"]    # though the batch is twice as large
    assert other["transformer, frozen"] < 0.4 * told["transformer, frozen"]


def test_dry_run_of_a_sharded_run_counts_a_process(monkeypatch, capsys):
    """Of three processes each has a third of the blocks, but for two that are whole; one speaks."""
    monkeypatch.setattr(dry_run, "GB", 1)
    monkeypatch.setattr(dry_run, "step_bytes",
                        lambda loss_of, batch, *_: (batch * 10 ** 8, 10 ** 8))
    whole = told_by_dry_run(monkeypatch, capsys)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shared = told_by_dry_run(monkeypatch, capsys, "--shard")
    bare = load_pipeline(MODEL, None, "cpu", "float32").dit
    blocks = [sum(t.nbytes for t in block.parameters()) for block in (
        *bare.transformer_blocks, *bare.single_transformer_blocks)]
    away = (sum(blocks) - 2 * max(blocks)) * 2 / 3
    for name, size in whole.items():
        less = away if name in ("transformer, frozen", "together") else 0
        assert size - shared[name] == pytest.approx(less, abs=2), name
    monkeypatch.setenv("RANK", "1")
    assert told_by_dry_run(monkeypatch, capsys, "--shard") == {}


def test_what_options_need(monkeypatch):
    for size in ("-1", "nan"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--dry-run", size])
        with pytest.raises(ValueError, match="from 0 up"):
            train.main()
    monkeypatch.setenv("CXX", sys.executable)
    for given, words in ((["--shard"], "torchrun"), (["--compile", "--shard"], "not together"),
                           (["--data-root", "/gone"], "no such folder")):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", *given])
        with pytest.raises(ValueError, match=words):
            train.main()


def test_pictures_of_how_it_goes(tmp_path, monkeypatch, capsys):
    """Losses, routing and likeness are drawn where matplotlib is, else it is said once."""
    monkeypatch.setattr(train, "sample_sheet", lambda *_: np.zeros((8, 8, 3), np.uint8))
    def files(*rest: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--batch-size", "1",
                                          "--steps", "2", "--save-every", "1", *rest])
        train.main()
        return {file.name for file in Path(rest[-1]).iterdir()}
    always = {"adapter.safetensors", "checkpoint.pt", "checkpoint_before.pt", "log.jsonl",
              "run.json", "samples_000001.png", "samples_000002.png"}
    assert files("--out", str(tmp_path / "all")) == always | {"loss.png", "routing.png",
                                                              "experts.png"}
    assert files("--adapter", "lora", "--out", str(tmp_path / "lora")) == always | {"loss.png"}
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    capsys.readouterr()
    assert files("--out", str(tmp_path / "none")) == always
    assert capsys.readouterr().err.count("matplotlib") == 1


def test_similarity_of_experts_is_that_of_their_outputs():
    """Against every expert's output written out; the mean over layers of |cosine|."""
    pipe, sample, wanted = make_pipeline(), samples("move", 1)[0], []
    def look(layer: mole.MoLELinear, args: tuple, _: torch.Tensor) -> None:
        parts = zip(layer.experts_A.chunk(layer.config.experts, 1),
                    layer.experts_B.chunk(layer.config.experts, 0))
        Y = torch.stack([(args[0] @ A @ B).flatten() for A, B in parts])
        wanted.append(torch.nn.functional.normalize(Y, dim=1).cpu())
    for layer in pipe.adapter.layers.values():
        if isinstance(layer, mole.MoLELinear):
            layer.register_forward_hook(look)
    pipe.adapter.eval()
    found = routing_maps.expert_similarity(
        pipe.adapter, lambda: train.flow_loss(pipe, [sample], 0))
    assert torch.allclose(found, torch.stack([(Y @ Y.T).abs() for Y in wanted]).mean(0), atol=1e-4)


def test_a_run_says_how_to_repeat_it(tmp_path, monkeypatch, capsys):
    """run.json; other data under the same names are noticed by a resumed run."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    folder, rows = tmp_path / "own", []
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"target": f"{i}.png", "instruction": "red"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    common = ["train.py", "--data", str(folder), "tiny", "--batch-size", "1", "--out",
              str(tmp_path / "run")]
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
    assert "fingerprints" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["fingerprints"][0] != own


def test_a_run_leaves_its_files_and_another_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--out", str(out),
                                          *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            commands.run(train.main)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and len(printed.splitlines()) == 1
        return printed
    done = run("--data", "tiny", "--steps", 2, "--batch-size", 2, "--save-every", 2,
               "--out", out, "--adapter", "lora")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {"adapter.safetensors", "checkpoint.pt", "log.jsonl",
                                               "loss.png", "run.json", "samples_000002.png"}
    entry = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "flow", "balance", "orthogonality", "tasks", "seconds"} <= entry.keys()
    before = (out / "adapter.safetensors").read_bytes()
    assert "--resume" in refused("--steps", 2)
    (out / "log.jsonl").rename(tmp_path / "log.jsonl")
    assert "--resume" in refused("--steps", 2)           # results are there yet
    (tmp_path / "log.jsonl").rename(out / "log.jsonl")
    record = (out / "run.json").read_bytes()
    assert "steps" in refused("--steps", 3, "--batch-size", 2, "--adapter", "lora", "--resume")
    shutil.copytree(MODEL, tmp_path / "model")           # the same names, other weights
    changed = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-2] + b"\0\0")
    assert "model = " in refused("--steps", 2, "--batch-size", 2, "--adapter", "lora", "--resume",
                                 "--model", tmp_path / "model", "--config",
                                 ROOT / "tiny/adapter.json")
    assert (out / "run.json").read_bytes() == record
    assert (out / "adapter.safetensors").read_bytes() == before


def test_resuming_asks_for_the_same_run(tmp_path, monkeypatch, capsys):
    """Another configuration in the same file, a checkpoint that is none: one line, nothing lost."""
    config, out = tmp_path / "config.json", tmp_path / "run"
    config.write_text((ROOT / "tiny/adapter.json").read_text())
    monkeypatch.setattr(train, "previews", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--steps", "1", "--batch-size",
                                      "1", "--config", str(config), "--out", str(out), "--resume"])
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


@pytest.mark.parametrize("arguments, words", [
    (["--data", "gone"], "gone"), (["--data", "tiny:0"], "weight"),
    (["--data", "tiny", "--steps", "0"], "--steps"),
    (["--data", "tiny", "--model", "gone"], "gone"),
    (["--data", "tiny", "--config", "gone.json"], "gone.json"),
    (["--data", "tiny", "--lr", "nan"], "--lr"),
    (["--data", "tiny", "--device", "cuda:99"], "--device")])
def test_what_a_user_gets_wrong_is_one_line(tmp_path, arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        commands.run(train.main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_configuration_entries_are_named(tmp_path):
    (tmp_path / "c.json").write_text('{"rnak": 3}')
    with pytest.raises(ValueError, match="rnak"):
        weights.adapter_config("instructmole", tmp_path / "c.json")
    assert "rank" in {entry.name for entry in fields(mole.AdapterConfig)}


def test_training_on_a_folder(tmp_path):
    from PIL import Image
    for i in range(2):
        Image.fromarray(np.full((70, 50, 3), 100 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(
        {"target": "0.png", "instruction": "dark", "images": ["1.png"]}))
    done = run("--data", tmp_path, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "run",
               "--checkpoint")
    assert done.returncode == 0, done.stderr
