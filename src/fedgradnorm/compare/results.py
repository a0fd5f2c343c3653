"""A study's figures: every measure of every method, by seed, with its paired difference against the baseline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedgradnorm.compare.cells import Ended
from fedgradnorm.compare.grid import Cell, Point
from fedgradnorm.compare.measures import Measured, Target
from fedgradnorm.compare.spec import Study
from fedgradnorm.compare.statistics import Interval, delta_m, difference_of
from fedgradnorm.records import MetricSummary

__all__ = ["OVERALL", "CellResult", "Estimate", "Results", "TunedMethod", "estimates_of"]

OVERALL = ""
"""In place of a task, for what is measured over all of them."""

By = tuple[str, str]
"""A variant and a method."""


@dataclass(frozen=True)
class CellResult:
    """A cell and what became of it; ``measured`` is None where it is not trained, or has diverged."""

    cell: Cell
    ended: Ended
    measured: Measured | None


@dataclass(frozen=True)
class TunedMethod:
    """How a method's step sizes were chosen in a variant.

    Attributes:
        scores: by point, the mean over the tuning seeds of the mean over the tasks of F(K) / F(0); None where a run diverged or is missing.
        reasons: by point, why there is no score.
        chosen: the point with the least score; None where there is none.
        edges: the settings whose chosen value is the least or the greatest that was tried.
    """

    variant: str
    method: str
    scores: Mapping[Point, float | None]
    reasons: Mapping[Point, str]
    chosen: Point | None
    edges: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """One measure of one method in one variant.

    Attributes:
        variant: the variant's name.
        method: the method's name.
        task: the task, or `OVERALL`.
        measure: what it is, such as ``rounds`` or ``last metric``.
        target: for ``rounds`` and ``seconds``, to what, such as ``loss ratio 0.6``.
        unit: of the values.
        better: which direction is good; None where neither is.
        values: by seed. A run that never reached the target, or has diverged, counts with all of its rounds.
        reached: for a target, in how many seeds it was reached; else None.
        difference: against the baseline, over the seeds that both have; None for the baseline itself, where there is no such seed, and
            where neither method reached the target in any of them.
        censored: in how many of these pairs one or both did not reach the target, so that the difference is one of min(rounds, K).
    """

    variant: str
    method: str
    task: str
    measure: str
    target: str
    unit: str
    better: Literal["less", "more"] | None
    values: Mapping[int, float]
    reached: int | None
    difference: Interval | None
    censored: int


@dataclass(frozen=True)
class Results:
    """All that a study found."""

    study: Study
    tuned: Sequence[TunedMethod]
    cells: Sequence[CellResult]
    estimates: Sequence[Estimate]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the runs' files."""
        return tuple(dict.fromkeys(task for result in self.cells if result.measured for task in result.measured.tasks))

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, str, str], Estimate]:
        return {(one.variant, one.method, one.task, one.measure, one.target): one for one in self.estimates}

    def find(self, variant: str, method: str, task: str, measure: str, target: str = "") -> Estimate | None:
        """One estimate, or None."""
        return self._index.get((variant, method, task, measure, target))

    def measured(self, variant: str, method: str) -> dict[int, Measured]:
        """By seed, the trained cells of a method."""
        found = (one for one in self.cells if (one.cell.variant, one.cell.method) == (variant, method))
        return {one.cell.seed: one.measured for one in found if one.measured is not None}

    def targets(self, task: str) -> tuple[str, ...]:
        """The targets of a task."""
        return tuple(dict.fromkeys(one.target for one in self.estimates if one.task == task and one.target))


def estimates_of(study: Study, cells: Sequence[CellResult]) -> list[Estimate]:
    """Every measure of every method, by variant and method in the study's order."""
    measured: dict[By, dict[int, Measured]] = {}
    for result in cells:
        if result.measured is not None:
            measured.setdefault((result.cell.variant, result.cell.method), {})[result.cell.seed] = result.measured
    lost: dict[By, dict[int, int]] = {}
    for result in cells:
        if result.ended.state == "diverged":
            lost.setdefault((result.cell.variant, result.cell.method), {})[result.cell.seed] = result.cell.config.train.num_rounds
    found: list[Estimate] = []
    for variant in study.variants:
        base = (variant.name, study.baseline)
        single = {} if study.single is None else measured.get((variant.name, study.single), {})
        for method in study.methods:
            own = (variant.name, method.name)
            compared = (measured.get(base, {}), lost.get(base, {})) if own != base else ({}, {})
            found += _Comparison(*own, measured.get(own, {}), lost.get(own, {}), *compared, single).estimates()
    return found


Getter = Callable[[Measured], float | None]


