"""The charts of a task as data, which the page draws."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from fedgradnorm.report.comparison import ComparisonRow
from fedgradnorm.report.loading import Loaded
from fedgradnorm.runs.records import Row

GREY = "#555b63"

MOST_LINES = 30
"""A chart with more clients than this shows their mean and range, not a line for each."""

Value = Callable[[Row], float | None]


def charts_of(group: Sequence[ComparisonRow], loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """The four charts of a task: their titles and units, and lines of rounds and values."""
    labels = {row.run for row in group}
    runs = [run for run in loaded if run.label in labels]
    first = group[0]
    scale = 100 if first.percent else 1
    rounds = max(run.summary["rounds"] for run in runs)
    thin = sum(row.clients for row in group) > MOST_LINES

    def lines(value: Value, *, sparse: bool = False) -> list[dict[str, Any]]:
        return [
            line
            for run in runs
            for line in _lines(run, first.task, value, thin=thin, sparse=sparse)
        ]

    def metric(row: Row) -> float | None:
        return None if row["metric"] is None else scale * row["metric"]

    def chart(title: str, unit: str, lines: list[dict[str, Any]], *, from_zero: bool = True) -> Any:
        drawn = [line for line in lines if any(value is not None for value in line["y"])]
        settings = {"title": title, "unit": unit, "rounds": rounds, "from_zero": from_zero}
        return settings | {"lines": drawn}

    values = sorted({scale * row.guess for row in group if row.guess is not None})
    guesses = [_guess(value, rounds) for value in values]
    targets = [_mean_line(run, first.task, lambda row: row["target"], "target") for run in runs]
    losses = lines(lambda row: row["inverse_training_rate"])
    metrics = lines(metric, sparse=True) + guesses
    norms = targets + lines(_weighted_norm)
    return [
        chart("Training loss", "share of initial loss", losses),
        chart(f"Test {first.metric or 'metric'}", _unit(first), metrics, from_zero=False),
        chart("Weight", "p; 1 is equal", lines(lambda row: row["weight"])),
        chart("Weighted gradient norm", "p · norm; its target is dashed", norms),
    ]


def _guess(value: float, rounds: int) -> dict[str, Any]:
    line = {"kind": "guess", "colour": GREY, "name": "constant guess"}
    return line | {"x": [1, rounds], "y": [value, value]}


def _unit(row: ComparisonRow) -> str:
    direction = "more is better" if row.higher_is_better else "less is better"
    return f"{'%, ' if row.percent else ''}{direction}" if row.metric else ""


def _weighted_norm(row: Row) -> float | None:
    return None if row["grad_norm"] is None else row["weight"] * row["grad_norm"]


def _lines(
    run: Loaded, task: str, value: Value, *, thin: bool, sparse: bool
) -> list[dict[str, Any]]:
    """A line for each client and their mean, or with ``thin`` a band and the mean.

    A round without a value is a gap. With ``sparse`` it is left out, and the line goes through.
    """
    by_client: dict[str, list[tuple[int, float | None]]] = {}
    for row in run.rows:
        if row["task"] == task and not (sparse and value(row) is None):
            by_client.setdefault(row["client"], []).append((row["round"], value(row)))
    lines = [_mean_line(run, task, value, "mean", sparse=sparse)]
    if thin:
        return [_band(run, task, value), *lines]
    if len(by_client) > 1:
        lines += [_line(run, "client", points, client) for client, points in by_client.items()]
    return lines


def _mean_line(
    run: Loaded, task: str, value: Value, kind: str, *, sparse: bool = False
) -> dict[str, Any]:
    points = [
        (round, fmean(values) if values else None)
        for round, values in _of_task(run, task, value).items()
        if values or not sparse
    ]
    return _line(run, kind, points, "target" if kind == "target" else "")


def _band(run: Loaded, task: str, value: Value) -> dict[str, Any]:
    by_round = {round: values for round, values in _of_task(run, task, value).items() if values}
    low = _line(run, "band", [(round, min(values)) for round, values in by_round.items()])
    high = _line(run, "band", [(round, max(values)) for round, values in by_round.items()])
    return {**high, "low": low["y"]}


def _of_task(run: Loaded, task: str, value: Value) -> dict[int, list[float]]:
    return values_by_round((row for row in run.rows if row["task"] == task), value)


def values_by_round(rows: Iterable[Row], value: Value) -> dict[int, list[float]]:
    """By round, a figure of each row that has it. A round without any has an empty list."""
    by_round: dict[int, list[float]] = {}
    for row in rows:
        values = by_round.setdefault(row["round"], [])
        if (number := value(row)) is not None:
            values.append(number)
    return by_round


def _line(
    run: Loaded, kind: str, points: Sequence[tuple[int, float | None]], what: str = ""
) -> dict[str, Any]:
    return {
        "kind": kind,
        "colour": run.colour,
        "name": f"{run.label}, {what}" if what else run.label,
        "x": [round for round, _ in points],
        "y": [None if value is None else float(f"{value:.5g}") for _, value in points],
    }
