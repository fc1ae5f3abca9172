"""sample.py: the pipeline and its command, on the embedded model."""
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import made, MODEL, PICTURE, ROOT, run_sample
from sample import seeded_noise
from support import export
from support.configs import read_json
from support.pictures import to_tensor
from support.resolutions import output_size, PREFERRED, prepare
from tiny import world


def test_the_same_picture_as_diffusers(bare):
    """FluxKontextPipeline, same noise, fp32: within 1/255 per pixel (rounding of 8-bit values)."""
    from diffusers import FluxKontextPipeline
    from dit import pack
    warnings.filterwarnings("ignore")
    peer = FluxKontextPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    for task in ("recolour", "t2i", "move"):
        test = world.tiny_test(task, 1)[0]
        noise = seeded_noise([1], (64, 64))
        ours, _ = made(bare, [test.instruction], [to_tensor([p]) for p in test.images], [],
                           noise, steps=6)
        theirs = peer(image=Image.fromarray(test.images[0]) if test.images else None,
                      prompt=test.instruction, height=64, width=64, max_area=64 * 64,
                      _auto_resize=False, latents=pack(noise),
                      num_inference_steps=6, guidance_scale=2.5, output_type="np",
                      max_sequence_length=bare.t5_tokens.length).images[0]
        assert np.abs(ours[0] / 255 - theirs).max() <= 1 / 255 + 1e-6, task
        assert ours[0].std() > 10                        # a picture, not a plain field


def test_equal_calls_are_equal_and_seeds_differ(trained):
    make = lambda seed: made(trained, ["a red circle in the top left on a white background"],
                                 [], [], seeded_noise([seed], (64, 64)), steps=3)[0]
    assert np.array_equal(make(1), make(1)) and not np.array_equal(make(1), make(2))


def test_a_batch_gives_what_single_calls_give(trained):
    """Rounding may move an 8-bit value by one step."""
    tests = world.tiny_test("move", 2)
    images = [to_tensor([t.images[0] for t in tests])]
    both, chosen = made(trained, [t.instruction for t in tests], images, [],
                            seeded_noise([0, 1], (64, 64)), steps=4)
    for i, test in enumerate(tests):
        one, _ = made(trained, [test.instruction], [images[0][i:i + 1]], [],
                          seeded_noise([i], (64, 64)), steps=4)
        assert np.abs(both[i].astype(int) - one[0].astype(int)).max() <= 1
    assert all(w.shape == (2, 8) and ((w > 0).sum(1) == 4).all() for w in chosen.values())


def test_conditions_and_references_of_any_number(trained):
    pictures = [to_tensor([world.tiny_test("t2i", 1)[0].target])] * 3
    results = [made(trained, ["a star"], pictures[:n], pictures[:m],
                        seeded_noise([0], (64, 64)), steps=2)[0]
               for n, m in ((0, 0), (1, 0), (0, 1), (2, 3))]
    assert all(not np.array_equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_seed_means_the_same_everywhere():
    noise = seeded_noise([7, 8], (64, 48))
    assert noise.shape == (2, 16, 6, 8)
    assert torch.equal(noise[1:], seeded_noise([8], (64, 48)))
    assert torch.equal(noise[:1],
                       torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(7)))


def test_sizes(bare):
    big = None                                           # as the released autoencoder has it
    def size(w: int, h: int) -> tuple[int, int]:
        return output_size(big, [Image.new("RGB", (w, h))], None)
    assert len(PREFERRED) == 17 and all(w % 16 == h % 16 == 0 for w, h in PREFERRED)
    assert {(h, w) for w, h in PREFERRED} == set(PREFERRED)
    assert (size(500, 500) == (1024, 1024) and size(4000, 3000) == (1184, 880)
            and size(1080, 1920) == (752, 1392))
    assert size(10, 10_000) == (672, 1568) and output_size(big, [], None) == (1024, 1024)
    assert output_size(big, [Image.new("RGB", (9, 9))], (512, 768)) == (512, 768)
    images, conds = prepare(big, [Image.new("RGB", (400, 300))] * 2,
                            [Image.new("RGB", (1000, 500))], (512, 768))
    assert [tuple(t.shape[-2:]) for t in images] == [(768, 512), (880, 1184)]  # first: the output's
    assert tuple(conds[0].shape[-2:]) == (256, 512)
    _, conds = prepare(big, [], [Image.new("RGB", (1000, 500))], (512, 768), 768)
    assert tuple(conds[0].shape[-2:]) == (384, 768)      # as its adapter was trained
    assert bare.vae.config.sample_size == 64
    assert output_size((64, 64), [Image.new("RGB", (400, 300))], None) == (64, 64)


# -------------------------------------------------------------------------------------- the command

