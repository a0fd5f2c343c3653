"""What a study says in words, made from its numbers."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from fedgradnorm.compare.results import OVERALL, Estimate, Results
from fedgradnorm.compare.statistics import FEWEST_PAIRS, Interval
from fedgradnorm.report.comparison import percentage
from fedgradnorm.report.findings import listed, plural
from fedgradnorm.runs.summary import LOSS_RATIO, SMOOTHED

__all__ = [
    "answers",
    "answers_on",
    "caveats",
    "curve_title",
    "edge_notes",
    "goal",
    "headline_target",
    "interval_text",
    "overall_title",
    "runs_title",
    "sentence",
    "speed_title",
    "task_title",
    "tuning_title",
    "verdict",
]

UNCLEAR, UNKNOWN = "not clearly different from", "not comparable with"

MOST_NAMED = 4
"""A title that would name more methods than these counts them."""


def headline_target(results: Results, variant: str, task: str) -> str | None:
    """The target by which a task's speed is told, chosen by the baseline alone: of those that it reached most often, the least loss ratio.

    Where it reached none, the least that another method reached; None where there is none of these either.
    """
    reached: dict[str, list[int]] = {}
    names = [results.study.baseline, *results.methods]
    for target in results.targets(task):
        if target.startswith(LOSS_RATIO):
            found = [results.find(variant, name, task, "rounds", target) for name in names]
            reached[target] = [one.reached or 0 if one else 0 for one in found]
    least_first = sorted(reached, key=lambda target: float(target.removeprefix(LOSS_RATIO)))
    by_baseline = max(least_first, key=lambda target: reached[target][0], default=None)
    if by_baseline is not None and reached[by_baseline][0]:
        return by_baseline
    return next((target for target in least_first if any(reached[target])), None)


def goal(target: str) -> str:
    """A target in words, such as "60 % of the initial loss"."""
    if target.startswith(LOSS_RATIO):
        return f"{percentage(float(target.removeprefix(LOSS_RATIO)))} of the initial training loss"
    return target


def verdict(one: Estimate) -> int:
    """1 where a method is better than the baseline, the whole interval on that side; -1 where it is worse; 0 where neither is clear.

    Of survivors alone there is no verdict.
    """
    if one.difference is None or one.better is None or one.lost:
        return 0
    return one.difference.sign * (1 if one.better == "more" else -1)


def interval_text(found: Interval) -> str:
    """An interval of rounds, such as "12 to 30 fewer" or "3 fewer to 5 more"."""
    if found.low is None or found.high is None:
        return f"too few seeds for an interval: {found.pairs} of {FEWEST_PAIRS}"
    if found.low == found.high == 0:
        return "the same with every seed"
    if found.high <= 0:
        return f"95 % interval {abs(found.high):.3g} to {abs(found.low):.3g} fewer"
    if found.low >= 0:
        return f"95 % interval {abs(found.low):.3g} to {found.high:.3g} more"
    return f"95 % interval {-found.low:.3g} fewer to {found.high:.3g} more"


def sentence(one: Estimate, baseline: str) -> str:
    """A method's rounds to a target against the baseline's, in a sentence."""
    found = one.difference
    if found is None:
        return f"Neither {one.method} nor {baseline} gets {one.task} to {goal(one.target)}."
    size = f"{abs(found.mean):.3g}"
    amount = (
        f"{size} round{'' if size == '1' else 's'} {'fewer' if found.mean < 0 else 'more'}"
        if found.mean
        else "as many rounds"
    )
    than = f"{'than' if found.mean else 'as'} {baseline}"
    text = f"{one.method} needs {amount} {than}"
    if verdict(one):
        return f"{text} on {one.task} ({interval_text(found)})."
    if found.low is None:
        return f"{one.task}: {text} ({interval_text(found)})."
    return f"No clear difference on {one.task}: {text} ({interval_text(found)})."


def task_title(results: Results, variant: str, task: str) -> str:
    """A task's finding on the rounds to its headline target: of one method, or how many of several are faster and slower."""
    found = _against(results, variant, task)
    baseline = results.study.baseline
    if not found:
        return f"{task}: no method brings the training loss down to a target."
    if len(found) == 1:
        return sentence(found[0], baseline)
    ours = [one for one in found if one.method in results.ours]
    others = [one for one in found if one not in ours]
    better, worse = ([one for one in others if verdict(one) == side] for side in (1, -1))
    if not ours and not better and not worse:
        return (
            f"No clear difference on {task}: no method is clearly faster or slower than {baseline}."
        )
    count = f"{len(better) or 'none'} {'are' if len(better) > 1 else 'is'}"
    counts = f"{count} faster than {baseline}{'' if ours else f' on {task}'}, {len(worse) or 'none'} slower"
    if ours:
        text = f"{task}, against {baseline}: {'; '.join(f'{one.method} {_brief(one)}' for one in ours)}."
        return f"{text} Of {plural(len(others), 'other method')} {counts}." if others else text
    counts = f"Of {len(others)} methods {counts}"
    first = min(better, key=_mean_difference, default=None)
    return f"{counts}." if first is None else f"{counts}; first of all {sentence(first, baseline)}"


