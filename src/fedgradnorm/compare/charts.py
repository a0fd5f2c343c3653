"""The charts of a study as data, which the page draws: differences with their intervals, and curves over the rounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from fedgradnorm.compare.findings import headline_target
from fedgradnorm.compare.measures import CURVES, Measured
from fedgradnorm.compare.results import Results
from fedgradnorm.compare.spec import Study
from fedgradnorm.report.loading import COLOURS

__all__ = ["Look", "curves_of", "forest_of", "looks_of"]

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
LOSS_ROOM = 1.1
"""The axis of the training loss ends so much above the highest median: single runs jump far beyond it."""
MOST_SHOWN = 6
"""So many methods' curves are drawn at first; a click shows the others."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every chart. Colours repeat after seven methods, with another dash and symbol."""

    name: str
    colour: str
    dash: str
    symbol: str
    shown: bool


def looks_of(study: Study) -> list[Look]:
    """The methods' looks, in the study's order: with many, the baseline and the first of the others are shown at first."""
    others = [method.name for method in study.methods if method.name != study.baseline]
    shown = {study.baseline, *others[: MOST_SHOWN - 1]}
    rows = len(COLOURS)
    return [
        Look(method.name, COLOURS[at % rows], DASHES[at // rows % len(DASHES)], SYMBOLS[at // rows % len(SYMBOLS)], method.name in shown)
        for at, method in enumerate(study.methods)
    ]


def forest_of(results: Results, variant: str, task: str) -> dict[str, Any]:
    """A task's differences in rounds against the baseline: a point with its interval for every other method."""
    target = headline_target(results, variant, task)
    points = []
    for at, method in enumerate(results.study.methods):
        one = results.find(variant, method.name, task, "rounds", target) if target else None
        if method.name == results.study.baseline or one is None or one.difference is None:
            continue
        found = one.difference
        points.append({"method": at, "mean": found.mean, "low": found.low, "high": found.high, "of": found.pairs, "fewer": found.below})
    return {"kind": "forest", "points": points, "baseline": results.study.baseline}


def curves_of(results: Results, variant: str, task: str) -> list[dict[str, Any]]:
    """A task's curves, each method's median and range over the seeds: training loss ratio, test metric, weight."""
    measured = [results.measured(variant, method.name) for method in results.study.methods]
    first = next((one for cells in measured for one in cells.values() if task in one.tasks), None)
    if first is None:
        return []
    metric = first.tasks[task].metric
    scale = 100 if metric and metric["percent"] else 1
    units = {
        "inverse_training_rate": ("Training loss", "share of the initial loss", 1),
        "metric": (f"Test {metric['name']}" if metric else "", _metric_unit(metric), scale),
        "weight": ("Weight", "p; 1 is equal", 1),
    }
    charts = []
    for key in (CURVES[0], CURVES[2], CURVES[1]):
        title, unit, factor = units[key]
        lines = [line for at, cells in enumerate(measured) if (line := _line(at, cells, task, key, factor))]
        if title and lines:
            guess = scale * metric["guess"] if key == "metric" and metric and metric["guess"] is not None else None
            top = LOSS_ROOM * max(1.0, *(max(line["y"]) for line in lines)) if key == "inverse_training_rate" else None
            charts.append(
                {"kind": "curves", "title": title, "unit": unit, "lines": lines, "rounds": first.rounds, "guess": guess, "top": top}
            )
    return charts


def _metric_unit(metric: Any) -> str:
    if metric is None:
        return ""
    return f"{'%, ' if metric['percent'] else ''}{'more' if metric['higher_is_better'] else 'less'} is better; dashed: constant guess"


def _line(at: int, cells: Mapping[int, Measured], task: str, key: str, factor: float) -> dict[str, Any] | None:
    by_round: dict[int, list[float]] = {}
    for one in cells.values():
        for round, value in one.tasks[task].curves[key].items():
            by_round.setdefault(round, []).append(factor * value)
    if not by_round:
        return None
    rounds = sorted(by_round)
    low, high = ([_short(pick(by_round[round])) for round in rounds] for pick in (min, max))
    return {
        "method": at,
        "x": rounds,
        "y": [_short(median(by_round[round])) for round in rounds],
        "low": low,
        "high": high,
        "seeds": len(cells),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
