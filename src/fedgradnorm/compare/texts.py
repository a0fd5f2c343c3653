"""A study's figures as the texts in its tables."""

from statistics import fmean

from fedgradnorm.compare.findings import headline_target, verdict
from fedgradnorm.compare.results import OVERALL, Estimate, Results
from fedgradnorm.report.comparison import ABSENT

OVERALL_MEASURES = (
    ("delta-m, last metric", "Δm, last (%)"),
    ("delta-m, best metric", "Δm, best (%)"),
    ("worst task's skill", "worst task (%)"),
    ("spread at the end", "spread, end"),
    ("spread on average", "spread, mean"),
    ("sent", "sent (MB)"),
)
"""The measures over all tasks, and the titles of their columns."""


def figure(value: float, digits: int = 3) -> str:
    """A number with this many significant digits.

    Below 1e6 it has all digits before the point and no exponent.
    """
    if 100 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.{3 if abs(value) >= 10 else digits}g}"


def mean_text(estimate: Estimate | None) -> str:
    """The mean over the seeds, in the measure's unit.

    If a seed has no value, the text counts those that have one, such as "0.42 (4 of 5)".
    """
    if estimate is None or not estimate.values:
        return ABSENT
    mean = _figure(estimate, fmean(estimate.values.values()))
    return _counted(mean, len(estimate.values), estimate.seeds)


def speed_text(estimate: Estimate | None) -> str:
    """Mean rounds or seconds to a target.

    If a run did not reach it, the text counts those that did, such as "≥ 52 (3 of 5)".
    """
    if estimate is None or not estimate.values or estimate.reached is None:
        return ABSENT
    mean = _figure(estimate, fmean(estimate.values.values()))
    text = _counted(mean, estimate.reached, estimate.seeds)
    return text if estimate.reached == len(estimate.values) else f"≥ {text}"


def difference_text(estimate: Estimate | None) -> str:
    """A paired difference with its interval, such as "-21 (-30 to -12)".

    If runs were lost, the text counts the pairs.
    """
    if estimate is None or estimate.difference is None:
        return ABSENT
    difference = estimate.difference
    text = _figure(estimate, difference.mean, signed=True)
    if difference.low is not None and difference.high is not None:
        ends = (difference.low, difference.high)
        low, high = (_figure(estimate, end, signed=True) for end in ends)
        text += f" ({low} to {high})"
    return f"{text}, {difference.pairs} of {estimate.seeds}" if estimate.lost else text


def _counted(text: str, count: int, of: int) -> str:
    return text if count == of else f"{text} ({count} of {of})"


def _figure(estimate: Estimate, value: float, *, signed: bool = False) -> str:
    """A value in the measure's unit: bytes in MB, a time in ms, s or min.

    A difference has a sign. A value that is only rounding is 0.
    """
    sign, digits = "+" if signed and value > 0 else "", 2 if signed else 3
    if estimate.unit == "seconds":
        if not value:
            return "0"
        if abs(value) < 1:
            return f"{sign}{figure(1000 * value, digits)} ms"
        if abs(value) < 120:
            return f"{sign}{figure(value, digits)} s"
        return f"{sign}{figure(value / 60, digits)} min"
    value = value / 1e6 if estimate.unit == "bytes" else value
    return "0" if abs(value) < 1e-9 else f"{sign}{figure(value, digits)}"


def overall_text(results: Results, variant: str, method: str, measure: str) -> str:
    """A measure over all tasks: the mean and the difference, or why there is none."""
    estimate = results.find(variant, method, OVERALL, measure)
    text = results.absence(variant, method) or mean_text(estimate)
    difference = ABSENT if measure == "sent" else difference_text(estimate)
    return text if difference == ABSENT else f"{text}; {difference}"


def overview(results: Results, variant: str) -> list[list[tuple[str, int]]]:
    """By method and task: rounds to the headline target and the difference, and its verdict.

    For a method without figures, the text says why it has none.
    """
    rows = []
    for method in results.methods:
        if absence := results.absence(variant, method):
            rows.append([(absence, 0) for _ in results.tasks])
            continue
        cells = []
        for task in results.tasks:
            target = headline_target(results, variant, task)
            estimate = results.find(variant, method, task, "rounds", target) if target else None
            text = speed_text(estimate)
            if estimate is not None and estimate.difference is not None:
                text += f"; {difference_text(estimate)}"
            cells.append((text, 0 if estimate is None else verdict(estimate)))
        rows.append(cells)
    return rows


def tuning_rows(results: Results) -> list[list[str]]:
    """By variant and method: the score at every point of the grid, the chosen one marked by *."""
    rows = []
    for tuned in results.tuned:
        names = [tuned.variant, tuned.method] if results.study.shows_variants else [tuned.method]
        scores = []
        for point, score in tuned.scores.items():
            text = tuned.reasons[point].split(" ")[0] if score is None else f"{score:.3f}"
            scores.append(f"{text} *" if point == tuned.chosen else text)
        rows.append([*names, *scores, "at the edge" if tuned.edges else ""])
    return rows


def tuning_titles(results: Results) -> list[str]:
    """The titles of these columns."""
    if not results.tuned:
        return []
    points = [", ".join(f"{value:g}" for value in point) for point in results.tuned[0].scores]
    return [*(["variant"] if results.study.shows_variants else []), "method", *points, ""]
