"""The study's page: one HTML file that holds all that it needs."""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import tomli_w

from fedgradnorm import registry
from fedgradnorm.compare.charts import MOST_SHOWN, curves_of, forest_of
from fedgradnorm.compare.findings import (
    answers_on,
    caveats,
    goal,
    headline_target,
    overall_title,
    runs_title,
    speed_title,
    task_title,
    tuning_title,
    verdict,
)
from fedgradnorm.compare.results import OVERALL, Results
from fedgradnorm.compare.tables import (
    OVERALL_MEASURES,
    difference_text,
    mean_text,
    overview,
    speed_text,
    tuning_rows,
    tuning_titles,
)
from fedgradnorm.config import MethodConfig, dotted
from fedgradnorm.errors import RunError
from fedgradnorm.report.comparison import ABSENT
from fedgradnorm.report.findings import plural
from fedgradnorm.report.html import json_for_html, plotly_source, style, tag, texts
from fedgradnorm.report.looks import Look, looks_for, swatch
from fedgradnorm.runs.summary import SMOOTHED

__all__ = ["write_page"]

WORST = "worst task's skill"
SIDES = {1: "better", 0: "", -1: "worse"}


def write_page(results: Results, output: Path) -> Path:
    """Write a study's page. It holds all that it needs, and loads nothing.

    Raises:
        RunError: plotly is not installed, or the file cannot be written.
    """
    plotly, study = plotly_source(), results.study
    looks, charts = looks_for(results.methods), list[dict[str, Any]]()
    parts = {
        "title": escape(study.title),
        "question": escape(study.question),
        "answers": "".join(_answers_html(results, variant.name) for variant in study.variants),
        "caveats": tag("ul", texts("li", caveats(results))),
        "legend": "".join(_key_html(at, look) for at, look in enumerate(looks)),
        "hint": _hint(len(looks)),
        "variants": "\n".join(
            _variant_html(results, variant.name, looks, charts) for variant in study.variants
        ),
        "tuning_title": escape(tuning_title(results)),
        "tuning": _tuning_html(results),
        "runs_title": escape(runs_title(results)),
        "cells": _cells_html(results),
        "terms": _terms_html(results),
        "methods": _methods_html(results, looks),
        "settings": tag(
            "pre", escape(tomli_w.dumps(study.model_dump(mode="json", exclude_none=True)))
        ),
        "style": style(),
    }
    page = Template(files("fedgradnorm.compare").joinpath("page.html").read_text(encoding="utf-8"))
    shown = [
        asdict(look) | {"dash": _plotly_dash(look), "shown": at < MOST_SHOWN}
        for at, look in enumerate(looks)
    ]
    text = page.substitute(
        parts, data=json_for_html({"looks": shown, "charts": charts}), plotly=plotly
    )
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"page {output}: cannot be written; {error.strerror}") from error
    return output


def _plotly_dash(look: Look) -> str:
    return ",".join(f"{length}px" for length in look.dash) or "solid"


def _answers_html(results: Results, variant: str) -> str:
    """What was found: of FedGradNorm at once, of the others on a click where FedGradNorm is there."""
    ours, others = answers_on(results, variant)
    heading = tag("h3", escape(variant)) if variant else ""
    told = tag("ul", texts("li", ours)) if ours else ""
    if not others:
        return heading + told
    rest = tag("ul", texts("li", others))
    count = len(results.methods) - len(results.ours) - (results.study.baseline not in results.ours)
    return (
        heading
        + told
        + (
            tag("details", tag("summary", f"The {plural(count, 'other method')}"), rest)
            if ours
            else rest
        )
    )


def _hint(count: int) -> str:
    more = (
        f"The curves of the first {MOST_SHOWN} are drawn at first. " if count > MOST_SHOWN else ""
    )
    return f"{more}A click on a method shows or hides its curves." if count > 1 else ""


