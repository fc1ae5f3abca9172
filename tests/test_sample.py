"""The pipeline and its command, on the embedded model."""
import json
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from sample import condition, generate, load_pipeline, output_size, PREFERRED, prepare, seeded_noise
from support import commands, devices, export, jobs, layouts, offload, report, routing_maps
from support.files import files_of, read_json
from support.fp8 import NarrowLinear
from support.pictures import to_tensor
from tiny import world

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny/model"
PICTURE = ROOT / "tiny/examples/before.png"


@pytest.fixture(scope="module")
def base():
    return load_pipeline(MODEL, None, "cpu", "float32")


@pytest.fixture(scope="module")
def adapted():
    return load_pipeline(MODEL, ROOT / "tiny/adapter.safetensors", "cpu", "float32")


def made(pipe, instructions, images, conds, noise, steps):
    return generate(pipe, condition(pipe, instructions, images, conds), noise, steps)


def test_the_same_picture_as_diffusers(base):
    """FluxKontextPipeline, same noise, fp32: within 1/255 per pixel (rounding of 8-bit values)."""
    from diffusers import FluxKontextPipeline
    from dit import pack
    warnings.filterwarnings("ignore")
    peer = FluxKontextPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    for task in ("recolour", "t2i", "move"):
        test = world.tiny_test(task, 1)[0]
        noise = seeded_noise([1], (64, 64))
        ours, _ = made(base, [test.instruction], [to_tensor([p]) for p in test.images], [],
                           noise, steps=6)
        theirs = peer(image=Image.fromarray(test.images[0]) if test.images else None,
                      prompt=test.instruction, height=64, width=64, max_area=64 * 64,
                      _auto_resize=False, latents=pack(noise),
                      num_inference_steps=6, guidance_scale=2.5, output_type="np",
                      max_sequence_length=base.t5_tokens.length).images[0]
        assert np.abs(ours[0] / 255 - theirs).max() <= 1 / 255 + 1e-6, task
        assert ours[0].std() > 10                        # a picture, not a plain field


def test_equal_calls_are_equal_and_seeds_differ(adapted):
    make = lambda seed: made(adapted, ["a red circle in the top left on a white background"],
                                 [], [], seeded_noise([seed], (64, 64)), steps=3)[0]
    assert np.array_equal(make(1), make(1)) and not np.array_equal(make(1), make(2))


def test_a_batch_gives_what_single_calls_give(adapted):
    """Rounding may move an 8-bit value by one step."""
    tests = world.tiny_test("move", 2)
    images = [to_tensor([t.images[0] for t in tests])]
    both, chosen = made(adapted, [t.instruction for t in tests], images, [],
                            seeded_noise([0, 1], (64, 64)), steps=4)
    for i, test in enumerate(tests):
        one, _ = made(adapted, [test.instruction], [images[0][i:i + 1]], [],
                          seeded_noise([i], (64, 64)), steps=4)
        assert np.abs(both[i].astype(int) - one[0].astype(int)).max() <= 1
    assert all(w.shape == (2, 8) and ((w > 0).sum(1) == 4).all() for w in chosen.values())


def test_conditions_and_references_of_any_number(adapted):
    pictures = [to_tensor([world.tiny_test("t2i", 1)[0].target])] * 3
    results = [made(adapted, ["a star"], pictures[:n], pictures[:m],
                        seeded_noise([0], (64, 64)), steps=2)[0]
               for n, m in ((0, 0), (1, 0), (0, 1), (2, 3))]
    assert all(not np.array_equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_seed_means_the_same_everywhere():
    noise = seeded_noise([7, 8], (64, 48))
    assert noise.shape == (2, 16, 6, 8)
    assert torch.equal(noise[1:], seeded_noise([8], (64, 48)))
    assert torch.equal(noise[:1],
                       torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(7)))


