"""What a tiny adapter can do, and what its routing decides.

tiny/experiment.py asks for flow_losses(), scores(), decisions() and cosine() of what it trains.

Key: B pictures of a batch; N tokens; E experts; p shares before the top k; w weights after it.
"""
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dit
from data import stack
from evaluate import make_pictures, success
from mole import MoLELinear, Routing
from sample import Pipeline, condition, encode_picture
from support import routing_maps
from support.adapters import mixtures
from support.configs import read_json
from support.files import write_json
from support.pictures import to_tensor
from support.scores import psnr
from tiny import conflict, world
from train import matching_loss

STEPS, GUIDANCE = 12, 2.5
SHIFT = 6.0                                              # of the times t in training
TIMES = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (0.1, 0.3, 0.5, 0.7, 0.9)]   # 0.4 to 0.98
# Tasks that are given as many pictures, and so can share a batch.
TOGETHER = (("canny", "depth", "pose", "fill", "subject"), ("multi", "mixed"), conflict.TASKS)
SLOT = {"a": r"[a-z]+ [a-z]+", "colour": "[a-z]+", "shape": "[a-z]+", "place": "[a-z ]+",
        "place2": "[a-z ]+", "scene": ".+", "things": ".+", "first": "first|second",
        "second": "first|second", "map": "edges|depth map", "rest": ".*"}


# ------------------------------------------------------------------------------------------ scores

def scenes(task: str, number: int, validation: bool) -> list:
    """Held-out samples of a task: of validation's quarter of the held-out scenes, or of the rest.

    An edit belongs where the scene after it does. In conflict a test's are others than those on
    which the setting was looked for.
    """
    own, number_of = task in world.WORDINGS, [*world.WORDINGS, *conflict.TASKS].index(task)
    draw = world.tiny_sample if own else conflict.conflict_sample
    test = 0 if own else 2
    rng, chosen = np.random.default_rng([1 if validation else test, number_of]), []
    while len(chosen) < number:
        sample = draw(rng, task, held_out=True)
        if (sample.scene.digest() // 10 % 4 == 0) == validation:
            chosen.append(sample)
    return chosen


def unseen(task: str, text: str) -> bool:
    """Whether an instruction has one of the two wordings that training never uses."""
    text = text[0].lower() + text[1:].rstrip(".").replace("an orange", "a orange")
    for wording in world.WORDINGS.get(task, ())[-2:]:    # those in conflict have no such
        parts = re.split(r"\{(\w+)\}", wording)          # text, slot, text, slot, ...
        pattern = "".join(f"({SLOT[part]})" if i % 2 else re.escape(part)
                          for i, part in enumerate(parts))
        if re.fullmatch(pattern, text):
            return True
    return False


def marks(each: list[bool]) -> str:
    """A digit for each picture, in the order of scenes(): as all adapters are scored on the same
    ones, two can be compared picture by picture."""
    return "".join(str(int(one)) for one in each)


def scores(pipe: Pipeline, tasks: tuple[str, ...], number: int, work: Path) -> dict[str, dict]:
    """Success and PSNR on each task's test scenes; tasks that were scored before are in `work`."""
    file = work / f"scores-{number}.json"
    done = read_json(file) if file.is_file() else {}
    for task in tasks:
        if task in done:
            continue
        samples = scenes(task, number, False)
        pictures = make_pictures(pipe, samples, STEPS, GUIDANCE)
        right = [success(picture, s) for picture, s in zip(pictures, samples)]
        new = [unseen(task, s.instruction) for s in samples]
        known = [ok for ok, other in zip(right, new) if other]
        done[task] = {
            "number": number, "success": float(np.mean(right)), "right": marks(right),
            "unseen": len(known), "success_unseen": float(np.mean(known)) if known else None,
            "unseen wording": marks(new),
            "psnr": float(np.mean([psnr(p, s.target) for p, s in zip(pictures, samples)]))}
        write_json(file, done)
    return done


@torch.no_grad()
def flow(pipe: Pipeline, samples: list, first: int = 0) -> float:
    """Flow loss of samples of one kind, a mean over TIMES; number i has the noise of first + i."""
    given = condition(pipe, [s.instruction for s in samples], stack(s.images for s in samples),
                      stack(s.conds for s in samples))
    latents = pipe.vae.latents(*encode_picture(pipe, to_tensor([s.target for s in samples])))
    x0 = dit.pack(latents.float())                       # (B, I, P)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(i))
                         for i in range(first, first + len(samples))]).to(x0)
    return float(np.mean([
        matching_loss(pipe, given, x0, noise, x0.new_full((len(x0),), t), latents.shape[-2:],
                      recompute=False)["flow"].item() for t in TIMES]))


def flow_losses(pipe: Pipeline, tasks: tuple[str, ...], validation: bool) -> dict[str, float]:
    """Flow loss on 64 held-out scenes of each task."""
    return {task: round(flow(pipe, scenes(task, 64, validation)), 5) for task in tasks}


