"""Blocks that visit the device: copied ahead, in order, and never more than two."""
import threading
from contextlib import nullcontext
from operator import call
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from helpers import gradients, make_pipeline, run_train, samples
from sample import condition, generate, seeded_noise
from support import devices, export, offload, streaming
from support.files import read_tensors

ELSEWHERE = torch.device("meta")                         # no weight is there, and no copy


class Lane(streaming.Lane):
    """A device's stand-in. Copies are no numbers until the device was told to wait for them."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.log, self.marks = [], 0

    def send(self, homes):
        copies = [torch.full_like(home, float("nan")) for home in homes]
        self.log.append("send")
        return copies, (copies, homes)

    def follow(self, mark):
        for copy, home in zip(*mark):
            copy.copy_(home)
        self.log.append("follow")

    def mark(self):
        self.marks += 1
        self.log.append(f"mark {self.marks}")
        return self.marks

    def wait(self, mark):
        self.log.append(f"wait {mark}")

    def locked(self, size):
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def at_home(monkeypatch):
    """The parts that are no blocks stay where they are."""
    monkeypatch.setattr(offload, "on_device", lambda *_: nullcontext(call))


def addresses(model):
    return [[t.data_ptr() for t in offload.weights_of(block)] for block in model.blocks]


def test_the_next_block_is_copied_while_one_computes(bare, monkeypatch, at_home):
    """Asked for before what this block computes is waited for, and after the one before it left."""
    lane, homes, blocks = Lane(), addresses(bare.dit), bare.dit.blocks
    with streaming.stream(bare.dit, ELSEWHERE, lane) as run:
        for i, block in enumerate(blocks):
            def work():
                lane.log.append("compute")
                there = [now != home for now, home in zip(addresses(bare.dit), homes)]
                assert there[i] and sum(there) <= 2 and not any(there[i + 1:])
                assert all(p.isfinite().all() for p in block.parameters())
            monkeypatch.setattr(block, "forward", work)
            run(block)
            assert [now != home for now, home in zip(addresses(bare.dit), homes)].count(True) == 1
        first, second, *rest = lane.log
        assert (first, second) == ("mark 1", "send")     # the first is waited for
        step = ["follow", "compute", "wait {0}", "send", "mark {1}"]
        wanted = [word.format(n, n + 1) for n in range(1, len(blocks)) for word in step]
        assert rest[:len(wanted)] == wanted
    assert addresses(bare.dit) == homes


def test_a_failure_leaves_every_block_at_home(bare, monkeypatch, at_home):
    homes, blocks = addresses(bare.dit), bare.dit.blocks
    def fail():
        raise RuntimeError("out of memory")
    monkeypatch.setattr(blocks[1], "forward", fail)
    monkeypatch.setattr(blocks[0], "forward", lambda: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        with streaming.stream(bare.dit, ELSEWHERE, Lane()) as run:
            run(blocks[0])
            run(blocks[1])
    assert addresses(bare.dit) == homes


def test_a_streamed_model_makes_the_same_picture(trained, monkeypatch):
    """The whole of generate(), where a device is said to lack room for the transformer."""
    given, noise = condition(trained, ["make it red"], [], []), seeded_noise([0], (64, 64))
    monkeypatch.setattr(export, "mergeable", lambda *_: False)               # streamed is unmerged
    plain, _ = generate(trained, given, noise, steps=2)
    lane = Lane()
    stream = streaming.stream
    monkeypatch.setattr(streaming, "stream", lambda model, device: stream(model, ELSEWHERE, lane))
    monkeypatch.setattr(offload, "fits", lambda model, device: model is not trained.dit)
    real = offload.on_device
    monkeypatch.setattr(offload, "on_device", lambda part, device: (
        nullcontext() if device == ELSEWHERE else real(part, device)))
    streamed, _ = generate(trained, given, noise, steps=2)
    assert "follow" in lane.log and np.array_equal(plain, streamed)


def test_a_streamed_model_trains_alike(monkeypatch, at_home):
    """Blocks come again in backward, the last one first: the same gradients to the bit."""
    pipe, batch, lane = make_pipeline(), [(3, samples("move"))], Lane()
    losses = train.accumulate(pipe, batch, 1.0, recompute=True)
    wanted = gradients(pipe)
    blocks, order = pipe.dit.blocks, []
    trained = {id(p) for p in pipe.adapter.tensors().values()}
    real = offload.weights_of
    monkeypatch.setattr(offload, "weights_of", lambda block: [
        t for t in real(block) if id(t) not in trained])         # those are on the device
    homes, most = addresses(pipe.dit), []
    with streaming.stream(pipe.dit, ELSEWHERE, lane) as run:
        def watched(block, *args):
            order.append(blocks.index(block))
            away = [now != home for now, home in zip(addresses(pipe.dit), homes)]
            most.append(sum(away))
            return run(block, *args)
        pipe.run = watched
        assert train.accumulate(pipe, batch, 1.0, recompute=True) == losses
    n = len(blocks)
    assert order == [*range(n), *reversed(range(n))]
    assert max(most) == 1                                # and the next one is on its way
    assert lane.log.count("send") <= 2 * n               # each is fetched once in either direction
    for name, grad in gradients(pipe).items():
        assert torch.equal(grad, wanted[name]), name


def test_weights_become_page_locked_without_being_waited_for(monkeypatch, at_home):
    """The first step passes while that hangs; later ones take what is ready; values stay."""
    pipe, lane, go = make_pipeline(), Lane(), threading.Event()
    lane.pins = True
    plain = lane.locked
    def slow(size):
        assert go.wait(30)
        return plain(size)
    lane.locked = slow
    values = {name: t.clone() for name, t in pipe.dit.state_dict().items()}
    before, blocks = addresses(pipe.dit), pipe.dit.blocks
    with streaming.stream(pipe.dit, ELSEWHERE, lane) as run:
        for block in blocks:
            block.forward = lambda: None
            run(block)
        go.set()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread._target is streaming.pin:
                thread.join(30)
    after = addresses(pipe.dit)
    assert all(set(a).isdisjoint(b) for a, b in zip(after, before))
    assert all(torch.equal(t, values[name]) for name, t in pipe.dit.state_dict().items())


def test_no_more_memory_is_locked_than_there_is(monkeypatch):
    """What is left for others is a fifth of all."""
    monkeypatch.setattr(devices, "memory", lambda device: 1000)
    left = iter([250, 200, 199, 199])
    monkeypatch.setattr(devices, "available", lambda: next(left))
    homes = [[torch.ones(3)] for _ in range(4)]
    first = [block[0].data_ptr() for block in homes]
    streaming.pin(homes, Lane(), SimpleNamespace(is_set=lambda: False))
    assert [block[0].data_ptr() != old for block, old in zip(homes, first)] == [
        True, True, False, False]
    assert all(torch.equal(block[0], torch.ones(3)) for block in homes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_slabs_hold_any_type_and_shape(dtype, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", 256)
    slabs = streaming.Slabs(Lane())
    given = [torch.randn(shape).to(dtype) for shape in ((3, 5), (), (7,), (300, 2), (2, 2))]
    given.append(given[0].T)
    for home, copy in [(home, slabs.copy(home)) for home in given]:
        assert copy.shape == home.shape and copy.dtype == dtype
        assert torch.equal(copy.float(), home.float()) and copy.data_ptr() != home.data_ptr()


def test_how_much_memory_can_be_had(tmp_path, monkeypatch):
    """Of a container's own, where it has a limit."""
    cpu = torch.device("cpu")
    assert 0 <= devices.available() <= devices.memory(cpu)
    monkeypatch.setattr(devices, "CONTAINER", tmp_path)
    whole = devices.memory(cpu)
    for limit, expected in (("max\n", whole), ("4096\n", 4096)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("4000\n")
        assert devices.memory(cpu) == expected
    assert devices.available() == 96
    (tmp_path / "memory.stat").write_text(               # what files keep in memory can be had
        "anon 900\nfile 3100\ninactive_anon 7\nactive_file 1000\ninactive_file 2000\n")
    assert devices.available() == 3096


def test_a_command_that_streams_trains_the_same_adapter(tmp_path, monkeypatch, capsys, at_home):
    """A device without room: the whole command, its pictures on the way included."""
    common = ["--data", "tiny", "--steps", 2, "--batch-size", 2, "--method", "lora", "--out"]
    assert run_train(monkeypatch, capsys, *common, tmp_path / "plain", "--recompute")[0] == 0
    lane, real, stream = Lane(), offload.weights_of, streaming.stream
    monkeypatch.setattr(offload, "settle", lambda *_: False)
    monkeypatch.setattr(offload, "weights_of", lambda block: [
        t for t in real(block) if not t.requires_grad])          # the adapter's are on the device
    monkeypatch.setattr(streaming, "stream", lambda model, device: stream(model, ELSEWHERE, lane))
    code, _, err = run_train(monkeypatch, capsys, *common, tmp_path / "streamed")
    assert code == 0 and "no room for the transformer" in err and lane.log.count("send") > 30
    plain, streamed = (read_tensors([tmp_path / name / "adapter.safetensors"])
                       for name in ("plain", "streamed"))
    assert all(torch.equal(t, streamed[name]) for name, t in plain.items())
    assert all(t.abs().max() > 0 for t in streamed.values())
    assert len(list((tmp_path / "streamed").glob("samples_*.png"))) == 1
