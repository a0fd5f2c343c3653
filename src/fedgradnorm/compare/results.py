"""A study's figures: every measure of every method, by seed, with its paired difference against the baseline."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedgradnorm.build import resolve_config
from fedgradnorm.compare.cells import Ended
from fedgradnorm.compare.grid import Cell, Point
from fedgradnorm.compare.measures import Measured, Target
from fedgradnorm.compare.spec import Study
from fedgradnorm.compare.statistics import Interval, delta_m, difference_of
from fedgradnorm.config import RunConfig, overlaid, validated
from fedgradnorm.runs.records import MetricSummary

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
        values: by seed. In ``rounds`` a run that never reached the target, or has diverged, counts with all of its rounds; elsewhere a run
            that has diverged has no value.
        seeds: how many seeds the study has.
        reached: for a target, in how many seeds it was reached; else None.
        difference: against the baseline, over the seeds that both have; None for the baseline itself, where there is no such seed, and
            where neither method reached the target in any of them.
        censored: in how many of these pairs one or both did not reach the target, so that the difference is one of min(rounds, K).
        lost: in how many seeds the method or the baseline ended without a value, as it diverged or failed: the others are survivors.
    """

    variant: str
    method: str
    task: str
    measure: str
    target: str
    unit: str
    better: Literal["less", "more"] | None
    values: Mapping[int, float]
    seeds: int
    reached: int | None
    difference: Interval | None
    censored: int
    lost: int


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
        return tuple(
            dict.fromkeys(
                task for result in self.cells if result.measured for task in result.measured.tasks
            )
        )

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, str, str], Estimate]:
        return {
            (one.variant, one.method, one.task, one.measure, one.target): one
            for one in self.estimates
        }

    def find(
        self, variant: str, method: str, task: str, measure: str, target: str = ""
    ) -> Estimate | None:
        """One estimate, or None."""
        return self._index.get((variant, method, task, measure, target))

    def measured(self, variant: str, method: str) -> dict[int, Measured]:
        """By seed, the trained cells of a method."""
        found = (
            one for one in self.cells if (one.cell.variant, one.cell.method) == (variant, method)
        )
        return {one.cell.seed: one.measured for one in found if one.measured is not None}

    def absence(self, variant: str, method: str) -> str:
        """Why a method has no figures, such as "diverged on all 8 seeds"; empty where it has some."""
        if self.measured(variant, method):
            return ""
        tuned = next(
            (one for one in self.tuned if (one.variant, one.method) == (variant, method)), None
        )
        if tuned is not None and tuned.chosen is None:
            missing = any(reason.startswith("missing") for reason in tuned.reasons.values())
            return "not tuned yet" if missing else "diverged or failed with all step sizes"
        found = (
            one.ended.state
            for one in self.cells
            if (one.cell.variant, one.cell.method) == (variant, method)
        )
        states = Counter("not trained yet" if state == "missing" else state for state in found)
        if len(states) == 1:
            return (
                f"{next(iter(states))} on all {len(self.study.seeds)} seeds"
                if "not trained yet" not in states
                else "not trained yet"
            )
        return ", ".join(
            f"{state} on {count} of {states.total()} seeds" for state, count in states.items()
        )

    @cached_property
    def configs(self) -> dict[str, RunConfig]:
        """By method, its settings in the base."""
        base = self.study.base
        return {
            one.name: resolve_config(validated(RunConfig, overlaid(base, one.options), prefix=""))
            for one in self.study.methods
        }

    @cached_property
    def ours(self) -> tuple[str, ...]:
        """The methods that weight as FedGradNorm, which studies here are about."""
        return tuple(
            name for name, config in self.configs.items() if config.weighting.name == "fedgradnorm"
        )

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """All methods in the order of tables and charts: FedGradNorm, the baseline, the others."""
        return tuple(dict.fromkeys((*self.ours, self.study.baseline, *self.configs)))

    def targets(self, task: str) -> tuple[str, ...]:
        """The targets of a task."""
        return tuple(
            dict.fromkeys(one.target for one in self.estimates if one.task == task and one.target)
        )


def estimates_of(study: Study, cells: Sequence[CellResult]) -> list[Estimate]:
    """Every measure of every method, by variant and method in the study's order."""
    of: dict[By, dict[int, CellResult]] = {}
    for result in cells:
        of.setdefault((result.cell.variant, result.cell.method), {})[result.cell.seed] = result
    found: list[Estimate] = []
    for variant in study.variants:
        base = (variant.name, study.baseline)
        single = {} if study.single is None else _measured(of.get((variant.name, study.single), {}))
        for method in study.methods:
            own = (variant.name, method.name)
            found += _Comparison(
                *own,
                len(study.seeds),
                of.get(own, {}),
                of.get(base, {}) if own != base else {},
                single,
            ).estimates()
    return found


def _measured(cells: Mapping[int, CellResult]) -> dict[int, Measured]:
    return {seed: one.measured for seed, one in cells.items() if one.measured is not None}


Getter = Callable[[Measured], float | None]