# --------------------------------------------------------------------------- what routing decides

WAYS = (  # what becomes of a picture's weights w (B, ..., E) at test time
    "as trained",
    "another's",                                         # w of a picture of another task, by token
    "its task's",                                        # w of another picture of the same task
    "mean",                                              # the layer's mean: nothing is decided
    "even",                                              # that, shared evenly by all experts
    "random",                                            # its own w, on experts drawn by lot
    "none")                                              # no expert serves


class Seen(NamedTuple):
    """What a layer decided, by picture."""
    w: Tensor                                            # (pictures, E)
    kept: Tensor                                         # (pictures, E), of its tokens, 0 to 1
    logits: Tensor                                       # (pictures, E), less their mean
    from_even: Tensor                                    # (pictures,) half the sum of |p - 1/E|
    lost: Tensor                                         # (pictures,) of the kept experts, the part
                                                         # that training's noise would change


class Watch:
    """Sees what the routers of a pass decide, and may decide otherwise.

    first: the number of a batch's first picture; tasks: how many take turns in the batch; mean: w
    of each layer, (E,), over all pictures, once they were seen as trained.
    """

    def __init__(self, pictures: int, mean: dict[str, Tensor] | None = None):
        self.way, self.first, self.tasks = WAYS[0], 0, 1
        self.pictures, self.mean = pictures, mean or {}
        self.seen: dict[str, Tensor] = {}                # of a layer: sums of note(), and calls
        self.noise = torch.Generator().manual_seed(0)
        self.orders: dict[str, Tensor] = {}              # of a layer: random experts, by picture

    def changed(self, name: str, w: Tensor) -> Tensor:
        """w (B, ..., E) in this way."""
        if self.way == "another's":
            return w.roll(1, 0)
        if self.way == "its task's":
            return w.roll(self.tasks, 0)
        if self.way == "none":
            return torch.zeros_like(w)
        if self.way == "random":
            if name not in self.orders:                  # by the layer's name alone
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                self.orders[name] = torch.rand(
                    self.pictures, w.shape[-1], generator=generator).argsort(-1)
            order = self.orders[name][self.first:self.first + len(w)].to(w.device)       # (B, E)
            return w.gather(-1, order.view(len(w), *[1] * (w.dim() - 2), -1).expand_as(w))
        if self.way == "mean":
            return self.mean[name].to(w).expand_as(w)
        if self.way == "even":
            return self.mean[name].mean().to(w).expand_as(w)
        return w

    def note(self, name: str, logits: Tensor, w: Tensor) -> None:
        """Add what a call decides for a batch; logits, w (B, ..., E)."""
        logits, w = logits.detach().float().cpu(), w.detach().float().cpu()
        B, E, kept = len(w), w.shape[-1], (w != 0).float()
        far = 0.5 * (logits.softmax(-1) - 1 / E).abs().sum(-1, keepdim=True)         # (B, ..., 1)
        noisy = logits + torch.randn(logits.shape, generator=self.noise) / E # as in training
        again = noisy.topk(int(kept[0].sum(-1).max()), -1).indices
        lost = 1 - kept.gather(-1, again).mean(-1, keepdim=True)
        columns = torch.cat([w, kept, logits - logits.mean(-1, keepdim=True), far, lost,
                             torch.ones_like(far)], -1)
        if name not in self.seen:
            self.seen[name] = torch.zeros(self.pictures, columns.shape[-1])
        self.seen[name][self.first:self.first + B] += columns.reshape(B, -1, 3 * E + 3).mean(1)

    def of(self, name: str) -> Seen:
        """Means over a layer's calls: sampling steps, flow losses, streams, each counting alike."""
        rows = self.seen[name] / self.seen[name][:, -1:]
        return Seen(*rows[:, :-3].chunk(3, -1), rows[:, -3], rows[:, -2])


