"""sample.py --explain: the page's numbers are the run's, its lines those that ran, its text text.

Nothing here depends on what the embedded weights are.
"""
import ast
import base64
import io
import json
import re
import shlex
import sys
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit
import mole
import sample
from helpers import make_pipeline, PICTURE, randn, ROOT, run_command, run_sample
from support import attention, export, figures, passages, routing_maps, trace
from support.attention import Grid
from support.explain import explain
from support.explain_shares import Comparison, shares_table, verdict
from support.explain_steps import regrown
from support.scores import psnr
from support.trace import Trace
from support.words import as_typed
from tiny import pages, world

TEXT = "make the green circle blue"
VOID = {"img", "meta", "br", "input"}


class Page(HTMLParser):
    """A page as a browser reads it. Fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.open, self.elements, self.words = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), len(self.words)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), len(self.words)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict]:
        return [found for name, found, _ in self.elements
                if name == tag and kind in (found.get("class") or "").split() + [""]]

    def after(self, tag: str) -> str:
        """The text that follows the first such tag."""
        return self.words[next(at for name, _, at in self.elements if name == tag)]

    @cached_property
    def data(self) -> dict:
        return json.loads(re.search(r'id="data">(.*?)</script>', self.text, re.S)[1])

    @property
    def entries(self) -> list[str]:
        """Whose attention can be chosen."""
        return re.findall("<option.*?>(.*?)</option>", self.text)

    @cached_property
    def attention(self) -> np.ndarray:
        """(steps, entries, cells, keys)."""
        whole = np.frombuffer(base64.b64decode(self.data["attention"]), "<u2")
        return whole.reshape(self.data["shape"]) / 65535


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


class Run:
    """An edit that was watched, with what its steps were and what its blocks attended to."""

    def __init__(self, pipe: sample.Pipeline, text: str = TEXT, images: object = PICTURE,
                 conds: object = (), **settings: object):
        self.pipe, self.latents, self.trace = pipe, [], Trace(sample.denoise, sample.encode_text)
        self.picture = sample.edit(pipe, text, images, conds, watch=self.trace, **settings,
                                   callback=lambda _, x: self.latents.append(x))
        self.page = Page(explain(self.trace, self.picture, images, conds))


@pytest.fixture(scope="module")
def run(trained) -> Run:
    return Run(trained, conds=PICTURE, steps=3)


# -------------------------------------------------------------------------------------- the picture

def test_the_picture_is_the_ordinary_one_to_the_byte(tmp_path, monkeypatch, capsys):
    arguments = ("--instruction", TEXT, "--image", PICTURE, "--steps", 2)
    (tmp_path / "page.html").write_text("mine")          # what is named is written over
    assert run_sample(monkeypatch, capsys, *arguments, "--out", tmp_path / "a.png")[0] == 0
    code, printed, err = run_sample(monkeypatch, capsys, *arguments, "--out", tmp_path / "b.png",
                                    "--explain", tmp_path / "page.html")
    assert code == 0, err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "b.png", "page.html"}
    page = Page((tmp_path / "page.html").read_text())
    assert page.after("blockquote") == TEXT and str(tmp_path / "page.html") in printed
    assert f"--explain {tmp_path / 'page.html'}" in "".join(page.words)      # makes it again
    assert "<tr><th>model</th><td>tiny/model</td></tr>" in page.text         # not its name alone


def test_nothing_is_watched_unasked(monkeypatch, capsys, tmp_path):
    def fail(*_: object) -> None:
        raise AssertionError
    monkeypatch.setattr(sample, "Trace", fail)
    monkeypatch.setattr(attention, "attention", fail)
    assert run_sample(monkeypatch, capsys, "--instruction", "a star", "--steps", 1, "--out",
                      tmp_path / "a.png")[0] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_the_model_is_left_as_it_was(run):
    model = run.pipe.dit
    assert all(block.attend is dit.attend for block in model.blocks)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    assert not run.pipe.adapter.routings


def test_a_trace_watches_one_picture(bare):
    watch = Trace(sample.denoise, sample.encode_text)
    with pytest.raises(ValueError, match="one picture"):
        sample.edit(bare, TEXT, seed=[0, 1], steps=1, watch=watch)
    picture = sample.edit(bare, TEXT, steps=1)
    with pytest.raises(ValueError, match="has seen no picture"):
        explain(Trace(sample.denoise, sample.encode_text), picture)
    picture.info = {}
    with pytest.raises(ValueError, match="with its texts"):
        explain(watch, picture)


# ---------------------------------------------------------------------------------------- the steps

def test_steps_are_the_run_s(run):
    """x_t as they were, velocities that lead from one to the next, times of the schedule."""
    times, before = dit.schedule(3, 16).tolist(), sample.seeded_noise([0], (64, 64))[0]
    assert [step.number for step in run.trace.steps] == [1, 2, 3]
    for step, t, t_next, after in zip(run.trace.steps, times, times[1:], run.latents):
        assert (step.t, step.t_next) == (t, t_next) and torch.equal(step.xt, before)
        assert torch.allclose(step.xt + (t_next - t) * step.velocity, after[0], atol=1e-6)
        before = after[0]


def test_pictures_on_the_page_are_x0_decoded(run):
    shown = [pixels(found["src"]) for found in run.page.all("img", "x0")]
    vae = run.pipe.vae
    for step, found in zip(run.trace.steps, shown, strict=True):
        with torch.no_grad():
            x0 = vae.decode((step.xt - step.t * step.velocity)[None])[0]
        wanted = ((x0.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(found, wanted)
    assert np.abs(shown[-1].astype(int) - np.asarray(run.picture)).max() <= 1    # the result
    assert not np.array_equal(shown[0], shown[-1])


def test_what_is_said_of_the_steps(run):
    """From when on layout and detail stay near the end: from the pictures on the page."""
    shown = [pixels(found["src"]).astype(float) for found in run.page.all("img", "x0")]

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means = np.kron(x.reshape(4, 16, 4, 16, 3).mean((1, 3)), np.ones((16, 16, 1)))
        return means, x - means
    ends = parts(shown[-1])
    far = np.array([[((part - end) ** 2).mean() ** 0.5 / max((end - end.mean((0, 1))).std(), 1)
                     for part, end in zip(parts(x), ends)] for x in shown])  # (steps, 2)
    first = [1 + max((i + 1 for i, lacks in enumerate(column) if lacks > 0.1), default=0)
             for column in far.T]
    assert (f"The layout is within 10% of its final state from step {first[0]} of 3, the detail "
            f"from step {first[1]}.") in run.page.text
    assert f"by {far[0, 0]:.0%} in layout and by {far[0, 1]:.0%} in detail" in run.page.text


def test_steps_move_more_at_the_end_only_where_they_do():
    assert "again towards the end" in regrown([0.3, 0.1, 0.2])
    assert not regrown([0.3, 0.2, 0.1]) and not regrown([0.3]) and not regrown([])


def test_at_most_eight_steps_are_shown():
    assert attention.spread(28, 8) == [0, 4, 8, 12, 15, 19, 23, 27]
    assert attention.spread(3, 8) == [0, 1, 2] and attention.spread(1, 8) == [0]
    assert attention.spread(57, 9)[-1] == 56 and len(attention.spread(57, 9)) == 9


# ----------------------------------------------------------------------------------- where it looks

def dense(q: torch.Tensor, k: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) with rotations as sines and cosines, a mean over heads, (S', S)."""
    def turned(x: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * pe.real - b * pe.imag, a * pe.imag + b * pe.real], -1).flatten(-2)
    scores = turned(q, pe[:q.shape[2]]) @ turned(k, pe).transpose(2, 3) / q.shape[-1] ** 0.5
    return (scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(1)[0]


def test_attention_is_that_of_a_dense_recomputation(run):
    """Of a double, a single, and the last block, on the page too; rows sum to 1."""
    step, seen = run.trace.steps[1], {}
    blocks, texts = [0, 4, 8], run.trace.texts
    plain = dit.attend
    for number in blocks:
        def beside(q, k, v, pe, number=number):
            seen[number] = dense(q, k, pe)[texts:texts + 16]
            return plain(q, k, v, pe)
        run.pipe.dit.blocks[number].attend = beside
    try:
        with torch.no_grad(), export.merged(run.pipe.dit, run.pipe.adapter, run.trace.given.txt,
                                            run.trace.given.pooled):
            run.pipe.dit(*step.args)
    finally:
        for number in blocks:
            run.pipe.dit.blocks[number].attend = plain
    read = run.page.data["read"]
    shown = run.page.attention[1]                        # (entries, cells, keys)
    assert abs(run.page.attention.sum(-1) - 1).max() < 1e-3
    for number in blocks:
        found, wanted = step.attention[number], seen[number]
        assert found.shape == wanted.shape == (16, texts + 3 * 16)
        assert (found - wanted).abs().max() < 1e-5 and wanted.std() > 1e-3
        reduced = torch.cat([wanted[:, :read], wanted[:, read:texts].sum(1, keepdim=True),
                             wanted[:, texts:]], 1)
        assert np.abs(shown[1 + number] - reduced.numpy()).max() < 2e-5
    assert np.abs(shown[0] - shown[1:].mean(0)).max() < 2e-5


def test_the_page_opens_where_the_reference_is_read_most(run, bare):
    data, first = run.page.data, run.page.attention[0]
    start, end = data["spans"][2]                        # the reference
    read = first[1:, data["cell"], start:end].sum(1)
    assert data["entry"] == 1 + read.argmax()
    place = first[data["entry"], data["cell"], start:end].argmax()
    told = re.search(r"asks in block (.*?), where .*?: (\d+)% of its .*? most to (.*?), row (\d+), "
                     r"column (\d+)", run.page.text).groups()
    own = "its own place" if place == data["cell"] else "another place"
    assert told == (run.page.entries[data["entry"]], f"{100 * read.max():.0f}", own,
                    str(place // 4), str(place % 4))
    assert Run(bare, images=(), steps=1).page.data["entry"] == 0


def test_attention_in_chunks_and_cells(monkeypatch):
    """A large picture in cells is the sum and mean of its tokens; no more is held than CHUNK."""
    grid = Grid("target", 0, 20, 36, 0)
    S = 5 + 2 * 720
    q, k = (randn(1, 3, S, 16, seed=seed) for seed in (1, 2))
    pe = dit.rope(torch.cat([torch.zeros(5, 3), dit.position_ids(40, 72),
                             dit.position_ids(40, 72, 1)]), (4, 6, 6))
    asking, cells = grid.cell_of(8), grid.cell_of(16)
    asked = torch.cat([torch.arange(5), cells + 5, cells + 5 + 256])
    held, plain = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: held.append(x.numel()) or
                        plain(x, dim))
    monkeypatch.setattr(attention, "CHUNK", 100_000)
    found = attention.attention(q, k, pe, range(5, 725), asking, asked)
    assert max(held) <= 100_000 and len(held) > 3
    whole = dense(q, k, pe)[5:725]
    for cell in (0, 9, 63):
        rows = whole[asking == cell].mean(0)
        wanted = torch.stack([rows[asked == key].sum() for key in range(5 + 2 * 256)])
        assert (found[cell] - wanted).abs().max() < 1e-6
    assert found.shape == (64, 517) and torch.allclose(found.sum(1), torch.ones(64), atol=1e-5)


def test_fewer_blocks_are_watched_where_there_are_many_tokens(bare, monkeypatch):
    """So that a page stays small; it says so."""
    monkeypatch.setattr(trace, "WEIGHTS", 4 * 16 * (28 + 16 + 16) + 1)
    page = Run(bare, steps=1).page
    assert page.entries == ["mean of 4 blocks", "double 0", "single 0", "single 2", "single 5"]
    assert "Of 9 blocks 4 are watched" in page.text and page.attention.shape[:2] == (1, 5)


def test_grids_are_read_from_positions():
    ids = torch.cat(dit.reference_ids([(8, 12), (6, 4)]))
    assert attention.grids_of(ids, "reference") == [Grid("reference", 1, 4, 6, 0),
                                                    Grid("reference", 2, 3, 2, 6)]
    assert attention.grids_of(None, "reference") == []


def test_the_first_token_is_shown_without_scripts(run):
    """Words and veils of the page as it is loaded are those of its first step."""
    data = run.page.data
    row = run.page.attention[0, data["entry"], data["cell"]]
    shades = [float(re.search(r"--a:([\d.]+)", found["style"])[1])
              for found in run.page.all("button", "word")]
    each = row[:len(shades)] / np.array(data["many"])    # padding is many tokens
    assert sum(data["many"]) == run.trace.texts
    wanted = np.minimum(each / each[:data["read"]].max(), 1)
    told = re.findall(r"<small>([\d.]+)%</small></button>", run.page.text)
    assert np.abs(np.array(told, float) / 100 - row[:len(shades)]).max() < 6e-4
    assert len(shades) == len(data["words"]) and np.abs(np.array(shades) - wanted).max() < 0.01
    veils = [pixels(found["src"])[..., 3] for found in run.page.all("img", "veil")]
    assert len(veils) == 4                               # target, reference, condition; a word
    for found, (start, end) in zip(veils, data["spans"][1:]):
        part = row[start:end].reshape(4, 4)
        assert np.abs(found - 225 * (1 - part / part.max())).max() <= 2


# -------------------------------------------------------------------------------------- the adapter

def test_shares_are_the_router_s(run):
    rows = re.findall(r'<tr data-layer="(.*?)">(.*?)</tr>', run.page.text)
    own = routing_maps.shares(run.pipe.adapter, *sample.encode_text(run.pipe, [TEXT]))
    assert [name for name, _ in rows] == list(own) and len(own) == 9
    for name, cells in rows:
        p = np.array([float(value) for value in re.findall(r'data-p="([\d.]+)"', cells)])
        kept = [" kept" in kind for kind in re.findall(r'<td class="(.*?)"', cells)]
        assert np.abs(p - own[name].p[0].numpy()).max() < 1e-6 and abs(p.sum() - 1) < 1e-5
        assert kept == own[name].kept[0].tolist() and sum(kept) == 4


def test_other_instructions_are_compared(run):
    """By their own shares, in the order of the examples."""
    rows = re.findall(r'data-moved="(.*?)" data-changing="(.*?)">.*?</td><td>(.*?)</td>',
                      run.page.text)
    assert len(rows) == 6
    own, other = (routing_maps.shares(run.pipe.adapter, *sample.encode_text(run.pipe, [text]))
                  for text in (TEXT, rows[2][2]))
    apart = [0.5 * (own[name].p - other[name].p).abs().sum() for name in own]
    lost = [(own[name].kept & ~other[name].kept).sum() / 4 for name in own]
    assert abs(float(rows[2][0]) - np.mean(apart)) < 1e-6
    assert abs(float(rows[2][1]) - np.mean(lost)) < 1e-6


@pytest.mark.parametrize("p, moved, changing, words", [
    ([[0.26, 0.25, 0.25, 0.24]], 0.001, 0.05, ["nearly even", "hardly differs",
                                              "lie 0.0000, next"]),
    ([[0.7, 0.12, 0.1, 0.08]], 0.2, 0.2, ["clearly more", "differs a little", "0.450 from even"]),
    ([[0.4, 0.3, 0.2, 0.1]], 0.4, 0.6, ["differs clearly", "60% of the kept", "lie 0.1000.",
                                        "others by 50% (1 - k/E)", "here it is 0.700"]),
    ([[0.251, 0.2501, 0.25, 0.2489]], 0.01, 0.45, ["near chance", "next to ties", "45% of the"]),
    ([[0.4, 0.3, 0.2, 0.1]], None, None, ["no other instruction"])])
def test_what_is_said_of_the_routing_comes_from_its_numbers(p, moved, changing, words):
    others = Comparison([moved, moved], [changing, changing]) if moved else Comparison()
    p = torch.tensor(p)
    told = re.sub("<.*?>", "", verdict(p, mole.route(p.log(), 2)[2] > 0, others))
    assert all(word in told for word in words), told
    assert "differs clearly" not in told or changing == 0.6


def test_shares_that_look_equal_are_shown_by_their_distance_from_even():
    own = {"a": routing_maps.Shares(torch.tensor([[0.25004, 0.25002, 0.25001, 0.24993]]),
                                    torch.tensor([[True, True, False, False]]))}
    shown = shares_table(own)
    assert ">+40.0<" in shown and ">-70.0<" in shown and "in units of 1e-06" in shown
    own["a"] = own["a"]._replace(p=torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert ">0.3000<" in shares_table(own) and "in units" not in shares_table(own)


def test_another_text_s_routing_is_what_the_page_shows(trained):
    """With route_by: the shares, what is kept, the plain LoRA, are that text's, as in the run."""
    other = "Follow the edges: a black square on a yellow background."
    watched = Run(trained, steps=1, route_by=other)
    own, of_the_instruction = (routing_maps.shares(
        trained.adapter, *sample.encode_text(trained, [text])) for text in (other, TEXT))
    rows = dict(re.findall(r'<tr data-layer="(.*?)">(.*?)</tr>', watched.page.text))
    for name, cells in rows.items():
        kept = [" kept" in kind for kind in re.findall(r'<td class="(.*?)"', cells)]
        used = (watched.trace.weights[name][0] > 0).tolist()
        assert kept == used == own[name].kept[0].tolist()
        p = [float(value) for value in re.findall(r'data-p="([\d.]+)"', cells)]
        assert np.abs(np.array(p) - own[name].p[0].numpy()).max() < 1e-6
    assert any(not torch.equal(own[name].kept, of_the_instruction[name].kept) for name in own)
    assert f"<tr><th>routed by</th><td>{other}</td></tr>" in watched.page.text
    assert f"<q>{other}</q>" in watched.page.text and "exactly the same shares" in watched.page.text
    assert watched.page.after("blockquote") == TEXT


def test_how_far_the_picture_moves_with_other_experts(run):
    """Those of the instruction whose choice differs most: as sample.edit(route_by=...) does it."""
    changing = [float(part) for part in re.findall(r'data-changing="(.*?)"', run.page.text)]
    shown = re.search(r"with the experts of <q>(.*?)</q>, (\d+)% of them others.*?differ by "
                      r"([\d.]+) of 255 on average; without the adapter by ([\d.]+)",
                      run.page.text)
    text, part, experts, bare = shown.groups()
    wanted = sample.edit(run.pipe, TEXT, PICTURE, PICTURE, steps=3, route_by=text)
    apart = np.abs(np.asarray(wanted).astype(float) - np.asarray(run.picture)).mean()
    assert abs(float(experts) - apart) <= 0.051 and abs(float(part) / 100 - max(changing)) < 0.006
    found = run.trace.decode(run.trace.again()).astype(float)
    assert abs(float(bare) - np.abs(found - np.asarray(run.picture)).mean()) <= 0.051


@pytest.mark.parametrize("kind, here, not_here", [
    ("instructmole", ["A router sees the instruction and nothing else", "had the adapter merged",
                      "plain LoRA on 49 layers", "on 9 layers 8 experts of rank 8",
                      "without its experts alone"], ["each token's own input"]),
    ("soft", ["p = softmax( G z / temperature )"], ["p = softmax( G z )"]),
    ("standardised", ["p = softmax( G ((z &minus; mean) / deviation) )"], ["softmax( G z )"]),
    ("token", ["see each token's own input", "had the adapter beside the weights"],
     ["nothing else", "merged into the weights", "served by the same"]),
    ("lora", ["plain LoRA on", "had the adapter merged"], ["router", "Experts", "experts alone"]),
    ("bare", ["no adapter in this run"], ["router", "had the adapter", "Experts"])])
def test_what_is_said_of_the_adapter_is_true_of_it(bare, kind, here, not_here):
    pipe = bare if kind == "bare" else make_pipeline(kind)
    if pipe.adapter:
        pipe.adapter.eval()
    page = Run(pipe, steps=1).page.text
    said = "".join(re.search(f'<section id="{stage}">.*?(<details|</section>)', page, re.S)[0]
                   for stage in ("routing", "effect"))
    said = re.sub("<.*?>", "", said)
    assert all(words in said for words in here), said
    assert not any(words in said for words in not_here), said


def test_what_the_adapter_does_to_a_block(run):
    """Beside blocks whose matrices B are zero: all of them, or those of the experts."""
    pipe, given, step = run.pipe, run.trace.given, run.trace.steps[0]
    first, rows = [0, 5], re.findall(r'data-change="(.*?)" data-experts="(.*?)"', run.page.text)
    effects = run.trace.effects()
    for number in first:
        block, seen, part = pipe.dit.blocks[number], [], slice(28, 44) if number > 2 else slice(16)
        hook = block.register_forward_hook(lambda _, args, out: seen.append((args, out)))
        with torch.no_grad(), pipe.adapter.serve(given.txt, given.pooled):
            pipe.dit(*step.args)
            hook.remove()
            (args, whole), outs = seen[0], []
            layers = [m for m in block.modules() if isinstance(m, (mole.LoRALinear,
                                                                   mole.MoLELinear))]
            for kinds in ((mole.MoLELinear,), (mole.LoRALinear, mole.MoLELinear)):
                matrices = [getattr(m, "experts_B" if isinstance(m, mole.MoLELinear) else "lora_B")
                            for m in layers if isinstance(m, kinds)]
                kept = [B.detach().clone() for B in matrices]
                for B in matrices:
                    B.zero_()
                outs.append(block(*args))
                for B, old in zip(matrices, kept):
                    B.copy_(old)
        fewer, bare, x, whole = (
            (state[1][0] if number < 3 else state[0] if isinstance(state, list) else state[0][0])
            [:, part] for state in (*outs, args, whole))
        change = (whole - bare).norm() / (bare - x).norm()
        experts = (whole - fewer).norm() / (whole - bare).norm()
        assert abs(effects[0].change[number] - change) < 1e-4 * max(1, change)
        assert abs(effects[0].experts[number] - experts) < 1e-4
        mean = np.mean([effect.change[number] for effect in effects])
        assert abs(float(rows[number][0]) - mean) < 1e-5 and mean > 0.01
    assert all(effect.off < 1e-4 for effect in effects)


def test_the_picture_without_the_adapter(run, bare):
    wanted = sample.edit(bare, TEXT, PICTURE, PICTURE, steps=3)
    found = run.trace.decode(run.trace.again())
    assert np.array_equal(found, np.asarray(wanted))
    assert not np.array_equal(found, np.asarray(run.picture))
    shown = [pixels(image["src"]) for image in run.page.all("img")
             if image["alt"] == "made without the adapter"]
    assert len(shown) == 1 and np.array_equal(shown[0], found)


def test_the_difference_is_shown_enlarged(run):
    apart = np.abs(np.asarray(run.picture).astype(int)
                   - run.trace.decode(run.trace.again()))
    image = next(found for found in run.page.all("img") if "the difference" in found["alt"])
    factor = int((re.findall(r"enlarged (\d+) times", image["alt"]) or [1])[0])
    assert np.array_equal(pixels(image["src"]), apart * factor)
    assert 127 < apart.max() * factor < 256


# ---------------------------------------------------------------------------------------- the lines

def listings(page: Page) -> list[tuple[str, int, list[str]]]:
    """File, number of the first line, lines."""
    found = []
    for head, body in re.findall(r'<figure class="code" (.*?)>.*?<pre.*?>(.*?)</pre>', page.text,
                                 re.S):
        file, first = re.search(r'data-file="(.*?)" data-first="(\d+)"', head).groups()
        reader = HTMLParser()
        texts = []
        reader.handle_data = texts.append
        reader.feed(re.sub(r'<span class="number">\d+</span>', "", body))
        found.append((file, int(first), "".join(texts).split("\n")))
    return found


def test_lines_are_those_of_the_files(run):
    found = listings(run.page)
    assert len(found) == 20
    for file, first, lines in found:
        own = (ROOT / file).read_text().splitlines()[first - 1:first - 1 + len(lines)]
        indent = min(len(line) - len(line.lstrip()) for line in own if line.strip())
        assert [line[indent:].rstrip() for line in own] == lines, (file, first)


def statements(file: str, first: int, last: int) -> set[int]:
    """First lines of the statements of functions that stand there, without docstrings."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not text and not isinstance(
                node, (ast.FunctionDef, ast.Raise)):
            found.add(node.lineno)
    return {line for line in found if first <= line <= last}


def test_lines_are_those_that_ran(trained):
    """Of each passage most statements, and its last one; others are other cases."""
    ran: set[tuple[str, int]] = set()
    names: dict[str, str | None] = {}

    def watch(frame: object, event: str, _: object) -> object:
        path = frame.f_code.co_filename
        if path not in names:
            inside = Path(path).is_relative_to(ROOT)
            names[path] = Path(path).relative_to(ROOT).as_posix() if inside else None
        if names[path] is None:
            return None
        ran.add((names[path], frame.f_lineno))
        return watch
    sys.settrace(watch)
    try:
        watched = Run(trained, steps=1)
    finally:
        sys.settrace(None)
    for file, first, lines in listings(watched.page):
        wanted = statements(file, first, first + len(lines) - 1)
        done = {line for line in wanted if (file, line) in ran}
        assert len(done) > 0.55 * len(wanted), (file, first, sorted(wanted - done))
        assert max(wanted) in done, (file, first, max(wanted))


def test_a_passage_that_is_gone_is_an_error():
    def function() -> int:
        x = 1                                            # one
        return x
    whole = passages.passage(function)
    assert whole.lines[0] == "def function() -> int:" and whole.lines[-1] == "    return x"
    part = passages.passage(function, "x = 1", "return")
    assert part.lines[1] == "return x" and part.first == whole.first + 1
    assert passages.passage(function, "return").lines == ["return x"]
    assert part.file == "tests/test_explain.py"
    for words in (("gone",), ("x = 1", "gone")):
        with pytest.raises(ValueError, match="holds 'gone' any more"):
            passages.passage(function, *words)


# ----------------------------------------------------------------------------------------- the page

def test_a_page_stands_by_itself(run):
    """Nothing comes from elsewhere; each picture says what it is; a tiny page is small."""
    page = run.page
    for _, found, _ in page.elements:
        for name in ("src", "href", "data", "poster", "action"):
            assert found.get(name, "#").startswith(("data:image/", "#")), found
    assert not re.search(r"https?:|@import|url\(", page.text)
    assert all(found.get("alt") or found["class"] == "veil pixels" for found in page.all("img"))
    ids = [found["id"] for _, found, _ in page.elements if "id" in found]
    assert len(ids) == len(set(ids)) and len(page.all("section")) == 9
    assert {found["href"][1:] for found in page.all("a")} <= set(ids)
    assert len(page.text) < 3_000_000 and "{{" not in page.text
    assert not re.search(r"[\s>:]nan\b", page.text)
    for section in re.findall(r"<section.*?</section>", page.text, re.S):
        assert re.search(r'class="equation">\S', section) and '<figure class="code"' in section
        assert section.count("<tr><th><code>") or 'id="asked"' in section


def test_sizes_that_are_said_are_the_run_s(run):
    """Of the model, and of the letters; how many pictures were given, and how."""
    text, pipe = run.page.text, run.pipe
    added = sum(p.numel() for p in pipe.adapter.tensors().values()) / 1e6
    assert (f"3 double and 6 single blocks of width 128, 3.5 million numbers; its adapter adds "
            f"{added:.1f} million" in text)
    assert "19 + 38 blocks of width 3,072" in text
    letters = dict(re.findall(r"<th><code>([A-Zhwrkd, ]+)</code></th><td><code>(.*?)</code>", text))
    assert {name: letters[name] for name in ("T", "I", "R", "Q", "S", "D", "E, k, r")} == {
        "T": "28", "I": "16", "R": "16", "Q": "16", "S": "76", "D": "128", "E, k, r": "8, 4, 8"}
    assert "This run has 1 reference and 1 condition." in text and "T | I | R | Q" in text


def test_strips_say_their_scale(run):
    """And the picture of z is as full as that: opaque from there on."""
    with torch.no_grad(), run.pipe.adapter.serve(*run.trace.given.routed_by) as routing:
        z = routing.z[0].numpy()
    full = np.quantile(np.abs(z), 0.99)
    for name, values in (("z, the instruction vector", z),
                         ("CLIP's vector", run.trace.given.pooled[0].numpy())):
        assert (f"{name}, {len(values)} channels, from {values.min():.2g} to {values.max():.2g}; "
                in run.page.text)
    assert f"the fullest colours are at {full:.2g}, clear is 0" in run.page.text
    image = next(found for found in run.page.all("img") if found["alt"].startswith("z, the"))
    assert np.array_equal(pixels(image["src"])[0, :, 3] == 255, np.abs(z) / full > 254.5 / 255)


HOSTILE = "a <b>\"star\"</b> & 'it' </script><script>alert(1)</script> {{data}} \u661f\u202e"


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>.png", "\"quoted\" & 'such'.png",
                                  "\u0430\u0431\u0432 \u661f.png"])
def test_text_is_text(tmp_path, bare, name):
    """Never markup, wherever it stands; nor a place of the frame."""
    Image.open(PICTURE).save(tmp_path / name)
    plain = Run(bare, "a star", PICTURE, PICTURE, steps=1).page
    page = Run(bare, HOSTILE, tmp_path / name, tmp_path / name, steps=1).page
    assert page.after("blockquote") == HOSTILE
    assert f"reference {name}" in page.words and f"condition {name}" in "".join(page.words)
    kinds = [{tag for tag, _, _ in one.elements} for one in (plain, page)]
    assert kinds[1] <= kinds[0] | {"s"} and len(page.all("script")) == 3     # "s": it is cut
    assert not any(key.startswith("on") for _, found, _ in page.elements for key in found)


def test_what_is_cut_is_struck_through(bare):
    page = Run(bare, "a star " * 20, (), steps=1).page
    pieces = bare.t5_tokens.model.encode("a star " * 20)
    lost = sum(len(part.tokens) - sum(part.special_tokens_mask) for part in pieces.overflowing)
    assert lost > 5 and f"nobody reads its {lost} tokens" in page.text
    assert f"nobody reads its {lost} tokens" not in Run(bare, "a star", (), steps=1).page.text
    shown = re.search(r"T5 reads</h3>(.*?)</p>", page.text, re.S)[1]
    assert shown.count("<s>") == lost and shown.count("<b>") == 28


@pytest.mark.parametrize("kind, more", [
    ("bare", {}), ("bare", {"images": (), "conds": ()}), ("token", {}), ("lora", {}),
    ("trained", {"images": [PICTURE, PICTURE], "size": (96, 64)}),
    ("trained", {"images": np.zeros((40, 30, 3), np.uint8), "keep_size": True}),
    ("trained", {"images": PICTURE, "mask": Image.new("L", (64, 64), 128)})])
def test_every_kind_of_run_has_its_page(bare, trained, kind, more):
    pipe = {"bare": bare, "trained": trained}.get(kind) or make_pipeline(kind)
    if pipe.adapter:
        pipe.adapter.eval()
    page = Run(pipe, **({"conds": f"canny:{PICTURE}", "steps": 1} | more)).page
    assert len(page.all("section")) == 9 and "{{" not in page.text
    told = "".join(page.words)
    assert ("no adapter in this run" in told) == (pipe.adapter is None)
    assert ("No layer of this adapter is routed by the instruction" in told) == (
        kind in ("token", "lora"))
    assert ("A mask held" in told) == ("mask" in more)


def test_large_pictures_are_made_small():
    """And said to be; small ones are there to the byte."""
    large = np.random.default_rng(0).integers(0, 256, (1000, 700, 3), np.uint8)
    found = re.search(r'src="(.*?)"', figures.picture(large, "x"))[1]
    assert pixels(found).shape[:2] == (384, 269) and found.startswith("data:image/jpeg")
    small = large[:128, :64]
    assert np.array_equal(pixels(re.search(r'src="(.*?)"', figures.picture(small, "x"))[1]), small)


# -------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("more, words", [
    (["--num", "2"], "--num 2"), (["--compile"], "--compile"),
    (["--export-lora", "a.safetensors"], "without --out")])
def test_what_a_page_cannot_explain(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.devices.check_compiler", lambda: None)
    code, out, err = run_sample(monkeypatch, capsys, "--instruction", "a star", "--explain",
                                "page.html", *more)
    assert code == 2 and out == "" and err.startswith("error: --explain page.html: ")
    assert words in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("page, words", [
    ("page.txt", ".html"), ("page", ".html"), ("gone/page.html", "folder"), (".html", ".html"),
    ("there.html", "is a folder")])
def test_names_that_no_page_can_have(tmp_path, monkeypatch, capsys, page, words):
    monkeypatch.chdir(tmp_path)
    Path("there.html").mkdir()
    code, out, err = run_sample(monkeypatch, capsys, "--instruction", "a star", "--explain", page)
    assert code == 2 and out == "" and err.startswith(f"error: --explain {page}: ")
    assert words in err and err.count("\n") == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_batch_is_not_explained(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a star"}\n')
    code, out, err = run_sample(monkeypatch, capsys, "--batch", tmp_path / "a.jsonl", "--explain",
                                tmp_path / "page.html")
    assert code == 2 and out == "" and "--batch" in err and err.count("\n") == 1


def test_the_command_is_quoted_for_its_shell():
    words = ["python", "sample.py", "--instruction", 'a "star" and a moon', "--out", "a.png"]
    assert shlex.split(as_typed(words, windows=False)) == words
    assert as_typed(words, windows=True) == (
        'python sample.py --instruction "a \\"star\\" and a moon" --out a.png')


# ------------------------------------------------------------------------------------ tiny/pages.py

def test_pages_show_the_right_answer(trained):
    page = Page(pages.page(trained, "move"))
    test = world.tiny_test("move", 1)[0]
    shown = {found["alt"]: found["src"] for found in page.all("img")}
    assert page.after("blockquote") == test.instruction
    assert np.array_equal(pixels(shown["the right answer"]), test.target)
    assert np.array_equal(pixels(shown["given: reference 1"]), test.images[0])
    assert "python -m tiny.pages move" in page.text
    dB = [psnr(pixels(shown[name]), test.target)
          for name in ("made with the adapter", "given: reference 1", "made without the adapter")]
    assert (f"right answer: result {dB[0]:.1f} dB, given picture {dB[1]:.1f} dB (higher is nearer)"
            in page.text)
    assert f"{dB[2]:.1f} dB without it, {dB[0]:.1f} dB with it" in page.text


def test_pages_of_tasks_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "page", lambda pipe, task: task)
    out = tmp_path / "out"
    code, printed, _ = run_command(monkeypatch, capsys, "pages.py", pages.main, "--out", out)
    assert code == 0 and {file.name for file in out.iterdir()} == {
        f"{task}.html" for task in ("t2i", "move", "canny", "mixed")}
    families = [next(i for i, group in enumerate(world.GROUPS) if task in group)
                for task in pages.TASKS]
    assert families == [0, 1, 2, 3]                      # one of each
    for arguments, words in ((["swim"], "swim: no such task"), (["move", "--keep"], "leave out")):
        code, _, err = run_command(monkeypatch, capsys, "pages.py", pages.main, *arguments)
        assert code == 2 and words in err
    monkeypatch.setattr(pages, "which", lambda name: None)
    code, _, err = run_command(monkeypatch, capsys, "pages.py", pages.main, "--keep")
    assert code == 2 and "a browser takes the picture" in err


def test_the_page_that_is_kept_is_small():
    assert 0 < (ROOT / "tiny/examples/explained.html").stat().st_size < 2_000_000
    with Image.open(ROOT / "tiny/examples/explained.png") as image:
        assert image.width == 1280
