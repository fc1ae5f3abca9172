"""tiny/: the drawn world, and that the embedded model is made from nothing."""
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from data import Sample
from evaluate import success
from helpers import MODEL
from sample import condition, encode_text, generate, load_pipeline, seeded_noise
from support.texts import cuts
from text_encoder import T5Tokenizer
from tiny import autoencoder, conflict, pretrain, vocabularies, world
from tiny.world import BASE_TASKS, BIG, EDITS, NEW_TASKS, SMALL, Scene, Thing

ALL = BASE_TASKS + NEW_TASKS


def draws(task: str, number: int, held_out: bool, sample=world.tiny_sample) -> list[Sample]:
    rng = np.random.default_rng(5)
    return [sample(rng, task, held_out) for _ in range(number)]


@pytest.mark.parametrize("task", ALL)
def test_samples_are_given_what_their_task_says(task):
    natives = 1 if task in EDITS else 0
    cleans = {"multi": 2, "mixed": 2}.get(task, 1 if task in NEW_TASKS else 0)
    for sample in draws(task, 20, False):
        assert (len(sample.images), len(sample.conds), sample.task) == (natives, cleans, task)
        assert np.array_equal(sample.target, world.draw(sample.scene))
        assert (sample.instruction.strip() and "{" not in sample.instruction
                and "a orange" not in sample.instruction)
        assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8
                   for p in [sample.target, *sample.images, *sample.conds])


@pytest.mark.parametrize("task", ALL)
def test_held_out_scenes_and_wordings_never_occur_in_training(task):
    assert not any(sample.scene.held_out() for sample in draws(task, 60, False))
    assert all(sample.scene.held_out() for sample in draws(task, 10, True))
    kept = world.WORDINGS[task][-2:]
    seen = [sample.instruction.lower() for sample in draws(task, 60, False)]
    assert not any("please" in text for text in seen)    # every last wording says so
    assert "please" in kept[-1]


def test_edits_hold_out_the_scene_before_too():
    rng, found = np.random.default_rng(1), []
    for i in range(400):
        before, after, _ = world.edited(rng, "recolour")
        sample = world.edit_sample(np.random.default_rng(i), "recolour", False)
        found.append(before.held_out())
        assert sample is None or not sample.scene.held_out()
    assert any(found)                                    # such scenes are drawn, and then refused
    pictures = {world.draw(b).tobytes()
                for b, _, _ in (world.edited(rng, "recolour") for _ in range(300)) if b.held_out()}
    assert not any(s.images[0].tobytes() in pictures for s in draws("recolour", 300, False))


def test_one_scene_in_ten_is_held_out_and_the_hash_is_stable():
    rng = np.random.default_rng(0)
    share = np.mean([world.random_scene(rng, 2).held_out() for _ in range(4000)])
    assert 0.08 < share < 0.12
    first, second = Thing("circle", "red", 0), Thing("star", "blue", 5)
    assert Scene("white", (first, second)).held_out() == Scene("white", (second, first)).held_out()
    assert [Scene(c, (first,)).held_out() for c in (
        "green", "blue", "yellow", "purple", "orange", "white", "black")] == HELD_OUT


HELD_OUT = [False, False, True, False, False, False, False]          # written down once, for ever


def test_test_samples_are_fixed():
    once, again = world.tiny_test("move", 5), world.tiny_test("move", 5)
    assert [s.instruction for s in once] == [s.instruction for s in again]
    assert all(np.array_equal(a.target, b.target) for a, b in zip(once, again))
    assert [s.instruction for s in world.tiny_test("move", 5, seed=1)] != [
        s.instruction for s in once]


def test_a_batch_is_given_the_same_number_of_pictures_and_every_task_occurs():
    source, seen = world.TinyWorld(), Counter()
    for i in range(60):
        batch = source.draw(np.random.default_rng(i), 4)
        assert len({(len(s.images), len(s.conds)) for s in batch}) == 1
        seen.update(s.task for s in batch)
    assert set(seen) == set(ALL)
    assert {s.task for i in range(30) for s in
            world.TinyWorld(BASE_TASKS).draw(np.random.default_rng(i), 2)} <= set(BASE_TASKS)


