"""Less memory: weights that visit a device, types, recomputing, a base in fp8, counting before."""
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baselines
import dit
import train
from helpers import (adapted, DIT, FIRST, gradients, inputs, made, make_pipeline, MODEL, ROOT, same,
                     samples, step)
from sample import as_tokens, condition, generate, load_pipeline, seeded_noise
from support import commands, devices, dry_run, export, layouts, offload, routing_maps
from support.files import files_of
from support.fp8 import NarrowLinear
from support.recompute import sparing, when_compiled
from support.training_options import train_options
from tiny import world

# -------------------------------------------------------------------- weights that visit the device

def test_parts_visit_the_device_and_come_back(bare):
    """Within the `with` all weights are there; then the very same memory is in its place again."""
    before = {name: t.data_ptr() for name, t in bare.vae.state_dict().items()}
    with offload.on_device(bare.vae, torch.float64):       # a type in place of a device
        assert {t.dtype for t in bare.vae.state_dict().values()} == {torch.float64}
    assert {name: t.data_ptr() for name, t in bare.vae.state_dict().items()} == before


def test_what_has_room_on_a_device(bare, monkeypatch):
    size = sum(t.nbytes for t in bare.vae.state_dict().values())
    for room, answer in ((2 * size, True), (size, False)):
        monkeypatch.setattr(devices, "memory", lambda device: room)
        assert offload.fits(bare.vae, torch.device("meta")) == answer
        assert offload.fits(bare.vae, torch.device("cpu"))                    # it is there already


def test_room_for_training():
    """In 0.8 of the device: what is frozen, and what is trained with its gradients and states."""
    for frozen, training, encoders, answer in (
            (40, 16, 20, (True, True)), (40, 16, 24, (True, False)), (60, 20, 0, (False, False)),
            (80, 0, 0, (False, False))):
        assert offload.room_for(frozen, training, encoders, 100) == answer
    tensors = {name: torch.zeros(10) for name in ("a.experts_A", "a.experts_B", "a.router.weight")}
    adapter = SimpleNamespace(tensors=lambda: tensors)
    assert offload.training_bytes(adapter, "adamw") == 4 * 120
    assert offload.training_bytes(adapter, "muon") == 4 * 40 + 3 * 80


class Part:
    """A text encoder's or the autoencoder's stand-in, of 1000 bytes, which notes its journeys."""

    def __init__(self):
        self.t, self.sent = torch.empty(250), []

    def parameters(self):
        return [self.t]

    def buffers(self):
        return []

    def to(self, device: torch.device) -> None:
        self.sent.append(device.type)


@pytest.mark.parametrize("cache", [None, Path("cache")])
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("share, fits, beside", [(0, False, False), (0.5, True, False),
                                                 (2, True, True)])
def test_what_has_room_moves_to_the_device_that_trains(share, fits, beside, shard, cache,
                                                       monkeypatch):
    """meta is the device: of bytes for the transformer, and a share of those for the encoders."""
    model, adapter = adapted()
    frozen = sum(t.nbytes for t in offload.weights_of(model) if not t.requires_grad)
    training = 4 * sum(t.nbytes for t in adapter.tensors().values())
    monkeypatch.setenv("WORLD_SIZE", "2" if shard else "1")
    room = frozen // (2 if shard else 1) + training + 3000 * share + (1 if share else -1)
    monkeypatch.setattr(devices, "memory", lambda device: room / devices.ROOM)
    moved, parts = [], [Part() for _ in range(3)]
    monkeypatch.setattr(offload, "move", lambda ts, device: moved.append((len(ts), device)))
    pipe = SimpleNamespace(dit=model, adapter=adapter, device=torch.device("meta"),
                           **dict(zip(("t5", "clip", "vae"), parts)))
    args = SimpleNamespace(shard=shard, cache=cache, optimizer="adamw")
    assert offload.settle(args, pipe) == fits
    there = {t.device.type for t in offload.weights_of(model) if not t.requires_grad}
    assert there == {"meta" if fits and not shard else "cpu"}                # shard() moves its own
    assert moved == [(len(adapter.tensors()), pipe.device)]                  # is trained there
    assert [part.sent for part in parts] == 3 * [["meta"] if beside and not cache else []]


