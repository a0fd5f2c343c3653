"""A study's charts as data: differences with their intervals, and curves over the rounds."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from fedgradnorm.compare.findings import headline_target
from fedgradnorm.compare.measures import Measured
from fedgradnorm.compare.results import Results
from fedgradnorm.compare.titles import curve_title

LOSS_ROOM = 1.1
"""The axis of the training loss ends at this factor times the highest median.

Single runs jump far beyond it.
"""
MOST_SHOWN = 6
"""The number of methods whose curves are drawn at first. A click shows the others."""


def forest_of(results: Results, variant: str, task: str) -> dict[str, Any]:
    """A task's differences in rounds against the baseline.

    Every other method has a point with its interval, or the reason why there is none.
    """
    target = headline_target(results, variant, task)
    points = list[dict[str, Any]]()
    for at, method in enumerate(results.methods):
        if method == results.study.baseline:
            continue
        estimate = results.find(variant, method, task, "rounds", target) if target else None
        if absence := results.absence(variant, method):
            points.append({"method": at, "absence": absence})
        elif estimate is not None and (difference := estimate.difference) is not None:
            point = {
                "method": at,
                "mean": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "of": difference.pairs,
                "fewer": difference.below,
                "censored": estimate.censored,
            }
            points.append(point)
    return {"kind": "forest", "points": points, "baseline": results.study.baseline}


def curves_of(results: Results, variant: str, task: str) -> list[dict[str, Any]]:
    """A task's curves: each method's median and range over the seeds.

    The charts are those of training loss ratio, test metric and weight that have values.
    """
    by_method = [results.measured(variant, method) for method in results.methods]
    runs = (run for by_seed in by_method for run in by_seed.values())
    first = next((run for run in runs if task in run.tasks), None)
    if first is None:
        return []
    metric = first.tasks[task].metric
    scale = 100 if metric and metric["percent"] else 1
    metric_unit = f"test {metric['name']}{', %' if metric['percent'] else ''}" if metric else ""
    guess = scale * metric["guess"] if metric and metric["guess"] is not None else None
    charts = []
    for key, unit, factor in (
        ("inverse_training_rate", "training loss, share of F(0)", 1),
        ("metric", metric_unit, scale),
        ("weight", "weight p; 1 is equal", 1),
    ):
        drawn = [_line(at, by_seed, task, key, factor) for at, by_seed in enumerate(by_method)]
        lines = [line for line in drawn if line is not None]
        if unit and lines:
            highest = max(1.0, *(max(line["y"]) for line in lines))
            chart = {
                "kind": "curves",
                "title": curve_title(results, variant, task, key),
                "unit": unit,
                "lines": lines,
                "rounds": first.rounds,
                "guess": guess if key == "metric" else None,
                "top": LOSS_ROOM * highest if key == "inverse_training_rate" else None,
            }
            charts.append(chart)
    return charts


def _line(
    at: int, by_seed: Mapping[int, Measured], task: str, key: str, factor: float
) -> dict[str, Any] | None:
    by_round: dict[int, list[float]] = {}
    for run in by_seed.values():
        for round, value in run.tasks[task].curves[key].items():
            by_round.setdefault(round, []).append(factor * value)
    if not by_round:
        return None
    rounds = sorted(by_round)
    low, middle, high = (
        [float(f"{pick(by_round[round]):.4g}") for round in rounds] for pick in (min, median, max)
    )
    line = {"method": at, "x": rounds, "y": middle, "low": low, "high": high}
    return line | {"seeds": len(by_seed)}
