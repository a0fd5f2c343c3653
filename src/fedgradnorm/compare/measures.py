"""The figures of one trained cell, by task and over the tasks, and its curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedgradnorm.compare.spec import Targets
from fedgradnorm.compare.statistics import final_value, skill, spread
from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import MetricSummary, Row
from fedgradnorm.runs.summary import LOSS_RATIO, SMOOTHED, rounds_to, task_curve

DIVERGED_RATIO = 10.0
"""A run has diverged if its training loss ends above this multiple of the initial one."""


@dataclass(frozen=True)
class Target:
    """Whether and when a run reached a target.

    Attributes:
        reached: whether it did.
        rounds: the round at which it was reached; see `rounds_to`. All rounds if it was not.
        seconds: the time up to the end of that round; None if it is not known.
    """

    reached: bool
    rounds: float
    seconds: float | None


@dataclass(frozen=True)
class TaskMeasures:
    """A task in one run.

    Attributes:
        metric: the main test metric, or None.
        final_ratio: F(K) / F(0), the mean over the last tenth of its rounds; None without reports
            at the end.
        weight: the weight, also the mean over the last tenth.
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
        spread_end: how unequal the tasks' inverse training rates are at the end; see `spread`.
        spread_mean: the mean of the spread over the rounds.
        worst: the task with the least skill, and its skill in %; None if no task has one.
        bytes: the total sent up and down.
        dropped: the number of dropped reports.
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
        ConfigError: a metric target names an unknown task or a task without a metric.
        RunError: the folder does not hold a finished run.
    """
    run = Run(folder)
    rows, summary = run.rows(), run.summary()
    rounds, clock = summary["rounds"], _clock(rows, summary["costs"])
    for name in targets.metrics:
        if name not in summary["tasks"]:
            near = nearest(name, summary["tasks"])
            raise ConfigError(f"targets.metrics.{name}: there is no task '{name}'; {near}")
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
        spread_end=final_value(spreads),
        spread_mean=fmean(spreads.values()) if spreads else None,
        worst=_worst(tasks),
        bytes=summary["bytes_up"] + summary["bytes_down"],
        dropped=summary["dropped"],
    )


def diverged(measured: Measured) -> str:
    """Why a run that reached its last round has diverged; empty if it has not."""
    for name, task in measured.tasks.items():
        if task.final_ratio is None:
            return f"{name}: none of its last reports was sound"
        if task.final_ratio > DIVERGED_RATIO:
            return f"{name}: the training loss ends at {task.final_ratio:.3g} times the initial one"
        if task.metric is not None and task.metric["last"] is None:
            return f"{name}: the last test metric is not a number"
    return ""


def tuning_score(measured: Measured) -> float | None:
    """The mean over the tasks of F(K) / F(0), or None if the run has diverged. Less is better."""
    ratios = [task.final_ratio for task in measured.tasks.values()]
    return None if diverged(measured) else fmean(ratio for ratio in ratios if ratio is not None)


def _clock(rows: Sequence[Row], costs: Mapping[str, float]) -> list[float]:
    """By round, the seconds since the start, as if all clients worked at the same time.

    A round takes the time of its slowest client, and the server's. The server's total is divided
    among the rounds in proportion to the clients' work.
    """
    slowest: dict[int, float] = {}
    worked: dict[int, float] = {}
    for row in rows:
        slowest[row["round"]] = max(slowest.get(row["round"], 0.0), row["seconds"])
        worked[row["round"]] = worked.get(row["round"], 0.0) + row["seconds"]
    training = costs["head steps"] + costs["encoder steps"]
    # Divided by the costs, not by the rows' sum: a resumed run counts the costs of its last part.
    share = costs["aggregation"] / training if training > 0 else 0.0
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
    ratios = task_curve(rows, name, "inverse_training_rate")
    weights = task_curve(rows, name, "weight")
    metrics = task_curve(rows, name, "metric")

    def target(round: int | None) -> Target:
        return Target(round is not None, float(round or rounds), clock[round or rounds])

    reached = {
        f"{LOSS_RATIO}{ratio:g}": target(rounds_to(ratios, ratio))
        for ratio in sorted(targets.loss_ratios, reverse=True)
    }
    if metric is not None and name in targets.metrics:
        goal = targets.metrics[name]
        round = rounds_to(metrics, goal, higher_is_better=metric["higher_is_better"])
        reached[f"{metric['name']} {goal:g}"] = target(round)
    curves = {"inverse_training_rate": ratios, "weight": weights, "metric": metrics}
    start = rounds - max(SMOOTHED, rounds // 10)
    own = (row for row in rows if row["task"] == name and row["participated"])
    end = [row for row in own if row["round"] > start]
    lost = bool(end) and all(row["dropped"] is not None for row in end)
    ratio = None if lost else final_value(ratios)
    return TaskMeasures(metric, ratio, final_value(weights), reached, curves)


def _spreads(curves: Sequence[Mapping[int, float]], rounds: int) -> dict[int, float]:
    """By round, the spread over the tasks, in rounds with at least two of them."""
    spreads = {
        round: spread([curve[round] for curve in curves if round in curve])
        for round in range(1, rounds + 1)
    }
    return {round: value for round, value in spreads.items() if value is not None}


def _worst(tasks: Mapping[str, TaskMeasures]) -> tuple[str, float] | None:
    skills = {}
    for name, task in tasks.items():
        metric = task.metric
        if metric is None or metric["last"] is None or metric["guess"] is None:
            continue
        higher, percent = metric["higher_is_better"], metric["percent"]
        value = skill(metric["last"], metric["guess"], higher_is_better=higher, percent=percent)
        if value is not None:
            skills[name] = value
    return min(skills.items(), key=lambda item: item[1]) if skills else None
