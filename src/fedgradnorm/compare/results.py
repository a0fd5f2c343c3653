"""The results of a study: every measure of every method by seed, and its paired difference."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fedgradnorm.build import resolve_config
from fedgradnorm.compare.cells import Ended
from fedgradnorm.compare.grid import Cell, Point
from fedgradnorm.compare.measures import Measured
from fedgradnorm.compare.spec import Study
from fedgradnorm.compare.statistics import Interval
from fedgradnorm.config import RunConfig, overlaid
from fedgradnorm.validation import validated

NOT_TRAINED = {"diverged": "diverged", "failed": "failed", "missing": "not trained yet"}
"""By the state of a cell that is not trained, its words."""

OVERALL = ""
"""Task name used for measures that aggregate over all tasks."""


@dataclass(frozen=True)
class CellResult:
    """A cell and how it ended. ``measured`` is None if it is not trained, or has diverged."""

    cell: Cell
    ended: Ended
    measured: Measured | None


@dataclass(frozen=True)
class TunedMethod:
    """How a method's step sizes were chosen in a variant.

    Attributes:
        scores: by point, the mean over the tuning seeds of the mean over the tasks of F(K) / F(0);
            None if a run diverged or is missing.
        reasons: by point, why there is no score.
        chosen: the point with the least score; None if no point has one.
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
        measure: what is measured, such as ``rounds`` or ``last metric``.
        unit: of the values.
        better: which direction is good; None if neither is.
        values: by seed. A run that has diverged has no value, except in ``rounds``: there, like a
            run that never reached the target, it counts with all of its rounds.
        seeds: the number of the study's seeds.
        difference: against the baseline, over the seeds that both have. None for the baseline
            itself, without a common seed, and if neither method ever reached the target.
        lost: in how many seeds the method or the baseline has no value because it diverged or
            failed. The other values are those of survivors.
        target: the target of ``rounds`` and ``seconds``, such as ``loss ratio 0.6``.
        reached: in how many seeds the target was reached; None without a target.
        censored: in how many pairs of the difference a run did not reach the target, so that the
            difference is one of min(rounds, K).
    """

    variant: str
    method: str
    task: str
    measure: str
    unit: str
    better: Literal["less", "more"] | None
    values: Mapping[int, float]
    seeds: int
    difference: Interval | None
    lost: int
    target: str = ""
    reached: int | None = None
    censored: int = 0


@dataclass(frozen=True)
class Results:
    """All results of a study."""

    study: Study
    tuned: Sequence[TunedMethod]
    cells: Sequence[CellResult]
    estimates: Sequence[Estimate]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the runs' files."""
        runs = (result.measured for result in self.cells if result.measured)
        return tuple(dict.fromkeys(task for run in runs for task in run.tasks))

    @cached_property
    def _index(self) -> dict[tuple[str, str, str, str, str], Estimate]:
        return {(e.variant, e.method, e.task, e.measure, e.target): e for e in self.estimates}

    def find(
        self, variant: str, method: str, task: str, measure: str, target: str = ""
    ) -> Estimate | None:
        """One estimate, or None."""
        return self._index.get((variant, method, task, measure, target))

    def _cells_of(self, variant: str, method: str) -> list[CellResult]:
        own = (variant, method)
        return [result for result in self.cells if (result.cell.variant, result.cell.method) == own]

    def measured(self, variant: str, method: str) -> dict[int, Measured]:
        """By seed, the trained cells of a method."""
        return {
            result.cell.seed: result.measured
            for result in self._cells_of(variant, method)
            if result.measured is not None
        }

    def not_trained(self) -> dict[str, int]:
        """How many runs diverged, failed or are not trained yet, by these words."""
        states = Counter[str](result.ended.state for result in self.cells)
        return {NOT_TRAINED[state]: states[state] for state in NOT_TRAINED if states[state]}

    def absence(self, variant: str, method: str) -> str:
        """Why a method has no figures, such as "diverged on all 8 seeds"; empty if it has some."""
        if self.measured(variant, method):
            return ""
        for tuned in self.tuned:
            if (tuned.variant, tuned.method) == (variant, method) and tuned.chosen is None:
                missing = any(reason.startswith("missing") for reason in tuned.reasons.values())
                return "not tuned yet" if missing else "diverged or failed with all step sizes"
        states = Counter(result.ended.state for result in self._cells_of(variant, method))
        if list(states) == ["missing"]:
            return NOT_TRAINED["missing"]
        if len(states) == 1:
            return f"{next(iter(states))} on all {len(self.study.seeds)} seeds"
        total = states.total()
        return ", ".join(f"{NOT_TRAINED[key]} on {n} of {total} seeds" for key, n in states.items())

    @cached_property
    def configs(self) -> dict[str, RunConfig]:
        """By method, its settings in the base."""
        configs = {}
        for method in self.study.methods:
            values = overlaid(self.study.base, method.options)
            configs[method.name] = resolve_config(validated(RunConfig, values, prefix=""))
        return configs

    @cached_property
    def ours(self) -> tuple[str, ...]:
        """The methods with FedGradNorm's weighting. The findings begin with them."""
        weightings = {name: config.weighting.name for name, config in self.configs.items()}
        return tuple(name for name, used in weightings.items() if used == "fedgradnorm")

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """All methods in the order of tables and charts: FedGradNorm, the baseline, the others."""
        return tuple(dict.fromkeys((*self.ours, self.study.baseline, *self.configs)))

    def targets(self, task: str) -> tuple[str, ...]:
        """The targets of a task."""
        return tuple(dict.fromkeys(e.target for e in self.estimates if e.task == task and e.target))
