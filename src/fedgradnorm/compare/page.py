"""The study's page: one HTML file that holds all that it needs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from fedgradnorm import registry
from fedgradnorm.compare import texts, titles
from fedgradnorm.compare.charts import MOST_SHOWN, curves_of, forest_of
from fedgradnorm.compare.findings import answers_on, caveats, goal, headline_target, verdict
from fedgradnorm.compare.results import OVERALL, Estimate, Results
from fedgradnorm.compare.texts import OVERALL_MEASURES, difference_text, mean_text
from fedgradnorm.config import MethodConfig, dotted
from fedgradnorm.report.comparison import ABSENT
from fedgradnorm.report.findings import plural
from fedgradnorm.report.html import write_html
from fedgradnorm.report.looks import Look, looks_for
from fedgradnorm.runs.summary import SMOOTHED

WORST = "worst task's skill"
SIDES = {1: "better", 0: "", -1: "worse"}


def write_page(results: Results, output: Path) -> Path:
    """Write a study's page. The file loads nothing.

    Raises:
        RunError: plotly or Jinja2 is not installed, or the file cannot be written.
    """
    study, looks = results.study, looks_for(results.methods)
    page = _Page(results, looks, [])
    variants = [page.variant(variant.name) for variant in study.variants]
    drawn = [
        asdict(look) | {"dash": _plotly_dash(look), "shown": at < MOST_SHOWN}
        for at, look in enumerate(looks)
    ]
    return write_html(
        "study.html.j2",
        output,
        title=study.title,
        question=study.question,
        answers=[_answer(results, variant.name) for variant in study.variants],
        caveats=caveats(results),
        looks=looks,
        most_shown=MOST_SHOWN,
        variants=variants,
        tuning=_tuning(results),
        runs=_runs(results),
        terms=_terms(results),
        methods=list(_methods(results, looks)),
        settings=tomli_w.dumps(study.model_dump(mode="json", exclude_none=True)),
        data={"looks": drawn, "charts": page.charts},
    )


def _plotly_dash(look: Look) -> str:
    return ",".join(f"{length}px" for length in look.dash) or "solid"


def _answer(results: Results, variant: str) -> dict[str, Any]:
    """The findings on FedGradNorm, and on the other methods, which a click shows."""
    ours, others = answers_on(results, variant)
    count = len(results.methods) - len(results.ours) - (results.study.baseline not in results.ours)
    return {
        "variant": variant,
        "ours": ours,
        "others": others,
        "count": plural(count, "other method"),
    }


class _Cell(NamedTuple):
    """A mean, and the small print below it."""

    mean: str
    smalls: tuple[str, ...] = ()
    side: str = ""


def _cell(mean: str, difference: str, side: int, more: str = "") -> _Cell:
    smalls = tuple(text for text in (difference, more) if text not in ("", ABSENT))
    return _Cell(mean, smalls, SIDES[side])


@dataclass(frozen=True)
class _Page:
    """The parts of the page with charts. A figure has the number of its chart in ``charts``."""

    results: Results
    looks: Sequence[Look]
    charts: list[dict[str, Any]]

    def variant(self, variant: str) -> dict[str, Any]:
        """A variant's section. Its heading is None in a study without variants."""
        results = self.results
        heading = variant if results.study.shows_variants else None
        if not any(results.measured(variant, look.name) for look in self.looks):
            return {"heading": heading, "empty": True}
        return {
            "heading": heading,
            "empty": False,
            "speed_title": titles.speed_title(results, variant),
            "speed": self._speed(variant),
            "forests": [self._forest(variant, task) for task in results.tasks],
            "overall_title": titles.overall_title(results, variant),
            "overall": self._overall(variant),
            "tasks": [self._task(variant, task) for task in results.tasks],
        }

    def _speed(self, variant: str) -> dict[str, Any]:
        rows = []
        for look, cells in zip(self.looks, texts.overview(self.results, variant), strict=True):
            parted = [(*text.partition("; ")[::2], side) for text, side in cells]
            rows.append(self._row(variant, look, [_cell(*parts) for parts in parted]))
        baseline = self.results.study.baseline
        return {
            "note": f"Mean rounds, and below them the mean difference against {baseline} and its "
            "95 % interval.",
            "titles": [(task, self._goal(variant, task)) for task in self.results.tasks],
            "rows": rows,
        }

    def _overall(self, variant: str) -> dict[str, Any]:
        rows = []
        for look in self.looks:
            done = len(self.results.measured(variant, look.name))
            cells = [self._overall_cell(variant, look.name, name) for name, _ in OVERALL_MEASURES]
            cells.append(_Cell(f"{done} of {len(self.results.study.seeds)}"))
            rows.append(self._row(variant, look, cells))
        baseline = self.results.study.baseline
        return {
            "note": f"Means over the seeds, and below each the difference against {baseline}.",
            "titles": [*(title for _, title in OVERALL_MEASURES), "runs"],
            "rows": rows,
        }

    def _overall_cell(self, variant: str, method: str, measure: str) -> _Cell:
        estimate = self.results.find(variant, method, OVERALL, measure)
        if measure == "sent":
            return _Cell(mean_text(estimate))
        runs = self.results.measured(variant, method).values() if measure == WORST else ()
        worst = ", ".join(sorted({run.worst[0] for run in runs if run.worst}))
        return _cell(mean_text(estimate), difference_text(estimate), _side(estimate), worst)

    def _row(self, variant: str, look: Look, cells: Sequence[_Cell]) -> dict[str, Any]:
        """A method's figures, or why it has none."""
        absence = self.results.absence(variant, look.name)
        return {"look": look, "absence": absence, "cells": cells}

    def _goal(self, variant: str, task: str) -> str:
        target = headline_target(self.results, variant, task)
        return f"to {goal(target)}" if target else "no target reached"

    def _forest(self, variant: str, task: str) -> dict[str, Any]:
        chart = forest_of(self.results, variant, task)
        points = chart["points"]
        small = f"{task}: rounds {self._goal(variant, task)}; mean difference and 95 % interval"
        if any(point.get("censored") for point in points):
            small += "; hollow: some runs did not reach it and count with all of their rounds"
        figure = self._figure(chart) if points else {"number": None}
        title = titles.task_title(self.results, variant, task)
        return figure | {"title": title, "small": small, "height": 90 + 22 * len(points)}

    def _figure(self, chart: dict[str, Any]) -> dict[str, Any]:
        self.charts.append(chart)
        number = len(self.charts) - 1
        return {"title": chart.get("title"), "small": "", "height": None, "number": number}

    def _task(self, variant: str, task: str) -> dict[str, Any]:
        charts = [self._figure(chart) for chart in curves_of(self.results, variant, task)]
        return {"name": task, "charts": charts, "table": self._task_table(variant, task)}

    def _task_table(self, variant: str, task: str) -> dict[str, Any]:
        columns = list(_columns(self.results, task))
        rows = []
        for look in self.looks:
            cells = []
            for _, measure, target in columns:
                estimate = self.results.find(variant, look.name, task, measure, target)
                mean = texts.speed_text(estimate) if target else mean_text(estimate)
                cells.append(_cell(mean, difference_text(estimate), _side(estimate)))
            rows.append(self._row(variant, look, cells))
        headers = [(title, target) for title, _, target in columns]
        return {"note": "", "titles": headers, "rows": rows}


