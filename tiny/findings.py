"""What the experiment has found, as tables, from the JSON of tiny/results alone.

A test compares the tables in tiny/EXPERIMENT.md with what this makes.

Run: python -m tiny.findings                             # prints the tables, draws the figures
"""
from support import commands

if __name__ == "__main__":
    commands.loading()                                   # Ctrl-C during imports ends in a line
from collections.abc import Iterable
from functools import partial
from itertools import product

import numpy as np

from support import report
from support.pictures import save_picture
from support.results import HOLE, markdown
from support.words import note
from tiny import conflict, probe
from tiny.design import (COMPARED, FIRST, FOR_EACH, MORE_SEEDS, RATES, RESULTS, SCALES, SEARCHES,
                         SEEDS, STAGES, TRIPLES, flow_loss, found, left, pieces)
from tiny.drawings import FIGURES
from tiny.leads import (ALL_KEPT, Interval, alone, by_variant, by_way, difference, ended,
                        in_company, interference, lead, means, over_layers, over_seeds, percents,
                        right, seeds_of, spread_of, success, with_routing)
from tiny.world import EDITS, GROUPS, NEW_TASKS

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
    ("does InstructMoLE pay?", "before", "table", "InstructMoLE", "plain LoRA"),
    ("more than a nearly fixed choice of experts?", "before", "table", "InstructMoLE",
     "routing as drawn"),
    ("with a stronger LoRA beside its experts?", "after two", "table", "strong LoRA beside",
     "plain LoRA"),
    ("does it pay in 4,500 steps?", "after two", "longer", "InstructMoLE", "plain LoRA"),
    ("and with the stronger LoRA?", "after two", "longer", "strong LoRA beside", "plain LoRA"),
    ("on tasks in conflict: does `standardised whole` pay?", "after pilots", "conflict",
     "standardised whole", "plain LoRA"),
    ("more than one expert as large as its eight?", "after pilots", "conflict",
     "standardised whole", "free as one"),
    ("more than with the pooled text alone?", "after pilots", "conflict", "standardised whole",
     "standardised"),
    ("what do LoRAs for one task each win there?", "after pilots", "conflict", FOR_EACH,
     "plain LoRA"),
    ("and on the first seven tasks?", "after pilots", "table",
     "standardised whole", "plain LoRA"))


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
    """Each variant: its size, what the search chose, success in percent, minutes of training."""
    return markdown(
        ["variant", "parameters", "rate", "scale", "seeds", "new tasks, %", "edits, %", "minutes"],
        ([name, f"{results[0]['parameters']:,}", f"{results[0]['piece']['lr']:g}",
          f"{results[0]['piece']['scale']:.3g}", f"{len(results)}",
          over_seeds(results, lambda r: success(r, NEW_TASKS)),
          over_seeds(results, lambda r: success(r, EDITS)),
          f"{np.mean([r['training_seconds'] for r in results]) / 60:.0f}"]
         for name, results in by_variant(stage).items()))


def leads_table(stage: str = "table") -> str:
    """InstructMoLE over each other variant, and what may lead a plain LoRA over that.

    As difference() counts it, over all seeds that both have; once more, by how much the seeds of
    all variants differ. The flow loss is in thousandths. In conflict: LADDER.
    """
    table = by_variant(stage)
    pairs = [*(("InstructMoLE", name) for name in table if name != "InstructMoLE"),
             *((name, "plain LoRA") for name in ("strong LoRA beside", "standardised whole"))]
    what, tasks = "new tasks", NEW_TASKS
    if stage == "conflict":
        pairs, what, tasks = [*LADDER], "tasks in conflict", conflict.TASKS

    def less(result: dict) -> np.ndarray:
        return np.array([-1000 * flow_loss(result, tasks)])
    of_all = spread_of(table, lambda result: success(result, tasks))
    rows = []
    for ours, theirs in pairs:
        if ours in table and theirs in table:
            two = table[ours], table[theirs]
            rows.append([f"{ours} over {theirs}", f"{seeds_of(*two)}", lead(*two, right(tasks)),
                         lead(*two, right(tasks), spread=of_all), lead(*two, less)])
    return markdown(["lead", "seeds", f"{what}, points", "the same, by the spread of all variants",
                     f"flow loss of {what}, less by 0.001 times"], rows)