def speed_title(results: Results, variant: str) -> str:
    """On how many tasks FedGradNorm is faster than the baseline, or how many methods are."""
    baseline, tasks = results.study.baseline, plural(len(results.tasks), "task")
    verdicts: dict[str, list[int]] = {}
    for one in (one for task in results.tasks for one in _against(results, variant, task)):
        verdicts.setdefault(one.method, []).append(verdict(one))
    ours = []
    for name in (name for name in results.ours if name in verdicts):
        faster, slower = (verdicts[name].count(side) or "none" for side in (1, -1))
        ours.append(f"{name} faster than {baseline} on {faster} of {tasks}, slower on {slower}")
    if 0 < len(ours) <= MOST_NAMED:
        return f"Rounds to a target: {'; '.join(ours)}"
    some = sum(1 in sides for sides in verdicts.values()) or "none"
    return f"Rounds to a target: {some} of {plural(len(verdicts), 'method')} faster than {baseline} on some task"


def overall_title(results: Results, variant: str) -> str:
    """Which method has the best mean of the metrics, and which the tasks most even; only of those all of whose runs ended well."""
    texts = []
    for measure, what, unit in (
        ("delta-m, last metric", "the best Δm", " %"),
        ("spread at the end", "the least spread", ""),
    ):
        found = _by_method(results, variant, OVERALL, measure)
        if len(found) > 1:
            best = (min if measure.startswith("spread") else max)(found, key=found.__getitem__)
            others = [
                name
                for name in (*results.ours, results.study.baseline)
                if name in found and name != best
            ]
            compared = "; ".join(f"{name} {found[name]:.3g}{unit}" for name in others)
            texts.append(
                f"{best} has {what}, {found[best]:.3g}{unit}{f' ({compared})' if compared else ''}"
            )
    return f"Over all tasks: {', '.join(texts)}" if texts else "Over all tasks"


def curve_title(results: Results, variant: str, task: str, key: str) -> str:
    """What a task's chart shows, by the means over the seeds at the end; only of methods all of whose runs ended well."""
    measure = {
        "inverse_training_rate": "final loss ratio",
        "metric": "last metric",
        "weight": "final weight",
    }[key]
    found = _by_method(results, variant, task, measure)
    if key == "weight":
        some = [
            results.find(variant, name, task, measure) for name in results.ours or results.methods
        ]
        told = [
            f"{fmean(one.values.values()):.2f} with {one.method}{_share(one)}"
            for one in some
            if one is not None and one.values
        ]
        return f"Weight: ends at {'; '.join(told[:3])}" if told else "Weight"
    first = next(
        (one for one in results.estimates if (one.task, one.measure) == (task, measure)), None
    )
    start = (
        "Training loss"
        if key == "inverse_training_rate"
        else f"Test {first.unit.partition(',')[0] if first else 'metric'}"
    )
    if first is None or len(found) < 2:
        return start
    best = (max if first.better == "more" else min)(found, key=found.__getitem__)
    base = results.study.baseline
    compared = "".join(
        f"; {name} {found[name]:.3g}"
        for name in (*results.ours[:2], base)
        if name in found and name != best
    )
    return f"{start}: ends best with {best}, {found[best]:.3g}{compared}"


