"""The report: one HTML file that holds all that it needs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w

import fedgradnorm.report.comparison as comparison
from fedgradnorm.errors import RunError
from fedgradnorm.report.charts import GREY, charts_of
from fedgradnorm.report.comparison import ABSENT, ComparisonRow, cells_of, percentage
from fedgradnorm.report.findings import (
    caveat,
    differing_settings,
    findings,
    listed,
    plural,
    settings_of,
)
from fedgradnorm.report.html import write_html
from fedgradnorm.report.loading import Loaded, load, sound
from fedgradnorm.runs.reader import Run

LOSS_TITLE = "training loss: last share, and rounds to a share"
GROUPS = {"metric": "test metric", "loss": LOSS_TITLE, "": ""}
"""The titles above the columns of the table, by what the columns are about."""


def write_page(folder: Path) -> None:
    """Write a run's report.html, where plotly is installed."""
    if find_spec("plotly") is not None:
        write_report([Run(folder)], folder / "report.html")


@sound
def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write the report on one run, or on several overlaid. The file loads nothing.

    Args:
        runs: finished or not, in the order of the report. A method has the colour that it has in a
            study. Colours repeat after seven.
        output: the file to write; its folder is made.

    Returns:
        The file.

    Raises:
        RunError: no run, a damaged run, a run without a round, plotly or Jinja2 is not installed,
            or the file cannot be written.
    """
    if not runs:
        raise RunError("expected at least one run to report on, found none")
    loaded = load(runs)
    labels = [run.label for run in loaded]
    groups = comparison.rows_of(labels, [run.summary for run in loaded])
    headers = comparison.headers_of(groups)
    numbers = count()
    tasks = [_task(group, headers, loaded, numbers) for group in groups]
    charts = [chart for task in tasks for chart in task["charts"]]
    return write_html(
        "report.html.j2",
        output,
        title=listed(labels) if len(runs) <= 3 else f"{len(runs)} runs",
        findings=findings(groups, loaded),
        caveat=caveat(loaded),
        legend=_legend(loaded, {line["kind"] for chart in charts for line in chart["lines"]}),
        facts=list(_facts(loaded[0])),
        runs=[_run(run) for run in loaded],
        dropped=_dropped(loaded),
        notes=_notes(loaded),
        tops=[(GROUPS[about], span) for about, span in Counter(a for a, _ in headers).items()],
        titles=[title for _, title in headers],
        tasks=tasks,
        explanation=comparison.explanation(single=len(runs) == 1),
        differing=differing_settings(loaded),
        charts=charts,
    )


def _legend(loaded: Sequence[Loaded], kinds: set[str]) -> list[tuple[str, str, str]]:
    """The legend's entries: text, colour and kind of line."""
    entries = [(run.label, run.colour, "") for run in loaded]
    if "client" in kinds:
        entries.append(("one client", GREY, "thin"))
    if "band" in kinds:
        entries.append(("range over the clients", GREY, "band"))
    dashed = {"guess": "constant guess (grey)", "target": "target"}
    texts = [text for kind, text in dashed.items() if kind in kinds]
    return [*entries, (", ".join(texts), GREY, "dashed")] if texts else entries


def _run(run: Loaded) -> dict[str, Any]:
    return {
        "label": run.label,
        "colour": run.colour,
        "facts": list(_facts(run).values()),
        "settings": tomli_w.dumps(settings_of(run.run)),
    }


def _facts(run: Loaded) -> dict[str, str]:
    """A run's line in the table of runs, by the columns' titles."""
    config, summary = run.run.config, run.summary
    rounds = str(summary["rounds"])
    return {
        "method": config.train.method.name,
        "weighting": config.weighting.name,
        "rounds": f"{rounds} of {config.train.num_rounds}" if run.state else rounds,
        "clients": str(len(summary["clients"])),
        "took part": percentage(fmean(row["participated"] for row in run.rows)),
        "reports dropped": str(summary["dropped"]),
        "seed": str(config.train.seed),
        "time": f"{summary['seconds']:.0f} s" if summary["seconds"] else ABSENT,
    }


def _dropped(loaded: Sequence[Loaded]) -> list[str]:
    """Whose reports were dropped, how often, and why."""
    texts = []
    for run in loaded:
        dropped = [row for row in run.rows if row["dropped"] is not None]
        reasons = Counter((row["client"], row["dropped"]) for row in dropped)
        for (client, reason), times in reasons.items():
            reports = plural(times, "report")
            texts.append(f"{run.label}: {reports} of {client} dropped: {reason}")
    return texts


def _notes(loaded: Sequence[Loaded]) -> list[str]:
    """What was odd about clients, and when."""
    return [
        f"{run.label}: round {row['round']}, {row['client']}: {note}"
        for run in loaded
        for row in run.rows
        for note in row.get("notes", ())
    ]


def _task(
    group: Sequence[ComparisonRow],
    headers: Sequence[tuple[str, str]],
    loaded: Sequence[Loaded],
    numbers: Iterator[int],
) -> dict[str, Any]:
    """A task's rows of the table, and its charts, each with its number on the page."""
    colours = {run.label: run.colour for run in loaded}
    rows = [
        {"label": row.run, "colour": colours[row.run], "cells": cells}
        for row, cells in zip(group, cells_of(group, headers), strict=True)
    ]
    charts = [chart | {"number": next(numbers)} for chart in charts_of(group, loaded)]
    heading = comparison.heading_of(group[0])
    return {"name": group[0].task, "heading": heading, "rows": rows, "charts": charts}
