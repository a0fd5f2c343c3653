"""A run in figures: per task and client the first, best and last metric, and the rounds to each target."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from rich.filesize import decimal

from fedgradnorm.config import RunSettings
from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.federation import Members
from fedgradnorm.records import Row, Summary, TaskSummary
from fedgradnorm.task import Task

__all__ = ["LOSS_RATIO", "SMOOTHED", "check_targets", "costs_text", "rounds_to", "summarise", "task_curve"]

Curve = Literal["loss", "inverse_training_rate", "weight", "metric"]

LOSS_RATIO = "loss ratio "
"""A target of the training loss is named by this and its share of the initial loss, such as "loss ratio 0.6"."""

SMOOTHED = 5
"""A target counts as reached by the mean of so many rounds: a single noisy round may dip under it by chance."""


def task_curve(rows: Sequence[Row], task: str, key: Curve) -> dict[int, float]:
    """By round, the mean of one figure over the clients of a task that have it in that round."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["task"] == task and (value := row[key]) is not None:
            values.setdefault(row["round"], []).append(value)
    return {round: fmean(numbers) for round, numbers in values.items()}


def rounds_to(curve: Mapping[int, float], target: float, *, higher_is_better: bool = False) -> int | None:
    """The first round at which the mean of a curve over the last five rounds has reached its target, or None.

    Rounds without a value do not count; before the fifth round the mean is over those there are.

    >>> rounds_to({1: 0.9, 2: 0.3, 3: 0.7, 4: 0.3, 5: 0.2}, 0.5)
    5
    """
    for round in curve:
        mean = fmean(curve[last] for last in range(round - SMOOTHED + 1, round + 1) if last in curve)
        if mean >= target if higher_is_better else mean <= target:
            return round
    return None


def check_targets(settings: RunSettings, federation: Members) -> None:
    """Raise ConfigError where a metric target names no task, or one without a metric."""
    tasks = _tasks(federation)
    for name in settings.metric_targets:
        if name not in tasks:
            raise ConfigError(f"run.metric_targets.{name}: there is no task '{name}'; {nearest(name, tasks)}")
        if tasks[name].main_metric is None:
            raise ConfigError(f"run.metric_targets.{name}: task '{name}' has no metric")


def summarise(
    federation: Members,
    rows: Sequence[Row],
    guesses: Mapping[str, Mapping[str, float]],
    settings: RunSettings,
    seconds: float,
    costs: Mapping[str, float],
) -> Summary:
    """The contents of summary.json.

    Args:
        federation: what was trained.
        rows: the lines of metrics.jsonl.
        guesses: by client, the metrics of the best guess that looks at no input.
        settings: which targets to look for.
        seconds: how long the run took.
        costs: by part, the seconds of it.
    """
    last = {row["client"]: row for row in rows}
    return {
        "rounds": max(row["round"] for row in rows),
        "seconds": seconds,
        "costs": dict(costs),
        "dropped": sum(row["dropped"] is not None for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "tasks": {
            name: _summarise_task(task, rows, guesses, settings)
            for name, task in _tasks(federation).items()
            if any(row["task"] == name for row in rows)
        },
        "clients": {
            client.id: {
                "task": client.task.name,
                "examples": last[client.id]["examples"],
                "weight": last[client.id]["weight"],
                "test_loss": last[client.id]["test_loss"],
                "metrics": last[client.id]["metrics"],
                "guess": guesses.get(client.id, {}),
            }
            for client in federation.clients
            if client.id in last  # one on another machine may have come after the last round
        },
    }


def costs_text(summary: Summary) -> str:
    """Where the time went, and bytes a round, as a line to read."""
    seconds = summary["seconds"]
    parts = {**summary["costs"], "other": seconds - sum(summary["costs"].values())}
    shares = ", ".join(f"{part} {value / seconds:.0%}" for part, value in parts.items())
    up, down = (decimal(round(summary[way] / summary["rounds"])) for way in ("bytes_up", "bytes_down"))
    return f"time: {seconds:.1f} s, of which {shares}; sent a round: {up} up, {down} down"


def _tasks(federation: Members) -> dict[str, Task]:
    return {client.task.name: client.task for client in federation.clients}


def _summarise_task(task: Task, rows: Sequence[Row], guesses: Mapping[str, Mapping[str, float]], settings: RunSettings) -> TaskSummary:
    clients = sorted({row["client"] for row in rows if row["task"] == task.name})
    ratios, weights = task_curve(rows, task.name, "inverse_training_rate"), task_curve(rows, task.name, "weight")
    rounds = {f"{LOSS_RATIO}{target:g}": rounds_to(ratios, target) for target in settings.loss_targets}
    rounds_done = max(row["round"] for row in rows)
    took_part = [row["round"] for row in rows if row["task"] == task.name and row["participated"]]
    summary: TaskSummary = {
        "clients": len(clients),
        "loss_ratio": ratios.get(max(took_part, default=0)),  # None where the last report was dropped
        "weight": list(weights.values())[-1],
        "metric": None,
        "rounds_to": rounds,
    }
    metric, curve = task.main_metric, task_curve(rows, task.name, "metric")
    if metric is None or not curve:
        return summary
    best = (max if metric.higher_is_better else min)(curve, key=curve.__getitem__)
    if task.name in settings.metric_targets:
        target = settings.metric_targets[task.name]
        rounds[f"{metric.name} {target:g}"] = rounds_to(curve, target, higher_is_better=metric.higher_is_better)
    known = [guesses[client][metric.name] for client in clients if metric.name in guesses.get(client, {})]
    summary["metric"] = {
        "name": metric.name,
        "higher_is_better": metric.higher_is_better,
        "percent": metric.percent,
        "guess": fmean(known) if known else None,
        "first": next(iter(curve.values())),
        "best": curve[best],
        "best_round": best,
        "last": curve.get(rounds_done),  # None where the model has diverged
    }
    return summary
