"""The report's page: one HTML file that holds all that it needs."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

import tomli_w

from fedgradnorm.errors import RunError
from fedgradnorm.report.charts import GREY, charts_of
from fedgradnorm.report.comparison import (
    ABSENT,
    ComparisonRow,
    cells_of,
    explanation,
    headers_of,
    heading_of,
    percentage,
    rows_of,
)
from fedgradnorm.report.findings import (
    caveat,
    differing_settings,
    findings,
    listed,
    plural,
    settings_of,
)
from fedgradnorm.report.html import json_for_html, key, plotly_source, style, tag, texts
from fedgradnorm.report.loading import Loaded, load, sound
from fedgradnorm.runs.folder import Run

__all__ = ["write_report"]


@sound
def write_page(folder: Path) -> None:
    """Write a run's report.html, where plotly is installed."""
    if find_spec("plotly") is not None:
        write_report([Run(folder)], folder / "report.html")


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write one HTML page on one run, or on several overlaid. It holds all that it needs, and loads nothing.

    Args:
        runs: finished or not, in the order of the page. A method has the colour that it has in a study; colours repeat after seven.
        output: the file to write; its folder is made.

    Returns:
        The file.

    Raises:
        RunError: no run, one whose files are damaged, one without a round, a page that cannot be written, or plotly is not installed.
    """
    plotly = plotly_source()
    if not runs:
        raise RunError("expected at least one run to report on, found none")
    loaded = load(runs)
    groups = rows_of([one.label for one in loaded], [one.summary for one in loaded])
    charts: list[dict[str, Any]] = []
    parts = {
        "title": escape(
            listed([one.label for one in loaded]) if len(runs) <= 3 else f"{len(runs)} runs"
        ),
        "findings": escape(findings(groups, loaded)),
        "caveat": escape(caveat(loaded)),
        "explanation": escape(explanation(single=len(runs) == 1)),
        "runs": _runs_html(loaded),
        "dropped": _dropped_html(loaded),
        "notes": _notes_html(loaded),
        "table": _table_html(groups, loaded),
        "tasks": "\n".join(_task_html(group, loaded, charts) for group in groups),
        "settings": _settings_html(loaded),
    }
    kinds = {line["kind"] for chart in charts for line in chart["lines"]}
    page = Template(files("fedgradnorm.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = page.substitute(
        parts,
        style=style(),
        legend=_legend_html(loaded, kinds),
        charts=json_for_html(charts),
        plotly=plotly,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"report {output}: cannot be written; {error.strerror}") from error
    return output


def _legend_html(loaded: Sequence[Loaded], kinds: set[str]) -> str:
    styles = {"client": ("one client", "thin"), "band": ("range over the clients", "band")}
    keys = [key(one.label, one.colour) for one in loaded]
    keys += [key(text, GREY, style) for kind, (text, style) in styles.items() if kind in kinds]
    dashed = [
        text
        for kind, text in (("guess", "constant guess (grey)"), ("target", "target"))
        if kind in kinds
    ]
    return "".join([*keys, *([key(", ".join(dashed), GREY, "dashed")] if dashed else [])])


def _runs_html(loaded: Sequence[Loaded]) -> str:
    titles = (
        "method",
        "weighting",
        "rounds",
        "clients",
        "took part",
        "reports dropped",
        "seed",
        "time",
    )
    head = tag("thead", tag("tr", tag("th", "run"), texts("th", titles)))
    lines = []
    for one in loaded:
        present = fmean(row["participated"] for row in one.rows)
        facts = (
            one.run.config.train.method.name,
            one.run.config.weighting.name,
            f"{one.summary['rounds']} of {one.run.config.train.num_rounds}"
            if one.state
            else str(one.summary["rounds"]),
            str(len(one.summary["clients"])),
            percentage(present),
            str(one.summary["dropped"]),
            str(one.run.config.train.seed),
            f"{one.summary['seconds']:.0f} s" if one.summary["seconds"] else ABSENT,
        )
        lines.append(tag("tr", tag("td", key(one.label, one.colour)), texts("td", facts)))
    return tag("table", head, tag("tbody", *lines))


def _dropped_html(loaded: Sequence[Loaded]) -> str:
    """Whose reports were dropped, how often, and why."""
    items = []
    for one in loaded:
        reasons = Counter(
            (row["client"], row["dropped"]) for row in one.rows if row["dropped"] is not None
        )
        items += [
            f"{one.label}: {plural(count, 'report')} of {client} dropped: {reason}"
            for (client, reason), count in reasons.items()
        ]
    return (
        tag("details", tag("summary", "Dropped reports"), tag("ul", texts("li", items)))
        if items
        else ""
    )


def _notes_html(loaded: Sequence[Loaded]) -> str:
    """What was odd about clients, and when."""
    items = [
        f"{one.label}: round {row['round']}, {row['client']}: {note}"
        for one in loaded
        for row in one.rows
        for note in row.get("notes", ())
    ]
    return (
        tag("details", tag("summary", "Notes"), tag("ul", texts("li", items)), open="open")
        if items
        else ""
    )


def _table_html(groups: Sequence[Sequence[ComparisonRow]], loaded: Sequence[Loaded]) -> str:
    headers, colours, single = (
        headers_of(groups),
        {one.label: one.colour for one in loaded},
        len(loaded) == 1,
    )
    spans = Counter(group for group, _ in headers)
    names = {
        "metric": "test metric",
        "loss": "training loss: last share, and rounds to a share",
        "": "",
    }
    tops = "".join(
        tag("th", names[group], colspan=str(count), class_="group" if group else "")
        for group, count in spans.items()
    )
    head = tag(
        "thead",
        tag("tr", "<th></th>", tops),
        tag("tr", tag("th", "task"), texts("th", (title for _, title in headers))),
    )
    bodies = []
    for group in groups:
        heading = tag(
            "th",
            escape(heading_of(group[0])),
            scope="rowgroup",
            colspan="" if single else str(len(headers) + 1),
        )
        lines = [] if single else [tag("tr", heading)]
        for row, cells in zip(group, cells_of(group, headers), strict=True):
            name = heading if single else tag("td", key(row.run, colours[row.run]))
            figures = (
                tag("td", escape(text), class_="best" if best else "") for text, best in cells
            )
            lines.append(tag("tr", name, *figures))
        bodies.append(tag("tbody", *lines))
    return tag("table", head, *bodies)


def _task_html(
    group: Sequence[ComparisonRow], loaded: Sequence[Loaded], charts: list[dict[str, Any]]
) -> str:
    """A task's section. Its charts are added to those of the page, where the section refers to them by number."""
    figures = []
    for chart in charts_of(group, loaded):
        caption = tag("figcaption", escape(chart["title"]), tag("small", escape(chart["unit"])))
        place = (
            tag("div", id=f"chart-{len(charts)}", class_="chart")
            if chart["lines"]
            else tag("p", "no figures", class_="empty")
        )
        figures.append(tag("figure", caption, place))
        charts.append(chart)
    return tag("section", tag("h3", escape(group[0].task)), tag("div", *figures, class_="charts"))


def _settings_html(loaded: Sequence[Loaded]) -> str:
    differing = differing_settings(loaded)
    head = tag(
        "thead",
        tag(
            "tr",
            tag("th", "differs between the runs"),
            texts("th", (one.label for one in loaded), class_="text"),
        ),
    )
    lines = [
        tag("tr", tag("td", escape(key)), texts("td", values, class_="text"))
        for key, values in differing.items()
    ]
    table = (
        tag("div", tag("table", head, tag("tbody", *lines)), class_="scroll") if differing else ""
    )
    details = [
        tag(
            "details",
            tag("summary", f"All settings of {escape(one.label)}"),
            tag("pre", escape(tomli_w.dumps(settings_of(one.run)))),
        )
        for one in loaded
    ]
    return table + "".join(details)
