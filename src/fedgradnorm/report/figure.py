"""A run's curves as a matplotlib figure, for notebooks and documents."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedgradnorm.errors import ConfigError
from fedgradnorm.report.charts import GREY, MOST_LINES, Value, values_by_round
from fedgradnorm.report.looks import Look, looks_for
from fedgradnorm.runs.records import Row, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MARKED = 30
"""A line with fewer points has a marker at each of them."""


def curves(rows: Sequence[Row], summary: Summary) -> "Figure":
    """Draw the training loss as a share of the initial one, the weights and the main test metrics.

    A panel has a line over the rounds for each client. With more than `MOST_LINES` clients it has
    for each task a line, their mean, in a band from the least to the greatest. Tasks with the same
    metric share a panel, where a dashed grey line is a constant guess.

    Args:
        rows: the run's rows, as in ``metrics.jsonl``.
        summary: the run's summary.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            'the figure needs matplotlib: pip install "fedgradnorm[report]"'
        ) from error
    by_task = len({row["client"] for row in rows}) > MOST_LINES
    looks = looks_for(list(dict.fromkeys(_name(row, by_task) for row in rows)))
    mains = (task["metric"] for task in summary["tasks"].values())
    metrics = dict.fromkeys((main["name"], main["percent"]) for main in mains if main is not None)
    count = 2 + len(metrics)
    figure = Figure(figsize=(3.8 * count + 1.6, 3.6), layout="constrained")
    with rc_context({"text.parse_math": False}):  # names are not formulas
        loss, weight, *others = figure.subplots(1, count)
        _draw(loss, rows, by_task, looks, lambda row: row["inverse_training_rate"])
        loss.set_title("Training loss, share of the initial one", fontsize=10)
        _draw(weight, rows, by_task, looks, lambda row: row["weight"])
        weight.set_title("Weight p; 1 is equal", fontsize=10)
        for panel, metric in zip(others, metrics, strict=True):
            _draw_metric(panel, rows, summary, by_task, looks, metric)
        legend = weight.get_legend_handles_labels()
        figure.legend(*legend, loc="outside right center", frameon=False)
    return figure


def _name(row: Row, by_task: bool) -> str:
    return row["task"] if by_task else row["client"]


def _draw(
    panel: Any,
    rows: Sequence[Row],
    by_task: bool,
    looks: Sequence[Look],
    value: Value,
    *,
    sparse: bool = False,
) -> None:
    """Draw a line for each look. A round without a value is a gap, or left out with ``sparse``."""
    for look in looks:
        own = (row for row in rows if _name(row, by_task) == look.name)
        by_round = values_by_round(own, value)
        points = {round: values for round, values in by_round.items() if values or not sparse}
        if not any(points.values()):
            continue
        means = [fmean(values) if values else float("nan") for values in points.values()]
        dash = (0, look.dash) if look.dash else "-"
        line = {"color": look.colour, "linestyle": dash, "label": look.name}
        panel.plot(list(points), means, marker="." if len(means) < MOST_MARKED else "", **line)
        if by_task:
            low = [min(values, default=float("nan")) for values in points.values()]
            high = [max(values, default=float("nan")) for values in points.values()]
            panel.fill_between(list(points), low, high, color=look.colour, alpha=0.13, linewidth=0)
    panel.set_xlabel("round", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", color="#e6e8eb")


def _draw_metric(
    panel: Any,
    rows: Sequence[Row],
    summary: Summary,
    by_task: bool,
    looks: Sequence[Look],
    metric: tuple[str, bool],
) -> None:
    """Draw the metric of the tasks whose main metric it is, and what a constant guess has."""
    name, percent = metric
    scale = 100 if percent else 1
    guesses = {
        task: main["guess"]
        for task, figures in summary["tasks"].items()
        if (main := figures["metric"]) is not None and (main["name"], main["percent"]) == metric
    }

    def value(row: Row) -> float | None:
        number = row["metric"] if row["task"] in guesses else None
        return None if number is None else scale * number

    _draw(panel, rows, by_task, looks, value, sparse=True)
    for guess in {guess for guess in guesses.values() if guess is not None}:
        panel.axhline(scale * guess, color=GREY, linestyle="--", linewidth=1, zorder=0)
    panel.set_title(f"Test {name}{', %' if percent else ''}", fontsize=10)