def comes_first(stage: str, ours: str, theirs: str) -> bool:
    """Whether a comparison has eight seeds, and so an answer."""
    return {ours, theirs} <= set(FIRST.get(stage, ()))


def answer(stage: str, two: tuple[str, str], seeds: int, interval: Interval | None) -> str:
    """By the rule, once all seeds of what comes first are there; three seeds answer nothing."""
    planned = len(SEEDS + MORE_SEEDS)
    if any("diverged" in r and r["piece"]["variant"] in two for r in found(stage)):
        return "undecided: a training diverged"
    if interval is None:
        return "not measured yet"
    if not comes_first(stage, *two):
        return f"none: {seeds} seeds describe"
    return interval.answer if seeds >= planned else f"open: {seeds} of {planned} seeds"


def answers_table(first: bool = False) -> str:
    """QUESTIONS, each with the lead that answers it, of success on the stage's tasks.

    first: those alone that get an answer.
    """
    rows = []
    for question, asked, stage, ours, theirs in QUESTIONS:
        if first and not comes_first(stage, ours, theirs):
            continue
        table = by_variant(stage)
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
    """InstructMoLE by the weight of its balance loss, at one rate and scale.

    Lost: as summary_table() has it; another's: routed by another task's picture.
    """
    weights: dict[float, list[dict]] = {}
    for result in [*ended("balance"), *with_routing().get("InstructMoLE", [])]:
        weights.setdefault(result["config"]["balance_weight"], []).append(result)
    return markdown(["balance weight", "new tasks, %", "lost without experts",
                     "lost by another's", "shares from even", "logits between tasks, sd",
                     "kept experts that noise changes", "bits about the task"], (
        [f"{weight:g}", over_seeds(results, lambda r: success(r, NEW_TASKS)),
         *(lead(results, results, by_way("as trained"), by_way(way))
           for way in ("none", "another's")),
         *(f"{over_layers(results, key):.3f}" for key in ("from even", "spread")),
         f"{over_layers(results, 'lost'):.1%}", f"{over_layers(results, 'information'):.3f}"]
        for weight, results in sorted(weights.items())))