def test_every_task_is_as_likely_as_any_other():
    assert np.allclose(world.TinyWorld().chances, np.array([1, 6, 5, 2]) / 14)
    assert np.allclose(world.TinyWorld(("fill", "subject", "multi")).chances, [2 / 3, 1 / 3])


@pytest.mark.parametrize("task", BASE_TASKS)
def test_a_base_sees_big_things_that_its_tests_do_not_hold(task):
    """A quarter of 200 samples: 50, standard deviation 6; held-out scenes move it little."""
    rng = np.random.default_rng(0)
    seen = [world.tiny_sample(rng, task) for _ in range(200)]
    big = [sample for sample in seen if sample.scene.things[0].radius == BIG]
    assert 25 <= len(big) <= 75
    if task == "t2i":                                    # an edit shows the size; here words say it
        assert all(("big" in s.instruction) == (s.scene.things[0].radius == BIG) for s in seen)
    if task == "move":                                   # which of two were in front is not said
        assert all(len(sample.scene.things) == 1 for sample in big)
    assert all(thing.radius == SMALL for sample in world.tiny_test(task, 50)
               for thing in sample.scene.things)


# --------------------------------------------------------------------------------- tiny/conflict.py

@pytest.mark.parametrize("task", conflict.TASKS)
def test_what_is_done_with_a_map_is_said_by_the_words_alone(task):
    tokens = T5Tokenizer(MODEL / "tokenizer_2")
    for held_out in (False, True):
        for s in draws(task, 30, held_out, conflict.conflict_sample):
            assert np.array_equal(s.target, world.draw(s.scene)) and success(s.target, s)
            assert (s.task, s.images, len(s.conds)) == (task, [], 1)
            assert s.scene.held_out() == held_out and not cuts(s.instruction, tokens)
            more = [words for words in conflict.MORE_WORDS[task] if s.instruction.endswith(words)]
            assert more
            said = s.instruction.removesuffix(max(more, key=len))
            assert not any(words and words in said for all_words in conflict.MORE_WORDS.values()
                           for words in all_words)


def test_the_answer_of_one_way_is_wrong_in_every_other():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = world.random_scene(rng, 2, new_shapes=True)
        one, two = scene.things
        if one.colour == two.colour or world.near(one.cell, two.cell):
            continue
        answers = {task: Scene(scene.background, change(one, two))
                   for task, change in conflict.CHANGES.items()}
        for task, right in answers.items():
            s = Sample("", world.draw(right), [], [world.edge_map(scene)], task, right)
            assert [other for other, answer in answers.items()
                    if success(world.draw(answer), s)] == [task]


def test_the_map_is_of_the_things_named_and_only_the_tasks_asked_for_are_drawn():
    one, two = Thing("circle", "red", 0), Thing("star", "blue", 8)
    changed = {task: change(one, two) for task, change in conflict.CHANGES.items()}
    assert changed == {
        "as it is": (one, two), "one alone": (one,),
        "colours exchanged": (Thing("circle", "blue", 0), Thing("star", "red", 8)),
        "places exchanged": (Thing("circle", "red", 8), Thing("star", "blue", 0)),
        "grown": (Thing("circle", "red", 0, BIG), Thing("star", "blue", 8, BIG))}
    for s in draws("one alone", 20, False, conflict.conflict_sample):
        assert str(s.scene.things[0]) in s.instruction
        assert not np.array_equal(s.conds[0], world.edge_map(s.scene))       # the other shows too
    batch = conflict.ConflictWorld(("grown", "one alone")).draw(np.random.default_rng(0), 40)
    assert {s.task for s in batch} == {"grown", "one alone"} and len(batch) == 40


# --------------------------------------------------------------------------------- tiny/pretrain.py

STAGES = ["--vae-steps", "2", "--samples", "200", "--no-compile"]