@dataclass(frozen=True)
class _Comparison:
    """A method in a variant: its cells, those of the baseline (none for the baseline itself), and those of single-task training.

    Of cells that have diverged there are the rounds, by seed.
    """

    variant: str
    method: str
    own: Mapping[int, Measured]
    lost: Mapping[int, int]
    baseline: Mapping[int, Measured]
    baseline_lost: Mapping[int, int]
    single: Mapping[int, Measured]

    def estimates(self) -> Iterator[Estimate]:
        first = next(iter(self.own.values()), None)
        if first is None:
            return
        for task, figures in first.tasks.items():
            for target in figures.targets:
                yield self._to_target(task, target, "rounds")
                yield self._to_target(task, target, "seconds")
            yield self._estimate(task, "final loss ratio", "share of F(0)", "less", lambda one, task=task: one.tasks[task].final_ratio)  # type: ignore[misc]
            yield self._estimate(task, "final weight", "p", None, lambda one, task=task: one.tasks[task].weight)  # type: ignore[misc]
            if figures.metric is not None:
                better: Literal["less", "more"] = "more" if figures.metric["higher_is_better"] else "less"
                for which in ("last", "best"):
                    yield self._estimate(task, f"{which} metric", _metric_unit(figures.metric), better, _metric(task, which))
        for which in ("last", "best"):
            values = {seed: _delta_m(one, self.single[seed], which) for seed, one in self.own.items() if seed in self.single}
            base = {seed: _delta_m(one, self.single[seed], which) for seed, one in self.baseline.items() if seed in self.single}
            yield self._made(OVERALL, f"delta-m, {which} metric", "%", "more", values, base)
        yield self._estimate(OVERALL, "worst task's skill", "%", "more", lambda one: one.worst[1] if one.worst else None)
        yield self._estimate(OVERALL, "spread at the end", "std / mean", "less", lambda one: one.spread_end)
        yield self._estimate(OVERALL, "spread on average", "std / mean", "less", lambda one: one.spread_mean)
        yield self._estimate(OVERALL, "sent", "bytes", "less", lambda one: float(one.bytes))

    def _estimate(self, task: str, measure: str, unit: str, better: Literal["less", "more"] | None, get: Getter) -> Estimate:
        own, base = ({seed: get(one) for seed, one in cells.items()} for cells in (self.own, self.baseline))
        return self._made(task, measure, unit, better, own, base)

    def _made(
        self,
        task: str,
        measure: str,
        unit: str,
        better: Literal["less", "more"] | None,
        own: Mapping[int, float | None],
        base: Mapping[int, float | None],
    ) -> Estimate:
        values, others = ({seed: value for seed, value in some.items() if value is not None} for some in (own, base))
        difference = difference_of(values, others)
        return Estimate(self.variant, self.method, task, measure, "", unit, better, values, None, difference, 0)

    def _to_target(self, task: str, target: str, measure: Literal["rounds", "seconds"]) -> Estimate:
        own, base = _targets(self.own, self.lost, task, target), _targets(self.baseline, self.baseline_lost, task, target)
        values, others = (
            {seed: value for seed, one in some.items() if (value := getattr(one, measure)) is not None} for some in (own, base)
        )
        pairs = [own[seed].reached + base[seed].reached for seed in values.keys() & others.keys()]
        difference = difference_of(values, others) if any(pairs) else None
        reached = sum(one.reached for one in own.values())
        censored = sum(both < 2 for both in pairs)
        return Estimate(self.variant, self.method, task, measure, target, measure, "less", values, reached, difference, censored)


def _targets(cells: Mapping[int, Measured], lost: Mapping[int, int], task: str, target: str) -> dict[int, Target]:
    """By seed; a run that has diverged has not reached its target, and took we do not know how long."""
    reached = {seed: one.tasks[task].targets[target] for seed, one in cells.items()}
    return reached | {seed: Target(False, float(rounds), None) for seed, rounds in lost.items()}


def _metric(task: str, which: str) -> Getter:
    def get(one: Measured) -> float | None:
        metric = one.tasks[task].metric
        value: float | None = None if metric is None else metric["last"] if which == "last" else metric["best"]
        return 100 * value if value is not None and metric is not None and metric["percent"] else value

    return get


def _metric_unit(metric: MetricSummary) -> str:
    return f"{metric['name']}, %" if metric["percent"] else metric["name"]


def _delta_m(one: Measured, single: Measured, which: str) -> float | None:
    tasks = [task for task, figures in one.tasks.items() if figures.metric is not None]
    own, reference = ({task: _metric(task, which)(some) for task in tasks} for some in (one, single))
    if None in own.values() or None in reference.values():
        return None
    directions = {task: metric["higher_is_better"] for task in tasks if (metric := one.tasks[task].metric) is not None}
    known = [{task: value for task, value in some.items() if value is not None} for some in (own, reference)]
    return delta_m(known[0], known[1], directions)
