"""The study's page: one HTML file that holds all that it needs."""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import tomli_w

from fedgradnorm.compare.charts import Look, curves_of, forest_of, looks_of
from fedgradnorm.compare.findings import answers, caveats, goal, headline_target, task_title, verdict
from fedgradnorm.compare.results import OVERALL, Results
from fedgradnorm.compare.tables import (
    OVERALL_MEASURES,
    difference_text,
    mean_text,
    overview,
    point_text,
    speed_text,
    tuning_rows,
    tuning_titles,
)
from fedgradnorm.errors import RunError
from fedgradnorm.report.comparison import ABSENT
from fedgradnorm.report.html import json_for_html, plotly_source, style, tag, texts

__all__ = ["write_page"]

WORST = "worst task's skill"
SIDES = {1: "better", 0: "", -1: "worse"}


def write_page(results: Results, output: Path) -> Path:
    """Write a study's page. It holds all that it needs, and loads nothing.

    Raises:
        RunError: plotly is not installed, or the file cannot be written.
    """
    plotly, study = plotly_source(), results.study
    looks, charts = looks_of(study), list[dict[str, Any]]()
    found = answers(results)
    parts = {
        "title": escape(study.title),
        "question": escape(study.question),
        "answers": tag("ul", *(tag("li", escape(text)) for text in found)) if len(found) > 1 else tag("p", escape("".join(found))),
        "caveats": tag("ul", *(tag("li", escape(text)) for text in caveats(results))),
        "legend": "".join(_key_html(at, look) for at, look in enumerate(looks)),
        "hint": "A click on a method shows or hides its curves." if len(looks) > 1 else "",
        "variants": "\n".join(_variant_html(results, variant.name, looks, charts) for variant in study.variants),
        "tuning": _tuning_html(results),
        "cells": _cells_html(results),
        "settings": tag("pre", escape(tomli_w.dumps(study.model_dump(mode="json", exclude_none=True)))),
        "style": style(),
    }
    page = Template(files("fedgradnorm.compare").joinpath("page.html").read_text(encoding="utf-8"))
    data = {"looks": [asdict(look) for look in looks], "charts": charts}
    text = page.substitute(parts, data=json_for_html(data), plotly=plotly)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"page {output}: cannot be written; {error.strerror}") from error
    return output


def _key_html(at: int, look: Look) -> str:
    """A method's entry in the legend: a button that shows and hides its curves."""
    pressed = str(look.shown).lower()
    return tag(
        "button", _dash_html(look), class_="key", style=f"color:{look.colour}", type="button", data_method=str(at), aria_pressed=pressed
    )


def _name_html(look: Look) -> str:
    return tag("span", _dash_html(look), class_="key", style=f"color:{look.colour}")


def _dash_html(look: Look) -> str:
    style = {"solid": "", "dot": "border-top-style:dotted"}.get(look.dash, "border-top-style:dashed")
    return tag("i", style=style) + tag("span", escape(look.name))


def _variant_html(results: Results, variant: str, looks: Sequence[Look], charts: list[dict[str, Any]]) -> str:
    heading = tag("h2", escape(variant)) if results.study.shows_variants else ""
    if not any(results.measured(variant, look.name) for look in looks):
        return tag("section", heading, tag("p", "No run of this is trained yet, or none ended well.", class_="empty"))
    level = "h3" if heading else "h2"
    return tag(
        "section",
        heading,
        tag(level, f"Rounds to a target, against {escape(results.study.baseline)}"),
        tag("div", _speed_html(results, variant, looks), class_="scroll"),
        tag("div", *(_forest_html(results, variant, task, charts) for task in results.tasks), class_="forests"),
        tag(level, "Over all tasks"),
        tag("div", _overall_html(results, variant, looks), class_="scroll"),
        _overall_note(results),
        tag(level, "Round by round"),
        *(_task_html(results, variant, task, looks, charts) for task in results.tasks),
    )


def _speed_html(results: Results, variant: str, looks: Sequence[Look]) -> str:
    targets = {task: headline_target(results, variant, task) for task in results.tasks}
    head = tag(
        "tr", tag("th", "method"), *(tag("th", escape(task), "<br>", tag("small", escape(_to(target)))) for task, target in targets.items())
    )
    lines = []
    for look, cells in zip(looks, overview(results, variant), strict=True):
        figures = []
        for text, side in cells:
            mean, _, difference = text.partition("; ")
            figures.append(_cell_html(mean, difference, side))
        lines.append(tag("tr", tag("td", _name_html(look)), *figures))
    note = tag(
        "caption", "Mean rounds; under it the mean paired difference and its 95 % interval. Green: clearly faster, red: clearly slower."
    )
    return tag("table", note, tag("thead", head), tag("tbody", *lines), class_="speed")


def _to(target: str | None) -> str:
    return f"to {goal(target)}" if target else "no target reached"


def _forest_html(results: Results, variant: str, task: str, charts: list[dict[str, Any]]) -> str:
    chart = forest_of(results, variant, task)
    target = headline_target(results, variant, task)
    caption = tag("figcaption", escape(task_title(results, variant, task)), tag("small", escape(f"{task}: rounds {_to(target)}")))
    return _figure_html(caption, chart, charts, bool(chart["points"]), height=f"{90 + 22 * len(chart['points'])}px")


def _figure_html(caption: str, chart: dict[str, Any], charts: list[dict[str, Any]], has_any: bool, height: str = "") -> str:
    """A figure whose chart is added to those of the page, where the figure refers to it by number."""
    if not has_any:
        return tag("figure", caption, tag("p", "no figures to compare", class_="empty"))
    charts.append(chart)
    place = tag("div", id=f"chart-{len(charts) - 1}", class_="chart", style=f"height:{height}" if height else "")
    return tag("figure", caption, place)


