"""A study's figures as files: results.csv, results.json, results.md; and as a table to print."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from fedgradnorm.atomic import write_atomically
from fedgradnorm.compare.findings import answers, caveats, goal, headline_target
from fedgradnorm.compare.results import Estimate, Results
from fedgradnorm.compare.texts import (
    OVERALL_MEASURES,
    overall_text,
    overview,
    tuning_rows,
    tuning_titles,
)
from fedgradnorm.compare.titles import task_title
from fedgradnorm.errors import RunError
from fedgradnorm.report.comparison import ABSENT

COLUMNS = (
    *("variant", "method", "task", "measure", "target", "unit", "better", "seeds", "reached"),
    *("mean", "difference", "low", "high", "pairs", "below", "above", "censored", "lost"),
)
"""The columns of results.csv."""


def write_tables(results: Results, folder: Path) -> None:
    """Write results.csv, results.json and results.md.

    Raises:
        RunError: a file cannot be written.
    """
    try:
        for name, make in (("csv", _csv), ("json", _json), ("md", _markdown)):
            write_atomically(folder / f"results.{name}", make(results).encode())
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"study folder {folder}: cannot be written: {reason}") from error


def terminal_table(results: Results) -> Table:
    """The rounds to every task's headline target, for the terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.caption = (
        "Rounds to a share of the initial training loss; the difference against "
        f"{results.study.baseline} with its 95 % interval. Green is faster, red slower."
    )
    table.add_column("method", overflow="fold", min_width=10)
    for task in results.tasks:
        table.add_column(task, overflow="fold")
    for variant in results.study.variants:
        targets = [headline_target(results, variant.name, task) for task in results.tasks]
        goals = [f"to {goal(target).split(' of')[0]}" if target else ABSENT for target in targets]
        table.add_row(*(Text(text, style="bold") for text in (variant.name, *goals)))
        for method, cells in zip(results.methods, overview(results, variant.name), strict=True):
            styles = {1: "green", -1: "red", 0: ""}
            figures = (Text(text, style=styles[side]) for text, side in cells)
            table.add_row(Text(f"  {method}"), *figures)
    return table


def _record(estimate: Estimate) -> dict[str, Any]:
    """The figures of an estimate, by the columns of results.csv."""
    difference, values = estimate.difference, estimate.values
    interval = vars(difference) if difference else {"pairs": 0}
    figures = vars(estimate) | {
        "seeds": len(values),
        "mean": fmean(values.values()) if values else None,
        "difference": difference.mean if difference else None,
    }
    return {column: figures.get(column, interval.get(column)) for column in COLUMNS}


def _csv(results: Results) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_record(estimate) for estimate in results.estimates)
    return file.getvalue()


def _json(results: Results) -> str:
    tuning = []
    for tuned in results.tuned:
        scores = [
            {"point": point, "score": score, "reason": tuned.reasons.get(point, "")}
            for point, score in tuned.scores.items()
        ]
        names = {"variant": tuned.variant, "method": tuned.method}
        tuning.append({**names, "scores": scores, "chosen": tuned.chosen, "edges": tuned.edges})
    cells = [
        {
            "variant": result.cell.variant,
            "method": result.cell.method,
            "seed": result.cell.seed,
            "folder": f"cells/{result.cell.name}",
            **asdict(result.ended),
        }
        for result in results.cells
    ]
    estimates = [
        _record(estimate) | {"values": {str(seed): v for seed, v in estimate.values.items()}}
        for estimate in results.estimates
    ]
    value = {
        "title": results.study.title,
        "question": results.study.question,
        "findings": answers(results),
        "caveats": caveats(results),
        "study": results.study.model_dump(mode="json", exclude_none=True),
        "tuning": tuning,
        "cells": cells,
        "estimates": estimates,
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
        parts += _markdown_on(results, variant.name)
    if study.tuning is not None:
        parts.append("Tuning: mean over the tasks of F(K) / F(0). The least is best (*).")
        parts.append(_table(tuning_titles(results), tuning_rows(results)))
    rows = [
        [cell.variant, cell.method, str(cell.seed), ended.state, ended.reason]
        for cell, ended in ((result.cell, result.ended) for result in results.cells)
        if ended.state != "trained"
    ]
    if rows:
        parts.append(_table(["variant", "method", "seed", "", "why"], rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def _markdown_on(results: Results, variant: str) -> Iterator[str]:
    """The findings and the two tables of a variant."""
    yield "\n".join(f"- {task_title(results, variant, task)}" for task in results.tasks)
    yield (
        f"Rounds to a target; the difference against {results.study.baseline} with its 95 % "
        "interval:"
    )
    targets = [headline_target(results, variant, task) for task in results.tasks]
    titles = [
        f"{task}: {goal(target) if target else ABSENT}"
        for task, target in zip(results.tasks, targets, strict=True)
    ]
    lines = zip(results.methods, overview(results, variant), strict=True)
    rows = [[name, *(text for text, _ in cells)] for name, cells in lines]
    yield _table(["method", *titles], rows)
    overall = [
        [name, *(overall_text(results, variant, name, measure) for measure, _ in OVERALL_MEASURES)]
        for name in results.methods
    ]
    yield _table(["method", *(title for _, title in OVERALL_MEASURES)], overall)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, rows)])
