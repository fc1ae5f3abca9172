"""The experiment on the tiny model: what is compared, how it is scored, what routing decides."""
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from itertools import product
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch

import mole
import sample
import weights
from helpers import MODEL, ROOT
from support import adapters, routing_maps
from support.configs import read_json
from support.files import write_json
from support.pictures import load_image
from tiny import conflict, design, drawings, experiment, findings, leads, probe, world
from tiny.design import Piece

PIECE = Piece("table", "token", 0, 2, 1e-3, 1.0, 2, 4, tasks=("canny", "pose"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for module in (design, experiment):
        monkeypatch.setattr(module, "MODEL", MODEL)
        monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(design, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(probe, "STEPS", 1)
    monkeypatch.setattr(experiment.train, "previews", lambda *_: {})         # slow, and not asked
    return tmp_path


# ------------------------------------------------------------------------------ what is compared

@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_variants_have_as_many_parameters(scale, folders):
    sizes, rates = {}, {}
    for variant in design.VARIANTS:
        config = design.configuration(replace(PIECE, variant=variant, scale=scale))
        sizes[variant] = design.count(config)
        rates[variant] = (config.alpha / config.rank, config.lora_alpha / config.lora_rank)
    own = sizes["InstructMoLE"]
    assert all(abs(size / own - 1) < 0.05 for size in sizes.values()), sizes
    assert rates.pop("plain LoRA")[1] == scale
    assert rates.pop("strong LoRA beside") == rates.pop("standardised whole") == (scale, 8.0)
    assert set(rates.values()) == {(scale, 1.0)}         # the LoRA beside the experts stays


def test_regimes_are_as_large_as_a_plain_lora(folders):
    def size(variant: str) -> int:
        return design.count(design.configuration(replace(PIECE, variant=variant)))
    plain = size("plain LoRA")
    for name in (*design.FIRST["conflict"], "free", "standardised as drawn"):    # compared
        assert abs(size(name) / plain - 1) < 0.05, name
    assert abs(5 * size(design.FOR_EACH) / plain - 1) < 0.05
    for name in design.SEARCHES["regimes"]:
        assert name == design.FOR_EACH or abs(size(name) / size("InstructMoLE") - 1) < 0.05
    assert not design.VARIANTS.keys() & design.REGIMES.keys()


def search_all() -> None:
    """Every variant is best at the rate 3e-3, in conflict at 1e-3."""
    for stage, lr in (("search", 3e-3), ("regimes", 1e-3)):
        while todo := [piece for piece in design.pieces(stage) if not piece.there()]:
            for piece in todo:
                write_json(piece.file, {"piece": vars(piece), "flow": dict.fromkeys(
                    piece.tasks, 0.5 + 0.1 * (piece.lr != lr))})


def test_tasks_in_conflict_are_trained_alone_and_together(folders):
    search_all()
    assert {p.tasks for p in design.pieces("regimes")} == {conflict.TASKS}
    stage = list(design.pieces("conflict"))
    together = [p for p in stage if p.variant != design.FOR_EACH]
    assert {(p.tasks, p.steps, p.batch) for p in together} == {(conflict.TASKS, 1500, 24)}
    for name in design.SEARCHES["regimes"]:
        seeds = 8 if name in design.FIRST["conflict"] else 3
        assert sum(p.variant == name for p in together) == seeds * (name != design.FOR_EACH)
    alone = [p for p in stage if p not in together]      # as many steps, 5 of 24 pictures
    assert {(p.tasks, p.steps, p.batch) for p in alone} == {
        ((task,), 1500, 5) for task in conflict.TASKS} and len(alone) == 15
    assert {p.lr for p in stage} == {1e-3}               # what the search on such tasks has found
    assert all(bool(p.ways) == (p in together and p.seed < 4 and p.variant not in (
        "plain LoRA", "free as one")) for p in stage)    # what routing decides
    assert design.left("conflict") == (stage, 0)


def test_tests_in_conflict_are_not_what_the_setting_was_looked_for_on():
    """Those were drawn by [0, the task's number]."""
    for number, task in enumerate(conflict.TASKS, len(world.WORDINGS)):
        rng = np.random.default_rng([0, number])
        before = {conflict.conflict_sample(rng, task, held_out=True).instruction
                  for _ in range(64)}
        new = {s.instruction for s in probe.scenes(task, 32, False)}
        assert len(new & before) < 8                     # by chance: there are not so many texts


def test_a_piece_in_conflict_is_trained_on_such_tasks(folders, monkeypatch):
    monkeypatch.setattr(probe, "TIMES", [0.9])
    monkeypatch.setattr(probe, "make_pictures", lambda pipe, samples, *_: [
        s.target for s in samples])
    piece = replace(PIECE, stage="conflict", variant="routing as drawn", tasks=conflict.TASKS,
                    ways=probe.WAYS[:1])
    monkeypatch.setattr(experiment, "FEW", 2)
    experiment.run(piece)
    found = read_json(piece.file)
    assert found["tasks"].keys() == found["routing"]["right"]["as trained"].keys() == set(
        conflict.TASKS)
    assert found["tasks"]["grown"]["success"] == 1 and found["tasks"]["grown"]["unseen"] == 0
    log = (experiment.WORK / piece.name / "log.jsonl").read_text()
    assert any(task in log for task in conflict.TASKS)
    assert read_json(experiment.WORK / piece.name / "run.json")["arguments"]["schedule"] == "cosine"


def test_every_piece_has_a_name_of_its_own(folders):
    grid = list(design.pieces("search"))
    assert not list(design.pieces("table"))          # the search is not complete
    while todo := [piece for piece in design.pieces("search") if not piece.there()]:
        for piece in todo:                               # the best: the second rate, scale 8
            good = (piece.lr, piece.scale) == (design.RATES[1], 8.0)
            write_json(piece.file, {"piece": vars(piece), "flow": dict.fromkeys(
                design.ALL, 0.5 - 0.1 * good)})
    search = list(design.pieces("search"))           # beyond the best, which lay on an edge
    assert [(p.lr, p.scale) for p in search if p not in grid] == len(design.VARIANTS) * [
        (design.RATES[1], 64.0)]
    assert list(findings.tables(finished=True).values())[1:] == [findings.search_table()]
    found = [piece for stage in design.STAGES if stage != "regimes"
             for piece in design.pieces(stage)]
    assert len({piece.name for piece in found}) == len(found)
    rest = found[len(search):]
    assert {(p.lr, p.scale) for p in rest} == {(design.RATES[1], 8.0)}
    seeds = {variant: {p.seed for p in rest if p.variant == variant}
             for variant in design.VARIANTS}
    for variant, own in seeds.items():                   # the search's is none of them
        more = design.MORE_SEEDS if variant in design.FIRST["table"] else ()
        assert own == {*design.SEEDS, *more} and design.SEARCH_SEED not in own
    assert {(p.variant, p.seed, p.steps) for p in rest if p.stage == "longer"} == {
        (name, seed, 4500) for name in ("InstructMoLE", "strong LoRA beside", "plain LoRA")
        for seed in design.SEEDS}
    for p in rest:                                       # its own pictures: the same number
        assert p.stage != "interference" or (
            p.steps * p.batch == len(p.tasks) * design.TOGETHER_STEPS * design.OWN)


# ------------------------------------------------------------------------------------ one piece

def test_a_piece_is_trained_scored_and_goes_on_where_it_stopped(folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment"])
    monkeypatch.setattr(probe, "TIMES", [0.9])
    scored = []
    monkeypatch.setattr(probe, "make_pictures", lambda pipe, samples, *_: scored.append(
        samples[0].task) or [s.target for s in samples])
    kept, alone = probe.psnr, replace(PIECE, stage="interference")
    monkeypatch.setattr(probe, "psnr", lambda *two: kept(*two) / (len(scored) < 2))
    with pytest.raises(ZeroDivisionError):               # as if killed after the first task
        experiment.run(alone)
    monkeypatch.setattr(probe, "psnr", kept)
    experiment.run(alone)
    assert scored == ["canny", "pose", "pose"]           # the first is not scored again
    assert "finished already" in capsys.readouterr().out     # nor the adapter trained
    found = read_json(alone.file)
    assert found["tasks"]["pose"]["success"] == 1 and found["tasks"]["pose"]["number"] == 2
    assert found["config"]["routing"] == "token"
    assert found["parameters"] == design.count(design.configuration(alone))
    assert found["tasks"]["pose"]["right"] == "11" and found["flow"].keys() == {"canny", "pose"}
    assert {name: len(tenths) for name, tenths in found["losses"].items()} == {
        "flow": 2, "balance": 2, "orthogonality": 2}
    assert found["begun"].keys() == {"commit", "date", "python", "torch", "machine"}
    experiment.run(replace(alone, number=3))             # another number is scored anew
    assert read_json(alone.file)["tasks"]["pose"]["number"] == 3


def test_a_search_s_piece_is_measured_by_what_decides_it(folders, monkeypatch):
    piece, *_ = design.tried("search", "token")
    monkeypatch.setattr(experiment, "fit", lambda *_: ROOT / "tiny")
    monkeypatch.setattr(experiment, "progress", lambda _: {})
    asked = []
    monkeypatch.setattr(probe, "flow_losses", lambda pipe, *what: asked.append(what) or {})
    experiment.run(piece)
    assert asked == [(design.ALL, True)] and "tasks" not in read_json(piece.file)
    assert piece.there()
    with pytest.raises(ValueError, match="made with another steps, 500 and not 501; move it and "):
        replace(piece, steps=501).there()


def test_a_rate_that_diverges_is_no_winner_and_stops_nothing(folders, monkeypatch):
    def diverge(*_):
        raise ValueError("step 7: the loss is no number any more; the last checkpoint, if any, ...")
    monkeypatch.setattr(experiment, "fit", diverge)
    first, second, *_ = design.tried("search", "token")
    experiment.run(first)
    assert first.there() and "step 7" in read_json(first.file)["diverged"]
    write_json(second.file, {"piece": vars(second), "flow": dict.fromkeys(design.ALL, 9.0)})
    assert min(first, second, key=design.validation_loss) == second
    again = replace(first, stage="table")                # nor is it tried for ever
    experiment.run(again)
    assert again.there() and read_json(again.file)["parameters"] > 0

    def other(*_):
        raise ValueError("no such file")
    monkeypatch.setattr(experiment, "fit", other)
    with pytest.raises(ValueError, match="no such file"):
        experiment.run(replace(first, seed=9))


def test_a_search_around_its_best_tries_nothing_twice(folders):
    """Three times a third of a rate is that rate, not 0.000999999."""
    while todo := [p for p in design.tried("search", "token") if not p.there()]:
        for piece in todo:                               # the best: a third of the first rate
            loss = abs(np.log(piece.lr / 0.000333333)) + np.log(piece.scale) ** 2
            write_json(piece.file, {"piece": vars(piece),
                                    "flow": dict.fromkeys(design.ALL, loss)})
    places = {(piece.lr, piece.scale) for piece in design.tried("search", "token")}
    assert places == {(0.001, 1), (0.003, 1), (0.009, 1), (0.001, 8), (0.003, 8), (0.009, 8),
                      (0.000333333, 1), (0.001, 0.125),  # around the first best, (0.001, 1)
                      (0.000111111, 1), (0.000333333, 8), (0.000333333, 0.125)}
    assert len(design.tried("search", "token")) == len(places)
    found = design.best("token", "table")
    assert (found.lr, found.scale) == (0.000333333, 1)


def test_what_is_trained_together_is_drawn_as_often(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment.train, "run_training", lambda args, config, first, sources, held:
                        seen.append((args, sources[0][0])) or folders.joinpath(
                            "work", "x").mkdir(parents=True, exist_ok=True)
                        or args.out.mkdir(parents=True, exist_ok=True)
                        or (args.out / "log.jsonl").write_text(""))
    experiment.fit(replace(PIECE, stage="interference", tasks=("fill", "subject", "multi")))
    (args, source), = seen
    assert dict(zip(map(tuple, source.groups), source.chances)) == {
        ("fill", "subject"): pytest.approx(2 / 3), ("multi",): pytest.approx(1 / 3)}
    assert (args.optimizer, args.schedule, args.router_lr) == ("adamw", "constant", None)
    assert args.seed == 0 and args.lr == 1e-3 and args.resume


def test_routing_as_drawn_stays_so_and_that_of_instructmole_does_not(folders, bare):
    """Whatever decides it: the routers, and what makes z."""
    for variant, stays in (("routing as drawn", True), ("InstructMoLE", False)):
        piece = replace(PIECE, variant=variant)
        experiment.fit(piece)
        _, trained = adapters.read(experiment.WORK / piece.name)
        torch.manual_seed(piece.seed)
        drawn = weights.build_adapter(bare.dit, design.configuration(piece)).tensors()
        moved = {name for name in drawn if not torch.equal(trained[name], drawn[name])}
        deciding = {name for name in drawn if "router" in name or "instruction" in name}
        assert deciding and stays == (not deciding & moved)
        assert moved >= {name for name in drawn if name.endswith("_B")}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="it is asked there")
def test_two_processes_are_not_at_one_piece(folders):
    with experiment.alone(PIECE):
        mark = experiment.WORK / PIECE.name / "process"
        pid = mark.read_text()
        assert pid == str(os.getpid())
    assert not mark.exists()
    other = subprocess.Popen([
        sys.executable, "-c", "import time; time.sleep(60)", PIECE.name])
    mark.write_text(str(other.pid))
    while not Path(f"/proc/{other.pid}/cmdline").read_bytes():     # it has only just begun
        pass
    try:
        with pytest.raises(ValueError, match=f"process {other.pid} is at it"):
            with experiment.alone(PIECE):
                pass
    finally:
        other.kill()
        other.wait()
    with experiment.alone(PIECE):                        # that one has ended
        pass
    mark.write_text(str(os.getpid()))                    # a number that was another's before
    with experiment.alone(PIECE):
        pass


def test_a_crew_that_is_stopped_stops_its_pieces(folders, monkeypatch):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: popen(sleeper, **more))
    crew = experiment.Crew(None)
    threading.Timer(0.5, crew.stop).start()
    assert crew.work(PIECE) != 0 and not crew.running
    assert crew.work(PIECE) == 0                         # and starts no more


@pytest.mark.parametrize("words, why", [
    (["tabel"], "no stage 'tabel'; there are search"),
    (["--device", "gpu", "--list"], "--device gpu: write auto, cpu, cuda")])
def test_what_cannot_be_asked_is_one_line(folders, monkeypatch, words, why):
    monkeypatch.setattr(sys, "argv", ["experiment", *words])
    with pytest.raises(ValueError, match=why):
        experiment.main()


def test_a_stage_named_twice_is_told_of_once(folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment", "table", "table", "--list"])
    experiment.main()
    assert capsys.readouterr().out.count("table: ") == 1


# --------------------------------------------------------------------------------------- the scores

@pytest.mark.parametrize("task", ["subject", "pose", "mixed"])
def test_validation_scenes_are_never_tested(task):
    chosen = [{s.scene for s in probe.scenes(task, 40, validation)} for validation in (True, False)]
    assert not chosen[0] & chosen[1]
    assert all(scene.held_out() for scene in chosen[0] | chosen[1])


@pytest.mark.parametrize("task", world.WORDINGS)
def test_unseen_wordings_are_told_from_seen_ones(task, monkeypatch):
    drawn, pick = [], world.pick
    monkeypatch.setattr(world, "pick", lambda rng, options: drawn.append(pick(rng, options))
                        or drawn[-1])
    told = set()
    for seed in range(60):
        s = world.tiny_sample(np.random.default_rng(seed), task, held_out=True)
        wording = next(one for one in reversed(drawn) if one in world.WORDINGS[task])
        told.add(probe.unseen(task, s.instruction))
        assert probe.unseen(task, s.instruction) == (wording in world.WORDINGS[task][-2:])
    assert told == {True, False}


# ------------------------------------------------------------------------- what routing decides

def test_information_is_what_an_expert_tells_of_the_task():
    told = torch.tensor([[1.0, 0.5, 1, 0], [0, 0.5, 1, 0.5]])    # tasks x experts
    wanted = [1, 0, 0, -0.25 * log2(0.25) - 0.75 * log2(0.75) - 0.5]
    assert probe.information(told) == pytest.approx(sum(wanted) / 4)
    torch.manual_seed(0)
    blind = (torch.rand(7, 64, 8) < 0.5).float().mean(1) # 64 pictures a task, by chance
    assert 0 <= probe.information(blind) < 0.03


@pytest.fixture
def watch() -> probe.Watch:
    return probe.Watch(6, {"a": torch.tensor([0.1, 0.2, 0.0, 0.5])})


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["by instruction", "by token"])
def test_weights_are_changed_in_every_way(watch, tokens):
    torch.manual_seed(0)
    watch.tasks = 2
    w, wanted = torch.rand(3, *tokens, 4) * (torch.rand(3, *tokens, 4) < 0.5), {}
    mean = torch.tensor([0.1, 0.2, 0.0, 0.5])
    for watch.way in probe.WAYS:
        wanted[watch.way] = watch.changed("a", w)
        assert wanted[watch.way].shape == w.shape
    assert torch.equal(wanted["as trained"], w) and not wanted["none"].any()
    assert torch.equal(wanted["another's"], w[[2, 0, 1]])
    assert torch.equal(wanted["its task's"], w[[1, 2, 0]])
    assert torch.equal(wanted["mean"], mean.expand_as(w))
    assert torch.allclose(wanted["even"], torch.full_like(w, 0.2))
    random = wanted["random"]
    assert torch.equal(random.sort(-1).values, w.sort(-1).values) and not torch.equal(random, w)
    watch.way = "random"                                 # in all calls alike, at all tokens
    assert torch.equal(random, watch.changed("a", w))
    if tokens:
        assert torch.equal(watch.changed("a", w[:, :1]), random[:, :1])
    watch.first = 3                                      # other pictures have other experts
    assert not torch.equal(random, watch.changed("a", w))


def test_what_is_seen_is_a_mean_over_tokens_and_calls_for_each_picture(watch):
    p = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]])     # (1, 2, 4)
    kept = torch.tensor([[[1.0, 1, 0, 0], [1, 0, 1, 0]]])
    watch.first = 2
    watch.note("a", p.log(), p * kept)
    watch.note("a", p[:, 1:].log(), p[:, 1:] * kept[:, 1:])      # another stream, of one token
    w, often, logits, far, _ = (part[2] for part in watch.of("a"))
    assert torch.allclose(logits, 0.25 * (p[0, 0].log() - p[0, 0].log().mean()))
    assert torch.allclose(far, torch.tensor((0.45 / 2 + 0) / 2))
    assert torch.allclose(often, torch.tensor([1.0, 0.25, 0.75, 0]))
    assert torch.allclose(w, torch.tensor([(0.475 + 0.25) / 2, 0.025, (0.125 + 0.25) / 2, 0]))


