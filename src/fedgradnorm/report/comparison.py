"""What every run made of every task: as rows of figures, and as a table for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fedgradnorm.errors import RunError
from fedgradnorm.report.loading import labels_of, read, sound
from fedgradnorm.runs.folder import Run
from fedgradnorm.runs.records import Summary
from fedgradnorm.runs.summary import LOSS_RATIO, SMOOTHED

__all__ = [
    "ABSENT",
    "ComparisonRow",
    "cell_of",
    "cells_of",
    "comparison_rows",
    "comparison_table",
    "explanation",
    "grouped",
    "headers_of",
    "heading_of",
    "percentage",
    "rows_of",
]

ABSENT = "–"


@dataclass(frozen=True)
class ComparisonRow:
    """What one run made of one task.

    Attributes:
        task: the task.
        run: the run's name; with the folders above it where several runs share a name.
        clients: how many clients have the task.
        metric: the task's main metric, or None.
        higher_is_better: the metric's direction.
        percent: whether the metric is shown as a percentage.
        guess: the metric of a constant answer: the majority class, or the mean.
        first: the metric after the first round.
        best: the best of the metric's values.
        best_round: the first round with that value.
        last: the metric after the last round.
        loss_ratio: the last training loss as a share of the initial one, F(k) / F(0).
        rounds_to: the rounds to each target, such as ``"loss ratio 0.6"``; None where it was not reached.
        weight: the last weight; the mean where several clients have the task.
    """

    task: str
    run: str
    clients: int
    metric: str | None
    higher_is_better: bool
    percent: bool
    guess: float | None
    first: float | None
    best: float | None
    best_round: int | None
    last: float | None
    loss_ratio: float | None
    rounds_to: Mapping[str, int | None]
    weight: float


@sound
def comparison_rows(runs: Sequence[Run]) -> list[ComparisonRow]:
    """What every run made of every task: the tasks in the order of the runs' files, in each task the runs in the order given.

    Raises:
        RunError: no run, one whose files are damaged, or one without a round.
    """
    if not runs:
        raise RunError("expected at least one run to report on, found none")
    return [
        row for group in rows_of(labels_of(runs), [read(run)[1] for run in runs]) for row in group
    ]


def rows_of(labels: Sequence[str], summaries: Sequence[Summary]) -> list[list[ComparisonRow]]:
    """What the runs with these names made of every task, by task."""
    return grouped(
        _row(label, name, task, task["metric"] or {})
        for label, one in zip(labels, summaries, strict=True)
        for name, task in one["tasks"].items()
    )


@sound
def comparison_table(runs: Sequence[Run]) -> Table:
    """The same rows for the terminal; of several runs the best value of a task is bold in every column.

    Raises:
        RunError: as `comparison_rows`.
    """
    groups = grouped(comparison_rows(runs))
    headers, single = headers_of(groups), len(runs) == 1
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=explanation(single),
        caption_justify="left",
    )
    table.add_column("task" if single else "task / run", overflow="fold", min_width=10)
    for header in headers:
        last_loss = header == (
            "loss",
            "last",
        )  # a wider gap parts the figures of the loss from those of the metric
        table.add_column(" loss" if last_loss else header[1], justify="right", no_wrap=True)
    for group in groups:
        heading = Text(heading_of(group[0]), style="bold")
        if not single:
            table.add_row(heading)
        for row, cells in zip(group, cells_of(group, headers), strict=True):
            name = heading if single else Text(f"  {row.run}")
            table.add_row(name, *(Text(text, style="bold" if best else "") for text, best in cells))
    return table


def grouped(rows: Iterable[ComparisonRow]) -> list[list[ComparisonRow]]:
    """The rows by task; the same name with another metric is another task."""
    groups: dict[tuple[str, str | None], list[ComparisonRow]] = {}
    for row in rows:
        groups.setdefault((row.task, row.metric), []).append(row)
    return list(groups.values())


def headers_of(groups: Sequence[Sequence[ComparisonRow]]) -> list[tuple[str, str]]:
    """Every figure's column: what it is about, and its title."""
    rows = [row for group in groups for row in group]
    shares = {
        key.removeprefix(LOSS_RATIO)
        for row in rows
        for key in row.rounds_to
        if key.startswith(LOSS_RATIO)
    }
    aims = [("metric", "target")] if any(_aims(row) for row in rows) else []
    metric = [("metric", title) for title in ("guess", "first", "best (at)", "last")]
    losses = [
        ("loss", "last"),
        *(("loss", f"≤{share}") for share in sorted(shares, key=float, reverse=True)),
    ]
    return [*metric, *aims, *losses, ("", "weight")]


