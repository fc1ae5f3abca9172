"""Pictures of how it goes: support/report.py, routing_maps.py."""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mole
import train
from helpers import expert_use, made, make_pipeline, ROOT, run_sample, samples
from sample import seeded_noise
from support import report, routing_maps


def test_the_use_of_experts_is_what_sampling_reports(trained):
    texts, noise = ["a red star in the top", "make the circle blue"], seeded_noise([0], (64, 64))
    chosen = [made(trained, [text], [], [], noise, steps=1)[1] for text in texts]
    use = expert_use(trained, texts)
    assert use.keys() == chosen[0].keys()
    for name, mean in use.items():                       # rounding differs between batches
        assert torch.allclose(mean, (chosen[0][name][0] + chosen[1][name][0]) / 2, atol=1e-5)


def test_routing_is_drawn_by_task_without_making_pictures(tmp_path, monkeypatch, capsys):
    """Cells have the colours of their weights; every task has a panel."""
    layers = [f"layer {i}" for i in range(3)]
    use = {task: {name: torch.eye(3)[i] for i, name in enumerate(order)}
           for task, order in (("one", layers), ("two", layers))}
    one, both = (report.draw_routing({task: use[task] for task in tasks})
                 for tasks in (["one"], ["one", "two"]))
    bright, dark = ([253, 231, 36], [68, 1, 84])         # 1 and 0 in matplotlib's colour map
    share = [(one == colour).all(-1).sum() for colour in (bright, dark)]
    assert 0.4 < share[0] / share[1] < 0.6               # three cells of nine hold 1
    assert both.shape[1] > one.shape[1]

    rows = [{"instruction": "a star", "task": "t2i"},
            {"instruction": "make it red", "task": "edit"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    adapter = ("--adapter", ROOT / "tiny/adapter.safetensors")
    for what in (("--batch", "jobs.jsonl"), ("--instruction", "a star")):
        code, printed, _ = run_sample(monkeypatch, capsys, *what, *adapter, "--routing", "map.png")
        assert code == 0 and len(printed.splitlines()) == 1 and "map.png" in printed
        assert {p.name for p in tmp_path.iterdir()} == {"jobs.jsonl", "map.png"}


def test_pictures_of_how_it_goes(tmp_path, monkeypatch, capsys, short_model):
    """Losses, routing and likeness are drawn where matplotlib is, else it is said once."""
    monkeypatch.setattr(train, "sample_sheet", lambda *_: np.zeros((8, 8, 3), np.uint8))
    def files(*rest: str) -> set[str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "tiny", "--batch-size", "1",
                                          "--steps", "2", "--save-every", "1", "--model",
                                          str(short_model), *rest])
        train.main()
        return {file.name for file in Path(rest[-1]).iterdir()}
    always = {"adapter.safetensors", "checkpoint.pt", "checkpoint_before.pt", "log.jsonl",
              "run.json", "samples_000001.png", "samples_000002.png"}
    assert files("--out", str(tmp_path / "all")) == always | {"loss.png", "routing.png",
                                                              "experts.png"}
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


def test_cosines_are_those_of_the_outputs_and_zero_outputs_are_at_right_angles():
    """Against normalised outputs written out, in float64; the loss is the mean of their squares."""
    H, B = torch.randn(9, 8, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    B[2:4] = 0                                           # the second of four experts
    Y = torch.stack([H[:, i:i + 2] @ B[i:i + 2] for i in range(0, 8, 2)]).flatten(1)
    Y = nn.functional.normalize(Y, dim=1)
    cosine = routing_maps.cosines(H, B, 4, scale=3.0)
    assert torch.allclose(cosine, Y @ Y.T, atol=1e-12, rtol=0) and (cosine[1] == 0).all()
    loss = (cosine.square().sum() - 3) / 12              # three are not zero
    assert abs(mole.orthogonality_loss(H, B, 4, scale=3.0) - loss) < 1e-12


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