def _key_html(at: int, look: Look) -> str:
    """A method's entry in the legend: a button that shows and hides its curves."""
    pressed = str(at < MOST_SHOWN).lower()
    return tag(
        "button",
        swatch(look),
        tag("span", escape(look.name)),
        class_="key",
        type="button",
        data_method=str(at),
        aria_pressed=pressed,
    )


def _name_html(look: Look) -> str:
    return tag("span", swatch(look), tag("span", escape(look.name)), class_="key")


def _variant_html(
    results: Results, variant: str, looks: Sequence[Look], charts: list[dict[str, Any]]
) -> str:
    heading = tag("h2", escape(variant)) if results.study.shows_variants else ""
    if not any(results.measured(variant, look.name) for look in looks):
        return tag(
            "section",
            heading,
            tag("p", "No run of this is trained yet, or none ended well.", class_="empty"),
        )
    level = "h3" if heading else "h2"
    return tag(
        "section",
        heading,
        tag(level, escape(speed_title(results, variant))),
        tag("div", _speed_html(results, variant, looks), class_="scroll"),
        tag(
            "div",
            *(_forest_html(results, variant, task, charts) for task in results.tasks),
            class_="forests",
        ),
        tag(level, escape(overall_title(results, variant))),
        tag("div", _overall_html(results, variant, looks), class_="scroll"),
        tag(level, "Round by round"),
        tag(
            "p",
            "Curves are medians over the seeds; where at most four are drawn, a band goes from the least to the greatest.",
            class_="note",
        ),
        *(_task_html(results, variant, task, looks, charts) for task in results.tasks),
    )


def _speed_html(results: Results, variant: str, looks: Sequence[Look]) -> str:
    targets = {task: headline_target(results, variant, task) for task in results.tasks}
    head = tag(
        "tr",
        tag("th", "method"),
        *(
            tag("th", escape(task), "<br>", tag("small", escape(_to(target))))
            for task, target in targets.items()
        ),
    )
    lines = []
    for look, cells in zip(looks, overview(results, variant), strict=True):
        figures = []
        for text, side in cells:
            mean, _, difference = text.partition("; ")
            figures.append(_cell_html(mean, difference, side))
        lines.append(_line_html(results, variant, look, figures))
    note = tag(
        "caption",
        f"Mean rounds; under it the mean difference against {escape(results.study.baseline)} and its 95 % interval.",
        _sides(),
    )
    return tag("table", note, tag("thead", head), tag("tbody", *lines), class_="speed")


def _sides() -> str:
    return (
        " "
        + tag("span", "Blue: clearly better;", class_="better")
        + " "
        + tag("span", "orange: clearly worse.", class_="worse")
    )


def _line_html(results: Results, variant: str, look: Look, cells: Sequence[str]) -> str:
    """A method's row, or why it has no figures."""
    if absence := results.absence(variant, look.name):
        cells = [tag("td", escape(absence), class_="absent", colspan=str(len(cells)))]
    return tag("tr", tag("td", _name_html(look)), *cells)


def _to(target: str | None) -> str:
    return f"to {goal(target)}" if target else "no target reached"


def _forest_html(results: Results, variant: str, task: str, charts: list[dict[str, Any]]) -> str:
    chart = forest_of(results, variant, task)
    target = headline_target(results, variant, task)
    censored = any(point.get("censored") for point in chart["points"])
    more = (
        "; hollow: some runs did not get there, and count with all of their rounds"
        if censored
        else ""
    )
    small = f"{task}: rounds {_to(target)}; mean difference and 95 % interval{more}"
    caption = tag(
        "figcaption", escape(task_title(results, variant, task)), tag("small", escape(small))
    )
    return _figure_html(
        caption, chart, charts, bool(chart["points"]), height=f"{90 + 22 * len(chart['points'])}px"
    )


def _figure_html(
    caption: str,
    chart: dict[str, Any],
    charts: list[dict[str, Any]],
    has_any: bool,
    height: str = "",
) -> str:
    """A figure whose chart is added to those of the page, where the figure refers to it by number."""
    if not has_any:
        return tag("figure", caption, tag("p", "no figures to compare", class_="empty"))
    charts.append(chart)
    place = tag(
        "div",
        id=f"chart-{len(charts) - 1}",
        class_="chart",
        style=f"height:{height}" if height else "",
    )
    return tag("figure", caption, place)


