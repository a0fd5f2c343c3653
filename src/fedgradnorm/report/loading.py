"""The runs of a report with their files read, and the names and colours that tell them apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from fedgradnorm.errors import RunError
from fedgradnorm.history import Run
from fedgradnorm.records import Row, Summary

__all__ = ["Loaded", "labels_of", "load", "sound"]

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The Okabe-Ito palette, less its yellow, which is hard to see on white."""


@dataclass(frozen=True)
class Loaded:
    """A run with its files read, and the name and colour that it has throughout a report."""

    label: str
    colour: str
    run: Run
    rows: list[Row]
    summary: Summary


def load(runs: Sequence[Run]) -> list[Loaded]:
    """Read the files of every run, and give it its name and colour. Raises RunError where one is missing or damaged."""
    return [
        Loaded(label, COLOURS[number % len(COLOURS)], run, _some_rows(run), run.summary())
        for number, (label, run) in enumerate(zip(labels_of(runs), runs, strict=True))
    ]


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: with as many of the folders above as that takes, and numbered if a folder comes twice."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = next((depth for depth in range(1, 5) if len({part[-depth:] for part in parts}) == len(parts)), 1)
    names = ["/".join(part[-depth:]) for part in parts]
    return [f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _some_rows(run: Run) -> list[Row]:
    rows = run.rows()
    if not rows:
        raise RunError(f"{run.folder / 'metrics.jsonl'}: expected a line per round and client, found none")
    return rows


def sound(report: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Files whose figures are sound but do not belong together are an error of ours, too."""

    @wraps(report)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        try:
            return report(*args, **kwargs)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                f"metrics.jsonl and summary.json do not belong together, or are not what this version writes: {error!r}"
            ) from error

    return checked
