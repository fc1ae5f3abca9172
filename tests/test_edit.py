"""sample.edit(): the pipeline from Python, again and again, and what it may be given."""
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from helpers import MODEL, PICTURE, pixels, ROOT, run_sample
from sample import edit, load_pipeline
from support import adapters, devices, origin, routing_maps
from support.conditions import canny, EDGES

TEXT = "make the green circle blue"
OURS = ROOT / "tiny/adapter.safetensors"


@pytest.fixture(scope="module")
def pipe() -> sample.Pipeline:
    return load_pipeline(MODEL)


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# ------------------------------------------------------------------------------------- what is made

@pytest.mark.parametrize("more", [
    {"seed": 3}, {"guidance": 4.0}, {"size": (96, 64)}, {"conds": PICTURE},
    {"conds": f"canny:{PICTURE}"}, {"images": [PICTURE, PICTURE]}, {"images": ()}])
def test_a_call_makes_what_the_command_makes(pipe, tmp_path, monkeypatch, capsys, more) -> None:
    """To the byte, file and all."""
    given = {"images": [PICTURE], "steps": 2} | more
    arguments = [word for image in given["images"] for word in ("--image", image)]
    for name, option in (("conds", "--cond"), ("seed", "--seed"), ("guidance", "--guidance")):
        arguments += [option, given[name]] if name in given else []
    arguments += ["--size", "96x64"] if "size" in given else []
    out = tmp_path / "a.png"
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", TEXT, "--steps", 2,
                              "--out", out, *arguments)
    assert code == 0, err
    picture = edit(pipe, TEXT, **given)
    assert picture.tobytes() == pixels(out)
    assert picture.info == Image.open(out).text


def test_pictures_of_all_kinds_are_taken(pipe) -> None:
    """A path, its text, a PIL picture of any mode, an array; one or several."""
    opened = Image.open(PICTURE)
    wanted = edit(pipe, TEXT, PICTURE, steps=1).tobytes()
    clear = opened.convert("RGBA")
    for given in (str(PICTURE), opened, np.asarray(opened), clear, [PICTURE], (opened,)):
        assert edit(pipe, TEXT, given, steps=1).tobytes() == wanted
    none = edit(pipe, TEXT, None, steps=1).tobytes()
    assert none == edit(pipe, TEXT, steps=1).tobytes() != wanted
    clear.putalpha(0)                                    # white, to a person
    white = Image.new("RGB", (64, 64), "white")
    assert edit(pipe, TEXT, clear, steps=1).tobytes() == edit(pipe, TEXT, white, steps=1).tobytes()
    with pytest.raises(ValueError, match="uint8.*float32"):
        edit(pipe, TEXT, np.zeros((64, 64, 3), np.float32))


def test_all_seeds_are_looked_at_before_any_picture_is_made(pipe, monkeypatch) -> None:
    monkeypatch.setattr(sample, "edits", None)           # is not asked
    with pytest.raises(ValueError, match="seed -1: must be a whole number"):
        edit(pipe, TEXT, PICTURE, seed=[0, -1])


def test_several_seeds_give_several_pictures(pipe) -> None:
    made = edit(pipe, TEXT, PICTURE, seed=[1, 2], steps=1)
    assert [picture.tobytes() for picture in made] == [
        edit(pipe, TEXT, PICTURE, seed=seed, steps=1).tobytes() for seed in (1, np.int64(2))]
    assert made[0].tobytes() != made[1].tobytes()


def test_each_step_is_told(pipe) -> None:
    seen = []
    edit(pipe, TEXT, PICTURE, steps=3, callback=lambda step, x: seen.append((step, tuple(x.shape))))
    assert seen == [(step, (1, 16, 8, 8)) for step in (1, 2, 3)]


def weights_of(pipe: sample.Pipeline, text: str, **more: str) -> tuple[Image.Image, torch.Tensor]:
    """The picture of an instruction, and w of all layers, (layers, E)."""
    picture = edit(pipe, text, PICTURE, steps=2, **more)
    return picture, torch.cat(list(routing_maps.last_weights(pipe.adapter).values()))