def summary_table() -> str:
    """Of each variant, in a line: its settings, success, what its experts and their choice do.

    Lost is success as trained less that without any expert, on the same pictures. The choice is
    what routing by another picture of its own task gives a picture, beside routing by another's.
    """
    rows, routed = [], with_routing()
    for name, results in by_variant().items():
        without = choice = told = cosine = HOLE
        if own := routed.get(name):
            without = lead(own, own, by_way("as trained"), by_way("none"))
            choice = lead(own, own, by_way("its task's"), by_way("another's"))
            cosine = f"{np.mean([result['cosine'] for result in own]):.3f}"
            if name not in ALL_KEPT:
                told = f"{over_layers(own, 'information'):.3f}"
        c = results[0]["config"]
        scales = [f"{c['lora_alpha'] / c['lora_rank']:.2g}",
                  f"{c['alpha'] / c['rank']:.2g}" if c["mole_targets"] else HOLE]
        rows.append([name, f"{results[0]['piece']['lr']:g}", ", ".join(scales), f"{len(results)}",
                     over_seeds(results, lambda r: success(r, NEW_TASKS)), without, choice, told,
                     cosine])
    return markdown(["variant", "rate", "scales", "seeds", "new tasks, % (least, most)",
                     "lost without experts", "its task's choice less another's",
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


def triples_table() -> str:
    """What training with two other tasks costs each, and in which part of the steps it had alone.

    A batch is of tasks that are given as many pictures, so that a company of two kinds has fewer
    steps for each.
    """
    variants, rows = COMPARED["interference"], []
    for triple in TRIPLES:
        group = {task: [other for other in triple if other in of] for task in triple
                 for of in GROUPS if task in of}
        together = [task for task in triple if len(group[task]) == len(triple)]
        for tasks in [*((task,) for task in triple), *([tuple(together)] if together else [])]:
            each = (lead(alone(variant, tasks), in_company(variant, [triple], tasks), right(tasks))
                    for variant in variants)
            rows.append([" + ".join(triple), tasks[0] if len(tasks) == 1 else "mean",
                         f"{len(group[tasks[0]])}/{len(triple)}".replace("3/3", "all"), *each])
    return markdown(["together", "task", "steps", *(f"{variant} loses" for variant in variants)],
                    rows)


def company_table() -> str:
    """What training with all tasks instead of alone costs, on the same pictures; see difference().

    Apart from `mixed`, too, which alone gains by company.
    """
    def lost(variant: str, tasks: tuple[str, ...]) -> list[dict]:
        """Of each seed, of each picture: 100 where it is right alone and not with all, or -100."""
        before, after = ({one["piece"]["seed"]: right(tasks)(one) for one in results} for results
                         in (alone(variant, tasks), in_company(variant, [NEW_TASKS], tasks)))
        return [{"piece": {"seed": seed}, "lost": before[seed] - after[seed]}
                for seed in before if seed in after]

    def each(one: dict) -> np.ndarray:
        return one["lost"]

    def none(one: dict) -> np.ndarray:
        return np.zeros_like(one["lost"])
    first, second = COMPARED["interference"]
    columns = []
    for tasks in (NEW_TASKS, tuple(task for task in NEW_TASKS if task != "mixed")):
        losses = [lost(variant, tasks) for variant in (first, second)]
        apart = [alone(variant, tasks) for variant in (second, first)]
        columns.append([*(lead(own, own, each, none) for own in losses), lead(*losses, each),
                        lead(*apart, right(tasks))])
    return markdown(["points (about 95 %)", "all new tasks", "all but mixed"], map(list, zip(
        [f"{first} loses by company", f"{second} loses by company", "the first less the second",
         f"alone, {second} over {first}"], *columns)))


def conflict_table() -> str:
    """Success on each task in conflict and on all of them: means over seeds, least, most, in %."""
    return markdown(["variant", "rate, scale", "seeds", *conflict.TASKS, "mean"], (
        [name, f"{results[0]['piece']['lr']:g}, {results[0]['piece']['scale']:g}",
         f"{len(results)}",
         *(over_seeds(results, lambda one, task=task: success(one, [task]), 0)
           for task in conflict.TASKS),
         over_seeds(results, lambda one: success(one, conflict.TASKS))]
        for name, results in by_variant("conflict").items()))


def otherwise_table() -> str:
    """In conflict, success on each task as trained, by another's routing and by none, in %."""
    def mean(results: list[dict], way: str, task: str) -> str:
        marks = [percents(result["routing"]["right"][way][task]) for result in results]
        return f"{np.mean(marks):.0f}"
    return markdown(["variant", "routed", *conflict.TASKS], (
        [name, way, *(mean(results, way, task) for task in conflict.TASKS)]
        for name, results in with_routing("conflict").items()
        for way in ("as trained", "another's", "none")))


TABLES = {"search": (search_table,),
          "table": (variants_table, leads_table, tasks_table, wordings_table, flow_table,
                    routing_table, routers_table, cosines_table),
          "interference": (interference_table, triples_table, company_table),
          "balance": (balance_table,),
          "longer": tuple(partial(make, "longer") for make in (
              variants_table, leads_table, tasks_table, routing_table, routers_table)),
          "regimes": (partial(search_table, "regimes"),),
          "conflict": (conflict_table, *(partial(make, "conflict") for make in (
              leads_table, routing_table, routers_table)), otherwise_table)}


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
