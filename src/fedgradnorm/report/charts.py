"""The charts of a task as data, which the page draws."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from fedgradnorm.report.comparison import ComparisonRow
from fedgradnorm.report.loading import Loaded
from fedgradnorm.runs.records import Row

__all__ = ["GREY", "MOST_LINES", "charts_of"]

GREY = "#555b63"

MOST_LINES = 30
"""A chart with more clients than this shows their mean and range in place of a line each."""


def charts_of(group: Sequence[ComparisonRow], loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """The four charts of a task, as data: titles, and lines of rounds and values, which the page draws."""
    members = {row.run: row for row in group}
    runs = [one for one in loaded if one.label in members]
    thin = sum(row.clients for row in group) > MOST_LINES
    first = group[0]
    scale = 100 if first.percent else 1

    def lines(
        value: Callable[[Row], float | None], *, sparse: bool = False
    ) -> list[dict[str, Any]]:
        return [
            line
            for one in runs
            for line in _lines(one, first.task, value, thin=thin, sparse=sparse)
        ]

    def metric(row: Row) -> float | None:
        return None if row["metric"] is None else scale * row["metric"]

    rounds = max(one.summary["rounds"] for one in runs)
    guesses = sorted({scale * row.guess for row in group if row.guess is not None})
    guess = [
        {
            "kind": "guess",
            "colour": GREY,
            "name": "constant guess",
            "x": [1, rounds],
            "y": [value, value],
        }
        for value in guesses
    ]
    targets = [_mean_line(one, first.task, lambda row: row["target"], "target") for one in runs]
    texts = [
        ("Training loss", "share of initial loss", lines(lambda row: row["inverse_training_rate"])),
        (f"Test {first.metric or 'metric'}", _unit(first), lines(metric, sparse=True) + guess),
        ("Weight", "p; 1 is equal", lines(lambda row: row["weight"])),
        (
            "Weighted gradient norm",
            "p · norm; its target is dashed",
            targets + lines(_weighted_norm),
        ),
    ]
    return [
        {
            "title": title,
            "unit": unit,
            "rounds": rounds,
            "from_zero": number != 1,
            "lines": [line for line in drawn if _has_values(line)],
        }
        for number, (title, unit, drawn) in enumerate(texts)
    ]


def _unit(row: ComparisonRow) -> str:
    direction = "more is better" if row.higher_is_better else "less is better"
    return f"{'%, ' if row.percent else ''}{direction}" if row.metric else ""


def _weighted_norm(row: Row) -> float | None:
    return None if row["grad_norm"] is None else row["weight"] * row["grad_norm"]


def _has_values(line: Mapping[str, Any]) -> bool:
    return any(value is not None for value in line["y"])


def _lines(
    one: Loaded, task: str, value: Callable[[Row], float | None], *, thin: bool, sparse: bool
) -> list[dict[str, Any]]:
    """A line per client and their mean, or a band and the mean; ``sparse`` leaves rounds without a value out in place of a gap."""
    by_client: dict[str, list[tuple[int, float | None]]] = {}
    for row in one.rows:
        if row["task"] == task and not (sparse and value(row) is None):
            by_client.setdefault(row["client"], []).append((row["round"], value(row)))
    lines = [_mean_line(one, task, value, "mean", sparse=sparse)]
    if thin:
        return [_band(one, task, value), *lines]
    if len(by_client) > 1:
        lines += [_line(one, "client", points, client) for client, points in by_client.items()]
    return lines


def _mean_line(
    one: Loaded, task: str, value: Callable[[Row], float | None], kind: str, *, sparse: bool = False
) -> dict[str, Any]:
    by_round = _by_round(one.rows, task, value)
    points = [
        (round, fmean(values) if values else None)
        for round, values in by_round.items()
        if values or not sparse
    ]
    return _line(one, kind, points, {"target": "target"}.get(kind, ""))


def _band(one: Loaded, task: str, value: Callable[[Row], float | None]) -> dict[str, Any]:
    reached = {
        round: values for round, values in _by_round(one.rows, task, value).items() if values
    }
    low = _line(one, "band", [(round, min(values)) for round, values in reached.items()])
    return {
        **_line(one, "band", [(round, max(values)) for round, values in reached.items()]),
        "low": low["y"],
    }


def _by_round(
    rows: Sequence[Row], task: str, value: Callable[[Row], float | None]
) -> dict[int, list[float]]:
    by_round: dict[int, list[float]] = {}
    for row in rows:
        if row["task"] == task:
            values = by_round.setdefault(row["round"], [])
            if (number := value(row)) is not None:
                values.append(number)
    return by_round


def _line(
    one: Loaded, kind: str, points: Sequence[tuple[int, float | None]], what: str = ""
) -> dict[str, Any]:
    return {
        "kind": kind,
        "colour": one.colour,
        "name": escape(
            f"{one.label}, {what}" if what else one.label, quote=False
        ),  # plotly reads names as HTML
        "x": [round for round, _ in points],
        "y": [None if value is None else float(f"{value:.5g}") for _, value in points],
    }
