"""A run in figures: by task and client the first, best and last metric, and rounds to targets."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from rich.filesize import decimal

from fedgradnorm.config import RunSettings
from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.federation import Client, Members
from fedgradnorm.runs.records import Heard, MetricSummary, Row, Summary, TaskSummary
from fedgradnorm.task import Metric, Task

Curve = Literal["loss", "inverse_training_rate", "weight", "metric"]

LOSS_RATIO = "loss ratio "
"""The name of a target of the training loss is this and a share, such as "loss ratio 0.6"."""

SELDOM = 0.5
"""A client counts seldom if a smaller share of its reports counted."""

MOST_NAMED = 10
"""The most clients that a text names."""

MOST_REASONS = 3
"""The most reasons that a text names."""

NUMBERS = re.compile(r"[-+]?[0-9][0-9.e+-]*")

SMOOTHED = 5
"""A target is reached by the mean over this many rounds: one noisy round may reach it by chance."""


def task_curve(rows: Sequence[Row], task: str, key: Curve) -> dict[int, float]:
    """By round, the mean of a figure over the clients of a task that have it in that round.

    Metrics of clients whose reports never counted are left out: their models are untrained.
    """
    values: dict[int, list[float]] = {}
    heard = {row["client"] for row in rows if row["loss"] is not None}
    for row in rows:
        value = row[key] if row["task"] == task else None
        if value is not None and (key != "metric" or row["client"] in heard):
            values.setdefault(row["round"], []).append(value)
    return {round: fmean(numbers) for round, numbers in values.items()}


def rounds_to(
    curve: Mapping[int, float], target: float, *, higher_is_better: bool = False
) -> int | None:
    """The first round at which the mean of a curve over five rounds has reached its target.

    The mean is over the round and the four before it, as far as they have values. None: the target
    is never reached.

    >>> rounds_to({1: 0.9, 2: 0.3, 3: 0.7, 4: 0.3, 5: 0.2}, 0.5)
    5
    """
    for round in curve:
        window = range(round - SMOOTHED + 1, round + 1)
        mean = fmean(curve[past] for past in window if past in curve)
        if mean >= target if higher_is_better else mean <= target:
            return round
    return None


def check_targets(settings: RunSettings, federation: Members) -> None:
    """Raise ConfigError if a metric target names an unknown task, or a task without a metric."""
    tasks = _tasks(federation.clients)
    for name in settings.metric_targets:
        if name not in tasks:
            hint = nearest(name, tasks)
            raise ConfigError(f"run.metric_targets.{name}: there is no task '{name}'; {hint}")
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
        guesses: by client, the metrics of the best constant answer.
        settings: which targets to look for.
        seconds: how long the run took, over all of its starts.
        costs: the parts of these seconds, by name.
        missing: by client and metric, why it could not be computed at the last test.
    """
    heard = _heard(rows)
    last = {row["client"]: row for row in rows}  # no row: a remote client that came after the end
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
            if client.id in last
        },
    }


def _heard(rows: Sequence[Row]) -> dict[str, Heard]:
    """By client, how many of its reports counted, and why the others did not."""
    by_client: dict[str, Heard] = {}
    for row in rows:
        counts = by_client.setdefault(row["client"], {"asked": 0, "heard": 0, "reasons": {}})
        counts["asked"] += row["participated"]
        counts["heard"] += row["loss"] is not None
        if (reason := row["dropped"]) is not None:
            counts["reasons"][reason] = counts["reasons"].get(reason, 0) + 1
    return by_client


def silent_texts(summary: Summary) -> list[str]:
    """A text for each client that seldom or never counted, and one for all never trained."""
    clients = summary["clients"]
    texts = [_silent_text(id, client["reports"]) for id, client in clients.items()]
    texts = [text for text in texts if text]
    if never := [f"'{id}'" for id, client in clients.items() if not client["reports"]["asked"]]:
        more = f" and {len(never) - MOST_NAMED} more" if len(never) > MOST_NAMED else ""
        who, were = ("client", "was") if len(never) == 1 else ("clients", "were")
        named = f"{who} {', '.join(never[:MOST_NAMED])}{more}"
        texts.append(f"{named} {were} never trained: not among the participants of any round")
    return texts


