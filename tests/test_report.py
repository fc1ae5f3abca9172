"""Pictures of how it goes: support/report.py, routing_maps.py."""
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mole
import train
from helpers import expert_use, made, make_pipeline, moles, ROOT, run_sample, samples
from sample import encode_text, seeded_noise
from support import adapters, report, routing_maps


def test_the_use_of_experts_is_what_sampling_reports(trained):
    texts, noise = ["a red star in the top", "make the circle blue"], seeded_noise([0], (64, 64))
    chosen = [made(trained, [text], [], [], noise, steps=1)[1] for text in texts]
    use = expert_use(trained, texts)
    assert use.keys() == chosen[0].keys()
    for name, mean in use.items():                       # rounding differs between batches
        assert torch.allclose(mean, (chosen[0][name][0] + chosen[1][name][0]) / 2, atol=1e-5)


@pytest.mark.parametrize("method", ["instructmole", "pooled", "soft"])
def test_shares_are_those_that_serve_and_the_weights_that_are_kept(method):
    """p of every expert, kept or not; the soft routing keeps all, by its temperature."""
    pipe = make_pipeline(method)
    pipe.adapter.eval()
    txt, pooled = encode_text(pipe, ["a red star in the top", "make the circle blue"])
    layer = adapters.routed(pipe.adapter)[1]
    with torch.no_grad(), pipe.adapter.serve(txt, pooled) as routing:
        w, _ = layer.routing_weights(routing.z, routing)
        logits = routing.z @ layer.router.weight.T
    p, kept = routing_maps.shares(pipe.adapter, txt, pooled)[layer.name]
    temperature = layer.log_temperature.exp() if method == "soft" else 1
    assert torch.allclose(p, (logits / temperature).softmax(-1), atol=1e-6)
    assert torch.equal(p * kept, w)
    most = layer.config.experts if method == "soft" else layer.config.top_k
    assert kept.dtype == torch.bool and (kept.sum(1) == most).all()


def shared(p: list[list[float]], kept: list[list[int]]) -> routing_maps.Shares:
    return routing_maps.Shares(torch.tensor(p), torch.tensor(kept).bool())


def test_the_measures_of_routing():
    """Two layers of four experts, three instructions in two tasks; numbers by hand."""
    even, one = [0.25] * 4, [1., 0., 0., 0.]
    use = {"a": {"x": shared([even, even], [[1, 1, 0, 0]] * 2),
                 "y": shared([one, even], [[1, 1, 0, 0], [1, 0, 1, 0]])},
           "b": {"x": shared([even], [[1, 1, 0, 0]]), "y": shared([one], [[0, 0, 1, 1]])}}
    found = routing_maps.measures(use)
    assert abs(found["from_even"] - (0 + 0.75 * 2 / 3) / 2) < 1e-6
    mean = [0.75, 1 / 12, 1 / 12, 1 / 12]                # of y: one, even, one
    apart = [sum(abs(a - b) for a, b in zip(p, mean)) / 2 for p in (one, even, one)]
    assert abs(found["between"] - sum(apart) / 6) < 1e-6
    changing = (1 / 2 + 1 / 2 + 1) / 3                   # of y: each two of the three
    assert abs(found["changing"] - changing / 2) < 1e-6
    assert routing_maps.told(found) == (
        "shares are 0.250 from even (half the sum of |p - 1/E|), 0.167 between instructions; of "
        "the kept experts 33% change from one instruction to another")
    alone = routing_maps.measures({"a": {"y": shared([one], [[1, 1, 0, 0]])}})
    assert alone == {"from_even": 0.75} and "between" not in routing_maps.told(alone)
    assert routing_maps.measures({}) == routing_maps.measures({"a": {}}) == {}


def colours(picture: np.ndarray, *wanted: list[int]) -> list[int]:
    """How many pixels have each colour."""
    return [int((picture == colour).all(-1).sum()) for colour in wanted]