def test_routers_are_watched_changed_and_put_back(trained):
    texts = ["make the red circle blue", "fill the box with a green star", "remove the red cross"]
    watch = probe.Watch(3)
    with trained.adapter.serve(*sample.encode_text(trained, texts)) as routing:
        layer = adapters.mixtures(trained.adapter)[0]
        own, _ = layer.routing_weights(None, routing)    # (B, E)
        with probe.watched(trained, watch):
            assert torch.equal(layer.routing_weights(None, routing)[0], own)
            watch.way = "another's"
            assert torch.equal(layer.routing_weights(None, routing)[0], own[[2, 0, 1]])
        assert torch.equal(layer.routing_weights(None, routing)[0], own)
        p = layer.logits(routing.z).softmax(-1)
    w, kept, _, far, _ = watch.of(layer.name)
    assert torch.equal(w, own) and torch.equal(kept, (own != 0).float())
    assert torch.allclose(far, 0.5 * (p - 1 / 8).abs().sum(-1))


@pytest.mark.parametrize("spread, lost", [(100.0, 0.0), (0.0, 0.5)])
def test_how_many_kept_experts_the_noise_of_training_changes(spread, lost):
    """None where logits lie far apart; where they are equal, of four of eight half."""
    watch, logits = probe.Watch(4000), spread * torch.arange(8.0).repeat(4000, 1)
    _, w, _ = mole.route(logits, 4)
    watch.note("a", logits, w)
    assert abs(watch.of("a").lost.mean() - lost) < 0.02