def test_on_a_cpu_nothing_moves():
    pipe, args = make_pipeline("lora"), SimpleNamespace(shard=False, cache=None, optimizer="adamw")
    before = [t.data_ptr() for t in offload.weights_of(pipe.dit)]
    assert offload.settle(args, pipe)
    assert before == [t.data_ptr() for t in offload.weights_of(pipe.dit)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("room", [0, 10 ** 9])
def test_visits_on_a_gpu(room, monkeypatch):
    """Blocks one by one, or parts in turn: the picture of a pipeline that stays on the device."""
    stays = load_pipeline(MODEL, None, "cuda", "float32")
    real = devices.memory
    monkeypatch.setattr(devices, "memory", lambda device: room if room else 1)
    visits = load_pipeline(MODEL, None, "cuda", "float32")
    for part in (visits.dit, visits.t5, visits.clip, visits.vae) if room else ():
        part.cpu()
    noise = seeded_noise([0], (64, 64))
    one, two = (made(pipe, ["a red star"], [], [], noise, 3)[0] for pipe in (stays, visits))
    assert real(torch.device("cuda")) > 0 and np.abs(one.astype(int) - two).max() <= 1
    assert next(visits.dit.parameters()).device.type == "cpu"


# -------------------------------------------------------------------------------------------- types

@pytest.mark.parametrize("able", ["avx2", "amx_bf16", "avx512_bf16", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_type_to_compute_in(able, device, monkeypatch):
    """auto: bf16 where it is fast and the model large; what is asked for is given."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True, "avx": True})
    monkeypatch.setattr(devices, "FAST_BF16", devices.fast_bf16())           # as at the start
    monkeypatch.setattr(devices, "memory", lambda device: 400)
    large, small = (devices.choose_dtype("auto", torch.device(device), size) for size in (100, 99))
    wide, narrow = torch.float32, torch.bfloat16
    assert large == (wide if device == "cpu" and able == "avx2" else narrow)
    assert small == (wide if device == "cpu" else narrow)
    assert devices.choose_dtype("float16", torch.device(device), 10) == torch.float16


def test_a_model_too_large_to_widen_is_widened_layer_by_layer(trained, monkeypatch):
    """The same numbers multiplied in the same type, unmerged: within 1/255 of the whole in fp32."""
    files = [file for part in layouts.SIGNS for file in files_of(MODEL / part)]
    needed = 2 * sum(file.stat().st_size for file in files)
    given, noise = condition(trained, ["make it red"], [], []), seeded_noise([0], (64, 64))
    wanted, _ = generate(trained, given, noise, steps=3)
    for room, number in ((2 * needed + 2, 0), (2 * needed, 100)):
        monkeypatch.setattr(devices, "memory", lambda device: room)
        pipe = load_pipeline(MODEL, ROOT / "tiny/adapter.safetensors", "cpu", "float32")
        kept = [layer for part in (pipe.dit, pipe.t5) for layer in part.modules()
                if isinstance(layer, NarrowLinear)]
        assert len(kept) >= number and (number or not kept)
        assert all(layer.weight.dtype == torch.bfloat16 for layer in kept)
        assert export.mergeable(pipe.adapter, 1, pipe.device) == (not kept)
        made, _ = generate(pipe, condition(pipe, ["make it red"], [], []), noise, steps=3)
        assert np.abs(made.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("device, dtype, fast, layout, wide", [
    ("cpu", torch.float32, False, True, False), ("cpu", torch.bfloat16, False, True, True),
    ("cpu", torch.bfloat16, True, True, True), ("meta", torch.bfloat16, False, False, False)])
def test_models_are_made_ready_for_their_device(device, dtype, fast, layout, wide, monkeypatch):
    """Channels last, and attention's backward in fp32, on the CPU only; weights keep values."""
    monkeypatch.setattr(devices, "FAST_BF16", fast)
    model, vae = dit.FluxTransformer(DIT), nn.Conv2d(4, 8, 3)
    weight = vae.weight.clone()
    devices.ready(model, vae, torch.device(device), dtype)
    assert vae.weight.is_contiguous(memory_format=torch.channels_last) == layout
    assert torch.equal(vae.weight, weight)
    for block in model.blocks:
        assert (block.attend is devices.attend_in_fp32) == wide


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_in_training_is_one_graph_and_of_its_own_type(fast, dtype, monkeypatch):
    """On a CPU bf16 passes through fp32, which float64 must not; many tokens only where slow."""
    monkeypatch.setattr(devices, "FAST_BF16", fast)
    model = dit.FluxTransformer(dit.DiTConfig(16, 1, 1, 16, 2, 8, 8, (4, 6, 6)))
    devices.ready(model, nn.Identity(), torch.device("cpu"), dtype)
    q, k, v = (torch.randn(1, 2, 5, 16).to(dtype).requires_grad_() for _ in range(3))
    pe = dit.rope(torch.zeros(5, 3), (4, 6, 6))          # turns nothing
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-12   # its rounding of values about 2
    plain = [model.transformer_blocks[0].attend, model.single_transformer_blocks[0].attend]
    compiled = [torch.compile(one, backend="aot_eager", fullgraph=True) for one in plain]
    for attend in plain + compiled:
        out = attend(q, k, v, pe)
        assert out.dtype == dtype and torch.allclose(out, wanted, atol=limit, rtol=0)
    seen, real = [], dit.attend
    monkeypatch.setattr(dit, "attend", lambda q, *rest: seen.append(q.dtype) or real(q, *rest))
    for tokens in (5, 2000):
        q, k, v = (torch.randn(1, 2, tokens, 16).to(dtype).requires_grad_() for _ in range(3))
        devices.attend_in_fp32(q, k, v, dit.rope(torch.zeros(tokens, 3), (4, 6, 6)))
    assert dtype == torch.float64 or seen == [
        torch.float32, torch.bfloat16 if fast else torch.float32]


@pytest.mark.usefixtures("short_by_default")
def test_a_base_in_fp8(tmp_path, monkeypatch, capsys):
    """It trains, says so in the run, and its results are not those of the base as stored."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    common = ["train.py", "--data", "tiny", "--batch-size", "2", "--steps", "2", "--method",
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


# -------------------------------------------------------------------------------------- recomputing

@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("clean", [False, True])
def test_checkpointing_changes_nothing(clean, training):
    model, adapter = adapted(token_targets=("single_transformer_blocks.1.proj_out",))
    adapter.train(training)
    calls, x = [], inputs(clean=clean)
    model.get_submodule(FIRST).register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    out, routing, gradients = step(model, adapter, x)
    gradients = {name: g.clone() for name, g in gradients.items()}
    plain, last = len(calls), routing_maps.last_weights(adapter)
    torch.manual_seed(5)
    out2, routing2, gradients2 = step(model, adapter, x, checkpointed=True)
    assert len(calls) == 3 * plain                       # it did compute again
    assert torch.equal(out, out2) and same(last, routing_maps.last_weights(adapter))
    assert (routing.balance == routing2.balance > 0
            and routing.orthogonality == routing2.orthogonality > 0)
    assert same(gradients, gradients2)


def test_checkpointing_leaves_losses_and_gradients_exact():
    pipe, batch = make_pipeline(), [(5, samples("mixed"))]
    plain = train.accumulate(pipe, batch, 1.0), gradients(pipe)
    again = train.accumulate(pipe, batch, 1.0, recompute=True), gradients(pipe)
    assert plain[0] == again[0] and plain[1].keys() == again[1].keys()
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


# ---------------------------------------------------------------------------------------- --dry-run

def told_by_dry_run(monkeypatch, capsys, *arguments: str, dtype: str = "float32"
                    ) -> dict[str, float]:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--device", "cpu", "--dtype",
                                      dtype, "--dry-run", *arguments])
    train.main()
    found = re.findall(r"^  (.+?) +([\d.]+) GB$", capsys.readouterr().out, re.M)
    return {name: float(value) for name, value in found}


def test_dry_run_counts_what_a_step_takes(monkeypatch, capsys, short_model, short_by_default):
    """Played with shapes alone, a step takes what it takes with numbers; parts add up."""
    pipe = make_pipeline(model=short_model)
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
                lambda batch: dry_run.empty_loss(
                    pipe, sample, as_tokens, train.matching_loss, batch, False), 2, pipe.adapter,
                optimizers, 1, live)
    real = passes - before                               # beyond weights, adapter and states
    assert told["activations"] + told["gradients"] == pytest.approx(real, rel=0.02)
    many = told_by_dry_run(monkeypatch, capsys, "--batch-size", "64")
    spared = told_by_dry_run(monkeypatch, capsys, "--batch-size", "64", "--recompute",
                             "--base-dtype", "fp8")
    assert spared["activations"] < 0.8 * many["activations"]
    assert spared["transformer, frozen"] < 0.4 * told["transformer, frozen"]


def test_dry_run_counts_the_batch_itself(monkeypatch, capsys, short_by_default):
    """Few samples take less each than many do, when recomputing: two give no slope."""
    monkeypatch.setattr(dry_run, "GB", 1)
    def step_bytes(loss_of, batch, *_):                  # gradients, then activations are the most
        return max(30 * 10 ** 6 + batch, 10 ** 6 * (25 + 2 * batch)), 28 * 10 ** 6
    monkeypatch.setattr(dry_run, "step_bytes", step_bytes)
    def told(batch: int, room: int) -> tuple[int, int]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--batch-size", str(batch),
                                          "--cache", "x", "--dry-run", str(room)])
        monkeypatch.setattr(train, "open_sources", lambda *_: [(world.TinyWorld(), 1.0)])
        train.main()
        out = capsys.readouterr().out
        return (int(float(re.search(r"together +([\d.]+)", out)[1])) // 10 ** 6,
                int(re.search(r"largest batch in .*: ([\d,]+)$", out, re.M)[1].replace(",", "")))
    for batch, room, whole, most in ((1, 2, 30, 0), (1, 100, 30, 36), (8, 36, 41, 4),
                                     (8, 42, 41, 8), (40, 205, 105, 90)):
        assert told(batch, room * 10 ** 6) == (whole, most), (batch, room)


def test_dry_run_lays_parts_where_training_does(monkeypatch, capsys):
    """Encoders beside the transformer if all, with what is trained, has room; blocks that visit."""
    monkeypatch.setattr(dry_run, "GB", 1)
    monkeypatch.setattr(dry_run, "step_bytes", lambda loss_of, batch, *_: (10 ** 9 + batch, 10))
    told = told_by_dry_run(monkeypatch, capsys)
    frozen, own, stay = (told[name] for name in (
        "transformer, frozen", "adapter, fp32", "text encoders, autoencoder"))
    needed = frozen + 4 * own
    for room, streamed, beside in (
            (needed + stay + 9, False, True), (needed + stay - 9, False, False),
            (needed - 9, True, False)):
        found = told_by_dry_run(monkeypatch, capsys, f"{room / devices.ROOM:.0f}")
        assert ("text encoders, autoencoder" in found) == beside
        assert (found["transformer, frozen"] < frozen) == streamed


def test_dry_run_for_so_many_gb_is_for_an_accelerator(monkeypatch, capsys, short_by_default):
    """Whatever type, and form of attention, this computer would take."""
    monkeypatch.setattr(dry_run, "GB", 1)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(devices, "FAST_BF16", fast)
        found.append(told_by_dry_run(monkeypatch, capsys, "1e9", dtype="bfloat16"))
    assert found[0] == found[1]
    for words, dtype in ((["--dry-run"], "auto"), (["--dry-run", "24"], "bfloat16"),
                         (["--dry-run", "24", "--dtype", "float32"], "float32")):
        assert train_options(baselines.METHODS, {}, ["--data", "tiny", *words]).dtype == dtype


def test_dry_run_says_nothing_odd(monkeypatch, capsys, short_by_default):
    """No steps that were not given, nothing of which there is none."""
    monkeypatch.setattr(dry_run, "step_bytes", lambda loss_of, batch, *_: (10 ** 8 * batch, 10))
    for more, steps in (([], False), (["--steps", "1"], True)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(ROOT / "tiny/examples/own"),
                                          "--cache", "x", *more, "--dry-run"])
        monkeypatch.setattr(dry_run, "largest", lambda batches: samples("t2i", 1)[0])
        train.main()
        out = capsys.readouterr().out
        assert ("in a batch; 1 step: 1 pass\n" in out) == steps and "steps" not in out
        assert "64x64, nothing given; the largest" in out and " 0.00" not in out


def test_dry_run_of_a_sharded_run_counts_a_process(monkeypatch, capsys):
    """Of three processes each has a third of the blocks, but for two that are whole; one speaks."""
    monkeypatch.setattr(dry_run, "GB", 1)
    monkeypatch.setattr(dry_run, "step_bytes",
                        lambda loss_of, batch, *_: (batch * 10 ** 8, 10 ** 8))
    whole = told_by_dry_run(monkeypatch, capsys)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shared = told_by_dry_run(monkeypatch, capsys, "--shard")
    bare = load_pipeline(MODEL, None, "cpu", "float32").dit
    blocks = [sum(t.nbytes for t in block.parameters()) for block in bare.blocks]
    away = (sum(blocks) - 2 * max(blocks)) * 2 / 3
    for name, size in whole.items():
        less = away if name in ("transformer, frozen", "together") else 0
        assert size - shared[name] == pytest.approx(less, abs=2), name
    monkeypatch.setenv("RANK", "1")
    assert told_by_dry_run(monkeypatch, capsys, "--shard") == {}


@pytest.mark.parametrize("kind", ["instructmole", "race", "standardised"])
def test_compiled_blocks_that_count_are_not_recomputed(kind):
    """Their second pass would lack what the first has kept."""
    adapter, counts = make_pipeline(kind).adapter, kind != "instructmole"
    assert when_compiled(adapter, "off") == "off"
    assert when_compiled(adapter, "auto") == ("off" if counts else "auto")
    if not counts:
        assert when_compiled(adapter, "on") == "on"
        return
    with pytest.raises(ValueError, match=f"--compile and --recompute .* routing '{kind}'; leave"):
        when_compiled(adapter, "on")


@pytest.mark.parametrize("kind", ["instructmole", "race"])
@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_what_has_no_memory_is_recomputed(choice, kind, capsys):
    """From that step on, which is done again: the same losses and gradients. Else the way out."""
    pipe, batch = make_pipeline(kind), [(3, samples("move")), (4, samples("t2i"))]
    learnt = [t for t in pipe.adapter.tensors().values() if not t.requires_grad]     # of "race"
    first, asked, lacking = [t.clone() for t in learnt], [], []

    def again():
        for t, value in zip(learnt, first):
            t.copy_(value)
        return gradients(pipe)

    def accumulate(pipe, micro_batches, factor, recompute, shift):
        asked.append(recompute)
        losses = train.accumulate(pipe, micro_batches, factor, recompute, shift)
        if lacking and not recompute:                    # after half of the work, as it may be
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return losses
    losses = train.accumulate(pipe, batch, 1.0, True)
    after = [t.clone() for t in learnt]
    wanted = losses, again()
    spared = sparing(accumulate, choice)
    spared(pipe, batch, 1.0, 1.0)
    again()
    lacking.append(True)
    if choice == "off":
        with pytest.raises(MemoryError, match="CUDA out of memory; try --recompute on, or a "):
            spared(pipe, batch, 1.0, 1.0)
        assert asked == [False, False]
        return
    losses = spared(pipe, batch, 1.0, 1.0)
    assert all(map(torch.equal, learnt, after)) and len(learnt) == (9 if kind == "race" else 0)
    for name, gradient in gradients(pipe).items():
        assert torch.equal(gradient, wanted[1][name]), name
    assert losses == wanted[0]
    spared(pipe, batch, 1.0, 1.0)
    assert asked == ([False, False, True, True] if choice == "auto" else [True] * 3)
    assert capsys.readouterr().err.count("recomputed in backward") == (choice == "auto")


@pytest.mark.parametrize("libc, variable, kept", [
    ("glibc", "", True), ("", "", False), ("glibc", "MALLOC_ARENA_MAX", False),
    ("glibc", "MALLOC_TRIM_THRESHOLD_", False), ("glibc", "GLIBC_TUNABLES", False)])
def test_freed_memory_is_kept_unless_the_user_says_how(libc, variable, kept, monkeypatch):
    asked = []
    for name in [name for name in os.environ if "MALLOC" in name or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: SimpleNamespace(
        mallopt=lambda *what: asked.append(what)))
    if variable:
        monkeypatch.setenv(variable, "1")
    devices.keep_freed_memory()
    assert asked == ([(-3, 32 * 2 ** 20), (-1, 2 ** 31 - 1)] if kept else [])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_is_not_given_new_pages_each_time():
    """By the system's own count of pages that it cleared, in a process of its own."""
    code = ("import resource, torch; from support import devices\n"
            "def step(): return [torch.ones(2 ** 21) for _ in range(50)]\n"    # 8 MB each
            "def faults(): step(); before = resource.getrusage(0).ru_minflt; step(); "
            "return resource.getrusage(0).ru_minflt - before\n"
            "plain = faults(); devices.keep_freed_memory(); print(plain, faults())")
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True,
                          text=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10
