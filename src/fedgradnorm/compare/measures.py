"""What one trained cell is worth: its figures by task and over the tasks, and its curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedgradnorm.compare.spec import Targets
from fedgradnorm.compare.statistics import final_value, skill, spread
from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.runs.folder import Run
from fedgradnorm.runs.records import MetricSummary, Row
from fedgradnorm.runs.summary import LOSS_RATIO, SMOOTHED, rounds_to, task_curve

__all__ = [
    "CURVES",
    "DIVERGED_RATIO",
    "Measured",
    "Target",
    "TaskMeasures",
    "diverged",
    "measure",
    "tuning_score",
]

DIVERGED_RATIO = 10.0
"""A run whose training loss ends at so many times the initial one has diverged."""

CURVES = ("inverse_training_rate", "weight", "metric")


@dataclass(frozen=True)
class Target:
    """When a run reached a target.

    Attributes:
        reached: whether it did.
        rounds: the round at which it was reached; see `rounds_to`. All rounds where it was not.
        seconds: the time up to the end of that round; None where it is not known.
    """

    reached: bool
    rounds: float
    seconds: float | None


@dataclass(frozen=True)
class TaskMeasures:
    """A task in one run.

    Attributes:
        metric: the main test metric: name, direction, guess, first, best and last value; None without one.
        final_ratio: F(K) / F(0), the mean over the last tenth of its rounds; None where there is none at the end.
        weight: the weight, likewise a mean.
        targets: by name, such as ``loss ratio 0.6``.
        curves: by name, the values by round: inverse training rate, weight, metric.
    """

    metric: MetricSummary | None
    final_ratio: float | None
    weight: float | None
    targets: Mapping[str, Target]
    curves: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Measured:
    """A trained cell.

    Attributes:
        rounds: how many there were.
        tasks: by name.
        spread_end: how unequal the tasks' inverse training rates are at the end; see `spread`.
        spread_mean: the same, as a mean over the rounds.
        worst: the task with the least skill, and its skill in %; None where no task has a metric with a guess.
        bytes: sent up and down in all.
        dropped: reports that were dropped.
    """

    rounds: int
    tasks: Mapping[str, TaskMeasures]
    spread_end: float | None
    spread_mean: float | None
    worst: tuple[str, float] | None
    bytes: int
    dropped: int


def measure(folder: Path, targets: Targets) -> Measured:
    """The figures of a finished run.

    Raises:
        ConfigError: a metric target of a task that is not there or has no metric.
        RunError: the folder is no finished run.
    """
    run = Run(folder)
    rows, summary = run.rows(), run.summary()
    rounds, clock = summary["rounds"], _clock(rows, summary["costs"])
    for name in targets.metrics:
        if name not in summary["tasks"]:
            raise ConfigError(
                f"targets.metrics.{name}: there is no task '{name}'; {nearest(name, summary['tasks'])}"
            )
        if summary["tasks"][name]["metric"] is None:
            raise ConfigError(f"targets.metrics.{name}: task '{name}' has no metric")
    tasks = {
        name: _task(rows, name, task["metric"], targets, rounds, clock)
        for name, task in summary["tasks"].items()
    }
    spreads = _spreads([task.curves["inverse_training_rate"] for task in tasks.values()], rounds)
    return Measured(
        rounds,
        tasks,
        final_value(spreads),
        fmean(spreads.values()) if spreads else None,
        _worst(tasks),
        summary["bytes_up"] + summary["bytes_down"],
        summary["dropped"],
    )


def diverged(measured: Measured) -> str:
    """Why a run that went on to its last round has diverged all the same; empty where it has not."""
    for name, task in measured.tasks.items():
        if task.final_ratio is None:
            return f"{name}: none of its last reports was sound"
        if task.final_ratio > DIVERGED_RATIO:
            return f"{name}: the training loss ends at {task.final_ratio:.3g} times the initial one"
        if task.metric is not None and task.metric["last"] is None:
            return f"{name}: the last test metric is not a number"
    return ""


def tuning_score(measured: Measured) -> float | None:
    """The mean over the tasks of F(K) / F(0); None for a run that has diverged. Less is better."""
    ratios = [task.final_ratio for task in measured.tasks.values()]
    return None if diverged(measured) else fmean(ratio for ratio in ratios if ratio is not None)


def _clock(rows: Sequence[Row], costs: Mapping[str, float]) -> list[float]:
    """By round, the seconds since the start, of a federation whose clients work at the same time.

    A round takes its slowest client's time and the server's, which is spread over the rounds in proportion to the clients' work.
    """
    slowest: dict[int, float] = {}
    worked: dict[int, float] = {}
    for row in rows:
        slowest[row["round"]] = max(slowest.get(row["round"], 0.0), row["seconds"])
        worked[row["round"]] = worked.get(row["round"], 0.0) + row["seconds"]
    training = costs["head steps"] + costs["encoder steps"]
    share = (
        costs["aggregation"] / training if training > 0 else 0.0
    )  # not the sum: a resumed run counts its second half only
    clock = [0.0]
    for round, seconds in slowest.items():
        clock.append(clock[-1] + seconds + share * worked[round])
    return clock


def _task(
    rows: Sequence[Row],
    name: str,
    metric: MetricSummary | None,
    targets: Targets,
    rounds: int,
    clock: Sequence[float],
) -> TaskMeasures:
    ratios, weights = (
        task_curve(rows, name, "inverse_training_rate"),
        task_curve(rows, name, "weight"),
    )
    metrics = task_curve(rows, name, "metric")

    def target(found: int | None) -> Target:
        return Target(found is not None, float(found or rounds), clock[found or rounds])

    found = {
        f"{LOSS_RATIO}{ratio:g}": target(rounds_to(ratios, ratio))
        for ratio in sorted(targets.loss_ratios, reverse=True)
    }
    if metric is not None and name in targets.metrics:
        goal = targets.metrics[name]
        reached = rounds_to(metrics, goal, higher_is_better=metric["higher_is_better"])
        found[f"{metric['name']} {goal:g}"] = target(reached)
    curves = {"inverse_training_rate": ratios, "weight": weights, "metric": metrics}
    end = [
        row
        for row in rows
        if row["task"] == name
        and row["participated"]
        and row["round"] > rounds - max(SMOOTHED, rounds // 10)
    ]
    lost = bool(end) and all(row["dropped"] is not None for row in end)
    return TaskMeasures(
        metric, None if lost else final_value(ratios), final_value(weights), found, curves
    )


def _spreads(curves: Sequence[Mapping[int, float]], rounds: int) -> dict[int, float]:
    """By round, the spread over the tasks, in rounds that have at least two of them."""
    by_round = {
        round: [curve[round] for curve in curves if round in curve]
        for round in range(1, rounds + 1)
    }
    return {
        round: value for round, rates in by_round.items() if (value := spread(rates)) is not None
    }


def _worst(tasks: Mapping[str, TaskMeasures]) -> tuple[str, float] | None:
    skills = {}
    for name, task in tasks.items():
        if (
            (metric := task.metric) is not None
            and metric["last"] is not None
            and metric["guess"] is not None
        ):
            value = skill(
                metric["last"],
                metric["guess"],
                higher_is_better=metric["higher_is_better"],
                percent=metric["percent"],
            )
            if value is not None:
                skills[name] = value
    return min(skills.items(), key=lambda item: item[1]) if skills else None