def test_neighbours_differ_in_task():
    batches = probe.mixed_batches(12)
    assert sum(map(len, batches)) == 12 * 7
    for batch in batches:
        tasks = [s.task for s in batch]
        assert all(a != b for a, b in zip(tasks, tasks[1:] + tasks[:1]))
        assert len({len(s.conds) for s in batch}) == 1


def test_decisions_of_an_adapter_whose_experts_do_nothing(trained, monkeypatch, tmp_path):
    """No way changes a picture; what was measured is that of the routers; a killed one goes on."""
    for layer in adapters.mixtures(trained.adapter):
        monkeypatch.setattr(layer.experts_B, "data", 0 * layer.experts_B)
    monkeypatch.setattr(probe, "STEPS", 1)
    monkeypatch.setattr(probe, "TIMES", [0.9])
    made = []
    monkeypatch.setattr(probe, "success", lambda picture, s: made.append(picture) or 1 / (
        len(made) != 30))
    with pytest.raises(ZeroDivisionError):               # in the third way
        probe.decisions(trained, 2, tmp_path)
    del made[28:]
    monkeypatch.setattr(probe, "success", lambda picture, s: made.append(picture) or True)
    found = probe.decisions(trained, 2, tmp_path)
    assert tuple(found["right"]) == probe.WAYS and len(made) == 14 * len(probe.WAYS)
    assert all(tasks == dict.fromkeys(tasks, "11") and tasks.keys() == set(world.NEW_TASKS)
               for tasks in found["right"].values())
    assert len(set(found["flow"].values())) == 1
    assert all((made[i] == made[i % 14]).all() for i in range(len(made)))
    texts = [s.instruction for batch in probe.mixed_batches(2) for s in batch]
    shares = routing_maps.shares(trained.adapter, *sample.encode_text(trained, texts))
    for name, (p, kept) in shares.items():
        assert found["from even"][name] == pytest.approx(
            routing_maps.distance(p, torch.full_like(p, 1 / 8)), abs=1e-5)
        assert found["mean weights"][name] == pytest.approx((p * kept).mean(0).tolist(), abs=1e-5)
        assert 0 <= found["information"][name] <= 1
        assert 0 <= found["information of shuffled tasks"][name] <= 1
        assert np.mean(found["kept"][name], 0) == pytest.approx(
            kept.float().mean(0).tolist(), abs=1e-4)
        assert np.mean(found["weights"][name], 0) == pytest.approx(
            (p * kept).mean(0).tolist(), abs=1e-4)