def _side(estimate: Estimate | None) -> int:
    return 0 if estimate is None else verdict(estimate)


def _columns(results: Results, task: str) -> Iterator[tuple[str, str, str]]:
    """The columns of a task's table: title, measure and target."""
    of_metric = (estimate for estimate in results.estimates if estimate.measure == "last metric")
    unit = next((estimate.unit for estimate in of_metric if estimate.task == task), "")
    if unit:
        yield f"last {unit}", "last metric", ""
        yield f"best {unit}", "best metric", ""
    for target in results.targets(task):
        yield "rounds", "rounds", target
        yield "time", "seconds", target


def _tuning(results: Results) -> dict[str, Any]:
    title, tuning = titles.tuning_title(results), results.study.tuning
    if tuning is None:
        return {"title": title, "note": ""}
    axes = " × ".join(" = ".join(axis.keys) for axis in tuning.axes)
    return {
        "title": title,
        "note": "Mean over the tasks of the final training loss, as a share of the initial one, "
        f"for every {axes}. The least is best (*). The final loss is the mean over the last tenth "
        "of the rounds.",
        "names": 2 if results.study.shows_variants else 1,
        "titles": texts.tuning_titles(results),
        "rows": texts.tuning_rows(results),
        "reasons": sorted({reason for tuned in results.tuned for reason in tuned.reasons.values()}),
    }


def _runs(results: Results) -> dict[str, Any]:
    """Every run that did not end well, with the reason."""
    with_variant = results.study.shows_variants
    bad = []
    for cell, ended in ((result.cell, result.ended) for result in results.cells):
        if ended.state != "trained":
            state = "not trained yet" if ended.state == "missing" else ended.state
            line = [cell.variant, cell.method, str(cell.seed), state, ended.reason]
            bad.append(line if with_variant else line[1:])
    columns = ["variant", "method", "seed", "state", "why"]
    return {
        "title": titles.runs_title(results),
        "titles": columns if with_variant else columns[1:],
        "bad": bad,
    }


def _terms(results: Results) -> dict[str, str]:
    """The words of the page, explained."""
    baseline, single = results.study.baseline, results.study.single
    reference = f"those of {single}, which trains every task alone"
    if single is None:
        reference = "with every task trained alone, which is not in this study"
    return {
        "rounds to a target": f"The round at which the mean training loss of the last {SMOOTHED} "
        "rounds is down to this share of the initial loss F(0). Loss ratio 0.6 is 60 % of it.",
        "≥ 52 (4 of 5)": "Four of five runs reached the target. The others count with all of their "
        "rounds, so the true mean is larger. Without ≥, four of five runs have this figure.",
        "difference": f"Method less {baseline}, of runs with the same seed, and its 95 % bootstrap "
        "interval over the seeds. It is clear if the whole interval is on one side of 0.",
        "time": "As if all clients worked at the same time: a round takes the time of its slowest "
        "client, and the server's.",
        "Δm": f"How much better the test metrics are than {reference}: the mean over the tasks.",
        "worst task": "How far the worst task's last test metric is from a constant guess (0) to "
        "perfection (100).",
        "spread": "Standard deviation over the tasks of the inverse training rates F(k) / F(0), "
        "divided by their mean. 0 is balanced.",
        "sent": "Up and down, over all clients and rounds.",
        "weight": "p, the weight of a client's update at the server. All 1: equal weights.",
    }


def _methods(results: Results, looks: Sequence[Look]) -> Iterator[tuple[Look, str, str]]:
    """By method: how it is drawn, what it does, and its options."""
    given = {method.name: method.options for method in results.study.methods}
    named = ("weighting.name", "train.method", "train.method.name")
    for look in looks:
        config = results.configs[look.name]
        method, weighting = config.train.method.name, config.weighting.name
        if method == MethodConfig().name:
            what = registry.describe("weighting", weighting)[0]
        else:
            what = f"{registry.describe('method', method)[0]} Weighting: {weighting}."
        options = dotted(given[look.name]).items()
        yield (
            look,
            what,
            ", ".join(f"{key} = {value}" for key, value in options if key not in named),
        )
