"""What the experiment has found, as tables, from the JSON of tiny/results alone.

A test compares the tables in tiny/EXPERIMENT.md with what this makes.

Run: python -m tiny.findings                             # prints the tables, draws the figures
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # Ctrl-C during imports ends in a line
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import numpy as np

from support import report
from support.pictures import save_picture
from support.results import HOLE, markdown
from support.words import note
from tiny import conflict, probe
from tiny.design import (COMPARED, FIRST, FOR_EACH, MORE_SEEDS, RATES, RESULTS, SCALES, SEARCHES,
                         SEEDS, STAGES, flow_loss, found, left, pieces)
from tiny.drawings import FIGURES
from tiny.leads import (ALL_KEPT, Interval, by_variant, by_way, difference, ended, in_company,
                        interference, lead, means, over_layers, over_seeds, right, seeds_of,
                        success, with_routing)
from tiny.world import EDITS, NEW_TASKS

# What leads what, in conflict: does it pay, is it the routing, what of the setting is it, what
# LoRAs for one task win.
LADDER = (("standardised whole", "plain LoRA"), ("standardised whole", "free as one"),
          ("standardised whole", "standardised"), ("standardised whole", "standardised balanced"),
          ("standardised whole", "free with resampler"),
          ("standardised", "standardised as drawn"), ("standardised", "free"),
          ("free with resampler", "strong LoRA beside"), ("strong LoRA beside", "InstructMoLE"),
          (FOR_EACH, "plain LoRA"))
# What was asked; when: before the table's first run, after two of its pieces, or after pilots; the
# stage that answers it, and which variant is to lead which.
QUESTIONS = (
    ("does it pay?", "before", "table", "InstructMoLE", "plain LoRA"),
    ("more than a nearly fixed choice of experts?", "before", "table", "InstructMoLE",
     "routing as drawn"),
    ("and with as strong a LoRA beside?", "after two", "table", "strong LoRA beside", "plain LoRA"),
    ("trained three times as long, does it pay?", "after two", "longer", "InstructMoLE",
     "plain LoRA"),
    ("and with as strong a LoRA beside?", "after two", "longer", "strong LoRA beside",
     "plain LoRA"),
    ("on tasks in conflict, does routing pay?", "after pilots", "conflict", "standardised whole",
     "plain LoRA"),
    ("beside one expert of that size?", "after pilots", "conflict", "standardised whole",
     "free as one"),
    ("is it the whole instruction?", "after pilots", "conflict", "standardised whole",
     "standardised"),
    ("what do LoRAs for one task each win there?", "after pilots", "conflict", FOR_EACH,
     "plain LoRA"),
    ("on the world's own tasks, does that pay?", "after pilots", "table", "standardised whole",
     "plain LoRA"))


def stages_table() -> str:
    """How much of the experiment is there, and what it took, two pieces side by side."""
    def hours(results: list[dict]) -> float:
        return sum(result.get(f"{what}_seconds", 0) for result in results
                   for what in ("training", "scoring")) / 3600
    rows = []
    for stage in STAGES:
        results, (todo, waiting) = found(stage), left(stage)
        to_do = f"{len(todo)} or more" if todo and waiting else f"{len(todo)}"
        to_do = "not known yet" if waiting and not todo else to_do
        rows.append([stage, f"{len(results)}", to_do, f"{hours(results):.1f}"])
    return markdown(["stage", "pieces there", "to do", "hours of one core"], rows)


def variants_table(stage: str = "table") -> str:
    """Each variant: its size, what the search chose, success in percent, minutes of training.

    All over the same seeds; where one of them diverged, fewer are counted.
    """
    return markdown(
        ["variant", "parameters", "rate", "scale", "seeds", "new tasks, %", "edits, %", "minutes"],
        ([name, f"{results[0]['parameters']:,}", f"{results[0]['piece']['lr']:g}",
          f"{results[0]['piece']['scale']:g}", f"{len(results)}",
          over_seeds(results, lambda r: success(r, NEW_TASKS)),
          over_seeds(results, lambda r: success(r, EDITS)),
          f"{np.mean([r['training_seconds'] for r in results]) / 60:.0f}"]
         for name, results in by_variant(stage).items()))


def leads_table(stage: str = "table") -> str:
    """InstructMoLE over each other variant, and what may lead a plain LoRA over that.

    As difference() counts it, over all seeds that both have. The flow loss is in thousandths. In
    conflict: LADDER.
    """
    table = by_variant(stage, SEEDS + MORE_SEEDS)
    pairs = [*(("InstructMoLE", name) for name in table if name != "InstructMoLE"),
             *((name, "plain LoRA") for name in ("strong LoRA beside", "standardised whole"))]
    groups = {"new tasks": NEW_TASKS, "edits": EDITS}
    if stage == "conflict":
        pairs, groups = [*LADDER], {"tasks in conflict": conflict.TASKS}
    tasks = next(iter(groups.values()))
    measures: list[Callable[[dict], np.ndarray]] = [
        *map(right, groups.values()), lambda r: np.array([-1000 * flow_loss(r, tasks)])]
    rows = []
    for ours, theirs in pairs:
        two = [table.get(name, []) for name in (ours, theirs)]
        rows.append([f"{ours} over {theirs}", f"{seeds_of(*two)}",
                     *(lead(*two, cases) for cases in measures)])
    return markdown(["lead", "seeds", *(f"{name}, points" for name in groups),
                     f"flow loss of {next(iter(groups))}, less by 0.001 times"], rows)


def answer(stage: str, two: tuple[str, str], seeds: int, interval: Interval | None) -> str:
    """By the rule, once all seeds are there; where a training diverged there is none."""
    planned = len(SEEDS)
    if set(two) <= set(FIRST.get(stage, ())):
        planned += len(MORE_SEEDS)
    if any("diverged" in r and r["piece"]["variant"] in two for r in found(stage)):
        return "undecided: a training diverged"
    if interval is None:
        return "not measured yet"
    return interval.answer if seeds >= planned else f"open: {seeds} of {planned} seeds"


def answers_table() -> str:
    """QUESTIONS, each with the lead that answers it, of success on the stage's tasks."""
    rows = []
    for question, asked, stage, ours, theirs in QUESTIONS:
        table = by_variant(stage, SEEDS + MORE_SEEDS)
        two = [table.get(name, []) for name in (ours, theirs)]
        interval = difference(*two, right(conflict.TASKS if stage == "conflict" else NEW_TASKS))
        rows.append([question, asked, f"{ours} over {theirs}", str(interval or HOLE),
                     answer(stage, (ours, theirs), seeds_of(*two), interval)])
    return markdown(["question", "asked", "lead", "points (about 95 %)", "answer"], rows)