def test_cosines_are_those_of_the_experts(trained, monkeypatch):
    """All alike: 1."""
    assert 0 < probe.cosine(trained, 1) < 0.9
    for layer in adapters.mixtures(trained.adapter):
        c = layer.config
        for name, dim in (("experts_A", 1), ("experts_B", 0)):
            t = getattr(layer, name)
            one = t.data.narrow(dim, 0, c.rank)
            monkeypatch.setattr(t, "data", torch.cat([one] * c.experts, dim))
    assert probe.cosine(trained, 1) == pytest.approx(1, abs=1e-4)


# --------------------------------------------------------------------------------- what was found

def result(variant: str, seed: int, right: float, **more: object) -> dict:
    """As experiment.run() writes it: success `right` of 4 pictures a task, one wording unseen."""
    marks = probe.marks([i < 4 * right for i in range(4)])
    tasks = {task: {"number": 4, "success": right, "right": marks, "unseen": 1,
                    "success_unseen": 1.0, "psnr": 30.0} for task in world.EDITS + world.NEW_TASKS}
    piece = vars(Piece("table", variant, seed, 9, 3e-3, 8.0, 4))
    return {"piece": piece, "parameters": 1234, "tasks": tasks, "training_seconds": 90,
            "flow": dict.fromkeys(design.ALL, right),
            "config": {"balance_weight": 0.1, "lora_alpha": 4, "lora_rank": 16, "alpha": 64,
                       "rank": 8, "mole_targets": [] if variant == "plain LoRA" else ["a"]}} | more


