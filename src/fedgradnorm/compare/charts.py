"""The charts of a study as data, which the page and the figure draw: differences with their intervals, and curves over the rounds."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from fedgradnorm.compare.findings import curve_title, headline_target
from fedgradnorm.compare.measures import CURVES, Measured
from fedgradnorm.compare.results import Results

__all__ = ["MOST_SHOWN", "curves_of", "forest_of"]

LOSS_ROOM = 1.1
"""The axis of the training loss ends so much above the highest median: single runs jump far beyond it."""
MOST_SHOWN = 6
"""So many methods' curves are drawn at first; a click shows the others."""


def forest_of(results: Results, variant: str, task: str) -> dict[str, Any]:
    """A task's differences in rounds against the baseline: a point with its interval for every other method, or why there is none."""
    target = headline_target(results, variant, task)
    points = list[dict[str, Any]]()
    for at, method in enumerate(results.methods):
        if method == results.study.baseline:
            continue
        one = results.find(variant, method, task, "rounds", target) if target else None
        if absence := results.absence(variant, method):
            points.append({"method": at, "absence": absence})
        elif one is not None and (found := one.difference) is not None:
            point = {
                "method": at,
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "of": found.pairs,
                "fewer": found.below,
            }
            points.append(point | {"censored": one.censored})
    return {"kind": "forest", "points": points, "baseline": results.study.baseline}


def curves_of(results: Results, variant: str, task: str) -> list[dict[str, Any]]:
    """A task's curves, each method's median and range over the seeds: training loss ratio, test metric, weight."""
    measured = [results.measured(variant, method) for method in results.methods]
    first = next((one for cells in measured for one in cells.values() if task in one.tasks), None)
    if first is None:
        return []
    metric = first.tasks[task].metric
    scale = 100 if metric and metric["percent"] else 1
    units = {
        "inverse_training_rate": ("training loss, share of F(0)", 1),
        "metric": (
            f"test {metric['name']}{', %' if metric['percent'] else ''}" if metric else "",
            scale,
        ),
        "weight": ("weight p; 1 is equal", 1),
    }
    charts = []
    for key in (CURVES[0], CURVES[2], CURVES[1]):
        unit, factor = units[key]
        lines = [
            line
            for at, cells in enumerate(measured)
            if (line := _line(at, cells, task, key, factor))
        ]
        if unit and lines:
            guess = (
                scale * metric["guess"]
                if key == "metric" and metric and metric["guess"] is not None
                else None
            )
            top = (
                LOSS_ROOM * max(1.0, *(max(line["y"]) for line in lines))
                if key == "inverse_training_rate"
                else None
            )
            title = curve_title(results, variant, task, key)
            charts.append(
                {
                    "kind": "curves",
                    "title": title,
                    "unit": unit,
                    "lines": lines,
                    "rounds": first.rounds,
                    "guess": guess,
                    "top": top,
                }
            )
    return charts


def _line(
    at: int, cells: Mapping[int, Measured], task: str, key: str, factor: float
) -> dict[str, Any] | None:
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