def tuning_title(results: Results) -> str:
    """How many choices lie at the edge of the grid."""
    if results.study.tuning is None:
        return "Step sizes were not tuned"
    chosen = [one for one in results.tuned if one.chosen is not None]
    edges = sum(bool(one.edges) for one in chosen)
    return f"Step sizes: {edges or 'none'} of {len(chosen)} best ones at the edge of the grid"


def runs_title(results: Results) -> str:
    """How many runs did not end well."""
    states = Counter[str](one.ended.state for one in results.cells)
    words = {"diverged": "diverged", "failed": "failed", "missing": "not trained yet"}
    bad = [f"{states[state]} {text}" for state, text in words.items() if states[state]]
    return (
        f"Runs: {', '.join(bad)} of {len(results.cells)}"
        if bad
        else f"Runs: all {len(results.cells)} ended well"
    )


def _share(one: Estimate) -> str:
    """How many of the seeds have a value, where not all do."""
    return "" if len(one.values) == one.seeds else f" ({len(one.values)} of {one.seeds})"


def _by_method(results: Results, variant: str, task: str, measure: str) -> dict[str, float]:
    """The means over all seeds; without methods that lack one of them."""
    found = ((name, results.find(variant, name, task, measure)) for name in results.methods)
    return {
        name: fmean(one.values.values())
        for name, one in found
        if one is not None and len(one.values) == one.seeds
    }


def _by(found: Interval) -> str:
    """The size of a clear difference, and its interval."""
    low, high = sorted((abs(found.low or 0.0), abs(found.high or 0.0)))
    return f"by {_rounds(found)}; {low:.3g} to {high:.3g}"


def _rounds(found: Interval) -> str:
    """The size of a difference."""
    size = f"{abs(found.mean):.3g}"
    return f"{size} round{'s' if size != '1' else ''}"


def _brief(one: Estimate) -> str:
    """A difference in a few words, such as "8.4 rounds fewer (95 % interval 4.2 to 13.4 fewer)"."""
    found = one.difference
    if found is None:
        return "does not get there either"
    if not verdict(one):
        return f"no clear difference ({interval_text(found)})"
    return f"{_rounds(found)} {'fewer' if found.mean < 0 else 'more'} ({interval_text(found)})"


def answers(results: Results) -> list[str]:
    """The study's findings, variant by variant, FedGradNorm's first."""
    return [
        f"{variant.name}: {text}" if variant.name else text
        for variant in results.study.variants
        for some in answers_on(results, variant.name)
        for text in some
    ]


def answers_on(results: Results, variant: str) -> tuple[list[str], list[str]]:
    """What was found in a variant: of FedGradNorm, and of the other methods. On which tasks each is faster than the baseline, and slower.

    Methods of which nothing is clear on any task are told of together.
    """
    names = [name for name in results.methods if name != results.study.baseline]
    ours, others = (
        [name for name in names if name in results.ours],
        [name for name in names if name not in results.ours],
    )
    return _told(results, variant, ours), _told(results, variant, others)


def _told(results: Results, variant: str, names: Sequence[str]) -> list[str]:
    baseline, texts = results.study.baseline, list[str]()
    unclear: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    absent: dict[str, list[str]] = {}
    for name in names:
        if absence := results.absence(variant, name):
            absent.setdefault(absence, []).append(name)
            continue
        sides = _sides(results, variant, name)
        if set(sides) <= {UNCLEAR, UNKNOWN}:
            unclear.setdefault(
                (tuple(sides.get(UNCLEAR, ())), tuple(sides.get(UNKNOWN, ()))), []
            ).append(name)
        else:
            parts = [f"{side} {baseline} on {listed(tasks)}" for side, tasks in sides.items()]
            texts.append(f"{name} is {'; '.join(parts)}.")
    for (tasks, unknown), alike in unclear.items():
        if not tasks:
            texts.append(f"{listed(alike)} cannot be compared with {baseline}: too few runs.")
            continue
        more = f"; not comparable on {listed(unknown)}" if unknown else ""
        texts.append(
            f"No clear difference between {baseline} and {listed(alike)} on {listed(tasks)}{more}."
        )
    return texts + [f"{listed(alike)}: {absence}." for absence, alike in absent.items()]


