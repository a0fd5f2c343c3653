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
from fedgradnorm.compare.findings import (
    answers,
    caveats,
    goal,
    headline_target,
    task_title,
    verdict,
)
from fedgradnorm.compare.results import OVERALL, Estimate, Results
from fedgradnorm.errors import RunError
from fedgradnorm.report.comparison import ABSENT

__all__ = [
    "COLUMNS",
    "OVERALL_MEASURES",
    "figure",
    "mean_text",
    "overall_text",
    "overview",
    "speed_text",
    "terminal_table",
    "tuning_rows",
    "write_tables",
]

COLUMNS = (
    *(
        "variant",
        "method",
        "task",
        "measure",
        "target",
        "unit",
        "better",
        "seeds",
        "reached",
        "mean",
    ),
    *("difference", "low", "high", "pairs", "below", "above", "censored", "lost"),
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
        for name, text in (
            ("csv", _csv(results)),
            ("json", _json(results)),
            ("md", _markdown(results)),
        ):
            write_atomically(folder / f"results.{name}", text.encode())
    except OSError as error:
        raise RunError(
            f"study folder {folder}: cannot be written: {error.strerror or error}"
        ) from error


def figure(value: float, digits: int = 3) -> str:
    """A number to read: so many digits that count, or all before the point, and no exponent where it can be helped."""
    return (
        f"{value:.0f}"
        if 100 <= abs(value) < 1e6
        else f"{value:.{3 if abs(value) >= 10 else digits}g}"
    )


def mean_text(one: Estimate | None) -> str:
    """The mean over the seeds, in the measure's unit; with how many of them have a value where not all do, such as "0.42 (4 of 5)"."""
    if one is None or not one.values:
        return ABSENT
    return _marked(_figure(one, fmean(one.values.values())), len(one.values), one.seeds)


def speed_text(one: Estimate | None) -> str:
    """Rounds or seconds to a target: the mean, with how many runs reached it where not all did, such as "≥ 52 (3 of 5)"."""
    if one is None or not one.values or one.reached is None:
        return ABSENT
    text = _marked(_figure(one, fmean(one.values.values())), one.reached, one.seeds)
    return text if one.reached == len(one.values) else f"≥ {text}"


def difference_text(one: Estimate | None) -> str:
    """A paired difference with its interval, such as "-21 (-30 to -12)", and with the pairs where runs that ended badly have none."""
    if one is None or one.difference is None:
        return ABSENT
    found = one.difference
    text = _figure(one, found.mean, signed=True)
    if found.low is not None and found.high is not None:
        text += (
            f" ({_figure(one, found.low, signed=True)} to {_figure(one, found.high, signed=True)})"
        )
    return f"{text}, {found.pairs} of {one.seeds}" if one.lost else text


def _marked(text: str, count: int, of: int) -> str:
    return text if count == of else f"{text} ({count} of {of})"


def _figure(one: Estimate, value: float, *, signed: bool = False) -> str:
    """A value of an estimate: bytes in MB, a time in the unit that suits it. A difference has its sign; what is but rounding is 0."""
    sign, digits = "+" if signed and value > 0 else "", 2 if signed else 3
    if one.unit == "seconds":
        size = abs(value)
        scaled, unit = (
            (1000 * value, "ms")
            if size < 1
            else (value, "s")
            if size < 120
            else (value / 60, "min")
        )
        return f"{sign}{figure(scaled, digits)} {unit}" if value else "0"
    value = value / 1e6 if one.unit == "bytes" else value
    return "0" if abs(value) < 1e-9 else f"{sign}{figure(value, digits)}"


def overall_text(results: Results, variant: str, method: str, measure: str) -> str:
    """What is measured over all tasks: the mean, and the difference against the baseline; why there is none where there is none."""
    one = results.find(variant, method, OVERALL, measure)
    texts = [
        results.absence(variant, method) or mean_text(one),
        ABSENT if measure == "sent" else difference_text(one),
    ]
    return "; ".join(texts) if texts[1] != ABSENT else texts[0]


def overview(results: Results, variant: str) -> list[list[tuple[str, int]]]:
    """By method and task: rounds to the headline target and the difference against the baseline, and whether that is better or worse.

    Where a method has no figures, why.
    """
    rows = []
    for method in results.methods:
        if absence := results.absence(variant, method):
            rows.append([(absence, 0) for _ in results.tasks])
            continue
        cells = []
        for task in results.tasks:
            target = headline_target(results, variant, task)
            one = results.find(variant, method, task, "rounds", target) if target else None
            text = speed_text(one)
            if one is not None and one.difference is not None:
                text += f"; {difference_text(one)}"
            cells.append((text, 0 if one is None else verdict(one)))
        rows.append(cells)
    return rows


def tuning_rows(results: Results) -> list[list[str]]:
    """By variant and method: the score at every point of the grid, the chosen one marked, and what to think of it."""
    rows = []
    for one in results.tuned:
        scores = []
        for point, score in one.scores.items():
            text = one.reasons[point].split(" ")[0] if score is None else f"{score:.3f}"
            scores.append(f"{text} *" if point == one.chosen else text)
        rows.append(
            [
                *([one.variant] if results.study.shows_variants else []),
                one.method,
                *scores,
                "at the edge" if one.edges else "",
            ]
        )
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
            *(
                Text(f"to {goal(target).split(' of')[0]}" if target else ABSENT, style="bold")
                for target in goals
            ),
        )
        for method, cells in zip(results.methods, overview(results, variant.name), strict=True):
            table.add_row(
                Text(f"  {method}"),
                *(Text(text, style={1: "green", -1: "red", 0: ""}[side]) for text, side in cells),
            )
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
        "lost": one.lost,
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
                "scores": [
                    {"point": point, "score": score, "reason": one.reasons.get(point, "")}
                    for point, score in one.scores.items()
                ],
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
        "estimates": [
            _record(one) | {"values": {str(seed): value for seed, value in one.values.items()}}
            for one in results.estimates
        ],
    }
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _markdown(results: Results) -> str:
    study = results.study
    parts = [
        f"# {study.title}",
        study.question,
        "\n".join(f"- {text}" for text in answers(results)),
        " ".join(caveats(results)),
    ]
    for variant in study.variants:
        if study.shows_variants:
            parts.append(f"## {variant.name or 'base'}")
        parts.append(
            "\n".join(f"- {task_title(results, variant.name, task)}" for task in results.tasks)
        )
        titles = [
            f"{task}: {goal(target) if target else ABSENT}"
            for task in results.tasks
            for target in [headline_target(results, variant.name, task)]
        ]
        rows = [
            [name, *(text for text, _ in cells)]
            for name, cells in zip(results.methods, overview(results, variant.name), strict=True)
        ]
        parts.append(
            f"Rounds to a target; difference against {study.baseline} with its 95 % interval:"
        )
        parts.append(_table(["method", *titles], rows))
        overall = [
            [
                name,
                *(
                    overall_text(results, variant.name, name, measure)
                    for measure, _ in OVERALL_MEASURES
                ),
            ]
            for name in results.methods
        ]
        parts.append(_table(["method", *(title for _, title in OVERALL_MEASURES)], overall))
    if study.tuning is not None:
        parts.append("Tuning: mean over the tasks of F(K) / F(0), least is best (*).")
        parts.append(_table(tuning_titles(results), tuning_rows(results)))
    bad = [one for one in results.cells if one.ended.state != "trained"]
    if bad:
        rows = [
            [
                one.cell.variant,
                one.cell.method,
                str(one.cell.seed),
                one.ended.state,
                one.ended.reason,
            ]
            for one in bad
        ]
        parts.append(_table(["variant", "method", "seed", "", "why"], rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, rows)])