@pytest.fixture
def results(folders, monkeypatch):
    monkeypatch.setattr(findings, "RESULTS", design.RESULTS)
    routing = {"right": {way: {"pose": i * "1" + (10 - i) * "0"}
                         for i, way in enumerate(probe.WAYS)},
               "flow": {way: 0.5 + i / 4 for i, way in enumerate(probe.WAYS)},
               "from even": {"a": 0.1, "b": 0.3}, "information": {"a": 1.0, "b": 0.5},
               "information of shuffled tasks": {"a": 0.1, "b": 0.1},
               "lost": {"a": 0.25, "b": 0.5}, "spread": {"a": 0.01, "b": 0.02},
               "kept": dict.fromkeys("ab", np.eye(7, 8).tolist())}
    for seed, right in enumerate((0.25, 0.5, 0.75, 1.0), 1):
        for variant in ("token", "InstructMoLE", "plain LoRA"):
            more = ({"routing": routing, "cosine": 0.125}
                    if variant != "plain LoRA" and seed < 4 else {})         # one of MORE_SEEDS
            write_json(design.RESULTS / f"table-{variant}-{seed}.json",
                       result(variant, seed, right, **more))
    lost = {"piece": vars(Piece("table", "plain LoRA", 2, 9, 3e-3, 8.0)), "diverged": "step 7"}
    write_json(design.RESULTS / "table-lost.json", lost)
    for variant in ("plain LoRA", "InstructMoLE"):
        for tasks in (*((task,) for task in world.NEW_TASKS), world.NEW_TASKS):
            found = result(variant, 1, 1 / len(tasks))
            found["piece"]["tasks"] = tasks
            write_json(design.RESULTS / f"interference-{variant}-{'+'.join(tasks)}.json", found)
    weighed = result("InstructMoLE", 1, 1.0, routing=routing)
    weighed["config"]["balance_weight"] = 0.01
    write_json(design.RESULTS / "balance-0.json", weighed)


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()[2:]]