def test_sizes(base):
    class Big:                                           # stands for the released autoencoder
        class vae:
            class config:
                sample_size = 1024
    def size(w: int, h: int) -> tuple[int, int]:
        return output_size(Big, [Image.new("RGB", (w, h))], None)
    assert len(PREFERRED) == 17 and all(w % 16 == h % 16 == 0 for w, h in PREFERRED)
    assert {(h, w) for w, h in PREFERRED} == set(PREFERRED)
    assert (size(500, 500) == (1024, 1024) and size(4000, 3000) == (1184, 880)
            and size(1080, 1920) == (752, 1392))
    assert size(10, 10_000) == (672, 1568) and output_size(Big, [], None) == (1024, 1024)
    assert output_size(Big, [Image.new("RGB", (9, 9))], (512, 768)) == (512, 768)
    images, conds = prepare(Big, [Image.new("RGB", (400, 300))] * 2,
                            [Image.new("RGB", (1000, 500))], (512, 768))
    assert [tuple(t.shape[-2:]) for t in images] == [(768, 512), (880, 1184)]  # first: the output's
    assert tuple(conds[0].shape[-2:]) == (256, 512)
    assert output_size(base, [Image.new("RGB", (400, 300))], None) == (64, 64)


# ------------------------------------------------------------------ models larger than the device

def test_parts_visit_the_device_and_come_back(base):
    """Within the `with` all weights are there; then the very same memory is in its place again."""
    before = {name: t.data_ptr() for name, t in base.vae.state_dict().items()}
    with offload.on_device(base.vae, torch.float64):       # a type in place of a device
        assert {t.dtype for t in base.vae.state_dict().values()} == {torch.float64}
    assert {name: t.data_ptr() for name, t in base.vae.state_dict().items()} == before


def test_blocks_are_streamed_one_ahead(base, monkeypatch):
    """A stand-in for the device counts who is there: the block at work and the next, never more."""
    model, here, most, order = base.dit, [], [], []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    real = offload.on_device

    @contextmanager
    def counted(part, where):
        here.append(part)
        most.append(sum(b in here for b in blocks))
        with real(part, torch.float64):                  # a type in place of a device
            yield
        here.remove(part)
    monkeypatch.setattr(offload, "on_device", counted)
    with offload.stream(model, torch.device("cpu")) as run:
        assert {id(part) for part in here} == {id(part) for name, part in model.named_children()
                                               if "blocks" not in name}
        for block in blocks:
            def work():
                order.append(block)
                assert {t.dtype for t in block.parameters()} == {torch.float64}
            monkeypatch.setattr(block, "forward", work)
            run(block)
    assert order == blocks and max(most) == 2 and not here


