"""What the experiment's results say together: successes, and by how much one variant leads another.

tiny/findings.py makes tables of it, tiny/drawings.py figures; both from the JSON of tiny/results.
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from support.results import HOLE
from tiny import conflict
from tiny.design import ADAPTERS, found

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57,     # 97.5 % of Student's t, by seeds
       7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
ALL_KEPT = ("soft", "Expert Choice")                     # each picture keeps all experts alike
MATTERS = 3                                              # points; a lead within them does not


class Interval(NamedTuple):
    """Of at least 95 %."""
    middle: float
    half: float

    @property
    def least(self) -> float:
        return self.middle - self.half

    @property
    def most(self) -> float:
        return self.middle + self.half

    def __str__(self) -> str:
        return f"{self.middle:+.1f} ({self.least:+.1f} to {self.most:+.1f})"

    @property
    def answer(self) -> str:
        """By the rule that was fixed beforehand."""
        if self.least > MATTERS:
            return "yes"
        if self.most < -MATTERS:
            return "no, the contrary"
        within = -MATTERS <= self.least and self.most <= MATTERS
        return "it does not matter" if within else "undecided"


class Spread(NamedTuple):
    """A standard deviation, and with how many degrees of freedom it is known."""
    deviation: float
    freedom: int

    @property
    def t95(self) -> float:
        """97.5 % of Student's t; of more than nine degrees nearly so."""
        return T95.get(self.freedom + 1, 1.96 + 2.5 / self.freedom)


# ------------------------------------------------------------------------------------ the results

def ended(stage: str) -> list[dict]:
    """A stage's results, but for those whose training diverged."""
    return [result for result in found(stage) if "diverged" not in result]


def joined(results: Iterable[dict], tasks: tuple[str, ...]) -> list[dict]:
    """The results of a seed as if they were of one adapter; of seeds that have all the tasks."""
    by_seed: dict[int, dict] = {}
    for result in results:
        one = by_seed.setdefault(result["piece"]["seed"], result | {"tasks": {}, "flow": {}})
        for what in ("tasks", "flow"):
            one[what] |= result[what]
    return [one for one in by_seed.values() if one["tasks"].keys() >= set(tasks)]


def by_variant(stage: str = "table") -> dict[str, list[dict]]:
    """A stage's results, the seeds of each variant together, in the order of ADAPTERS.

    In conflict, five adapters for a task each count as one.
    """
    results = ended(stage)
    each = {name: [r for r in results if r["piece"]["variant"] == name] for name in ADAPTERS}
    if stage == "conflict":
        each = {name: joined(own, conflict.TASKS) for name, own in each.items()}
    return {name: own for name, own in each.items() if own}


def success(result: dict, tasks: Iterable[str], key: str = "success") -> float:
    """Mean over the tasks, in percent."""
    return 100 * float(np.mean([result["tasks"][task][key] for task in tasks]))


def means(results: list[dict], tasks: Iterable[str]) -> list[float]:
    """Success on each of the tasks, a mean over the seeds, in percent."""
    return [float(np.mean([success(result, [task]) for result in results])) for task in tasks]


def over_seeds(results: list[dict], value: Callable[[dict], float], digits: int = 1) -> str:
    """The mean of the seeds' values and the least and greatest of them."""
    values = [value(result) for result in results]
    mean, least, most = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def with_routing(stage: str = "table") -> dict[str, list[dict]]:
    """by_variant(), of the variants and seeds that were routed otherwise, too."""
    return {name: routed for name, results in by_variant(stage).items()
            if (routed := [result for result in results if "routing" in result])}


def choosing(stage: str = "table") -> dict[str, list[dict]]:
    """with_routing(), of the variants that keep some experts and others not."""
    return {name: results for name, results in with_routing(stage).items() if name not in ALL_KEPT}