def test_tables_say_what_the_results_hold(results):
    of_four, of_three = "62.5 (25.0 to 100.0)", "50.0 (25.0 to 75.0)"
    assert rows(findings.variants_table()) == [
        [name, "1,234", "0.003", "8", "4", of_four, of_four, "2"]
        for name in ("InstructMoLE", "plain LoRA", "token")]
    assert rows(findings.tasks_table())[0] == ["InstructMoLE", *["62.5"] * 7]
    assert rows(findings.wordings_table())[0] == [       # of 4 pictures one, right, was unseen
        "InstructMoLE", "50.0 (0.0 to 100.0)", "100.0 (100.0 to 100.0)"]
    assert rows(findings.routing_table())[1:] == [       # pose: way i has 10 i of 10 right
        ["token", *(f"{i}0.0 ({i}0.0 to {i}0.0)".replace("00.0", "0.0") for i in range(7)),
         leads.lead(*2 * [leads.by_variant()["token"][:3]], *(
             lambda _, i=i: 100 * (np.arange(10) < i) for i in (2, 1)))]]
    assert rows(findings.routers_table()) == [
        [name, "0.200", "0.015", "37.5%", "0.750 (0.100)"] for name in ("InstructMoLE", "token")]
    flow = "0.6250 (0.2500 to 1.0000)"
    assert rows(findings.flow_table())[1:] == [
        ["plain LoRA", flow, *6 * ["–"]],
        ["token", flow, "+50.0", "+100.0", "+150.0", "+200.0", "+250.0", "+300.0"]]
    assert rows(findings.cosines_table()) == [
        [name, "0.1250 (0.1250 to 0.1250)"] for name in ("InstructMoLE", "token")]
    without, choice, another = (leads.lead(*2 * [leads.by_variant()["token"][:3]], *(
        lambda _, i=i: 100 * (np.arange(10) < i) for i in ways)) for ways in (
            (0, 6), (2, 1), (0, 1)))
    assert rows(findings.summary_table()) == [
        [name, "0.003", scales, "4", of_four, *more] for name, scales, more in (
            ("InstructMoLE", "0.25, 8", [without, choice, "0.750", "0.125"]),
            ("plain LoRA", "0.25, –", 4 * ["–"]),
            ("token", "0.25, 8", [without, choice, "0.750", "0.125"]))]
    assert rows(findings.balance_table()) == [
        ["0.01", "100.0 (100.0 to 100.0)", *2 * ["–"], "0.200", "0.015", "37.5%", "0.750"],
        ["0.1", of_three, without, another, "0.200", "0.015", "37.5%", "0.750"]]
    assert rows(findings.interference_table()) == [
        [name, "100.0", "14.3", "100.0", "14.3"] for name in (*world.NEW_TASKS, "mean")]
    longer = result("token", 1, 0.25)
    write_json(design.RESULTS / "longer-0.json", longer)
    assert rows(findings.tasks_table("longer")) == [["token", *["25.0"] * 7]]
    assert len(findings.tables()) == 18
    begun, *_, last = rows(findings.stages_table())
    assert begun == ["search", "0", "78", "0.0"]
    assert last == ["conflict", "0", "not known yet", "0.0"]
    assert len(findings.tables(finished=True)) == 1      # those of no stage are


def test_a_lead_is_paired_by_seed_and_picture(results):
    """Nothing differs; each seed loses another picture of four; seeds lose none, one, two."""
    def marks(one: dict) -> np.ndarray:
        return leads.percents(one["tasks"][task]["right"] for task in world.NEW_TASKS)
    ours = leads.by_variant()["InstructMoLE"]
    assert leads.lead(ours, ours[::-1], marks) == "+0.0 (+0.0 to +0.0)"
    worse = [result("token", seed, right - 0.25)
             for seed, right in enumerate((0.25, 0.5, 0.75), 1)]
    lost = 100 * np.eye(3, 4)                            # seed i loses picture i of each task
    half = 1.96 * np.tile(lost.mean(0), 7).std(ddof=1) / np.sqrt(28)
    assert leads.lead(ours, worse, marks) == (
        f"+25.0 ({25 - half:+.1f} to {25 + half:+.1f})")
    even = [result("token", seed, 0.25) for seed in (1, 2, 3)]               # lost: 0, 25, 50 %
    lost = np.tile([[0, 0, 0, 0], [0, 100, 0, 0], [0, 100, 100, 0]], 7)
    half = np.hypot(4.30 * 25 / np.sqrt(3), 1.96 * lost.mean(0).std(ddof=1) / np.sqrt(28))
    assert leads.lead(ours, even, marks) == (
        f"+25.0 ({25 - half:+.1f} to {25 + half:+.1f})")
    assert leads.lead(ours[:1], worse, marks) == "–"
    half = 2.26 * np.std([25, 50, 75, 100], ddof=1) * np.sqrt(2 / 4)         # no picture differs
    assert rows(findings.leads_table()) == [
        [f"InstructMoLE over {name}", "4", "+0.0 (+0.0 to +0.0)",
         f"+0.0 (-{half:.1f} to +{half:.1f})", "+0.0 (+0.0 to +0.0)"]
        for name in ("plain LoRA", "token")]
    losses = [result("token", seed, loss) for seed, loss in enumerate((0.251, 0.503, 0.755), 1)]
    half = 4.30 * 2 / np.sqrt(3)                         # of differences of 1, 3, 5: by seed alone
    less = leads.lead(ours, losses, lambda one: np.array(
        [-1000 * design.flow_loss(one, world.NEW_TASKS)]))
    assert less == f"+3.0 ({3 - half:+.1f} to {3 + half:+.1f})"


@pytest.mark.parametrize("middle, half, answer", [
    (4.5, 1, "yes"), (4, 1.5, "undecided"), (-4.5, 1, "no, the contrary"),
    (0, 3, "it does not matter"), (-2, 2, "undecided"), (2, 0.5, "it does not matter")])
def test_a_question_is_answered_by_the_rule(middle, half, answer):
    """Wholly above 3 points, wholly below -3, wholly between, or neither."""
    assert leads.Interval(middle, half).answer == answer


def test_answers_are_of_the_seeds_that_both_have(results):
    """Four seeds alike; of longer training two, one of which is better by a picture in four."""
    for seed, ours in ((1, 0.5), (2, 0.75)):
        for variant, right in (("InstructMoLE", ours), ("plain LoRA", 0.5)):
            write_json(design.RESULTS / f"longer-{variant}-{seed}.json",
                       result(variant, seed, right))
    first, drawn, _, longer, _, in_conflict, *_ = rows(findings.answers_table())
    about = ["does InstructMoLE pay?", "before", "InstructMoLE over plain LoRA",
             "+0.0 (+0.0 to +0.0)"]
    assert first == [*about, "undecided: a training diverged"]
    assert drawn[3:] == in_conflict[3:] == ["–", "not measured yet"]
    assert longer[3].startswith("+12.5 (") and longer[4] == "none: 2 seeds describe"
    assert [row[:2] for row in rows(findings.answers_table(first=True))] == [
        [question, asked] for question, asked, *_ in (
            findings.QUESTIONS[i] for i in (0, 1, 2, 5, 6, 7))]
    (design.RESULTS / "table-lost.json").unlink()
    assert rows(findings.answers_table())[0] == [*about, "open: 4 of 8 seeds"]
    for seed in range(5, 9):
        for variant in ("InstructMoLE", "plain LoRA"):
            write_json(design.RESULTS / f"table-{variant}-{seed}.json",
                       result(variant, seed, 0.5))
    assert rows(findings.answers_table())[0] == [*about, "it does not matter"]