@pytest.fixture
def less_work(monkeypatch):
    """The stages as they are, on fewer pictures and texts."""
    pictures, texts = autoencoder.vae_pictures, vocabularies.texts
    monkeypatch.setattr(autoencoder, "vae_pictures", lambda step, n: pictures(step, min(n, 16)))
    monkeypatch.setattr(vocabularies, "texts", lambda n: texts(n // 10))
    monkeypatch.setattr(autoencoder, "NUMBER", 4)


def test_every_stage_runs_and_the_result_is_a_model(tmp_path, monkeypatch, less_work):
    def run(*arguments: str) -> None:
        paths = ["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *STAGES, *paths, *arguments])
        pretrain.main()
    run("--steps", "1")
    (tmp_path / "model/model_index.json").unlink()       # as if it had been stopped there
    def alone(train, args: tuple, nprocs: int) -> None:
        train(0, 1, *args[1:])                           # one process goes on where two stopped
        torch.distributed.destroy_process_group()
    with monkeypatch.context() as patched:
        patched.setattr(pretrain.mp, "spawn", alone)
        run("--steps", "2")
    written = (tmp_path / "model/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    run("--steps", "2")                                  # finished stages are skipped
    file = tmp_path / "model/transformer/diffusion_pytorch_model.safetensors"
    assert file.read_bytes() == written
    pipe = load_pipeline(tmp_path / "model", None, "cpu", "float32")
    given = condition(pipe, ["a star"], [], [])
    picture, _ = generate(pipe, given, seeded_noise([0], (64, 64)), steps=1)
    assert picture.shape == (1, 64, 64, 3)


def test_a_finished_model_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", str(tmp_path),
                                      "--work", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="--out"):
        pretrain.main()


def test_every_wording_is_read_to_its_end():
    """Each slot filled with what takes most tokens there; what is big is said in training alone."""
    tokens = T5Tokenizer(MODEL / "tokenizer_2")
    def most(*texts: str) -> str:
        return max(texts, key=lambda text: len(tokens.model.encode(text).ids) * 1000 + len(text))
    colour, place = most(*world.COLOURS), most(*world.CELLS)
    thing, figure = (f"{colour} {most(*kind)}" for kind in (world.SHAPES, world.FIGURES))
    slots = {"colour": colour, "shape": most(*world.SHAPES), "place": place, "place2": place,
             "first": most("first", "second"), "second": most("first", "second"),
             "map": most("edges", "depth map"), "rest": f" with a {thing}",
             "a": most(thing, figure), "things": f"a {thing} and a {thing}"}
    for task, wordings in world.WORDINGS.items():
        for i, wording in enumerate(wordings):
            big = "" if i >= len(wordings) - 2 else "big "
            one = f"a {big}{thing} in the {place}"
            text = wording.format(**slots, scene=f"{one} and {one} on a {colour} background") + "."
            for said in (text, text[0].upper() + text[1:]):
                assert not cuts(said.replace("a orange", "an orange"), tokens), (task, said)


@pytest.mark.parametrize("task", ["canny", "depth"])
def test_what_t5_says_of_a_colour_tells_its_shape(task):
    """Without places named, too: else no adapter could learn which of a map's shapes has which.

    Read linearly from the colour's own token, by least squares on most texts, told of the others.
    """
    pipe, tokens = load_pipeline(MODEL, None, "cpu", "float32"), T5Tokenizer(MODEL / "tokenizer_2")
    pairs = [s for s in draws(task, 1000, False) if len(s.scene.things) == 2][:400]
    with torch.no_grad():
        txt, _ = encode_text(pipe, [s.instruction for s in pairs])           # (texts, T, D)
    said, wanted = [], []
    for vectors, s in zip(txt, pairs):
        pieces = [piece.strip("▁").lower() for piece in tokens.model.encode(s.instruction).tokens]
        for thing in s.scene.things:                     # a shape's colour stands before it
            said.append(vectors[pieces.index(thing.shape) - 1])
            wanted.append(list(world.SHAPES).index(thing.shape))
    said, wanted, fit = torch.stack(said).double(), torch.tensor(wanted), 600
    said = torch.cat([said, torch.ones(len(said), 1)], 1)
    one_hot = torch.nn.functional.one_hot(wanted, len(world.SHAPES)).double()
    told = said[fit:] @ torch.linalg.lstsq(said[:fit], one_hot[:fit]).solution
    assert (told.argmax(1) == wanted[fit:]).double().mean() > 0.95