@dataclass(frozen=True)
class _Comparison:
    """A method in a variant: its cells, those of the baseline (none for the baseline itself), and those of single-task training."""

    variant: str
    method: str
    seeds: int
    own_cells: Mapping[int, CellResult]
    baseline_cells: Mapping[int, CellResult]
    single: Mapping[int, Measured]

    @cached_property
    def own(self) -> dict[int, Measured]:
        return _measured(self.own_cells)

    @cached_property
    def baseline(self) -> dict[int, Measured]:
        return _measured(self.baseline_cells)

    def estimates(self) -> Iterator[Estimate]:
        first = next(iter(self.own.values()), None)
        if first is None:
            return
        for task, figures in first.tasks.items():
            for target in figures.targets:
                yield self._to_target(task, target, "rounds")
                yield self._to_target(task, target, "seconds")
            yield self._estimate(
                task,
                "final loss ratio",
                "share of F(0)",
                "less",
                lambda one, task=task: one.tasks[task].final_ratio,  # type: ignore[misc]
            )
            yield self._estimate(
                task,
                "final weight",
                "p",
                None,
                lambda one, task=task: one.tasks[task].weight,  # type: ignore[misc]
            )
            if figures.metric is not None:
                better: Literal["less", "more"] = (
                    "more" if figures.metric["higher_is_better"] else "less"
                )
                for which in ("last", "best"):
                    yield self._estimate(
                        task,
                        f"{which} metric",
                        _metric_unit(figures.metric),
                        better,
                        _metric(task, which),
                    )
        for which in ("last", "best"):
            values = {
                seed: _delta_m(one, self.single[seed], which)
                for seed, one in self.own.items()
                if seed in self.single
            }
            base = {
                seed: _delta_m(one, self.single[seed], which)
                for seed, one in self.baseline.items()
                if seed in self.single
            }
            yield self._made(OVERALL, f"delta-m, {which} metric", "%", "more", values, base)
        yield self._estimate(
            OVERALL,
            "worst task's skill",
            "%",
            "more",
            lambda one: one.worst[1] if one.worst else None,
        )
        yield self._estimate(
            OVERALL, "spread at the end", "std / mean", "less", lambda one: one.spread_end
        )
        yield self._estimate(
            OVERALL, "spread on average", "std / mean", "less", lambda one: one.spread_mean
        )
        yield self._estimate(OVERALL, "sent", "bytes", "less", lambda one: float(one.bytes))

    def _estimate(
        self,
        task: str,
        measure: str,
        unit: str,
        better: Literal["less", "more"] | None,
        get: Getter,
    ) -> Estimate:
        own, base = (
            {seed: get(one) for seed, one in cells.items()} for cells in (self.own, self.baseline)
        )
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
        values, others = (
            {seed: value for seed, value in some.items() if value is not None}
            for some in (own, base)
        )
        difference = difference_of(values, others)
        lost = self._lost(values, others) if difference is not None else 0
        return Estimate(
            self.variant,
            self.method,
            task,
            measure,
            "",
            unit,
            better,
            values,
            self.seeds,
            None,
            difference,
            0,
            lost,
        )

    def _lost(self, own: Mapping[int, float], base: Mapping[int, float]) -> int:
        """In how many seeds either has ended, and has no value."""
        pairs = ((self.own_cells, own), (self.baseline_cells, base))
        return len(
            {
                seed
                for cells, values in pairs
                for seed in cells.keys() - values.keys()
                if cells[seed].ended.state != "missing"
            }
        )

    def _to_target(self, task: str, target: str, measure: Literal["rounds", "seconds"]) -> Estimate:
        own, base = (
            _targets(self.own_cells, task, target),
            _targets(self.baseline_cells, task, target),
        )
        values, others = (
            {
                seed: value
                for seed, one in some.items()
                if (value := getattr(one, measure)) is not None
            }
            for some in (own, base)
        )
        pairs = [own[seed].reached + base[seed].reached for seed in values.keys() & others.keys()]
        difference = difference_of(values, others) if any(pairs) else None
        reached = sum(one.reached for one in own.values())
        censored = sum(both < 2 for both in pairs)
        lost = self._lost(values, others)
        return Estimate(
            self.variant,
            self.method,
            task,
            measure,
            target,
            measure,
            "less",
            values,
            self.seeds,
            reached,
            difference,
            censored,
            lost,
        )


def _targets(cells: Mapping[int, CellResult], task: str, target: str) -> dict[int, Target]:
    """By seed; a run that has diverged has not reached its target, and took we do not know how long."""
    reached = {seed: one.tasks[task].targets[target] for seed, one in _measured(cells).items()}
    lost = {
        seed: one.cell.config.train.num_rounds
        for seed, one in cells.items()
        if one.ended.state == "diverged"
    }
    return reached | {seed: Target(False, float(rounds), None) for seed, rounds in lost.items()}


def _metric(task: str, which: str) -> Getter:
    def get(one: Measured) -> float | None:
        metric = one.tasks[task].metric
        value: float | None = (
            None if metric is None else metric["last"] if which == "last" else metric["best"]
        )
        return (
            100 * value if value is not None and metric is not None and metric["percent"] else value
        )

    return get


def _metric_unit(metric: MetricSummary) -> str:
    return f"{metric['name']}, %" if metric["percent"] else metric["name"]


def _delta_m(one: Measured, single: Measured, which: str) -> float | None:
    tasks = [task for task, figures in one.tasks.items() if figures.metric is not None]
    own, reference = (
        {task: _metric(task, which)(some) for task in tasks} for some in (one, single)
    )
    if None in own.values() or None in reference.values():
        return None
    directions = {
        task: metric["higher_is_better"]
        for task in tasks
        if (metric := one.tasks[task].metric) is not None
    }
    known = [
        {task: value for task, value in some.items() if value is not None}
        for some in (own, reference)
    ]
    return delta_m(known[0], known[1], directions)