def cells_of(
    group: Sequence[ComparisonRow], headers: Sequence[tuple[str, str]]
) -> list[list[tuple[str, bool]]]:
    """By row and column: the text, and whether it is the best of its task. Where all are as good, none is."""
    scored = [[cell_of(row, *header) for header in headers] for row in group]
    best = []
    for column in zip(*scored, strict=True):
        scores = {score for _, score in column}
        best.append(max(scores - {None}, default=None) if len(scores) > 1 else None)
    return [
        [
            (text, score is not None and score == top)
            for (text, score), top in zip(cells, best, strict=True)
        ]
        for cells in scored
    ]


def cell_of(row: ComparisonRow, about: str, title: str) -> tuple[str, float | None]:
    """A figure's text, and a score that is higher where it is better; None where no figure is better than another.

    The score is what the text shows: runs that a reader cannot tell apart are not ranked.
    """
    if about == "loss":
        value = (
            row.loss_ratio
            if title == "last"
            else row.rounds_to.get(LOSS_RATIO + title.removeprefix("≤"))
        )
        text = (
            ABSENT
            if value is None
            else f"{value:d}"
            if isinstance(value, int)
            else f"{value:.2f}"
            if value < 1000
            else f"{value:.0e}"
        )
        return text, None if value is None else -float(text)
    if title == "weight":
        return f"{row.weight:.2f}", None
    if title == "target":
        return ", ".join(_aims(row)) or ABSENT, None
    value = {"guess": row.guess, "first": row.first, "last": row.last}.get(title, row.best)
    if value is None:
        return ABSENT, None
    text = _figure(value, row.percent)
    score = float(text.split()[0]) * (1 if row.higher_is_better else -1)
    return (
        f"{text} ({row.best_round})" if title == "best (at)" else text,
        None if title == "guess" else score,
    )


def percentage(share: float) -> str:
    """A share as a whole percentage that does not break over lines."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def heading_of(row: ComparisonRow) -> str:
    """A task's heading: its name, its clients if there are several, and its metric with the better direction."""
    clients = f" ({row.clients} clients)" if row.clients > 1 else ""
    return f"{row.task}{clients}" + (
        f": {row.metric}\N{NO-BREAK SPACE}{'↑' if row.higher_is_better else '↓'}"
        if row.metric
        else ""
    )


def explanation(single: bool) -> str:
    """What the columns of the table mean, in the terminal and on the page."""
    bold = "" if single else " Bold: the best run of a task."
    return (
        "guess, first, best, last: the metric on test data, ↑ more or ↓ less is better; guess: of a constant answer (majority class or "
        "mean); (at): the round of the best. loss: in training, as a share of the initial loss; ≤: the first round at which the mean of "
        f"the last {SMOOTHED} rounds is at most that, {ABSENT} if none.{bold}"
    )


def _row(
    label: str, name: str, task: Mapping[str, Any], metric: Mapping[str, Any]
) -> ComparisonRow:
    return ComparisonRow(
        task=name,
        run=label,
        clients=task["clients"],
        metric=metric.get("name"),
        higher_is_better=metric.get("higher_is_better", True),
        percent=metric.get("percent", False),
        **{key: metric.get(key) for key in ("guess", "first", "best", "best_round", "last")},
        loss_ratio=task["loss_ratio"],
        rounds_to=task["rounds_to"],
        weight=task["weight"],
    )


def _aims(row: ComparisonRow) -> list[str]:
    """The rounds to the targets that a run had for a task's metric, such as "12 (90.0 %)"."""
    aims = {
        key.rpartition(" ")[2]: round
        for key, round in row.rounds_to.items()
        if not key.startswith(LOSS_RATIO)
    }
    return [
        f"{round or ABSENT} ({_figure(float(target), row.percent)})"
        for target, round in aims.items()
    ]


def _figure(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"