def interference() -> dict[str, dict[int, dict[str, list[float]]]]:
    """Success in percent, by variant, by how many tasks were trained together, by task."""
    values: dict[str, dict[int, dict[str, list[float]]]] = {}
    for result in ended("interference"):
        variant, together = result["piece"]["variant"], result["piece"]["tasks"]
        for task in together:
            values.setdefault(variant, {}).setdefault(len(together), {}).setdefault(
                task, []).append(success(result, [task]))
    return values


def in_company(variant: str, companies: Iterable[tuple[str, ...]], tasks: tuple[str, ...]
               ) -> list[dict]:
    """Of each seed, the results of the tasks in these companies, as if of one adapter."""
    return joined((r for r in ended("interference") if r["piece"]["variant"] == variant
                   and tuple(r["piece"]["tasks"]) in companies), tasks)


def alone(variant: str, tasks: tuple[str, ...]) -> list[dict]:
    """The same of each task by itself."""
    return in_company(variant, [(task,) for task in tasks], tasks)


# -------------------------------------------------------------------------- one beside the other

def difference(ours: list[dict], theirs: list[dict], cases: Callable[[dict], np.ndarray],
               of_theirs: Callable[[dict], np.ndarray] | None = None, spread: Spread | None = None
               ) -> Interval | None:
    """By how much ours is more, a mean over seeds and cases; None without two seeds.

    cases: a result's values, one or many, in the same order for all; of_theirs: another's, if not
    so. Differences are taken within a seed and a case, as both drew the same. Half the interval is
    the root of (t SE over seeds)^2 + (1.96 SE over cases)^2: what is chance of one seed on one case
    counts in both, so that it is somewhat too wide. It speaks of new seeds and cases at the rates
    and scales that the search chose, on this base, and of one comparison: of twenty such intervals
    one may miss. spread: of the seeds, if it is not to be guessed from these few differences.
    """
    by_seed = {result["piece"]["seed"]: (of_theirs or cases)(result) for result in theirs}
    leads = np.array([cases(result) - by_seed[result["piece"]["seed"]] for result in ours
                      if result["piece"]["seed"] in by_seed])                # (seeds, cases)
    if len(leads) < 2:
        return None
    number, many = leads.shape
    by_chance = T95[number] * leads.mean(1).std(ddof=1) / np.sqrt(number)
    if spread is not None:
        by_chance = spread.t95 * spread.deviation * np.sqrt(2 / number)
    by_case = 1.96 * leads.mean(0).std(ddof=1) / np.sqrt(many) if many > 1 else 0
    return Interval(float(leads.mean()), float(np.hypot(by_chance, by_case)))


def lead(*args: object, **settings: object) -> str:
    """difference() as a table says it."""
    return str(difference(*args, **settings) or HOLE)


def spread_of(table: dict[str, list[dict]], value: Callable[[dict], float]) -> Spread:
    """By how much the seeds of one variant differ, pooled over all variants."""
    values = [[value(result) for result in results] for results in table.values()]
    freedom = max(1, sum(len(own) - 1 for own in values))
    return Spread(np.sqrt(sum(len(own) * np.var(own) for own in values) / freedom), freedom)


def seeds_of(*several: list[dict]) -> int:
    """How many seeds all have."""
    return len(set.intersection(*({one["piece"]["seed"] for one in own} for own in several)))


def percents(marks: Iterable[str]) -> np.ndarray:
    """probe.marks() as 0 or 100 for each picture."""
    return 100 * np.array([int(mark) for mark in "".join(marks)])


def right(tasks: Iterable[str]) -> Callable[[dict], np.ndarray]:
    """Of a result, percents() of its pictures of the tasks."""
    return lambda result: percents(result["tasks"][task]["right"] for task in tasks)


def by_way(way: str) -> Callable[[dict], np.ndarray]:
    """Of a result, percents() of its pictures when routed so: one of probe.WAYS."""
    return lambda result: percents(result["routing"]["right"][way].values())


def over_layers(results: list[dict], key: str) -> float:
    """A measure of probe.by_task(), a mean over seeds and layers."""
    return float(np.mean([list(result["routing"][key].values()) for result in results]))