def test_what_company_costs_is_paired_by_seed_and_picture(results):
    """Alone all are right; with all a plain LoRA loses 1 picture of 4, or 3; InstructMoLE 1."""
    for file in design.RESULTS.glob("interference-*"):
        file.unlink()
    for variant, lost in (("plain LoRA", (1, 3)), ("InstructMoLE", (1, 1))):
        for seed in (1, 2):
            for tasks in (*((task,) for task in world.NEW_TASKS), world.NEW_TASKS):
                right = 1.0 if len(tasks) == 1 else 1 - lost[seed - 1] / 4
                found = result(variant, seed, right)
                found["piece"]["tasks"] = tasks
                found["tasks"] = {task: found["tasks"][task] for task in tasks}
                write_json(design.RESULTS
                           / f"interference-{variant}-{seed}-{'+'.join(tasks)}.json", found)
    plain, routed, less, alone = rows(findings.company_table())

    def intervals(middle: float, by_seed: list[int], by_picture: list[float]) -> list[str]:
        """Of all seven tasks, and of those without mixed."""
        halves = [np.hypot(12.71 * np.std(by_seed, ddof=1) / np.sqrt(2),
                           1.96 * np.std(many * by_picture, ddof=1) / np.sqrt(4 * many))
                  for many in (7, 6)]
        return [f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})" for half in halves]
    assert plain == ["plain LoRA loses by company", *intervals(50, [25, 75], [0, 50, 50, 100])]
    assert routed == ["InstructMoLE loses by company", *intervals(25, [25, 25], [0, 0, 0, 100])]
    assert less == ["the first less the second", *intervals(25, [0, 50], [0, 50, 50, 0])]
    assert alone[1:] == 2 * ["+0.0 (+0.0 to +0.0)"]


def test_what_two_other_tasks_cost_is_told_with_the_steps_of_each(results):
    """Alone all are right; of the first triple depth loses one picture in four, of all seeds."""
    for variant, seed in product(("plain LoRA", "InstructMoLE"), (1, 2)):
        for tasks in (*((task,) for task in world.NEW_TASKS), *design.TRIPLES):
            found = result(variant, seed, 1.0)
            found["piece"]["tasks"] = tasks
            if len(tasks) == 3 and "depth" in tasks:
                found["tasks"]["depth"] = result(variant, seed, 0.75)["tasks"]["depth"]
            write_json(design.RESULTS / f"interference-{variant}-{seed}-{'+'.join(tasks)}.json",
                       found)
    table = rows(findings.triples_table())
    assert [row[1:3] for row in table] == [
        *(["canny", "all"], ["depth", "all"], ["pose", "all"], ["mean", "all"]),
        *(["fill", "2/3"], ["subject", "2/3"], ["multi", "1/3"]),
        *(["mixed", "1/3"], ["canny", "2/3"], ["subject", "2/3"])]
    none = "+0.0 (+0.0 to +0.0)"
    assert table[0][3:] == table[-1][3:] == [none, none]
    one, of_three = np.array([0, 0, 0, 100]), np.array([*4 * [0], 0, 0, 0, 100, *4 * [0]])
    for row, lost in ((table[1], one), (table[3], of_three)):
        half = 1.96 * lost.std(ddof=1) / np.sqrt(len(lost))
        middle = lost.mean()
        assert row[3] == row[4] == f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"


def test_in_conflict_a_lora_for_each_task_counts_as_one(results):
    """Of a seed, and only where all its tasks are there."""
    def write(variant: str, seed: int, tasks: tuple[str, ...], right: float) -> None:
        one = result(variant, seed, right)
        one["piece"]["tasks"] = tasks
        one["tasks"] = dict.fromkeys(tasks, one["tasks"]["pose"])
        one["flow"] = dict.fromkeys(tasks, right)
        write_json(design.RESULTS / f"conflict-{variant}-{seed}-{'+'.join(tasks)}.json", one)
    for seed in (1, 2):
        write("plain LoRA", seed, conflict.TASKS, 0.5)
        write("standardised whole", seed, conflict.TASKS, 0.75)
        for task in conflict.TASKS[seed - 1:]:           # of the second one is not there yet
            write(design.FOR_EACH, seed, (task,), float(task == "grown"))
    plain, other, each = rows(findings.conflict_table())
    assert plain == ["plain LoRA", "0.003, 8", "2", *5 * ["50 (50 to 50)"], "50.0 (50.0 to 50.0)"]
    assert other[2:] == ["2", *5 * ["75 (75 to 75)"], "75.0 (75.0 to 75.0)"]
    assert each == [design.FOR_EACH, "0.003, 8", "1", *4 * ["0 (0 to 0)"], "100 (100 to 100)",
                    "20.0 (20.0 to 20.0)"]
    first, last = rows(findings.leads_table("conflict"))
    assert first[:2] == ["standardised whole over plain LoRA", "2"]
    assert first[2].startswith("+25.0 (") and first[3] == first[2]           # no seeds differ
    assert first[4] == "-250.0 (-250.0 to -250.0)"       # the flow loss is called as success here
    assert last == [f"{design.FOR_EACH} over plain LoRA", "1", *3 * ["–"]]
    assert len(np.unique(drawings.FIGURES["conflict"][1]())) > 10
    file = design.RESULTS / f"conflict-standardised whole-1-{'+'.join(conflict.TASKS)}.json"
    right = {way: {task: (10 - i - j) * "1" + (i + j) * "0"
                   for j, task in enumerate(conflict.TASKS)} for i, way in enumerate(probe.WAYS)}
    write_json(file, read_json(file) | {"routing": {"right": right}})
    assert rows(findings.otherwise_table()) == [         # of ten right: fewer by way and by task
        ["standardised whole", way, *(f"{10 * (10 - i - j)}" for j in range(5))]
        for i, way in ((0, "as trained"), (1, "another's"), (6, "none"))]