def test_routing_is_drawn_by_task_without_making_pictures(tmp_path, monkeypatch, capsys):
    """Cells have the colours of their shares, white for even ones; what is kept has a dot."""
    white, full = (matplotlib.colormaps["RdBu_r"](place, bytes=True)[:3] for place in (0.5, 1.0))
    black, layers = (0, 0, 0), [f"layer {i}" for i in range(4)]

    def drawn(p: torch.Tensor, kept: torch.Tensor, *tasks: str) -> np.ndarray:
        found = {name: routing_maps.Shares(p[i][None], kept[i][None].bool())
                 for i, name in enumerate(layers)}
        return report.draw_routing(dict.fromkeys(tasks, found), "words")
    even, one, none = torch.full((4, 4), 0.25), torch.eye(4), torch.zeros(4, 4)
    blank = colours(drawn(even, none, "one"), white, full, black)
    assert blank[0] > 10_000
    dotted = colours(drawn(even, one, "one"), white, full, black)
    more = colours(drawn(even, one + one.flip(1), "one"), white, full, black)
    assert dotted[2] - blank[2] > 100 and abs(more[2] - 2 * dotted[2] + blank[2]) < 20
    decided = colours(drawn(one, none, "one"), white, full, black)
    cells = decided[1] - blank[1], blank[0] - decided[0]             # a quarter red, no cell white
    assert 0.2 < cells[0] / cells[1] < 0.3
    assert drawn(one, none, "one", "two").shape[1] > drawn(one, none, "one").shape[1]

    rows = [{"instruction": "a star", "task": "t2i"},
            {"instruction": "make it red", "task": "edit"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    adapter = ("--adapter", ROOT / "tiny/adapter.safetensors")
    for what in (("--batch", "jobs.jsonl"), ("--instruction", "a star")):
        code, printed, _ = run_sample(monkeypatch, capsys, *what, *adapter, "--routing", "map.png")
        assert code == 0 and len(printed.splitlines()) == 1
        assert re.match(r"map.png: the experts that \d instructions? chose; shares are 0\.\d+ from "
                        "even", printed) and ("between" in printed) == (what[0] == "--batch")
        assert {p.name for p in tmp_path.iterdir()} == {"jobs.jsonl", "map.png"}


def test_the_readme_says_what_the_routing_shows(trained, tmp_path, monkeypatch, capsys):
    """The picture is the one that its command makes; numbers and the clearest task are so."""
    rows = ROOT / "tiny/examples/tasks.jsonl"
    code, printed, _ = run_sample(monkeypatch, capsys, "--batch", rows, "--routing",
                                  tmp_path / "map.png")
    shown, made_now = (np.asarray(Image.open(file)).astype(int) for file in
                       (ROOT / "tiny/examples/routing.png", tmp_path / "map.png"))
    assert code == 0 and shown.shape == made_now.shape and abs(shown - made_now).mean() < 1
    number = re.search(r"`from_even` is ([\d.]+)", (ROOT / "README.md").read_text())[1]
    assert f"shares are {number} from even" in printed
    tasks: dict[str, list[str]] = {}
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        tasks.setdefault(row["task"], []).append(row["instruction"])
    changing = {task: routing_maps.measures({task: routing_maps.shares(
        trained.adapter, *encode_text(trained, texts))})["changing"]
        for task, texts in tasks.items()}
    assert min(changing, key=changing.get) == "move"


def test_pictures_of_how_it_goes(tmp_path, monkeypatch, capsys, short_model):
    """Losses, routing and likeness are drawn where matplotlib is, else it is said once."""
    monkeypatch.setattr(train, "sample_sheet", lambda *_: np.zeros((8, 8, 3), np.uint8))
    def files(*rest: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--batch-size", "1",
                                          "--steps", "2", "--save-every", "1", "--model",
                                          str(short_model), *rest])
        train.main()
        return {file.name for file in Path(rest[-1]).iterdir()}
    def told() -> list[set[str]]:
        """What the lines of the log tell of the routing; of one instruction alone, less."""
        lines = map(json.loads, (tmp_path / "all/log.jsonl").read_text().splitlines())
        return [line.keys() - {"step"} for line in lines if "flow" not in line]
    always = {"adapter.safetensors", "checkpoint.pt", "checkpoint_before.pt", "log.jsonl",
              "data.png", "run.json", "samples_000001.png", "samples_000002.png"}
    assert files("--out", str(tmp_path / "all")) == always | {"loss.png", "routing.png",
                                                              "experts.png"}
    assert told() == [{"from_even"}, {"from_even", "between", "changing"}]
    assert files("--method", "lora", "--out", str(tmp_path / "lora")) == always | {"loss.png"}
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


def test_experts_that_are_still_zero_are_like_none():
    """The diagonal is 1 of all that have an output in a layer, no number for those that have none.

    They count in no mean; what stays free of colour is grey.
    """
    pipe, sample = make_pipeline(), samples("move", 1)[0]
    layers, r = moles(pipe.adapter), pipe.adapter.config.rank
    for layer in layers:
        layer.experts_B.data[:r] = 0                     # the first is zero in every layer
    for layer in layers[1:]:
        layer.experts_B.data[r:2 * r] = 0                # the second lives in one
    alone = []
    layers[0].register_forward_hook(lambda layer, args, _: alone.append(routing_maps.cosines(
        args[0] @ layer.experts_A, layer.experts_B, layer.config.experts).abs()))
    found = routing_maps.expert_similarity(pipe.adapter.eval(),
                                           lambda: train.flow_loss(pipe, [sample], 0))
    assert found[0].isnan().all() and found[:, 0].isnan().all()
    assert torch.allclose(found[1:, 1:].diagonal(), torch.ones(len(found) - 1))
    assert found[1:, 1:].isfinite().all()
    assert torch.allclose(found[1, 1:], torch.stack(alone).mean(0)[1, 1:], atol=1e-6)
    grey = [211, 211, 211]
    some, all_of_them = (colours(report.draw_similarity(t), grey)[0]
                         for t in (torch.ones(2, 2), torch.full((2, 2), float("nan"))))
    assert some < 500 and all_of_them > 10_000           # some: the edges of letters


def test_cosines_are_those_of_the_outputs_and_zero_outputs_are_at_right_angles():
    """Against normalised outputs written out, in float64; the loss is the mean of their squares."""
    H, B = torch.randn(9, 8, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    B[2:4] = 0                                           # the second of four experts
    Y = torch.stack([H[:, i:i + 2] @ B[i:i + 2] for i in range(0, 8, 2)]).flatten(1)
    Y = nn.functional.normalize(Y, dim=1)
    cosine = routing_maps.cosines(H, B, 4)
    assert torch.allclose(cosine, Y @ Y.T, atol=1e-12, rtol=0) and (cosine[1] == 0).all()
    loss = (cosine.square().sum() - 3) / 12              # three are not zero
    assert abs(mole.orthogonality_loss(H, B, 4, scale=3.0) - loss) < 1e-12


def test_experts_are_compared_in_compiled_blocks_too():
    """Which mind no hook that comes after they were compiled; a plain LoRA costs no pass."""
    pipe, sample = make_pipeline(), samples("canny", 1)

    def forward():
        return train.flow_loss(pipe, sample, 0)
    found = routing_maps.expert_similarity(pipe.adapter.eval(), forward)
    for block in pipe.dit.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        forward()
    assert torch.equal(routing_maps.expert_similarity(pipe.adapter, forward), found)
    assert routing_maps.expert_similarity(make_pipeline("lora").adapter, None) is None


def test_a_sheet_that_fails_is_a_note_and_training_goes_on(tmp_path, monkeypatch, capsys):
    """As when sampling gives numbers that are not finite; the adapter goes on in training."""
    def fails(*_: object) -> None:
        raise ValueError("numbers that are not finite")
    monkeypatch.setattr(train, "sample_sheet", fails)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--batch-size", "1", "--method",
                                      "lora", "--steps", "2", "--save-every", "1", "--out",
                                      str(tmp_path / "run")])
    train.main()
    assert capsys.readouterr().err.count("not finite") == 2
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2
