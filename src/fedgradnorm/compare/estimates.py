"""Every measure of every method, by seed, with its paired difference against the baseline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

from fedgradnorm.compare.measures import Measured, Target
from fedgradnorm.compare.results import OVERALL, CellResult, Estimate
from fedgradnorm.compare.spec import Study
from fedgradnorm.compare.statistics import delta_m, difference_of
from fedgradnorm.runs.records import MetricSummary

Better = Literal["less", "more"]
Getter = Callable[[Measured], float | None]
BySeed = Mapping[int, float | None]


def estimates_of(study: Study, cells: Sequence[CellResult]) -> list[Estimate]:
    """Every measure of every method, by variant and method in the study's order."""
    cells_of: dict[tuple[str, str | None], dict[int, CellResult]] = {}
    for result in cells:
        by_seed = cells_of.setdefault((result.cell.variant, result.cell.method), {})
        by_seed[result.cell.seed] = result
    estimates: list[Estimate] = []
    for variant, method in product(study.variants, study.methods):
        own, base, single = (
            cells_of.get((variant.name, name), {})
            for name in (method.name, study.baseline, study.single)
        )
        names = (variant.name, method.name, len(study.seeds))
        base = {} if method.name == study.baseline else base
        estimates += _Comparison(*names, own, base, _measured(single)).estimates()
    return estimates


def _measured(cells: Mapping[int, CellResult]) -> dict[int, Measured]:
    return {seed: cell.measured for seed, cell in cells.items() if cell.measured is not None}


def _known(values: BySeed) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


@dataclass(frozen=True)
class _Comparison:
    """The cells of a method in a variant, of the baseline, and of single-task training.

    For the baseline itself, ``baseline_cells`` is empty.
    """

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
            yield from self._of_task(task, figures.metric)
        for which in ("last", "best"):
            own, base = self._delta_m(self.own, which), self._delta_m(self.baseline, which)
            yield self._estimate(OVERALL, f"delta-m, {which} metric", "%", "more", own, base)
        overall: tuple[tuple[str, str, Better, Getter], ...] = (
            ("worst task's skill", "%", "more", lambda run: run.worst[1] if run.worst else None),
            ("spread at the end", "std / mean", "less", lambda run: run.spread_end),
            ("spread on average", "std / mean", "less", lambda run: run.spread_mean),
            ("sent", "bytes", "less", lambda run: float(run.bytes)),
        )
        for measure, unit, better, get in overall:
            yield self._of_runs(OVERALL, measure, unit, better, get)

    def _of_task(self, task: str, metric: MetricSummary | None) -> Iterator[Estimate]:
        def ratio(run: Measured) -> float | None:
            return run.tasks[task].final_ratio

        def weight(run: Measured) -> float | None:
            return run.tasks[task].weight

        yield self._of_runs(task, "final loss ratio", "share of F(0)", "less", ratio)
        yield self._of_runs(task, "final weight", "p", None, weight)
        if metric is not None:
            better: Better = "more" if metric["higher_is_better"] else "less"
            unit = f"{metric['name']}, %" if metric["percent"] else metric["name"]
            for which in ("last", "best"):
                yield self._of_runs(task, f"{which} metric", unit, better, _metric(task, which))

    def _of_runs(
        self, task: str, measure: str, unit: str, better: Better | None, get: Getter
    ) -> Estimate:
        own = {seed: get(run) for seed, run in self.own.items()}
        base = {seed: get(run) for seed, run in self.baseline.items()}
        return self._estimate(task, measure, unit, better, own, base)

    def _delta_m(self, runs: Mapping[int, Measured], which: str) -> dict[int, float | None]:
        return {
            seed: _delta_m(run, self.single[seed], which)
            for seed, run in runs.items()
            if seed in self.single
        }

    def _estimate(
        self, task: str, measure: str, unit: str, better: Better | None, own: BySeed, base: BySeed
    ) -> Estimate:
        values, others = _known(own), _known(base)
        difference = difference_of(values, others)
        lost = 0 if difference is None else self._lost(values, others)
        names = (self.variant, self.method, task, measure, unit, better)
        return Estimate(*names, values, self.seeds, difference, lost)

    def _lost(self, own: Mapping[int, float], base: Mapping[int, float]) -> int:
        """In how many seeds a cell has ended without a value."""
        lost = {
            seed
            for cells, values in ((self.own_cells, own), (self.baseline_cells, base))
            for seed in cells.keys() - values.keys()
            if cells[seed].ended.state != "missing"
        }
        return len(lost)

    def _to_target(self, task: str, target: str, measure: Literal["rounds", "seconds"]) -> Estimate:
        own = _targets(self.own_cells, task, target)
        base = _targets(self.baseline_cells, task, target)
        values, others = (
            _known({seed: getattr(run, measure) for seed, run in runs.items()})
            for runs in (own, base)
        )
        pairs = [own[seed].reached + base[seed].reached for seed in values.keys() & others.keys()]
        estimate = self._estimate(task, measure, measure, "less", values, others)
        return replace(
            estimate,
            target=target,
            reached=sum(run.reached for run in own.values()),
            difference=estimate.difference if any(pairs) else None,
            censored=sum(both < 2 for both in pairs),
            lost=self._lost(values, others),
        )


def _targets(cells: Mapping[int, CellResult], task: str, target: str) -> dict[int, Target]:
    """By seed. A run that has diverged did not reach its target, and its time is unknown."""
    ended = {seed: run.tasks[task].targets[target] for seed, run in _measured(cells).items()}
    lost = {
        seed: result.cell.config.train.num_rounds
        for seed, result in cells.items()
        if result.ended.state == "diverged"
    }
    return ended | {seed: Target(False, float(rounds), None) for seed, rounds in lost.items()}


def _metric(task: str, which: str) -> Getter:
    def get(run: Measured) -> float | None:
        metric = run.tasks[task].metric
        if metric is None:
            return None
        value = metric["last"] if which == "last" else metric["best"]
        return 100 * value if value is not None and metric["percent"] else value

    return get


def _delta_m(run: Measured, single: Measured, which: str) -> float | None:
    metrics: dict[str, float] = {}
    references: dict[str, float] = {}
    directions: dict[str, bool] = {}
    for task, figures in run.tasks.items():
        if figures.metric is None:
            continue
        value, reference = _metric(task, which)(run), _metric(task, which)(single)
        if value is None or reference is None:
            return None
        metrics[task], references[task] = value, reference
        directions[task] = figures.metric["higher_is_better"]
    return delta_m(metrics, references, directions)