def test_experts_may_be_chosen_by_another_text(pipe) -> None:
    """Its routing is that text's, its words and picture are the instruction's own."""
    other = "fill the box with a red star"
    plain, own = weights_of(pipe, TEXT)
    again, same = weights_of(pipe, TEXT, route_by=TEXT)
    crossed, routed = weights_of(pipe, TEXT, route_by=other)
    another, wanted = weights_of(pipe, other)
    assert torch.equal(own, same) and plain.tobytes() == again.tobytes()
    assert torch.equal(routed, wanted) and not torch.equal(routed, own)
    assert len({picture.tobytes() for picture in (plain, crossed, another)}) == 3
    assert crossed.info["routed by"] == other and "routed by" not in plain.info
    nothing, by_nothing = weights_of(pipe, TEXT, route_by="")        # as where training drops it
    assert not torch.equal(by_nothing, own) and nothing.info["routed by"] == ""


def test_the_command_takes_it_and_a_lora_is_so_routed(tmp_path, monkeypatch, capsys, pipe) -> None:
    other, out = "fill the box with a <b>red</b> star", tmp_path / "a.png"
    code, _, err = run_sample(
        monkeypatch, capsys, "--instruction", TEXT, "--image", PICTURE, "--steps", 2, "--out", out,
        "--route-by", other, "--export-lora", tmp_path / "a.safetensors")
    assert code == 0, err
    assert pixels(out) == weights_of(pipe, TEXT, route_by=other)[0].tobytes()
    assert f"routed by: {other}" in origin.describe(out)
    run_sample(monkeypatch, capsys, "--instruction", other,
               "--export-lora", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("more, words", [
    (["--route-by", " "], "--route-by is empty"),
    (["--route-by", "a", "--routing", "r.png"], "leave out --route-by"),
    (["--route-by", "a", "--adapter", "none"], "--route-by: needs an adapter")])
def test_what_cannot_be_routed_so_is_one_line(tmp_path, monkeypatch, capsys, more, words) -> None:
    code, _, err = run_sample(monkeypatch, capsys, "--instruction", TEXT, "--steps", 1, "--out",
                              tmp_path / "a.png", *more)
    assert code == 2 and words in err and err.count("\n") == 1 and not any(tmp_path.iterdir())


def test_an_adapter_without_experts_cannot_be_routed(pipe, monkeypatch) -> None:
    monkeypatch.setattr(routing_maps, "routed", lambda adapter: [])
    with pytest.raises(ValueError, match="--route-by 'a': no layer here is routed"):
        edit(pipe, TEXT, PICTURE, steps=1, route_by="a")


def test_the_result_may_keep_the_size_of_its_picture(pipe) -> None:
    wide = Image.open(PICTURE).resize((150, 40))
    assert edit(pipe, TEXT, wide, steps=1).size == (64, 64)
    assert edit(pipe, TEXT, wide, steps=1, keep_size=True).size == (150, 40)


@pytest.mark.parametrize("changes, words", [
    ({"instruction": " "}, "instruction is empty"), ({"instruction": "\ud800"}, "Unicode"),
    ({"instruction": 5}, "instruction 5: must be a text"),
    *(({"seed": seed}, f"seed {seed}: must be a whole number") for seed in (1.5, -1, 2 ** 64)),
    ({"steps": 0}, "steps 0"), ({"guidance": -1}, "guidance -1"),
    ({"steps": 2.5}, "steps 2.5: must be a whole"), ({"guidance": "2"}, "must be a number"),
    ({"size": (64.0, 64)}, "must be width and"), ({"size": (64,)}, "must be width and"),
    ({"size": (100, 64)}, "size .100"), ({"conds": "depth:a.png"}, "depth"),
    ({"images": "gone.png"}, "gone.png"), ({"images": 3}, "3 is no picture"),
    ({"conds": [None]}, "None is no picture"),
    ({"mask": PICTURE, "images": ()}, "mask: needs the picture")])
def test_what_a_caller_gets_wrong_is_said(pipe, changes, words) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        edit(pipe, **{"instruction": TEXT, "images": PICTURE} | changes)
    assert len(str(error.value).splitlines()) == 1


def test_a_pipeline_is_used_again_by_several_threads(pipe) -> None:
    """As if one after the other: weights that are merged for one edit are no other's."""
    jobs = [(TEXT, 0), ("make the green circle red", 1), ("the background should be purple", 2)]
    before = {name: t.clone() for name, t in pipe.dit.state_dict().items()}
    wanted = [edit(pipe, text, PICTURE, seed=seed, steps=4).tobytes() for text, seed in jobs]
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        text, seed = jobs[number % 3]
        found[number] = edit(pipe, text, PICTURE, seed=seed, steps=4).tobytes()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == wanted * 2
    after = pipe.dit.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_thread_waits_for_the_other(pipe) -> None:
    """No other begins while one is between its steps."""
    begun = []

    def other() -> None:
        edit(pipe, TEXT, PICTURE, steps=1, callback=lambda step, x: begun.append("other"))

    def first(step: int, x: torch.Tensor) -> None:
        if step == 1:
            threading.Thread(target=other).start()
        begun.append("first")
    edit(pipe, TEXT, PICTURE, steps=6, callback=first)
    assert begun[:6] == ["first"] * 6


# ----------------------------------------------------------------------------------- which adapters

def test_a_pipeline_has_the_adapter_that_the_command_has(pipe, tmp_path) -> None:
    """By default the one beside the model's folder; None and "none" say none."""
    told = pipe.names["adapters"]
    assert pipe.adapter is not None and told == (
        f"adapter.safetensors (sha256 {hashlib.sha256(OURS.read_bytes()).hexdigest()[:16]})")
    for given in (None, "none"):
        assert load_pipeline(str(MODEL), given).adapter is None
    (tmp_path / "model").symlink_to(MODEL)               # nothing lies beside it
    assert load_pipeline(tmp_path / "model").names["adapters"] == "none"


def test_adapters_with_strengths(tmp_path) -> None:
    for given in (OURS, str(OURS), [OURS], (OURS, 1), [(str(OURS), 1.0)]):
        assert adapters.chosen(given, MODEL) == [(OURS, 1.0)]
    assert adapters.chosen([f"{OURS}:0.5", (OURS, 2)], MODEL) == [(OURS, 0.5), (OURS, 2.0)]
    half = load_pipeline(MODEL, [(OURS, 0.5)])
    assert half.names["adapters"].startswith("adapter.safetensors:0.5 (sha256 ")
    assert half.adapter.config.alpha == load_pipeline(MODEL, OURS).adapter.config.alpha / 2
    with pytest.raises(FileNotFoundError, match="^--adapter gone: no such file"):
        load_pipeline(MODEL, "gone")
    with pytest.raises(ValueError, match="none: not together"):
        load_pipeline(MODEL, ["none", OURS])


def test_a_folder_s_digest_is_of_all_its_files(tmp_path) -> None:
    for name, content in (("train_config.json", b"{}"), ("mole_experts.pt", b"ab")):
        (tmp_path / name).write_bytes(content)
    told = sample.origin.digest(tmp_path)
    assert told == hashlib.sha256(b"ab{}").hexdigest()[:16]
    (tmp_path / "mole_experts.pt").write_bytes(b"ac")
    assert sample.origin.digest(tmp_path) != told


# ------------------------------------------------------------------------------- what takes a while

def test_loading_of_a_large_model_is_announced(monkeypatch, capsys) -> None:
    load_pipeline(MODEL, None)
    assert not capsys.readouterr().err
    monkeypatch.setattr(devices, "LARGE", 1e6)
    load_pipeline(MODEL, None, weightless=True)
    assert not capsys.readouterr().err                   # nothing is read
    load_pipeline(MODEL, OURS)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and err[0].startswith("loading ") and err[0].endswith(" GB ...")
    assert err[1] == f"reading {OURS} ..."               # which is large too, here
    monkeypatch.setenv("WORLD_SIZE", "2")                # of many processes one speaks
    monkeypatch.setenv("RANK", "1")
    load_pipeline(MODEL, None)
    assert not capsys.readouterr().err


def test_edges_are_drawn_at_the_size_that_the_model_is_given(tmp_path, monkeypatch) -> None:
    """Not at the photograph's own, whose lines would be lost in shrinking."""
    from support.conditions import read_cond
    large = Image.open(PICTURE).resize((640, 640))
    large.save(tmp_path / "large.png")
    found = read_cond(f"canny:{tmp_path / 'large.png'}", lambda size: (size[0] // 10, 64))
    wanted = canny(np.asarray(large.resize((64, 64), Image.Resampling.LANCZOS)), *EDGES)
    assert EDGES == (100, 200) and (np.asarray(found) == wanted).all() and wanted.any()
    named = tmp_path / "canny:large.png"                 # a file that is called so is itself
    large.save(named)
    assert read_cond(named, lambda size: (64, 64)).size == (640, 640)
    monkeypatch.chdir(tmp_path)
    assert read_cond("canny:large.png", lambda size: (64, 64)).size == (640, 640)
    assert Path("canny:large.png").exists()