def caveats(results: Results) -> list[str]:
    """How far the findings can be trusted, and what the comparison did for fairness."""
    study = results.study
    seeds = plural(len(study.seeds), "seed")
    shown = sum(
        one.difference is not None and one.difference.low is not None
        for variant in study.variants
        for task in results.tasks
        for one in _against(results, variant.name, task)
    )
    texts = [
        f"Differences are of runs with the same seed ({seeds}), with their 95 % bootstrap intervals, made wider for so few. One in "
        f"twenty misses the truth by chance{f': about {0.05 * shown:.1g} of the {shown} in rounds here' if shown > 1 else ''}.",
        f"A target is reached by the mean of the last {SMOOTHED} rounds. A run that does not reach it counts with all of its rounds (≥): "
        "the true difference is larger.",
    ]
    if study.tuning is None:
        texts.append("Step sizes were not tuned.")
    else:
        tried, tuned_on = (
            plural(len(results.tuned[0].scores), "choice"),
            plural(len(study.tuning.seeds), "seed"),
        )
        texts.append(
            f"Every method's step sizes are the best of the same {tried}, on {tuned_on} used for nothing else."
        )
        texts += edge_notes(results)
    for state, words in (
        ("diverged", "diverged"),
        ("failed", "failed"),
        ("missing", "not trained yet"),
    ):
        if count := sum(one.ended.state == state for one in results.cells):
            texts.append(f"{plural(count, 'run')} of {len(results.cells)} {words}.")
    if any(one.ended.state == "diverged" for one in results.cells):
        texts.append(
            "A run that diverged counts as one that never reached a target, even where it had been there before. It has no other figures: "
            "those are of the other runs, which are counted (4 of 5), and nothing is concluded from them."
        )
    return texts


def edge_notes(results: Results) -> list[str]:
    """By setting: whose best value lies at the edge of the grid, so that a better one may lie beyond."""
    at: dict[str, list[str]] = {}
    for one in results.tuned:
        for edge in one.edges:
            at.setdefault(edge, []).append(
                f"{one.method} ({one.variant})" if one.variant else one.method
            )
    return [
        f"At the edge of the tuning grid, {edge}: {listed(names)}; a better value may lie beyond."
        for edge, names in at.items()
    ]


def _against(results: Results, variant: str, task: str) -> list[Estimate]:
    target = headline_target(results, variant, task)
    names = [name for name in results.methods if name != results.study.baseline]
    found = (
        (results.find(variant, name, task, "rounds", target) for name in names)
        if target is not None
        else ()
    )
    return [one for one in found if one is not None]


def _mean_difference(one: Estimate) -> float:
    return 0.0 if one.difference is None else one.difference.mean


def _sides(results: Results, variant: str, method: str) -> dict[str, list[str]]:
    """On which tasks a method is faster than the baseline, slower, and so on."""
    sides: dict[str, list[str]] = {"faster than": [], "slower than": [], UNCLEAR: [], UNKNOWN: []}
    for task in results.tasks:
        one = next((one for one in _against(results, variant, task) if one.method == method), None)
        if one is None or one.difference is None or one.difference.low is None:
            sides[UNKNOWN].append(task)
        else:
            side = {1: "faster than", -1: "slower than", 0: UNCLEAR}[verdict(one)]
            sides[side].append(f"{task} ({_by(one.difference)})" if verdict(one) else task)
    return {side: tasks for side, tasks in sides.items() if tasks}
