"""The findings of a study in sentences, made from its numbers."""

from collections.abc import Sequence
from itertools import product

from fedgradnorm.compare.results import Estimate, Results
from fedgradnorm.compare.statistics import FEWEST_PAIRS, Interval
from fedgradnorm.report.comparison import percentage
from fedgradnorm.report.findings import listed, plural
from fedgradnorm.runs.summary import LOSS_RATIO, SMOOTHED

FASTER, SLOWER = "faster than", "slower than"
UNCLEAR, UNKNOWN = "not clearly different from", "not comparable with"


def headline_target(results: Results, variant: str, task: str) -> str | None:
    """The target that a task's speed is reported for.

    The baseline alone chooses it: the least loss ratio among those that it reached most often. If
    it reached none, it is the least that another method reached, or None.
    """
    reached: dict[str, list[int]] = {}
    names = [results.study.baseline, *results.methods]
    for target in results.targets(task):
        if target.startswith(LOSS_RATIO):
            estimates = [results.find(variant, name, task, "rounds", target) for name in names]
            reached[target] = [estimate.reached or 0 if estimate else 0 for estimate in estimates]
    least_first = sorted(reached, key=lambda target: float(target.removeprefix(LOSS_RATIO)))
    by_baseline = max(least_first, key=lambda target: reached[target][0], default=None)
    if by_baseline is not None and reached[by_baseline][0]:
        return by_baseline
    return next((target for target in least_first if any(reached[target])), None)


def goal(target: str) -> str:
    """A target in words, such as "60 % of the initial training loss"."""
    if target.startswith(LOSS_RATIO):
        return f"{percentage(float(target.removeprefix(LOSS_RATIO)))} of the initial training loss"
    return target


def verdict(estimate: Estimate) -> int:
    """1 if a method is clearly better than the baseline, -1 if it is clearly worse, else 0.

    It is clear if the whole interval is on one side, and no run was lost.
    """
    if estimate.difference is None or estimate.better is None or estimate.lost:
        return 0
    return estimate.difference.sign * (1 if estimate.better == "more" else -1)


def interval_text(difference: Interval) -> str:
    """An interval of rounds, such as "95 % interval 12 to 30 fewer" or "3 fewer to 5 more"."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return f"too few seeds for an interval: {difference.pairs} of {FEWEST_PAIRS}"
    if low == high == 0:
        return "the same with every seed"
    if high <= 0:
        return f"95 % interval {abs(high):.3g} to {abs(low):.3g} fewer"
    if low >= 0:
        return f"95 % interval {abs(low):.3g} to {high:.3g} more"
    return f"95 % interval {-low:.3g} fewer to {high:.3g} more"


def size_text(difference: Interval) -> str:
    """The size of a difference, such as "8.4 rounds"."""
    size = f"{abs(difference.mean):.3g}"
    return f"{size} round{'' if size == '1' else 's'}"


def sentence(estimate: Estimate, baseline: str) -> str:
    """A method's rounds to a target against the baseline's, in a sentence."""
    method, task, difference = estimate.method, estimate.task, estimate.difference
    if difference is None:
        return f"Neither {method} nor {baseline} gets {task} to {goal(estimate.target)}."
    amount = f"as many rounds as {baseline}"
    if difference.mean:
        direction = "fewer" if difference.mean < 0 else "more"
        amount = f"{size_text(difference)} {direction} than {baseline}"
    text, interval = f"{method} needs {amount}", interval_text(difference)
    if verdict(estimate):
        return f"{text} on {task} ({interval})."
    if difference.low is None:
        return f"{task}: {text} ({interval})."
    return f"No clear difference on {task}: {text} ({interval})."


def against(results: Results, variant: str, task: str) -> list[Estimate]:
    """Every other method's rounds to a task's headline target, against the baseline's."""
    target = headline_target(results, variant, task)
    if target is None:
        return []
    names = [name for name in results.methods if name != results.study.baseline]
    estimates = (results.find(variant, name, task, "rounds", target) for name in names)
    return [estimate for estimate in estimates if estimate is not None]


def answers(results: Results) -> list[str]:
    """The study's findings by variant, FedGradNorm's first."""
    return [
        f"{variant.name}: {text}" if variant.name else text
        for variant in results.study.variants
        for texts in answers_on(results, variant.name)
        for text in texts
    ]


def answers_on(results: Results, variant: str) -> tuple[list[str], list[str]]:
    """The findings in a variant: on FedGradNorm's methods, and on the others.

    They say on which tasks a method is faster or slower than the baseline. Methods without a clear
    difference share a sentence.
    """
    names = [name for name in results.methods if name != results.study.baseline]
    ours = [name for name in names if name in results.ours]
    others = [name for name in names if name not in results.ours]
    return _texts_on(results, variant, ours), _texts_on(results, variant, others)


