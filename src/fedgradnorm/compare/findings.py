"""What a study says in words, made from its numbers."""

from fedgradnorm.compare.results import Estimate, Results, TunedMethod
from fedgradnorm.compare.statistics import FEWEST_PAIRS, Interval
from fedgradnorm.report.comparison import percentage
from fedgradnorm.report.findings import listed, plural
from fedgradnorm.summary import LOSS_RATIO

__all__ = ["answers", "caveats", "edge_notes", "goal", "headline_target", "interval_text", "sentence", "task_title", "verdict"]

UNCLEAR, UNKNOWN = "not clearly different from", "not comparable with"


def headline_target(results: Results, variant: str, task: str) -> str | None:
    """The target by which a task's speed is told, chosen by the baseline alone: of those that it reached most often, the least loss ratio.

    Where it reached none, the least that another method reached; None where there is none of these either.
    """
    reached: dict[str, list[int]] = {}
    names = [results.study.baseline, *(method.name for method in results.study.methods)]
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
    """1 where a method is better than the baseline, the whole interval on that side; -1 where it is worse; 0 where neither is clear."""
    if one.difference is None or one.better is None:
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
    amount = f"{size} round{'' if size == '1' else 's'} {'fewer' if found.mean < 0 else 'more'}" if found.mean else "as many rounds"
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
    better, worse = ([one for one in found if verdict(one) == side] for side in (1, -1))
    if not better and not worse:
        return f"No clear difference on {task}: no method is clearly faster or slower than {baseline}."
    counts = f"Of {len(found)} methods {len(better)} {'is' if len(better) == 1 else 'are'} faster than {baseline} on {task}"
    counts += f", {len(worse)} slower"
    first = min(better, key=_mean_difference, default=None)
    return f"{counts}." if first is None else f"{counts}; first of all {sentence(first, baseline)}"


def answers(results: Results) -> list[str]:
    """The study's findings: for each variant and method, where it is faster than the baseline, where slower, and where nothing is clear.

    Methods of which nothing is clear on any task are told of together.
    """
    baseline, texts = results.study.baseline, []
    for variant in results.study.variants:
        start = f"{variant.name}: " if variant.name else ""
        unclear: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for method in results.study.methods:
            sides = _sides(results, variant.name, method.name) if method.name != baseline else {}
            if set(sides) <= {UNCLEAR, UNKNOWN} and sides:
                unclear.setdefault((tuple(sides.get(UNCLEAR, ())), tuple(sides.get(UNKNOWN, ()))), []).append(method.name)
            elif sides:
                parts = [f"{side} {baseline} on {listed(tasks)}" for side, tasks in sides.items()]
                texts.append(f"{start}{method.name} is {'; '.join(parts)}.")
        for (tasks, unknown), names in unclear.items():
            if not tasks:
                texts.append(f"{start}{listed(names)} cannot be compared with {baseline}: too few runs.")
                continue
            more = f"; not comparable on {listed(unknown)}" if unknown else ""
            texts.append(f"{start}No clear difference between {baseline} and {listed(names)} on {listed(tasks)}{more}.")
    return texts


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
        f"Differences are of runs with the same seed ({seeds}), with 95 % bootstrap intervals, made wider for so few of them. One in "
        f"twenty misses the truth by chance{f': about {0.05 * shown:.1g} of the {shown} in rounds here' if shown > 1 else ''}.",
        "A run that does not reach a target, or diverges, counts with all of its rounds: its difference is no larger than the true one.",
    ]
    if study.tuning is None:
        texts.append("Step sizes were not tuned.")
    else:
        tried, tuned_on = plural(len(results.tuned[0].scores), "choice"), plural(len(study.tuning.seeds), "seed")
        texts.append(f"Every method's step sizes are the best of the same {tried}, on {tuned_on} used for nothing else.")
        texts += edge_notes(results)
    for state, words in (("diverged", "diverged"), ("failed", "failed"), ("missing", "not trained yet")):
        if count := sum(one.ended.state == state for one in results.cells):
            texts.append(f"{plural(count, 'run')} of {len(results.cells)} {words}.")
    return texts + [_untuned(one) for one in results.tuned if one.chosen is None]


def _untuned(one: TunedMethod) -> str:
    where = f"{one.variant}, {one.method}" if one.variant else one.method
    if any(reason.startswith("missing") for reason in one.reasons.values()):
        return f"{where} is not tuned yet."
    return f"{where} diverged or failed with all step sizes, and is missing."


def edge_notes(results: Results) -> list[str]:
    """By setting: whose best value lies at the edge of the grid, so that a better one may lie beyond."""
    at: dict[str, list[str]] = {}
    for one in results.tuned:
        for edge in one.edges:
            at.setdefault(edge, []).append(f"{one.method} ({one.variant})" if one.variant else one.method)
    return [f"At the edge of the tuning grid, {edge}: {listed(names)}; a better value may lie beyond." for edge, names in at.items()]


def _against(results: Results, variant: str, task: str) -> list[Estimate]:
    target = headline_target(results, variant, task)
    names = [method.name for method in results.study.methods if method.name != results.study.baseline]
    found = (results.find(variant, name, task, "rounds", target) for name in names) if target is not None else ()
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
            sides[side].append(f"{task} (by {abs(one.difference.mean):.3g} rounds)" if verdict(one) else task)
    return {side: tasks for side, tasks in sides.items() if tasks}