def _overall_html(results: Results, variant: str, looks: Sequence[Look]) -> str:
    titles = [*(title for _, title in OVERALL_MEASURES), "runs"]
    lines = []
    for look in looks:
        figures = []
        for measure, _ in OVERALL_MEASURES:
            one = results.find(variant, look.name, OVERALL, measure)
            worst = _worst_names(results, variant, look.name) if measure == WORST else ""
            difference = difference_text(one) if measure != "sent" else ""
            figures.append(
                _cell_html(
                    mean_text(one),
                    difference,
                    0 if one is None or measure == "sent" else verdict(one),
                    worst,
                )
            )
        done = len(results.measured(variant, look.name))
        figures.append(tag("td", f"{done} of {len(results.study.seeds)}"))
        lines.append(_line_html(results, variant, look, figures))
    note = tag(
        "caption",
        f"Means over the seeds; under each the difference against {escape(results.study.baseline)}.",
        _sides(),
    )
    head = tag("thead", tag("tr", tag("th", "method"), texts("th", titles)))
    return tag("table", note, head, tag("tbody", *lines), class_="speed")


def _worst_names(results: Results, variant: str, method: str) -> str:
    return ", ".join(
        sorted({one.worst[0] for one in results.measured(variant, method).values() if one.worst})
    )


def _task_html(
    results: Results, variant: str, task: str, looks: Sequence[Look], charts: list[dict[str, Any]]
) -> str:
    drawn = curves_of(results, variant, task)
    figures = [
        _figure_html(tag("figcaption", escape(chart["title"])), chart, charts, True)
        for chart in drawn
    ]
    table = tag(
        "details",
        tag("summary", "Rounds, time and test metric in figures"),
        tag("div", _task_table(results, variant, task, looks), class_="scroll"),
    )
    return tag(
        "section", tag("h4", escape(task)), tag("div", *figures, class_="charts three"), table
    )


def _task_table(results: Results, variant: str, task: str, looks: Sequence[Look]) -> str:
    columns = list[tuple[str, str, str]]()
    metric = next(
        (
            one.unit
            for one in results.estimates
            if one.task == task and one.measure == "last metric"
        ),
        "",
    )
    columns += [
        (f"{which} {metric}", f"{which} metric", "") for which in ("last", "best") if metric
    ]
    for target in results.targets(task):
        columns += [
            (f"rounds to {target}", "rounds", target),
            (f"time to {target}", "seconds", target),
        ]
    lines = []
    for look in looks:
        cells = []
        for _, measure, target in columns:
            one = results.find(variant, look.name, task, measure, target)
            mean = speed_text(one) if target else mean_text(one)
            cells.append(_cell_html(mean, difference_text(one), 0 if one is None else verdict(one)))
        lines.append(_line_html(results, variant, look, cells))
    head = tag(
        "tr",
        tag("th", "method"),
        *(tag("th", escape(title).replace(" to ", " to<br>")) for title, _, _ in columns),
    )
    return tag("table", tag("thead", head), tag("tbody", *lines), class_="speed")


def _cell_html(mean: str, difference: str, side: int, more: str = "") -> str:
    """A mean, and under it the difference against the baseline."""
    under = (
        tag("small", "<br>", escape(text))
        for text in (difference, more)
        if text not in ("", ABSENT)
    )
    return tag("td", escape(mean), *under, class_=SIDES[side])