def _silent_text(client: str, reports: Heard) -> str:
    """How often a client's reports were dropped, and why; "" if enough of them counted.

    >>> _silent_text("a", {"asked": 5, "heard": 0, "reasons": {"no report": 1, "not finite": 4}})
    "client 'a' never counted: 5 of 5 reports were dropped: not finite (4), no report (1)"
    """
    asked, heard = reports["asked"], reports["heard"]
    if not asked or heard >= SELDOM * asked:
        return ""
    # reasons that only differ in their numbers are counted together, under the first
    kinds: dict[str, tuple[str, int]] = {}
    for reason, count in reports["reasons"].items():
        kind = NUMBERS.sub("", reason)
        first, so_far = kinds.get(kind, (reason, 0))
        kinds[kind] = first, so_far + count
    reasons = sorted(kinds.values(), key=lambda pair: -pair[1])
    named = ", ".join(f"{reason} ({count})" for reason, count in reasons[:MOST_REASONS])
    others = len(reasons) - MOST_REASONS
    more = f" and for {others} other reasons" if others > 0 else ""
    how = "never counted" if heard == 0 else "seldom counted"
    dropped = f"{asked - heard} of {asked} reports were dropped"
    return f"client '{client}' {how}: {dropped}: {named}{more}"


def costs_text(summary: Summary) -> str:
    """How long each part of the run took, and how many bytes were sent per round, in one line."""
    seconds, rounds = summary["seconds"], summary["rounds"]
    parts = {**summary["costs"], "other": seconds - sum(summary["costs"].values())}
    shares = ", ".join(f"{part} {value / seconds:.0%}" for part, value in parts.items())
    up, down = (decimal(round(summary[way] / rounds)) for way in ("bytes_up", "bytes_down"))
    return f"time: {seconds:.1f} s, of which {shares}; sent a round: {up} up, {down} down"


def _tasks(clients: Sequence[Client]) -> dict[str, Task]:
    return {client.task.name: client.task for client in clients}


def _summarise_task(
    task: Task,
    rows: Sequence[Row],
    guesses: Mapping[str, Mapping[str, float]],
    settings: RunSettings,
) -> TaskSummary:
    ratios = task_curve(rows, task.name, "inverse_training_rate")
    weights = list(task_curve(rows, task.name, "weight").values())
    metrics = task_curve(rows, task.name, "metric")
    targets = settings.loss_targets
    rounds = {f"{LOSS_RATIO}{target:g}": rounds_to(ratios, target) for target in targets}
    metric = task.main_metric
    if metric is not None and metrics and task.name in settings.metric_targets:
        target = settings.metric_targets[task.name]
        reached = rounds_to(metrics, target, higher_is_better=metric.higher_is_better)
        rounds[f"{metric.name} {target:g}"] = reached
    own, summary = [row for row in rows if row["task"] == task.name], None
    if metric is not None and metrics:
        last_round = max(row["round"] for row in rows)
        summary = _summarise_metric(metric, metrics, own, last_round, guesses)
    last_asked = max((row["round"] for row in own if row["participated"]), default=0)
    return {
        "clients": len({row["client"] for row in own}),
        "loss_ratio": ratios.get(last_asked),  # None if the last report was dropped
        "weight": weights[-1],
        "metric": summary,
        "rounds_to": rounds,
    }


def _summarise_metric(
    metric: Metric,
    curve: Mapping[int, float],
    rows: Sequence[Row],
    last_round: int,
    guesses: Mapping[str, Mapping[str, float]],
) -> MetricSummary:
    """A task's main metric. The curve and the rows are those of the task's clients."""
    best = (max if metric.higher_is_better else min)(curve, key=curve.__getitem__)
    heard = sorted({row["client"] for row in rows if row["loss"] is not None})  # as in the curve
    by_client = [guesses.get(client, {}) for client in heard]
    known = [guess[metric.name] for guess in by_client if metric.name in guess]
    return {
        "name": metric.name,
        "higher_is_better": metric.higher_is_better,
        "percent": metric.percent,
        "guess": fmean(known) if known else None,
        "first": next(iter(curve.values())),
        "best": curve[best],
        "best_round": best,
        "last": curve.get(last_round),  # None if the model has diverged
    }