@contextmanager
def watched(pipe: Pipeline, watch: Watch) -> Iterator[None]:
    """Within the `with`, `watch` sees and changes the weights of every layer with experts."""
    def instead(layer: MoLELinear, own: Callable) -> Callable:
        def routing_weights(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
            w, loss = own(x, routing)
            if watch.way == WAYS[0]:
                watch.note(layer.name, layer.logits(x if layer.by_token else routing.z), w)
            return watch.changed(layer.name, w), loss
        return routing_weights
    layers = mixtures(pipe.adapter)
    for layer in layers:
        layer.routing_weights = instead(layer, layer.routing_weights)
    try:
        yield
    finally:
        for layer in layers:
            del layer.routing_weights                    # the class's own shows again


def entropy(share: Tensor) -> Tensor:
    """Of a yes-or-no question, in bits."""
    return (torch.special.entr(share) + torch.special.entr(1 - share)) / log(2)


def information(kept: Tensor) -> float:
    """What one expert's being kept tells of the task, in bits, a mean over the experts.

    kept (tasks, E): in which share of a task's pictures, or their tokens, an expert is kept. With
    all tasks as likely it is the mutual information of the two, H(mean) - mean H: at most 1.
    """
    kept = kept.double().clamp(0, 1)
    return (entropy(kept.mean(0)) - entropy(kept).mean(0)).mean().item()


def mixed_batches(number: int, tasks: tuple[str, ...] = world.NEW_TASKS) -> list[list]:
    """The test scenes of the tasks, in batches in which neighbours differ in task.

    A batch's first differs from its last, too.
    """
    batches = []
    for group in filter(None, ([t for t in tasks if t in group] for group in TOGETHER)):
        each = zip(*(scenes(task, number, False) for task in group))
        size, every = 10 * len(group), list(chain.from_iterable(each))
        batches += [every[start:start + size] for start in range(0, len(every), size)]
    return batches


def routed(pipe: Pipeline, watch: Watch, batches: list[list]) -> tuple[dict[str, str], float]:
    """Which pictures of each task are right, routed in the watch's way; the flow loss of all."""
    right: dict[str, list[bool]] = {}
    losses, watch.first = [], 0
    for batch in batches:
        watch.tasks = len({s.task for s in batch})
        with watched(pipe, watch):
            made = make_pictures(pipe, batch, STEPS, GUIDANCE, watch.first, len(batch))
            for picture, s in zip(made, batch):
                right.setdefault(s.task, []).append(success(picture, s))
            losses += len(batch) * [flow(pipe, batch, watch.first)]
        watch.first += len(batch)
    return {task: marks(ok) for task, ok in right.items()}, round(float(np.mean(losses)), 5)


def decisions(pipe: Pipeline, number: int, work: Path, ways: Iterable[str] = WAYS,
              tasks: tuple[str, ...] = world.NEW_TASKS) -> dict[str, dict]:
    """What becomes of the tasks in each way, and measures of the routing by layer.

    right: marks(), by way and task, of so many pictures a task; flow: by way; the rest: by_task().
    What was found before is in `work`. ways: of WAYS, the first one first.
    """
    file, batches = work / f"decisions-{number}.json", mixed_batches(number, tasks)
    found = read_json(file) if file.is_file() else {"right": {}, "flow": {}}
    watch = Watch(sum(map(len, batches)),
                  {name: torch.tensor(w) for name, w in found.get("mean weights", {}).items()})
    for way in ways:
        if way in found["right"]:
            continue
        watch.way = way
        found["right"][way], found["flow"][way] = routed(pipe, watch, batches)
        if way == WAYS[0]:
            layers = {name: watch.of(name) for name in watch.seen}
            watch.mean = {name: seen.w.mean(0) for name, seen in layers.items()}
            found |= {"mean weights": {name: w.tolist() for name, w in watch.mean.items()}}
            found |= by_task(layers, [s.task for batch in batches for s in batch])
        write_json(file, found)
    return found


def by_task(layers: dict[str, Seen], tasks: list[str]) -> dict[str, dict]:
    """Measures of each layer; tasks: of its pictures.

    weights, kept: means for each task and expert; information, and that of shuffled tasks; from
    even, lost: means over all; spread: of the tasks' mean logits, their standard deviation.
    """
    def means(values: Tensor, order: list[str]) -> Tensor:                   # (tasks, E)
        return torch.stack([values[torch.tensor([other == task for other in order])].mean(0)
                            for task in dict.fromkeys(tasks)])
    shuffled = list(np.random.default_rng(0).permutation(tasks))
    measures: dict[str, Callable[[Seen], object]] = {
        "weights": lambda seen: means(seen.w, tasks).round(decimals=4).tolist(),
        "kept": lambda seen: means(seen.kept, tasks).round(decimals=4).tolist(),
        "information": lambda seen: information(means(seen.kept, tasks)),
        "information of shuffled tasks": lambda seen: information(means(seen.kept, shuffled)),
        "from even": lambda seen: seen.from_even.mean().item(),
        "lost": lambda seen: seen.lost.mean().item(),
        "spread": lambda seen: means(seen.logits, tasks).std(0).mean().item()}
    return {what: {name: measure(seen) for name, seen in layers.items()}
            for what, measure in measures.items()}


def cosine(pipe: Pipeline, number: int = 4, tasks: tuple[str, ...] = world.NEW_TASKS) -> float:
    """Mean |cosine| of the outputs of two different experts, on so many scenes of each task."""
    each = []
    for task in tasks:
        alike = routing_maps.expert_similarity(
            pipe.adapter, lambda: flow(pipe, scenes(task, number, True)))
        each.append(alike.fill_diagonal_(torch.nan).nanmean().item())
    return float(np.mean(each))