def test_a_streamed_model_makes_the_same_picture(adapted, monkeypatch):
    """The whole of generate(), where a device is said to lack room for the transformer."""
    given, noise = condition(adapted, ["make it red"], [], []), seeded_noise([0], (64, 64))
    monkeypatch.setattr(export, "mergeable", lambda *_: False)               # streamed is unmerged
    plain, _ = generate(adapted, given, noise, steps=2)
    real, calls = offload.stream, []
    monkeypatch.setattr(offload, "stream", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(offload, "fits", lambda model, device: model is not adapted.dit)
    streamed, _ = generate(adapted, given, noise, steps=2)
    assert calls and np.array_equal(plain, streamed)


def test_what_has_room_on_a_device(base, monkeypatch):
    size = sum(t.nbytes for t in base.vae.state_dict().values())
    for room, answer in ((2 * size, True), (size, False)):
        monkeypatch.setattr(devices, "memory", lambda device: room)
        assert offload.fits(base.vae, torch.device("meta")) == answer
        assert offload.fits(base.vae, torch.device("cpu"))                    # it is there already


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


def test_a_model_too_large_to_widen_is_widened_layer_by_layer(adapted, monkeypatch):
    """The same numbers multiplied in the same type, unmerged: within 1/255 of the whole in fp32."""
    files = [file for part in layouts.SIGNS for file in files_of(MODEL / part)]
    needed = 2 * sum(file.stat().st_size for file in files)
    given, noise = condition(adapted, ["make it red"], [], []), seeded_noise([0], (64, 64))
    wanted, _ = generate(adapted, given, noise, steps=3)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("room", [0, 10 ** 9])
def test_visits_on_a_gpu(room, monkeypatch):
    """Blocks one by one, or parts in turn: the picture of a pipeline that stays on the device."""
    stays = load_pipeline(MODEL, None, "cuda", "float32")
    real = devices.memory
    monkeypatch.setattr(devices, "memory", lambda device: room if room else 1)
    visits = load_pipeline(MODEL, None, "cuda", "float32")
    if room:
        visits.dit.cpu()
    noise = seeded_noise([0], (64, 64))
    one, two = (made(pipe, ["a red star"], [], [], noise, 3)[0] for pipe in (stays, visits))
    assert real(torch.device("cuda")) > 0 and np.abs(one.astype(int) - two).max() <= 1
    assert next(visits.dit.parameters()).device.type == "cpu"


# -------------------------------------------------------------------------------------- the command

def used(pipe: sample.Pipeline, texts: list[str]) -> dict[str, torch.Tensor]:
    """Mean weight of each expert in each layer that instructions route."""
    return routing_maps.expert_use(pipe.adapter, *sample.encode_text(pipe, texts))


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Run sample.py's command in this process -> exit code, stdout, stderr without progress bar."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    code = 0
    try:
        commands.run(sample.main)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, err


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
    assert command(monkeypatch, capsys, *arguments, "--num", 2, "--seed", 3,
                   "--out", tmp_path / "a.png")[0] == 0
    assert command(monkeypatch, capsys, *arguments, "--seed", 4,
                   "--out", tmp_path / "b.png")[0] == 0
    assert ((tmp_path / "a_1.png").read_bytes() == (tmp_path / "b.png").read_bytes()
            != (tmp_path / "a_0.png").read_bytes())


def test_the_result_may_keep_the_size_of_its_picture(tmp_path, monkeypatch, capsys):
    Image.open(PICTURE).resize((150, 40)).save(tmp_path / "wide.png")
    out = tmp_path / "out.png"
    for arguments, size in (((), (64, 64)), (("--keep-size",), (150, 40))):
        code, printed, _ = command(monkeypatch, capsys, "--instruction", "make it red", "--image",
                                   tmp_path / "wide.png", "--steps", 1, "--out", out, *arguments)
        assert code == 0 and Image.open(out).size == size
        assert "64x64" in printed and "150x40" in printed                    # what was done is said
    code, _, err = command(monkeypatch, capsys, "--instruction", "a star", "--keep-size")
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
        assert command(monkeypatch, capsys, "--instruction", "make it red", "--image", PICTURE,
                       "--cond", PICTURE, "--steps", 2, "--out", tmp_path / f"{name}.png",
                       *more)[0] == 0
    c = read_json(MODEL / "transformer/config.json")
    assert compiled == (["DoubleBlock"] * c["num_layers"]
                        + ["SingleBlock"] * c["num_single_layers"])
    plain, traced = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
                     for name in ("plain", "compiled"))
    assert np.abs(plain - traced).max() <= 1 and len(graphs) == 3            # the last one differs


def test_compiling_needs_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    code, _, err = command(monkeypatch, capsys, "--instruction", "make it red", "--compile")
    assert code == 2 and "--compile" in err