def tasks_table(stage: str = "table") -> str:
    """Success on each new task, a mean over the seeds, in percent."""
    return markdown(["variant", *NEW_TASKS], (
        [name, *(f"{mean:.1f}" for mean in means(results, NEW_TASKS))]
        for name, results in by_variant(stage).items()))


def wordings_table() -> str:
    """Success on the new tasks where the wording was trained on, and where it was not."""
    def seen(result: dict) -> float:
        tasks = [result["tasks"][task] for task in NEW_TASKS]
        return 100 * float(np.mean([
            (t["success"] * t["number"] - t["success_unseen"] * t["unseen"])
            / (t["number"] - t["unseen"]) for t in tasks]))
    return markdown(["variant", "seen wordings, %", "unseen wordings, %"], (
        [name, over_seeds(results, seen),
         over_seeds(results, lambda r: success(r, NEW_TASKS, "success_unseen"))]
        for name, results in by_variant().items()))


def routing_table(stage: str = "table") -> str:
    """What becomes of success on the tasks when the routing is changed at test time.

    The last column: what routing by its own task gives a picture, beside routing by another's.
    Experts suffer where they are used otherwise than trained: a loss here does not say that
    training without routing is worse.
    """
    header = ["variant", *(f"{way}, %" for way in probe.WAYS), "its task's less another's"]
    return markdown(header, (
        [name,
         *(over_seeds(results, lambda r, way=way: by_way(way)(r).mean()) for way in probe.WAYS),
         lead(results, results, by_way("its task's"), by_way("another's"))]
        for name, results in with_routing(stage).items()))


def routers_table(stage: str = "table") -> str:
    """What the routers have learned, means over layers and seeds; see probe.by_task().

    Bits are of a picture, or where tokens route of a token; those of routing as drawn are few, as
    drawn routers keep about the same experts for all. The noise of training is 1/E: which part of
    the kept experts it would change says how decided a routing is, not what it has learned.
    """
    rows = []
    for name, results in with_routing(stage).items():
        even, spread, lost, told, chance = (over_layers(results, key) for key in (
            "from even", "spread", "lost", "information", "information of shuffled tasks"))
        noise = "none" if name in ("soft", "Expert Race", "Expert Choice") else f"{lost:.1%}"
        rows.append([name, f"{even:.3f}", f"{spread:.3f}", noise,
                     HOLE if name in ALL_KEPT else f"{told:.3f} ({chance:.3f})"])
    return markdown(["variant", "shares from even", "logits between tasks, sd",
                     "kept experts that noise changes", "bits about the task (by chance)"], rows)


