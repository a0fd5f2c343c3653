"""The findings of a report in words, how sure they are, and in which settings the runs differ."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedgradnorm.config import dotted
from fedgradnorm.report.comparison import ABSENT, ComparisonRow, cell_of, percentage
from fedgradnorm.report.loading import Loaded
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import Summary
from fedgradnorm.runs.summary import LOSS_RATIO, silent_texts


def findings(groups: Sequence[Sequence[ComparisonRow]], loaded: Sequence[Loaded]) -> str:
    """The findings in a few sentences.

    They begin with the runs that have not finished, and with clients that seldom or never counted.
    """
    lines = state_lines(loaded)
    lines += silent_lines([run.label for run in loaded], [run.summary for run in loaded])
    return "".join(f"{line}. " for line in lines) + _findings(groups, loaded)


def state_lines(loaded: Sequence[Loaded]) -> list[str]:
    """A line for each unfinished run: how far it is. With several runs, it begins with a name."""
    unfinished = [run for run in loaded if run.state]
    return [run.state if len(loaded) == 1 else f"{run.label}: {run.state}" for run in unfinished]


def silent_lines(labels: Sequence[str], summaries: Sequence[Summary]) -> list[str]:
    """A line for each client that seldom or never counted, or was never trained.

    With several runs, the line begins with the run's name.
    """
    return [
        text if len(labels) == 1 else f"{label}: {text}"
        for label, summary in zip(labels, summaries, strict=True)
        for text in silent_texts(summary)
    ]


def _findings(groups: Sequence[Sequence[ComparisonRow]], loaded: Sequence[Loaded]) -> str:
    if len(loaded) == 1:
        return _findings_of_one([row for group in groups for row in group], loaded[0])
    shared = [group for group in groups if len(group) == len(loaded)]
    if not shared:
        return "These runs have no task in common."
    last = [{row.run: cell_of(row, "metric", "last")[1] for row in group} for group in shared]
    known = [{run: score for run, score in row.items() if score is not None} for row in last]
    tested = [scores for scores in known if scores]
    return _fastest(shared) + (f" Best last test metric: {_places(tested)}." if tested else "")


def caveat(loaded: Sequence[Loaded]) -> str:
    """How far the findings can be trusted."""
    if len(loaded) == 1:
        return "This is one run. Another seed can give other figures."
    keys = differing_settings(loaded)
    differing = {"weighting" if key.startswith("weighting.") else key for key in keys}
    return (
        "Each method was run once, so small differences can be noise. Settings that differ: "
        f"{listed(sorted(differing)) or 'none'}."
    )


def differing_settings(loaded: Sequence[Loaded]) -> dict[str, list[str]]:
    """The dotted keys whose values differ between the runs, with every run's value."""
    flat = [
        {key: str(value) for key, value in dotted(settings_of(run.run)).items()} for run in loaded
    ]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key, ABSENT) for settings in flat] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def settings_of(run: Run) -> dict[str, Any]:
    """The settings without the folder: a report may be passed on, and a path may name its owner."""
    settings: dict[str, Any] = run.config.model_dump(mode="json", exclude_none=True)
    settings["run"].pop("dir", None)
    return settings


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence, such as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def plural(count: int, word: str) -> str:
    """A count with its word, such as "1 task" or "2 tasks"."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def _fastest(shared: Sequence[Sequence[ComparisonRow]]) -> str:
    """Which run was first to a target, by task.

    The target does not depend on who won: it is the lowest that most tasks reached in any run.
    """
    keys = {key for key in shared[0][0].rounds_to if key.startswith(LOSS_RATIO)}
    keys = {key for key in keys if all(key in row.rounds_to for group in shared for row in group)}
    scores = {
        key: [
            {row.run: -round for row in group if (round := row.rounds_to[key]) is not None}
            for group in shared
        ]
        for key in sorted(keys, key=_share_of)
    }
    target = max(scores, key=lambda key: sum(map(bool, scores[key])), default=None)
    if target is None or not any(scores[target]):
        return "The training loss reached no common target of these runs on any task."
    share = percentage(_share_of(target))
    return f"First to {share} of the initial training loss: {_places(scores[target])}."


def _share_of(key: str) -> float:
    return float(key.removeprefix(LOSS_RATIO))


def _places(tasks: Sequence[Mapping[str, float]]) -> str:
    """In how many tasks each run is best, such as "a in 2 of 4 tasks, b in 1, a tie in 1"."""
    won: Counter[str] = Counter()
    for scores in tasks:
        winners = [run for run, score in scores.items() if score == max(scores.values())]
        won[winners[0] if len(winners) == 1 else "a tie" if winners else "no run"] += 1
    (most, count), *others = won.most_common()
    first = f"{most} in {count} of {plural(len(tasks), 'task')}"
    return ", ".join([first, *(f"{run} in {count}" for run, count in others)])


def _findings_of_one(rows: Sequence[ComparisonRow], run: Loaded) -> str:
    ratios = {row.task: row.loss_ratio for row in rows if row.loss_ratio is not None}
    text = f"After {plural(run.summary['rounds'], 'round')} "
    if ratios:
        shares = listed([f"{percentage(ratio)} in {task}" for task, ratio in ratios.items()])
        text += f"the training loss, as a share of the initial one, is {shares}."
    else:
        text += "no task has a training loss to report."
    if len(ratios) > 1 and min(ratios.values()) > 0:
        factor = max(ratios.values()) / min(ratios.values())
        text += f" The slowest task's share is {factor:.1f} times the fastest one's; 1 is equal."
    beaten = [
        row.last != row.guess and (row.last > row.guess) == row.higher_is_better
        for row in rows
        if row.last is not None and row.guess is not None
    ]
    if beaten:
        tasks = plural(len(beaten), "task")
        text += f" The last test metric beats the constant guess in {sum(beaten)} of {tasks}."
    return text