def test_the_command_makes_a_picture_and_says_what_it_did(tmp_path):
    out = tmp_path / "new.png"
    done = subprocess.run([sys.executable, "sample.py", "--instruction", "make the circle blue",
                           "--image", str(PICTURE), "--steps", "3", "--seed", "5",
                           "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (64, 64)
    line = done.stdout.strip()
    assert all(part in line for part in
               (str(out), "64x64", "3 steps", "seed 5", " s", "experts", ": 0."))
    assert len(line.splitlines()) == 1 and [p.name for p in tmp_path.iterdir()] == ["new.png"]


def test_several_pictures_have_the_seeds_that_follow(tmp_path, monkeypatch, capsys):
    arguments = ("--instruction", "a red star", "--steps", 2, "--adapter", "none")
    assert run_sample(monkeypatch, capsys, *arguments, "--num", 2, "--seed", 3,
                      "--out", tmp_path / "a.png")[0] == 0
    assert run_sample(monkeypatch, capsys, *arguments, "--seed", 4,
                      "--out", tmp_path / "b.png")[0] == 0
    assert ((tmp_path / "a_1.png").read_bytes() == (tmp_path / "b.png").read_bytes()
            != (tmp_path / "a_0.png").read_bytes())


def test_the_result_may_keep_the_size_of_its_picture(tmp_path, monkeypatch, capsys):
    Image.open(PICTURE).resize((150, 40)).save(tmp_path / "wide.png")
    out = tmp_path / "out.png"
    for arguments, size in (((), (64, 64)), (("--keep-size",), (150, 40))):
        code, printed, _ = run_sample(monkeypatch, capsys, "--instruction", "make it red",
                                      "--image", tmp_path / "wide.png", "--steps", 1, "--out", out,
                                      *arguments)
        assert code == 0 and Image.open(out).size == size
        assert "64x64" in printed and "150x40" in printed                    # what was done is said
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a star", "--keep-size")
    assert code == 2 and "--keep-size" in err


@pytest.mark.parametrize("beside", [False, True])
def test_compiled_blocks_make_the_same_picture(tmp_path, monkeypatch, capsys, beside):
    """Traced by torch.compile, run as traced: the same operations. Blocks of a kind share it."""
    compiled, graphs = [], []
    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward
    def compile(block: torch.nn.Module) -> None:
        compiled.append(type(block).__name__)
        block.forward = torch.compile(block.forward, backend=counted, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    if beside:                                           # the adapter stays beside the weights
        monkeypatch.setattr(export, "mergeable", lambda *_: False)
    torch._dynamo.reset()
    monkeypatch.setenv("CXX", sys.executable)            # that backend needs none, but it is asked
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert run_sample(monkeypatch, capsys, "--instruction", "make it red", "--image", PICTURE,
                          "--cond", PICTURE, "--steps", 2, "--out", tmp_path / f"{name}.png",
                          *more)[0] == 0
    c = read_json(MODEL / "transformer/config.json")
    assert compiled == (["DoubleBlock"] * c["num_layers"]
                        + ["SingleBlock"] * c["num_single_layers"])
    plain, traced = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
                     for name in ("plain", "compiled"))
    assert np.abs(plain - traced).max() <= 1 and len(graphs) == 3            # the last one differs


def test_a_batch_skips_what_exists(tmp_path, monkeypatch, capsys):
    Image.open(PICTURE).save(tmp_path / "in.png")
    rows = [{"instruction": "make the circle red", "images": ["in.png"]},
            {"instruction": "a star", "out": "star.png", "seed": 9},
            {"instruction": "along the edges", "conds": "in.png"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ("--batch", tmp_path / "jobs.jsonl", "--out", out, "--steps", 2)
    assert run_sample(monkeypatch, capsys, *arguments)[0] == 0
    assert {p.name for p in out.iterdir()} == {"0001.png", "star.png", "0003.png"}
    (out / "star.png").unlink()
    first = (out / "0001.png").stat().st_mtime_ns
    code, printed, _ = run_sample(monkeypatch, capsys, *arguments)
    assert (code == 0 and "2 of 3 pictures" in printed and len(printed.splitlines()) == 2
            and (out / "0001.png").stat().st_mtime_ns == first)
    code, printed, _ = run_sample(monkeypatch, capsys, *arguments)
    assert code == 0 and "3 of 3 pictures" in printed and len(printed.splitlines()) == 1


def test_what_is_not_read_of_a_text_is_told(tmp_path, monkeypatch, capsys):
    for text, told in (("a star", ""), ("a star " * 20, "the model reads 28 tokens"),
                       ("a HIPPO", "T5 reads 1 word letter by letter, or not at all: HIPPO")):
        code, _, err = run_sample(monkeypatch, capsys, "--instruction", text, "--steps", 1,
                                  "--out", tmp_path / "a.png")
        assert code == 0 and ("note:" in err) == bool(told)
        assert not told or re.search(f"(^|\r|\n)note: {told}", err)          # not beside a bar


def test_odd_pictures_are_edited_too(tmp_path, monkeypatch, capsys):
    Image.new("RGBA", (300, 1), (255, 0, 0, 90)).save(tmp_path / "odd.png")
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", "a",
                              "--image", tmp_path / "odd.png", "--steps", 1,
                              "--out", tmp_path / "out.png")
    assert code == 0 and (tmp_path / "out.png").exists()
