"""A study's figures as files to read on: results.csv, results.json and results.md; and as a table for the terminal."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from fedgradnorm.atomic import write_atomically
from fedgradnorm.compare.findings import answers, caveats, goal, headline_target, task_title, verdict
from fedgradnorm.compare.results import OVERALL, Estimate, Results, TunedMethod
from fedgradnorm.errors import RunError
from fedgradnorm.report.comparison import ABSENT

__all__ = [
    "COLUMNS",
    "OVERALL_MEASURES",
    "figure",
    "mean_text",
    "overview",
    "point_text",
    "speed_text",
    "terminal_table",
    "tuning_rows",
    "write_tables",
]

COLUMNS = (
    *("variant", "method", "task", "measure", "target", "unit", "better", "seeds", "reached", "mean"),
    *("difference", "low", "high", "pairs", "below", "above", "censored"),
)

OVERALL_MEASURES = (
    ("delta-m, last metric", "Δm, last (%)"),
    ("delta-m, best metric", "Δm, best (%)"),
    ("worst task's skill", "worst task (%)"),
    ("spread at the end", "spread, end"),
    ("spread on average", "spread, mean"),
    ("sent", "sent (MB)"),
)
"""What is measured over all tasks, and the columns' titles."""


def write_tables(results: Results, folder: Path) -> None:
    """Write results.csv, results.json and results.md. Raises RunError where that fails."""
    try:
        for name, text in (("csv", _csv(results)), ("json", _json(results)), ("md", _markdown(results))):
            write_atomically(folder / f"results.{name}", text.encode())
    except OSError as error:
        raise RunError(f"study folder {folder}: cannot be written: {error.strerror or error}") from error


def figure(value: float) -> str:
    """A number to read: three digits that count, and no exponent where it can be helped."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def mean_text(one: Estimate | None) -> str:
    """The mean over the seeds; of a percentage or a spread with its sign and unit left out."""
    if one is None or not one.values:
        return ABSENT
    mean = fmean(one.values.values())
    return figure(mean / 1e6 if one.unit == "bytes" else mean)


def speed_text(one: Estimate | None) -> str:
    """Rounds or seconds to a target: the mean, with how many runs reached it where not all did, such as "52 (3 of 5)"."""
    if one is None or not one.values:
        return ABSENT
    if not one.reached:
        return f"not in {max(one.values.values()):.0f}" if one.measure == "rounds" else "not reached"
    text = figure(fmean(one.values.values()))
    return text if one.reached == len(one.values) else f"≥ {text} ({one.reached} of {len(one.values)})"


def difference_text(one: Estimate | None) -> str:
    """A paired difference with its interval, such as "-21 (-30 to -12)"."""
    if one is None or one.difference is None:
        return ABSENT
    found = one.difference
    text = _signed(found.mean)
    return text if found.low is None or found.high is None else f"{text} ({_signed(found.low)} to {_signed(found.high)})"


def _signed(value: float) -> str:
    """A difference with its sign; what is but rounding is 0."""
    return "0" if abs(value) < 1e-9 else f"{value:+.3g}"


def overview(results: Results, variant: str) -> list[list[tuple[str, int]]]:
    """By method and task: rounds to the headline target and the difference against the baseline, and whether that is better or worse."""
    rows = []
    for method in results.study.methods:
        cells = []
        for task in results.tasks:
            target = headline_target(results, variant, task)
            one = results.find(variant, method.name, task, "rounds", target) if target else None
            text = speed_text(one)
            if one is not None and one.difference is not None:
                text += f"; {difference_text(one)}"
            cells.append((text, 0 if one is None else verdict(one)))
        rows.append(cells)
    return rows


def point_text(results: Results, one: TunedMethod) -> str:
    """The step sizes that were chosen."""
    tuning = results.study.tuning
    if tuning is None:
        return "as set"
    if one.chosen is None:
        return "none: all diverged or failed"
    return ", ".join(f"{' = '.join(axis.keys)} = {value:g}" for axis, value in zip(tuning.axes, one.chosen, strict=True))


def tuning_rows(results: Results) -> list[list[str]]:
    """By variant and method: the score at every point of the grid, the chosen one marked, and what to think of it."""
    rows = []
    for one in results.tuned:
        scores = []
        for point, score in one.scores.items():
            text = one.reasons[point].split(" ")[0] if score is None else f"{score:.3f}"
            scores.append(f"{text} *" if point == one.chosen else text)
        rows.append([*([one.variant] if results.study.shows_variants else []), one.method, *scores, "at the edge" if one.edges else ""])
    return rows


def tuning_titles(results: Results) -> list[str]:
    """The titles of these columns."""
    if not results.tuned:
        return []
    points = [", ".join(f"{value:g}" for value in point) for point in results.tuned[0].scores]
    return [*(["variant"] if results.study.shows_variants else []), "method", *points, ""]


def terminal_table(results: Results) -> Table:
    """The rounds to every task's headline target, for the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.caption = (
        f"rounds to a share of the initial training loss; difference against {results.study.baseline} with its 95 % interval: "
        "green is faster, red slower"
    )
    table.add_column("method", overflow="fold", min_width=10)
    for task in results.tasks:
        table.add_column(task, overflow="fold")
    for variant in results.study.variants:
        goals = [headline_target(results, variant.name, task) for task in results.tasks]
        table.add_row(
            Text(variant.name, style="bold"),
            *(Text(f"to {goal(target).split(' of')[0]}" if target else ABSENT, style="bold") for target in goals),
        )
        for method, cells in zip(results.study.methods, overview(results, variant.name), strict=True):
            table.add_row(Text(f"  {method.name}"), *(Text(text, style={1: "green", -1: "red", 0: ""}[side]) for text, side in cells))
    return table


