"""The study's figure: differences in rounds with their intervals, as an SVG file for documents."""

from pathlib import Path
from typing import Any

from fedgradnorm.compare.charts import forest_of
from fedgradnorm.compare.findings import headline_target
from fedgradnorm.compare.results import Results
from fedgradnorm.compare.titles import speed_title
from fedgradnorm.errors import RunError
from fedgradnorm.report.comparison import percentage
from fedgradnorm.report.looks import Look, looks_for
from fedgradnorm.runs.summary import LOSS_RATIO

MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
"""Matplotlib's names."""


def write_figure(results: Results, output: Path) -> Path:
    """Write the figure, with a row for every variant and a panel for every task.

    Raises:
        RunError: matplotlib is not installed, no run is trained yet, or the file cannot be
            written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError('the figure needs matplotlib: pip install "fedgradnorm[report]"') from error
    variants = [
        variant.name
        for variant in results.study.variants
        if any(results.measured(variant.name, method) for method in results.methods)
    ]
    if not variants:
        raise RunError("no run of the study is trained yet: there is nothing to draw")
    looks, tasks = looks_for(results.methods), results.tasks
    height = 0.2 * len(looks) + 1.5
    figure = Figure(figsize=(1.8 + 3 * len(tasks), height * len(variants)), layout="constrained")
    try:
        with rc_context({"text.parse_math": False}):  # names are not formulas
            rows = figure.subfigures(len(variants), 1, squeeze=False)[:, 0]
            for row, variant in zip(rows, variants, strict=True):
                title = speed_title(results, variant)
                row.suptitle(f"{variant}: {title}" if variant else title, fontsize=10, wrap=True)
                panels = row.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
                for axes, task in zip(panels, tasks, strict=True):
                    _forest(axes, results, variant, task, looks)
            save_svg(figure, output)
    except OSError as error:
        raise RunError(f"figure {output}: cannot be written; {error.strerror}") from error
    return output


def save_svg(figure: Any, output: Path) -> None:
    """Save a matplotlib figure. The same figure gives the same file."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "fedgradnorm"}):
        figure.savefig(output, format="svg", metadata={"Date": None})


def _forest(axes: Any, results: Results, variant: str, task: str, looks: list[Look]) -> None:
    target = headline_target(results, variant, task)
    share = "no target reached"
    if target is not None:
        share = f"{percentage(float(target.removeprefix(LOSS_RATIO)))} of the initial loss"
    axes.set_title(f"{task}: {share}", fontsize=9)
    axes.set_xlabel(f"rounds against {results.study.baseline} (left: fewer)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.axvline(0, color="#1c1f23", linewidth=1)
    axes.grid(axis="x", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(looks)), [look.name for look in looks])
    axes.set_ylim(len(looks) - 0.5, -0.5)
    base = results.methods.index(results.study.baseline)
    axes.plot(0, base, MARKERS[looks[base].marker], color=looks[base].colour, markersize=5)
    for point in forest_of(results, variant, task)["points"]:
        at, look = point["method"], looks[point["method"]]
        if "absence" in point:
            axes.text(0, at, f" {point['absence']}", fontsize=7, va="center", color="#555b63")
            continue
        if point["low"] is not None:
            axes.plot([point["low"], point["high"]], [at, at], color=look.colour, linewidth=1.5)
        fill = "white" if point["censored"] else look.colour
        marker = {"color": look.colour, "markerfacecolor": fill, "markersize": 5}
        axes.plot(point["mean"], at, MARKERS[look.marker], **marker)