def flow_table() -> str:
    """Flow loss on test scenes of the new tasks, and how much more it is when routed otherwise."""
    rows = []
    routed = with_routing()
    for name, results in by_variant().items():
        flows = [r["routing"]["flow"] for r in routed.get(name, [])]
        more = [f"{np.mean([100 * (flow[way] / flow[probe.WAYS[0]] - 1) for flow in flows]):+.1f}"
                if flows else HOLE for way in probe.WAYS[1:]]
        rows.append([name, over_seeds(results, lambda r: flow_loss(r, NEW_TASKS), 4), *more])
    return markdown(["variant", "flow loss", *(f"{way}, %" for way in probe.WAYS[1:])], rows)


def cosines_table() -> str:
    """How alike the experts are: 0 where all are orthogonal."""
    return markdown(["variant", "mean abs. cosine of two experts' outputs"], (
        [name, over_seeds(results, lambda r: r["cosine"], 4)]
        for name, results in with_routing().items()))


def balance_table() -> str:
    """InstructMoLE by the weight of its balance loss, at one rate and scale."""
    weights: dict[float, list[dict]] = {}
    for result in [*ended("balance"), *by_variant().get("InstructMoLE", [])]:
        weights.setdefault(result["config"]["balance_weight"], []).append(result)
    return markdown(["balance weight", "new tasks, %", "edits, %", "shares from even",
                     "bits about the task"], (
        [f"{weight:g}", over_seeds(results, lambda r: success(r, NEW_TASKS)),
         over_seeds(results, lambda r: success(r, EDITS)),
         *(f"{over_layers(results, key):.3f}" for key in ("from even", "information"))]
        for weight, results in sorted(weights.items())))


def summary_table() -> str:
    """Of each variant, in a line: success, what its routing decides and says, its experts.

    Lost is success as trained less that without any expert, or by another task's routing, on the
    same pictures: what the experts do, and what of it their choice does.
    """
    rows, routed = [], with_routing()
    for name, results in by_variant().items():
        without = another = told = cosine = HOLE
        if own := routed.get(name):
            without, another = (lead(own, own, by_way("as trained"), by_way(way))
                                for way in ("none", "another's"))
            cosine = f"{np.mean([result['cosine'] for result in own]):.3f}"
            if name not in ALL_KEPT:
                told = f"{over_layers(own, 'information'):.3f}"
        rows.append([name, f"{len(results)}", over_seeds(results, lambda r: success(r, NEW_TASKS)),
                     f"{np.mean([success(r, EDITS) for r in results]):.1f}", without, another,
                     told, cosine])
    return markdown(["variant", "seeds", "new tasks, % (least, most)", "edits, %",
                     "lost without experts (about 95 %)", "by another task's (about 95 %)",
                     "bits about the task", "cosine"], rows)


def search_table(stage: str = "search") -> str:
    """Flow loss of a search's pieces on validation scenes, a mean over all its tasks.

    Those of the grid, and the least of those tried around its best.
    """
    losses: dict[str, dict[tuple[float, float], float]] = {name: {} for name in SEARCHES[stage]}
    for result in found(stage):
        piece = result["piece"]
        losses[piece["variant"]][piece["lr"], piece["scale"]] = flow_loss(result, piece["tasks"])
    grid, rows = list(product(RATES, SCALES)), []
    for name, values in losses.items():
        around = {setting: values[setting] for setting in values if setting not in grid}
        least = min(around, key=around.get, default=None)
        rows.append([name, *(f"{values[at]:.4f}" if at in values else HOLE for at in grid),
                     f"{around[least]:.4f} at {least[0]:.2g}, {least[1]:.2g}" if least else HOLE])
    return markdown(["variant", *(f"rate {lr:g}, scale {scale:g}" for lr, scale in grid),
                     "the least around them"], rows)