def _record(one: Estimate) -> dict[str, Any]:
    found = one.difference
    return {
        "variant": one.variant,
        "method": one.method,
        "task": one.task,
        "measure": one.measure,
        "target": one.target,
        "unit": one.unit,
        "better": one.better,
        "seeds": len(one.values),
        "reached": one.reached,
        "mean": fmean(one.values.values()) if one.values else None,
        "difference": found.mean if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "pairs": found.pairs if found else 0,
        "below": found.below if found else None,
        "above": found.above if found else None,
        "censored": one.censored,
    }


def _csv(results: Results) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_record(one) for one in results.estimates)
    return file.getvalue()


def _json(results: Results) -> str:
    value = {
        "title": results.study.title,
        "question": results.study.question,
        "findings": answers(results),
        "caveats": caveats(results),
        "study": results.study.model_dump(mode="json", exclude_none=True),
        "tuning": [
            {
                "variant": one.variant,
                "method": one.method,
                "scores": [{"point": point, "score": score, "reason": one.reasons.get(point, "")} for point, score in one.scores.items()],
                "chosen": one.chosen,
                "edges": one.edges,
            }
            for one in results.tuned
        ],
        "cells": [
            {
                "variant": one.cell.variant,
                "method": one.cell.method,
                "seed": one.cell.seed,
                "folder": f"cells/{one.cell.name}",
                **asdict(one.ended),
            }
            for one in results.cells
        ],
        "estimates": [_record(one) | {"values": {str(seed): value for seed, value in one.values.items()}} for one in results.estimates],
    }
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _markdown(results: Results) -> str:
    study = results.study
    parts = [f"# {study.title}", study.question, "\n".join(f"- {text}" for text in answers(results)), " ".join(caveats(results))]
    for variant in study.variants:
        if study.shows_variants:
            parts.append(f"## {variant.name or 'base'}")
        parts.append("\n".join(f"- {task_title(results, variant.name, task)}" for task in results.tasks))
        titles = [
            f"{task}: {goal(target) if target else ABSENT}"
            for task in results.tasks
            for target in [headline_target(results, variant.name, task)]
        ]
        rows = [[m.name, *(text for text, _ in cells)] for m, cells in zip(study.methods, overview(results, variant.name), strict=True)]
        parts.append(f"Rounds to a target; difference against {study.baseline} with its 95 % interval:")
        parts.append(_table(["method", *titles], rows))
        overall = [
            [m.name, *(mean_text(results.find(variant.name, m.name, OVERALL, measure)) for measure, _ in OVERALL_MEASURES)]
            for m in study.methods
        ]
        parts.append(_table(["method", *(title for _, title in OVERALL_MEASURES)], overall))
    if study.tuning is not None:
        parts.append("Tuning: mean over the tasks of F(K) / F(0), least is best (*).")
        parts.append(_table(tuning_titles(results), tuning_rows(results)))
    bad = [one for one in results.cells if one.ended.state != "trained"]
    if bad:
        rows = [[one.cell.variant, one.cell.method, str(one.cell.seed), one.ended.state, one.ended.reason] for one in bad]
        parts.append(_table(["variant", "method", "seed", "", "why"], rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, rows)])
