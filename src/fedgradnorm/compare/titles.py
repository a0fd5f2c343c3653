"""The titles of a study's tables and charts, which say what these show."""

from statistics import fmean

from fedgradnorm.compare.findings import against, interval_text, sentence, size_text, verdict
from fedgradnorm.compare.results import OVERALL, Estimate, Results
from fedgradnorm.report.findings import plural

MOST_NAMED = 4
"""A title that would name more methods than this counts them."""


def task_title(results: Results, variant: str, task: str) -> str:
    """The finding on the rounds to a task's headline target.

    It is a sentence about one method, or says how many of several are faster and slower.
    """
    estimates = against(results, variant, task)
    baseline = results.study.baseline
    if not estimates:
        return f"{task}: no method brings the training loss down to a target."
    if len(estimates) == 1:
        return sentence(estimates[0], baseline)
    ours = [estimate for estimate in estimates if estimate.method in results.ours]
    others = [estimate for estimate in estimates if estimate not in ours]
    better = [estimate for estimate in others if verdict(estimate) == 1]
    worse = [estimate for estimate in others if verdict(estimate) == -1]
    if not ours and not better and not worse:
        rest = f"no method is clearly faster or slower than {baseline}."
        return f"No clear difference on {task}: {rest}"
    count = f"{len(better) or 'none'} {'are' if len(better) > 1 else 'is'} faster than {baseline}"
    counts = f"{count}{'' if ours else f' on {task}'}, {len(worse) or 'none'} slower"
    if ours:
        named = "; ".join(f"{estimate.method} {_brief(estimate)}" for estimate in ours)
        text = f"{task}, against {baseline}: {named}."
        return f"{text} Of {plural(len(others), 'other method')} {counts}." if others else text
    fastest = min(better, key=_mean_difference, default=None)
    first = "." if fastest is None else f"; first of all {sentence(fastest, baseline)}"
    return f"Of {len(others)} methods {counts}{first}"


def _brief(estimate: Estimate) -> str:
    """A difference in brief, such as "8.4 rounds fewer (95 % interval 4.2 to 13.4 fewer)"."""
    difference = estimate.difference
    if difference is None:
        return "does not get there either"
    interval = interval_text(difference)
    if not verdict(estimate):
        return f"no clear difference ({interval})"
    return f"{size_text(difference)} {'fewer' if difference.mean < 0 else 'more'} ({interval})"


def _mean_difference(estimate: Estimate) -> float:
    return 0.0 if estimate.difference is None else estimate.difference.mean


def speed_title(results: Results, variant: str) -> str:
    """On how many tasks FedGradNorm is faster than the baseline, or how many methods are."""
    baseline, tasks = results.study.baseline, plural(len(results.tasks), "task")
    verdicts: dict[str, list[int]] = {}
    for task in results.tasks:
        for estimate in against(results, variant, task):
            verdicts.setdefault(estimate.method, []).append(verdict(estimate))
    ours = []
    for name in (name for name in results.ours if name in verdicts):
        faster, slower = (verdicts[name].count(side) or "none" for side in (1, -1))
        ours.append(f"{name} faster than {baseline} on {faster} of {tasks}, slower on {slower}")
    if 0 < len(ours) <= MOST_NAMED:
        return f"Rounds to a target: {'; '.join(ours)}"
    faster = sum(1 in sides for sides in verdicts.values()) or "none"
    methods = plural(len(verdicts), "method")
    return f"Rounds to a target: {faster} of {methods} faster than {baseline} on some task"


def overall_title(results: Results, variant: str) -> str:
    """Which method has the best mean of the metrics, and which the least spread.

    Methods with a run that did not end well are left out.
    """
    texts = []
    for measure, what, unit, pick in (
        ("delta-m, last metric", "the best Δm", " %", max),
        ("spread at the end", "the least spread", "", min),
    ):
        means = _means(results, variant, OVERALL, measure)
        if len(means) > 1:
            best = pick(means, key=means.__getitem__)
            named = dict.fromkeys((*results.ours, results.study.baseline))
            others = [name for name in named if name in means and name != best]
            compared = "; ".join(f"{name} {means[name]:.3g}{unit}" for name in others)
            text = f"{best} has {what}, {means[best]:.3g}{unit}"
            texts.append(f"{text} ({compared})" if compared else text)
    return f"Over all tasks: {', '.join(texts)}" if texts else "Over all tasks"


def curve_title(results: Results, variant: str, task: str, key: str) -> str:
    """What a task's chart shows at its end, by the means over the seeds.

    Methods with a run that did not end well are left out.
    """
    if key == "weight":
        return _weight_title(results, variant, task)
    measure = "final loss ratio" if key == "inverse_training_rate" else "last metric"
    means = _means(results, variant, task, measure)
    matching = (e for e in results.estimates if (e.task, e.measure) == (task, measure))
    first = next(matching, None)
    start = "Training loss"
    if key == "metric":
        start = f"Test {first.unit.partition(',')[0] if first else 'metric'}"
    if first is None or len(means) < 2:
        return start
    best = (max if first.better == "more" else min)(means, key=means.__getitem__)
    named = dict.fromkeys((*results.ours[:2], results.study.baseline))
    others = [name for name in named if name in means and name != best]
    compared = "".join(f"; {name} {means[name]:.3g}" for name in others)
    return f"{start}: ends best with {best}, {means[best]:.3g}{compared}"


def _weight_title(results: Results, variant: str, task: str) -> str:
    ends = []
    for name in results.ours or results.methods:
        estimate = results.find(variant, name, task, "final weight")
        if estimate is not None and estimate.values:
            count, seeds = len(estimate.values), estimate.seeds
            share = "" if count == seeds else f" ({count} of {seeds})"
            ends.append(f"{fmean(estimate.values.values()):.2f} with {name}{share}")
    return f"Weight: ends at {'; '.join(ends[:3])}" if ends else "Weight"


def _means(results: Results, variant: str, task: str, measure: str) -> dict[str, float]:
    """By method, the mean over the seeds, without methods that lack a seed."""
    estimates = (results.find(variant, name, task, measure) for name in results.methods)
    return {
        estimate.method: fmean(estimate.values.values())
        for estimate in estimates
        if estimate is not None and len(estimate.values) == estimate.seeds
    }


def tuning_title(results: Results) -> str:
    """How many choices lie at the edge of the grid."""
    if results.study.tuning is None:
        return "Step sizes were not tuned"
    chosen = [tuned for tuned in results.tuned if tuned.chosen is not None]
    edges = sum(bool(tuned.edges) for tuned in chosen)
    return f"Step sizes: {edges or 'none'} of {len(chosen)} best ones at the edge of the grid"


def runs_title(results: Results) -> str:
    """How many runs did not end well."""
    bad = [f"{number} {how}" for how, number in results.not_trained().items()]
    if not bad:
        return f"Runs: all {len(results.cells)} ended well"
    return f"Runs: {', '.join(bad)} of {len(results.cells)}"