def _tuning_html(results: Results) -> str:
    if results.study.tuning is None:
        return tag("p", "Every method has those of the settings.")
    named = " × ".join(" = ".join(axis.keys) for axis in results.study.tuning.axes)
    note = (
        f"Mean over the tasks of the final training loss, as a share of the initial one, for every {named}; the least is best (*). "
        "Final is the mean over the last tenth of the rounds."
    )
    names = 2 if results.study.shows_variants else 1

    def line(name: str, cells: Sequence[str]) -> str:
        return tag("tr", texts(name, cells[:names], class_="left"), texts(name, cells[names:]))

    lines = [line("td", row) for row in tuning_rows(results)]
    table = tag("table", tag("thead", line("th", tuning_titles(results))), tag("tbody", *lines))
    reasons = sorted({reason for one in results.tuned for reason in one.reasons.values()})
    more = (
        tag("details", tag("summary", "Why some have no score"), tag("ul", texts("li", reasons)))
        if reasons
        else ""
    )
    scores = tag("details", tag("summary", "All scores"), tag("div", table, class_="scroll"))
    return tag("p", escape(note), class_="note") + scores + more


def _cells_html(results: Results) -> str:
    """Every run that did not end well, with the reason."""
    bad = [one for one in results.cells if one.ended.state != "trained"]
    if not bad:
        return ""
    titles = [
        *(["variant"] if results.study.shows_variants else []),
        "method",
        "seed",
        "state",
        "why",
    ]
    lines = []
    for one in bad:
        first = [one.cell.variant] if results.study.shows_variants else []
        cells = [
            *first,
            one.cell.method,
            str(one.cell.seed),
            {"missing": "not trained yet"}.get(one.ended.state, one.ended.state),
        ]
        lines.append(
            tag(
                "tr",
                texts("td", cells, class_="left"),
                tag("td", escape(one.ended.reason), class_="text"),
            )
        )
    table = tag(
        "table", tag("thead", tag("tr", texts("th", titles, class_="left"))), tag("tbody", *lines)
    )
    return tag("details", tag("summary", "Which, and why"), tag("div", table, class_="scroll"))


def _terms_html(results: Results) -> str:
    single = results.study.single
    terms = {
        "rounds to a target": f"The round at which the mean of the last {SMOOTHED} rounds' training loss is down to this share of the "
        "initial loss F(0). Loss ratio 0.6 is 60 % of it.",
        "≥ 52 (4 of 5)": "Four of five runs got there; the others count with all of their rounds, so the true mean is larger. Without ≥: "
        "four of five runs have this figure.",
        "difference": f"Method less {results.study.baseline}, of runs with the same seed, and its 95 % bootstrap interval over the seeds. "
        "It is clear where the whole interval is on one side of 0.",
        "time": "As if all clients worked at once: a round takes its slowest client's time, and the server's.",
        "Δm": f"How much better the test metrics are than those of {single}, which trains every task by itself: the mean over the tasks."
        if single is not None
        else "How much better the test metrics are than with every task trained by itself, which is not in this study.",
        "worst task": "How much of the way from a constant guess (0) to perfection (100) the worst task's last test metric has gone.",
        "spread": "Standard deviation over the tasks of the inverse training rates F(k) / F(0), divided by their mean; 0 is balanced.",
        "sent": "Up and down, all clients and rounds.",
        "weight": "p, by which a client's update counts at the server. All 1: equal weights.",
    }
    return tag(
        "dl", *(tag("dt", escape(term)) + tag("dd", escape(text)) for term, text in terms.items())
    )


def _methods_html(results: Results, looks: Sequence[Look]) -> str:
    lines = []
    for look, method in zip(looks, results.methods, strict=True):
        config = results.configs[method]
        what = registry.describe("weighting", config.weighting.name)[0]
        if config.train.method.name != MethodConfig().name:
            what = f"{registry.describe('method', config.train.method.name)[0]} Weighting: {config.weighting.name}."
        options = next(one.options for one in results.study.methods if one.name == method)
        own = [
            f"{key} = {value}"
            for key, value in dotted(options).items()
            if key not in ("weighting.name", "train.method", "train.method.name")
        ]
        cells = tag("td", escape(what), class_="text") + tag(
            "td", escape(", ".join(own)), class_="left"
        )
        lines.append(tag("tr", tag("td", _name_html(look)), cells))
    head = tag("tr", texts("th", ("method", "what it does", "options"), class_="text"))
    return tag("table", tag("thead", head), tag("tbody", *lines), class_="methods")