def interference_table() -> str:
    """Success of a task trained alone, with two others, with all, by variant.

    More company is also larger batches and fewer steps for each task: what compares is how much
    more one variant loses by it than the other.
    """
    values = interference()
    columns = [(variant, number) for variant in COMPARED["interference"]
               for number in sorted(values.get(variant, {}))]
    words = {1: "alone", 3: "with two", len(NEW_TASKS): "with all"}

    def cell(by_task: dict[str, list[float]], tasks: Iterable[str]) -> str:
        means = [float(np.mean(by_task[task])) for task in tasks if task in by_task]
        return f"{np.mean(means):.1f}" if len(means) == len(tasks) else HOLE
    return markdown(["task", *(f"{variant}, {words[number]}, %" for variant, number in columns)], (
        [name, *(cell(values[variant][number], tasks) for variant, number in columns)]
        for name, tasks in [*((task, [task]) for task in NEW_TASKS), ("mean", NEW_TASKS)]))


def company_table() -> str:
    """What training with all tasks instead of alone costs, on the same pictures; see difference().

    Apart from `mixed`, too, which alone gains by company.
    """
    def lost(variant: str, tasks: tuple[str, ...]) -> list[dict]:
        """Of each seed, of each picture: 100 where it is right alone and not with all, or -100."""
        alone, with_all = ({one["piece"]["seed"]: right(tasks)(one)
                            for one in in_company(variant, number, tasks)}
                           for number in (1, len(NEW_TASKS)))
        return [{"piece": {"seed": seed}, "lost": alone[seed] - with_all[seed]}
                for seed in alone if seed in with_all]

    def each(one: dict) -> np.ndarray:
        return one["lost"]

    def none(one: dict) -> np.ndarray:
        return np.zeros_like(one["lost"])
    first, second = COMPARED["interference"]
    columns = []
    for tasks in (NEW_TASKS, tuple(task for task in NEW_TASKS if task != "mixed")):
        losses = [lost(variant, tasks) for variant in (first, second)]
        alone = [in_company(variant, 1, tasks) for variant in (second, first)]
        columns.append([*(lead(own, own, each, none) for own in losses), lead(*losses, each),
                        lead(*alone, right(tasks))])
    return markdown(["points (about 95 %)", "all new tasks", "without mixed"], map(list, zip(
        [f"{first} loses by company", f"{second} loses by company", "the first less the second",
         f"alone, {second} over {first}"], *columns)))


def conflict_table() -> str:
    """Success on each task in conflict, a mean over the seeds, in percent, and on all of them."""
    return markdown(["variant", *conflict.TASKS, "mean"], (
        [name, *(f"{mean:.1f}" for mean in means(results, conflict.TASKS)),
         over_seeds(results, lambda one: success(one, conflict.TASKS))]
        for name, results in by_variant("conflict").items()))


TABLES = {"search": (search_table,),
          "table": (variants_table, leads_table, tasks_table, wordings_table, flow_table,
                    routing_table, routers_table, cosines_table),
          "interference": (interference_table, company_table), "balance": (balance_table,),
          "longer": tuple(partial(make, "longer")
                          for make in (variants_table, leads_table, tasks_table)),
          "regimes": (partial(search_table, "regimes"),),
          "conflict": (conflict_table, *(partial(make, "conflict") for make in (
              leads_table, routing_table, routers_table)))}


def tables(finished: bool = False) -> dict[str, str]:
    """All tables of which there are results, by what they tell.

    finished: of the stages alone of which all is there, but for MORE_SEEDS.
    """
    told = {"How much is there": stages_table()}
    for stage, makers in TABLES.items():
        there = [piece.there() for piece in pieces(stage) if piece.seed not in MORE_SEEDS]
        if found(stage) and (not finished or (there and all(there))):
            for make in makers:
                about = getattr(make, "func", make).__doc__.partition("\n")[0]
                told[f"{stage}: {about}"] = make()
    return told


def main() -> None:
    commands.Parser(prog="python -m tiny.findings",
                    description="Tables and figures of the experiment.").parse_args()
    if not any(map(found, STAGES)):
        raise ValueError(f"{RESULTS}: no results yet; python -m tiny.experiment makes them")
    for told, table in {"What was asked": answers_table(), **tables()}.items():
        print(f"{told}\n\n{table}\n")
    if not report.can_draw():
        note("the figures need matplotlib: pip install matplotlib")
    for name, (of_what, draw) in FIGURES.items():
        if of_what() and report.can_draw():
            save_picture(draw(), RESULTS / f"{name}.png")
            print(f"{RESULTS / name}.png")


if __name__ == "__main__":
    commands.run(main)