def test_a_batch_skips_what_exists(tmp_path, monkeypatch, capsys):
    Image.open(PICTURE).save(tmp_path / "in.png")
    rows = [{"instruction": "make the circle red", "images": ["in.png"]},
            {"instruction": "a star", "out": "star.png", "seed": 9},
            {"instruction": "along the edges", "conds": "in.png"}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ("--batch", tmp_path / "jobs.jsonl", "--out", out, "--steps", 2)
    assert command(monkeypatch, capsys, *arguments)[0] == 0
    assert {p.name for p in out.iterdir()} == {"0001.png", "star.png", "0003.png"}
    (out / "star.png").unlink()
    first = (out / "0001.png").stat().st_mtime_ns
    code, printed, _ = command(monkeypatch, capsys, *arguments)
    assert (code == 0 and "2 of 3 pictures" in printed and len(printed.splitlines()) == 2
            and (out / "0001.png").stat().st_mtime_ns == first)
    code, printed, _ = command(monkeypatch, capsys, *arguments)
    assert code == 0 and "3 of 3 pictures" in printed and len(printed.splitlines()) == 1


def test_the_use_of_experts_is_what_sampling_reports(adapted):
    texts, noise = ["a red star in the top", "make the circle blue"], seeded_noise([0], (64, 64))
    chosen = [made(adapted, [text], [], [], noise, steps=1)[1] for text in texts]
    use = used(adapted, texts)
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
        code, printed, _ = command(monkeypatch, capsys, *what, *adapter, "--routing", "map.png")
        assert code == 0 and len(printed.splitlines()) == 1 and "map.png" in printed
        assert {p.name for p in tmp_path.iterdir()} == {"jobs.jsonl", "map.png"}


@pytest.mark.parametrize("arguments, words", [
    (["--routing", "map.txt"], "picture"), (["--routing", "gone/map.png"], "folder"),
    (["--routing", "map.png", "--adapter", "none"], "no layer")])
def test_routing_that_cannot_be_drawn(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(monkeypatch, capsys, "--instruction", "a", *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_cut_is_told(tmp_path, monkeypatch, capsys):
    for text, told in (("a star", False), ("a star " * 20, True)):
        code, _, err = command(monkeypatch, capsys, "--instruction", text, "--steps", 1,
                               "--out", tmp_path / "a.png")
        assert code == 0 and ("28 tokens" in err) == told


def wrong_model(path: Path, part: str, change) -> Path:
    """A copy of the embedded model with one file changed."""
    import shutil
    shutil.copytree(MODEL, path / "model")
    file = path / "model" / part
    change(file)
    return path / "model"


@pytest.mark.parametrize("arguments, words", [
    (["--instruction", ""], "empty"), (["--instruction", "  "], "empty"), ([], "--instruction"),
    (["--instruction", "a", "--image", "gone.png"], "gone.png"),
    (["--instruction", "a", "--image", __file__], "test_sample.py"),
    (["--instruction", "a", "--cond", "gone.png"], "gone.png"),
    (["--instruction", "a", "--size", "100x64"], "96x64"),
    (["--instruction", "a", "--size", "big"], "WIDTHxHEIGHT"),
    (["--instruction", "a", "--size", "0x64"], "--size"),
    (["--instruction", "a", "--size", "1000000x1000000"], "8192x8192"),
    (["--instruction", "a", "--steps", "1000000000000"], "--steps"),
    (["--instruction", "a", "--num", "1000000000"], "--num"),
    (["--instruction", "a", "--guidance", "1e38"], "--guidance"),
    (["--instruction", "a\udcff"], "--instruction"),
    (["--instruction", "a", "--device", "meta"], "--device"),
    (["--instruction", "a", "--steps", "0"], "--steps"),
    (["--instruction", "a", "--guidance", "nan"], "--guidance"),
    (["--instruction", "a", "--seed", "-1"], "--seed"),
    (["--instruction", "a", "--num", "0"], "--num"),
    (["--instruction", "a", "--model", "gone"], "gone"),
    (["--instruction", "a", "--model", str(MODEL.parent / "adapter.safetensors")],
     "no FLUX Kontext transformer"),
    (["--instruction", "a", "--export-lora", "a.bin"], ".safetensors"),
    (["--instruction", "a", "--export-lora", str(MODEL.parent / "adapter.safetensors")], "exists"),
    (["--instruction", "a", "--export-lora", "a.safetensors", "--adapter", "none"], "an adapter"),
    (["--batch", "a.jsonl", "--export-lora", "a.safetensors"], "one --instruction"),
    (["--instruction", "a", "--adapter", "gone"], "gone"),
    (["--instruction", "a", "--adapter", str(PICTURE)], "before.png"),
    (["--instruction", "a", "--device", "cuda:99"], "--device"),
    (["--batch", "gone.jsonl"], "gone.jsonl"),
    (["--batch", "gone.jsonl", "--image", str(PICTURE)], "--image")])
def test_what_a_user_gets_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    out = tmp_path / "out.png"
    out.write_bytes(b"was here")
    code, printed, err = command(monkeypatch, capsys, "--out", out, *arguments)
    assert (code == 2 and words in err and len(err.splitlines()) == 1
            and "Traceback" not in err and not printed)
    assert out.read_bytes() == b"was here" and [p.name for p in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("out, words", [
    ("gone/out.png", "gone"), ("out", "picture file"), (".", "--out"), ("o.xbm", "picture file"),
    ("o.h5", "picture file")])
def test_bad_outputs_are_found_before_the_work(tmp_path, monkeypatch, capsys, out, words):
    code, _, err = command(monkeypatch, capsys, "--instruction", "a", "--out", tmp_path / out)
    assert code == 2 and words in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--routing"])
@pytest.mark.parametrize("given", ["--image", "--cond"])
def test_pictures_that_are_given_are_not_written_over(tmp_path, monkeypatch, capsys, option, given):
    mine, way = tmp_path / "mine.png", tmp_path / "way.png"
    mine.write_bytes(PICTURE.read_bytes())
    way.symlink_to(mine)                                 # the same file by another name
    code, _, err = command(monkeypatch, capsys, "--instruction", "a", given, mine, option, way)
    assert code == 2 and "is a picture that is given" in err and len(err.splitlines()) == 1
    assert mine.read_bytes() == PICTURE.read_bytes()


def test_pictures_that_a_batch_names_are_not_written_over(tmp_path, monkeypatch, capsys):
    mine, rows = tmp_path / "mine.png", tmp_path / "rows.jsonl"
    mine.write_bytes(PICTURE.read_bytes())
    rows.write_text(json.dumps({"instruction": "a", "conds": ["mine.png"]}))
    code, _, err = command(monkeypatch, capsys, "--batch", rows, "--routing", mine)
    assert code == 2 and "is a picture that is given" in err
    assert mine.read_bytes() == PICTURE.read_bytes()


def test_two_outputs_need_two_names(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.png"
    code, _, err = command(monkeypatch, capsys, "--instruction", "a", "--out", out,
                           "--routing", out)
    assert code == 2 and "makes that file too" in err and not out.exists()


def test_folders_that_may_not_be_written_to_are_found_before_the_work(tmp_path, monkeypatch,
                                                                      capsys):
    monkeypatch.setattr(jobs.os, "access", lambda path, mode: Path(path) != tmp_path)
    for arguments in (("--out", tmp_path / "a.png"), ("--routing", tmp_path / "a.png"),
                      ("--export-lora", tmp_path / "a.safetensors")):
        code, _, err = command(monkeypatch, capsys, "--instruction", "a", *arguments)
        assert code == 2 and "may not be written to" in err and arguments[0] in err
    (tmp_path / "jobs.jsonl").write_text('{"instruction": "a star"}')
    code, _, err = command(monkeypatch, capsys, "--batch", tmp_path / "jobs.jsonl", "--out",
                           tmp_path)
    assert code == 2 and "a folder to write to" in err


@pytest.mark.parametrize("part, change, words", [
    ("vae/config.json", lambda f: f.unlink(), "config.json"),
    ("vae/diffusion_pytorch_model.safetensors", lambda f: f.unlink(), "vae"),
    ("transformer/diffusion_pytorch_model.safetensors",
     lambda f: f.write_bytes(f.read_bytes()[:-9]), "transformer"),
    ("text_encoder/model.safetensors", lambda f: f.write_bytes(b"x" * 99), "text_encoder"),
    ("text_encoder_2/model.safetensors",
     lambda f: f.write_bytes((MODEL / "text_encoder/model.safetensors").read_bytes()), "missing"),
    ("transformer/config.json", lambda f: f.write_text(
        f.read_text().replace('"num_layers": 3', '"num_layers": 4')), "missing"),
    ("tokenizer/merges.txt", lambda f: f.unlink(), "merges.txt"),
    ("tokenizer_2/tokenizer.json", lambda f: f.write_text("{}"), "tokenizer.json")])
def test_broken_models_are_named(tmp_path, monkeypatch, capsys, part, change, words):
    folder = wrong_model(tmp_path, part, change)
    code, _, err = command(monkeypatch, capsys, "--instruction", "a", "--model", folder,
                           "--out", tmp_path / "out.png")
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("row, words", [
    ("{", "JSON"), ("[]", "instruction"), ('{"instruction": ""}', "instruction"),
    ('{"instruction": "a", "images": ["gone.png"]}', "gone.png"),
    ('{"instruction": "a", "out": "../x.png"}', "out"),
    ('{"instruction": "a", "images": 3}', "images"),
    ('{"instruction": "a", "images": 0}', "images"),
    ('{"instruction": "a", "imagse": "in.png"}', "imagse"),
    ('{"instruction": "a\\ud800"}', "Unicode")])
def test_broken_batches_are_named_before_anything_is_made(tmp_path, monkeypatch, capsys, row,
                                                          words):
    (tmp_path / "jobs.jsonl").write_text('{"instruction": "a star"}\n' + row)
    code, _, err = command(monkeypatch, capsys, "--batch", tmp_path / "jobs.jsonl",
                           "--out", tmp_path / "out")
    assert code == 2 and words in err and "line 2" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_odd_pictures_are_edited_too(tmp_path, monkeypatch, capsys):
    Image.new("RGBA", (300, 1), (255, 0, 0, 90)).save(tmp_path / "odd.png")
    code, _, err = command(monkeypatch, capsys, "--instruction", "a",
                           "--image", tmp_path / "odd.png", "--steps", 1,
                           "--out", tmp_path / "out.png")
    assert code == 0 and (tmp_path / "out.png").exists()
