"""A run in figures: per task and client the first, best and last metric, and the rounds to each target."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from rich.filesize import decimal

from fedgradnorm.config import RunSettings
from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.federation import Client, Members
from fedgradnorm.runs.records import Heard, Row, Summary, TaskSummary
from fedgradnorm.task import Task

__all__ = [
    "LOSS_RATIO",
    "SMOOTHED",
    "check_targets",
    "costs_text",
    "rounds_to",
    "silent_texts",
    "summarise",
    "task_curve",
]

Curve = Literal["loss", "inverse_training_rate", "weight", "metric"]

LOSS_RATIO = "loss ratio "
"""A target of the training loss is named by this and its share of the initial loss, such as "loss ratio 0.6"."""

SELDOM = 0.5
"""A client of whose reports a smaller share counted is said to count seldom."""

MOST_NAMED = 10
"""Clients that a text names."""

MOST_REASONS, NUMBERS = 3, re.compile(r"[-+]?[0-9][0-9.e+-]*")

SMOOTHED = 5
"""A target counts as reached by the mean of so many rounds: a single noisy round may dip under it by chance."""


def task_curve(rows: Sequence[Row], task: str, key: Curve) -> dict[int, float]:
    """By round, the mean of one figure over the clients of a task that have it in that round.

    The metric of a client of which no report ever counted is left out: its model is as initialised.
    """
    values: dict[int, list[float]] = {}
    heard = {row["client"] for row in rows if row["loss"] is not None} if key == "metric" else None
    for row in rows:
        if (
            row["task"] == task
            and (value := row[key]) is not None
            and (heard is None or row["client"] in heard)
        ):
            values.setdefault(row["round"], []).append(value)
    return {round: fmean(numbers) for round, numbers in values.items()}


def rounds_to(
    curve: Mapping[int, float], target: float, *, higher_is_better: bool = False
) -> int | None:
    """The first round at which the mean of a curve over the last five rounds has reached its target, or None.

    Rounds without a value do not count; before the fifth round the mean is over those there are.

    >>> rounds_to({1: 0.9, 2: 0.3, 3: 0.7, 4: 0.3, 5: 0.2}, 0.5)
    5
    """
    for round in curve:
        mean = fmean(
            curve[last] for last in range(round - SMOOTHED + 1, round + 1) if last in curve
        )
        if mean >= target if higher_is_better else mean <= target:
            return round
    return None


def check_targets(settings: RunSettings, federation: Members) -> None:
    """Raise ConfigError where a metric target names no task, or one without a metric."""
    tasks = _tasks(federation.clients)
    for name in settings.metric_targets:
        if name not in tasks:
            raise ConfigError(
                f"run.metric_targets.{name}: there is no task '{name}'; {nearest(name, tasks)}"
            )
        if tasks[name].main_metric is None:
            raise ConfigError(f"run.metric_targets.{name}: task '{name}' has no metric")


def summarise(
    clients: Sequence[Client],
    rows: Sequence[Row],
    guesses: Mapping[str, Mapping[str, float]],
    settings: RunSettings,
    seconds: float,
    costs: Mapping[str, float],
    missing: Mapping[str, Mapping[str, str]] = {},
) -> Summary:
    """The contents of summary.json.

    Args:
        clients: who was trained.
        rows: the lines of metrics.jsonl.
        guesses: by client, the metrics of the best guess that looks at no input.
        settings: which targets to look for.
        seconds: how long the run took, over all of its starts.
        costs: by part, the seconds of it.
        missing: by client, the metrics that could not be taken at the last test, with the reasons.
    """
    last, heard = {row["client"]: row for row in rows}, _heard(rows)
    return {
        "rounds": max(row["round"] for row in rows),
        "seconds": seconds,
        "costs": dict(costs),
        "dropped": sum(row["dropped"] is not None for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "tasks": {
            name: _summarise_task(task, rows, guesses, settings)
            for name, task in _tasks(clients).items()
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
                "reports": heard[client.id],
                "missing": missing.get(client.id, {}),
            }
            for client in clients
            if client.id in last  # one on another machine may have come after the last round
        },
    }


def _heard(rows: Sequence[Row]) -> dict[str, Heard]:
    """By client, how many of its reports counted, and why the others did not."""
    found: dict[str, Heard] = {}
    for row in rows:
        of_client = found.setdefault(row["client"], {"asked": 0, "heard": 0, "reasons": {}})
        of_client["asked"] += row["participated"]
        of_client["heard"] += row["loss"] is not None
        if (reason := row["dropped"]) is not None:
            of_client["reasons"][reason] = of_client["reasons"].get(reason, 0) + 1
    return found


def silent_texts(summary: Summary) -> list[str]:
    """Which clients never or seldom counted, and why, a text for each; and in one text which were never trained."""
    clients = summary["clients"].items()
    texts = [
        text for id, client in clients if (text := _silent_text(id, client["reports"])) is not None
    ]
    if never := [f"'{id}'" for id, client in clients if not client["reports"]["asked"]]:
        named = ", ".join(never[:MOST_NAMED]) + (
            f" and {len(never) - MOST_NAMED} more" if len(never) > MOST_NAMED else ""
        )
        who, were = ("client", "was") if len(never) == 1 else ("clients", "were")
        texts.append(f"{who} {named} {were} never trained: not among the participants of any round")
    return texts


def _silent_text(client: str, reports: Heard) -> str | None:
    """That a client was never heard, or in less than half of the rounds in which it was asked, and why; None where it was heard.

    >>> _silent_text("site", {"asked": 5, "heard": 0, "reasons": {"no report": 1, "gradient: not finite": 4}})
    "client 'site' never counted: 5 of 5 reports were dropped: gradient: not finite (4), no report (1)"
    """
    asked, heard = reports["asked"], reports["heard"]
    if not asked or heard >= SELDOM * asked:
        return None
    alike: dict[
        str, tuple[str, int]
    ] = {}  # reasons that differ in their numbers alone are one, told by the first
    for reason, count in reports["reasons"].items():
        kind = NUMBERS.sub("", reason)
        text, known = alike.get(kind, (reason, 0))
        alike[kind] = text, known + count
    reasons = sorted(alike.values(), key=lambda item: -item[1])
    told = ", ".join(f"{reason} ({count})" for reason, count in reasons[:MOST_REASONS])
    more = (
        f" and for {len(reasons) - MOST_REASONS} other reasons"
        if len(reasons) > MOST_REASONS
        else ""
    )
    how = "never counted" if heard == 0 else "seldom counted"
    return f"client '{client}' {how}: {asked - heard} of {asked} reports were dropped: {told}{more}"


def costs_text(summary: Summary) -> str:
    """Where the time went, and bytes a round, as a line to read."""
    seconds = summary["seconds"]
    parts = {**summary["costs"], "other": seconds - sum(summary["costs"].values())}
    shares = ", ".join(f"{part} {value / seconds:.0%}" for part, value in parts.items())
    up, down = (
        decimal(round(summary[way] / summary["rounds"])) for way in ("bytes_up", "bytes_down")
    )
    return f"time: {seconds:.1f} s, of which {shares}; sent a round: {up} up, {down} down"


def _tasks(clients: Sequence[Client]) -> dict[str, Task]:
    return {client.task.name: client.task for client in clients}


def _summarise_task(
    task: Task,
    rows: Sequence[Row],
    guesses: Mapping[str, Mapping[str, float]],
    settings: RunSettings,
) -> TaskSummary:
    clients = sorted({row["client"] for row in rows if row["task"] == task.name})
    ratios, weights = (
        task_curve(rows, task.name, "inverse_training_rate"),
        task_curve(rows, task.name, "weight"),
    )
    rounds = {
        f"{LOSS_RATIO}{target:g}": rounds_to(ratios, target) for target in settings.loss_targets
    }
    rounds_done = max(row["round"] for row in rows)
    took_part = [row["round"] for row in rows if row["task"] == task.name and row["participated"]]
    summary: TaskSummary = {
        "clients": len(clients),
        "loss_ratio": ratios.get(
            max(took_part, default=0)
        ),  # None where the last report was dropped
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
        rounds[f"{metric.name} {target:g}"] = rounds_to(
            curve, target, higher_is_better=metric.higher_is_better
        )
    heard = {
        row["client"] for row in rows if row["loss"] is not None
    }  # the curve has no others either
    known = [
        guesses[client][metric.name]
        for client in clients
        if client in heard and metric.name in guesses.get(client, {})
    ]
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
