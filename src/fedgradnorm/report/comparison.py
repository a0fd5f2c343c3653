"""The results of every run by task: as rows of figures, and as a table for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from fedgradnorm.errors import RunError
from fedgradnorm.report.loading import labels_of, read, sound
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import Summary
from fedgradnorm.runs.summary import LOSS_RATIO, SMOOTHED

ABSENT = "–"


@dataclass(frozen=True)
class ComparisonRow:
    """The results of one run on one task.

    Attributes:
        task: the task.
        run: the run's name, with the folders above it if several runs share a name.
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
        rounds_to: the rounds to each target, such as ``"loss ratio 0.6"``; None if it was not
            reached.
        weight: the last weight; the mean if several clients have the task.
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
    """The results of every run on every task.

    The tasks have the order of the runs' files. Within a task the runs have the order given.

    Raises:
        RunError: no run, a damaged run, or a run without a round.
    """
    if not runs:
        raise RunError("expected at least one run to report on, found none")
    groups = rows_of(labels_of(runs), [read(run)[1] for run in runs])
    return [row for group in groups for row in group]


def rows_of(labels: Sequence[str], summaries: Sequence[Summary]) -> list[list[ComparisonRow]]:
    """The results of the runs with these names, grouped by task."""
    return grouped(
        _row(label, name, task, task["metric"] or {})
        for label, summary in zip(labels, summaries, strict=True)
        for name, task in summary["tasks"].items()
    )


@sound
def comparison_table(runs: Sequence[Run]) -> Table:
    """The same rows for the terminal. Of several runs, the best values of a task are bold.

    Raises:
        RunError: see `comparison_rows`.
    """
    groups = grouped(comparison_rows(runs))
    headers, single = headers_of(groups), len(runs) == 1
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.caption = explanation(single)
    table.add_column("task" if single else "task / run", overflow="fold", min_width=10)
    for header in headers:
        # A wider gap separates the figures of the loss from those of the metric.
        last_loss = header == ("loss", "last")
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
    """The rows by task. The same name with another metric is another task."""
    groups: dict[tuple[str, str | None], list[ComparisonRow]] = {}
    for row in rows:
        groups.setdefault((row.task, row.metric), []).append(row)
    return list(groups.values())


def headers_of(groups: Sequence[Sequence[ComparisonRow]]) -> list[tuple[str, str]]:
    """The columns of figures: what each is about, and its title."""
    rows = [row for group in groups for row in group]
    targets = {target for row in rows for target in row.rounds_to if target.startswith(LOSS_RATIO)}
    shares = sorted((target.removeprefix(LOSS_RATIO) for target in targets), key=float)
    aims = [("metric", "target")] if any(_aims(row) for row in rows) else []
    metric = [("metric", title) for title in ("guess", "first", "best (at)", "last")]
    losses = [("loss", title) for title in ("last", *(f"≤{share}" for share in reversed(shares)))]
    return [*metric, *aims, *losses, ("", "weight")]


def cells_of(
    group: Sequence[ComparisonRow], headers: Sequence[tuple[str, str]]
) -> list[list[tuple[str, bool]]]:
    """By row and column: the text, and whether it is the best of its task.

    If all are equally good, none is the best.
    """
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
    """A figure's text and its score: higher is better. The score is None if figures are not ranked.

    The score is read from the text, so runs that look the same to a reader are not ranked.
    """
    if about == "loss":
        target = LOSS_RATIO + title.removeprefix("≤")
        value = row.loss_ratio if title == "last" else row.rounds_to.get(target)
        if value is None:
            return ABSENT, None
        text = str(value)
        if isinstance(value, float):
            text = f"{value:.2f}" if value < 1000 else f"{value:.0e}"
        return text, -float(text)
    if title == "weight":
        return f"{row.weight:.2f}", None
    if title == "target":
        return ", ".join(_aims(row)) or ABSENT, None
    value = {"guess": row.guess, "first": row.first, "last": row.last}.get(title, row.best)
    if value is None:
        return ABSENT, None
    text = _figure(value, row.percent)
    score = float(text.split()[0]) * (1 if row.higher_is_better else -1)
    shown = f"{text} ({row.best_round})" if title == "best (at)" else text
    return shown, None if title == "guess" else score


def percentage(share: float) -> str:
    """A share as a whole percentage that does not break over lines."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def heading_of(row: ComparisonRow) -> str:
    """A task's heading: its name, number of clients, metric and the better direction."""
    clients = f" ({row.clients} clients)" if row.clients > 1 else ""
    direction = "↑" if row.higher_is_better else "↓"
    metric = f": {row.metric}\N{NO-BREAK SPACE}{direction}" if row.metric else ""
    return f"{row.task}{clients}{metric}"


def explanation(single: bool) -> str:
    """What the columns of the table mean, in the terminal and on the page."""
    bold = "" if single else " Bold: the best run on a task."
    return (
        "guess, first, best, last: the metric on test data; ↑ more or ↓ less is better. guess: the "
        "metric of a constant answer (majority class or mean). (at): the round of the best value. "
        "loss: the training loss as a share of the initial loss. ≤: the first round at which its "
        f"mean over the last {SMOOTHED} rounds is at most this share; {ABSENT} if there is "
        f"none.{bold}"
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
    """The rounds to the targets for a task's metric, such as "12 (90.0 %)"."""
    return [
        f"{round or ABSENT} ({_figure(float(key.rpartition(' ')[2]), row.percent)})"
        for key, round in row.rounds_to.items()
        if not key.startswith(LOSS_RATIO)
    ]


def _figure(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"