def test_regimes_are_told_as_the_search_is(results):
    searched = result("free", 0, 0.5)
    searched["piece"] |= {"lr": design.RATES[1], "scale": 1.0, "tasks": conflict.TASKS}
    searched["flow"] = dict.fromkeys(conflict.TASKS, 0.5)
    write_json(design.RESULTS / "regimes-0.json", searched)
    compared = rows(findings.search_table("regimes"))
    assert [row[0] for row in compared] == [*design.SEARCHES["regimes"]]
    assert compared[7] == ["free", "–", "–", "0.5000", *4 * ["–"]]
    assert rows(findings.routing_table("conflict")) == []        # these have none
    assert len(findings.tables()) == 14                  # nothing is there of longer training


def test_what_is_not_measured_yet_is_left_open(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["findings"])
    for file in design.RESULTS.glob("interference-InstructMoLE-pose*"):
        file.unlink()
    table = rows(findings.interference_table())
    assert table[world.NEW_TASKS.index("pose")] == ["pose", "100.0", "14.3", "–", "14.3"]
    assert table[-1] == ["mean", "100.0", "14.3", "–", "14.3"]
    searched = result("token", 0, 0.5)
    searched["piece"] |= {"lr": design.RATES[1], "scale": 1.0}
    write_json(design.RESULTS / "search-0.json", searched)
    token = rows(findings.search_table())[list(design.VARIANTS).index("token")]
    assert token == ["token", "–", "–", "0.5000", *4 * ["–"]]
    for lr, scale, loss in ((3e-3, 64.0, 0.375), (1 / 3e3, 1.0, 0.25)):      # around the grid
        searched = result("token", 0, loss)
        searched["piece"] |= {"lr": lr, "scale": scale}
        write_json(design.RESULTS / f"search-{scale}.json", searched)
    token = rows(findings.search_table())[list(design.VARIANTS).index("token")]
    assert token[3:] == ["0.5000", *3 * ["–"], "0.2500 at 0.00033, 1"]
    findings.main()                                      # draws what there is


def test_findings_without_results_are_one_line(folders, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["findings"])
    with pytest.raises(ValueError, match="no results yet; python -m tiny.experiment"):
        findings.main()


def test_figures_are_drawn_and_tables_told(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["findings"])
    findings.main()
    out = capsys.readouterr().out
    assert all(table in out for table in [findings.answers_table(), *findings.tables().values()])
    for name in ("variants", "tasks", "routing", "cosines", "interference"):
        assert len(np.unique(load_image(design.RESULTS / f"{name}.png"))) > 10


def test_the_record_holds_the_tables():
    """Each as it is made from the committed results; of an unfinished stage, how much is there."""
    text = (ROOT / "tiny/EXPERIMENT.md").read_text(encoding="utf-8")
    for table in findings.tables(finished=True).values():
        assert table in text, table


@pytest.mark.parametrize("page, tables", [
    ("README.md", [partial(findings.answers_table, first=True)]),
    ("tiny/README.md", [findings.answers_table, findings.summary_table])])
def test_the_pages_hold_what_was_found(page, tables):
    text = (ROOT / page).read_text(encoding="utf-8")
    for make in tables:
        assert (table := make()) in text, table
    for shown in re.findall(r"\]\((?:tiny/)?results/(.*)\.png\)", text):
        drawn = drawings.FIGURES[shown][1]()
        assert np.array_equal(drawn, load_image(ROOT / f"tiny/results/{shown}.png")), shown


# All pieces were made at these; between them changed what is compared, not how it is trained.
COMMITS = {"1a937d44df18c01c51b27ea7537c22ec0d508768",
           "15240fd8a12829735369e3980053322796fc4387",
           "8b1c9f9c2fa81f4e7c5cb7d239292adb3c88b2f1",
           "4de0d2ca189b548cfa6a74f3f5d3db664965b038",
           "d671d836972d4f163d8537b04d72da2d1e30e0d7",
           "7b124d3cc28e74e0f2dcbe65c85e25a51ab9c23e",
           "e8578604ba5063edc05777280190797c1325fd2e"}


def test_the_results_that_are_committed_are_of_one_design():
    """Each is a piece, with its settings, of its size, trained by the same code."""
    own = design.count(design.base_config())
    commits = set()
    for stage in design.STAGES:
        files = {piece.file for piece in design.pieces(stage) if piece.there()}
        assert files == set(design.RESULTS.glob(f"{stage}-*.json"))
        found = design.found(stage)
        commits |= {one[when]["commit"] for one in found for when in ("begun", "ended")}
        assert all(abs(one["parameters"] / own - 1) < 0.05 for one in found
                   if design.ADAPTERS[one["piece"]["variant"]].sized)
    assert commits <= COMMITS