def _texts_on(results: Results, variant: str, names: Sequence[str]) -> list[str]:
    baseline, texts = results.study.baseline, list[str]()
    unclear: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    absent: dict[str, list[str]] = {}
    for name in names:
        if absence := results.absence(variant, name):
            absent.setdefault(absence, []).append(name)
            continue
        sides = _sides(results, variant, name)
        if set(sides) <= {UNCLEAR, UNKNOWN}:
            tasks = (tuple(sides.get(UNCLEAR, ())), tuple(sides.get(UNKNOWN, ())))
            unclear.setdefault(tasks, []).append(name)
        else:
            parts = [f"{side} {baseline} on {listed(tasks)}" for side, tasks in sides.items()]
            texts.append(f"{name} is {'; '.join(parts)}.")
    for (compared, unknown), alike in unclear.items():
        if not compared:
            texts.append(f"{listed(alike)} cannot be compared with {baseline}: too few runs.")
            continue
        text = f"No clear difference between {baseline} and {listed(alike)} on {listed(compared)}"
        texts.append(f"{text}; not comparable on {listed(unknown)}." if unknown else f"{text}.")
    return texts + [f"{listed(alike)}: {absence}." for absence, alike in absent.items()]


def _sides(results: Results, variant: str, method: str) -> dict[str, list[str]]:
    """On which tasks a method is faster than the baseline, slower, and so on."""
    sides: dict[str, list[str]] = {FASTER: [], SLOWER: [], UNCLEAR: [], UNKNOWN: []}
    for task in results.tasks:
        by_method = {estimate.method: estimate for estimate in against(results, variant, task)}
        estimate = by_method.get(method)
        difference = None if estimate is None else estimate.difference
        if estimate is None or difference is None or difference.low is None:
            sides[UNKNOWN].append(task)
        elif side := verdict(estimate):
            bounds = sorted((abs(difference.low), abs(difference.high or 0.0)))
            size = f"by {size_text(difference)}; {bounds[0]:.3g} to {bounds[1]:.3g}"
            sides[FASTER if side == 1 else SLOWER].append(f"{task} ({size})")
        else:
            sides[UNCLEAR].append(task)
    return {side: tasks for side, tasks in sides.items() if tasks}


def caveats(results: Results) -> list[str]:
    """How sure the findings are, and what made the comparison fair."""
    texts = [
        _on_intervals(results),
        f"A target is reached by the mean of the last {SMOOTHED} rounds. A run that does not reach "
        "it counts with all of its rounds (≥). The true difference is larger.",
        *_on_tuning(results),
    ]
    bad = results.not_trained()
    for how, number in bad.items():
        texts.append(f"{plural(number, 'run')} of {len(results.cells)} {how}.")
    if "diverged" in bad:
        texts.append(
            "A run that diverged counts as one that never reached a target, even if it had been "
            "there before. It has no other figures. These are figures of the other runs, with "
            "their number (4 of 5), and no conclusion is drawn from them."
        )
    return texts


def _on_intervals(results: Results) -> str:
    pairs = product(results.study.variants, results.tasks)
    estimates = [e for variant, task in pairs for e in against(results, variant.name, task)]
    shown = sum(e.difference is not None and e.difference.low is not None for e in estimates)
    misses = f", about {0.05 * shown:.1g} of the {shown} in rounds here" if shown > 1 else ""
    seeds = plural(len(results.study.seeds), "seed")
    return (
        f"Differences are of runs with the same seed ({seeds}). Their 95 % bootstrap intervals are "
        "widened for the small number of seeds. One interval in twenty misses the true "
        f"difference by chance{misses}."
    )


def _on_tuning(results: Results) -> list[str]:
    tuning = results.study.tuning
    if tuning is None:
        return ["Step sizes were not tuned."]
    choices = plural(len(results.tuned[0].scores), "choice")
    seeds = plural(len(tuning.seeds), "seed")
    methods_at: dict[str, list[str]] = {}
    for tuned in results.tuned:
        name = f"{tuned.method} ({tuned.variant})" if tuned.variant else tuned.method
        for edge in tuned.edges:
            methods_at.setdefault(edge, []).append(name)
    best = f"Every method's step sizes are the best of the same {choices}"
    start, end = "At the edge of the tuning grid", "a better value may lie beyond"
    edges = [f"{start}, {edge}: {listed(names)}; {end}." for edge, names in methods_at.items()]
    return [f"{best}, on {seeds} used for nothing else.", *edges]