def _overall_html(results: Results, variant: str, looks: Sequence[Look]) -> str:
    titles = [*(title for _, title in OVERALL_MEASURES), "runs"]
    lines = []
    for look in looks:
        figures = []
        for measure, _ in OVERALL_MEASURES:
            one = results.find(variant, look.name, OVERALL, measure)
            side = "" if one is None else SIDES[verdict(one)]
            text = mean_text(one) + (_worst_name(results, variant, look.name) if measure == WORST else "")
            figures.append(tag("td", escape(text), class_=side))
        done = len(results.measured(variant, look.name))
        lines.append(tag("tr", tag("td", _name_html(look)), *figures, tag("td", f"{done} of {len(results.study.seeds)}")))
    return tag("table", tag("thead", tag("tr", tag("th", "method"), texts("th", titles))), tag("tbody", *lines))


def _worst_name(results: Results, variant: str, method: str) -> str:
    names = {one.worst[0] for one in results.measured(variant, method).values() if one.worst}
    return f" ({', '.join(sorted(names))})" if names else ""


def _overall_note(results: Results) -> str:
    single = results.study.single
    reference = (
        f"Δm: how much better the test metrics are than those of {single}, which trains every task by itself, as a mean over the tasks. "
        if single is not None
        else "Δm needs a method that trains every task by itself, which this study does not have. "
    )
    return tag(
        "p",
        escape(
            f"{reference}worst task: how much of the way from a constant guess (0) to perfection (100) the worst task's last test metric "
            "has gone. spread: standard deviation of the inverse training rates F(k) / F(0) over the tasks, divided by their mean; 0 is "
            "balanced. Means over the seeds; green or red where the 95 % interval of the difference is on one side of 0."
        ),
        class_="note",
    )


def _task_html(results: Results, variant: str, task: str, looks: Sequence[Look], charts: list[dict[str, Any]]) -> str:
    figures = []
    for chart in curves_of(results, variant, task):
        caption = tag("figcaption", escape(chart["title"]), tag("small", escape(chart["unit"])))
        figures.append(_figure_html(caption, chart, charts, True))
    table = tag(
        "details",
        tag("summary", "Rounds, seconds and test metric in figures"),
        tag("div", _task_table(results, variant, task, looks), class_="scroll"),
    )
    return tag("section", tag("h4", escape(task)), tag("div", *figures, class_="charts three"), table)


def _task_table(results: Results, variant: str, task: str, looks: Sequence[Look]) -> str:
    columns = list[tuple[str, str, str]]()
    metric = next((one.unit for one in results.estimates if one.task == task and one.measure == "last metric"), "")
    columns += [(f"{which} {metric}", f"{which} metric", "") for which in ("last", "best") if metric]
    for target in results.targets(task):
        columns += [(f"rounds to {target}", "rounds", target), (f"seconds to {target}", "seconds", target)]
    lines = []
    for look in looks:
        cells = []
        for _, measure, target in columns:
            one = results.find(variant, look.name, task, measure, target)
            mean = speed_text(one) if target else mean_text(one)
            cells.append(_cell_html(mean, difference_text(one), 0 if one is None else verdict(one)))
        lines.append(tag("tr", tag("td", _name_html(look)), *cells))
    head = tag("tr", tag("th", "method"), *(tag("th", escape(title).replace(" to ", " to<br>")) for title, _, _ in columns))
    return tag("table", tag("thead", head), tag("tbody", *lines), class_="speed")


def _cell_html(mean: str, difference: str, side: int) -> str:
    """A mean, and under it the difference against the baseline."""
    return tag("td", escape(mean), tag("small", "<br>", escape(difference)) if difference not in ("", ABSENT) else "", class_=SIDES[side])


def _tuning_html(results: Results) -> str:
    if results.study.tuning is None:
        return tag("p", "Step sizes were not tuned: every method has those of the settings.")
    named = " × ".join(" = ".join(axis.keys) for axis in results.study.tuning.axes)
    note = (
        f"Mean over the tasks of the final training loss, as a share of the initial one, for every {named}; the least is best (*). "
        "Final is the mean over the last tenth of the rounds."
    )
    lines = [tag("tr", texts("td", row)) for row in tuning_rows(results)]
    table = tag("table", tag("thead", tag("tr", texts("th", tuning_titles(results)))), tag("tbody", *lines))
    chosen = [
        f"{' '.join(filter(None, (one.variant, one.method)))}: {point_text(results, one)}" for one in results.tuned if one.chosen is None
    ]
    reasons = sorted({reason for one in results.tuned for reason in one.reasons.values()})
    more = tag("details", tag("summary", "Why some have no score"), tag("ul", texts("li", [*chosen, *reasons]))) if reasons else ""
    return tag("p", escape(note), class_="note") + tag("div", table, class_="scroll") + more


def _cells_html(results: Results) -> str:
    """Every run that did not end well, with the reason."""
    bad = [one for one in results.cells if one.ended.state != "trained"]
    if not bad:
        return tag("p", f"All {len(results.cells)} runs ended well.") if results.cells else tag("p", "No run is trained yet.")
    titles = [*(["variant"] if results.study.shows_variants else []), "method", "seed", "state", "why"]
    lines = []
    for one in bad:
        first = [one.cell.variant] if results.study.shows_variants else []
        cells = [*first, one.cell.method, str(one.cell.seed), {"missing": "not trained yet"}.get(one.ended.state, one.ended.state)]
        lines.append(tag("tr", texts("td", cells, class_="text"), tag("td", escape(one.ended.reason), class_="text")))
    return tag("table", tag("thead", tag("tr", texts("th", titles, class_="text"))), tag("tbody", *lines))
