"""The runs of a report with their files read, and the names and colours that tell them apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from fedgradnorm.config import MethodConfig
from fedgradnorm.errors import RunError
from fedgradnorm.history import Run
from fedgradnorm.records import Row, Summary
from fedgradnorm.report.looks import looks_for

__all__ = ["Loaded", "labels_of", "load", "sound"]

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


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
    methods = [_method_of(run) for run in runs]
    looks = looks_for(
        [label if methods.count(name) > 1 else name for label, name in zip(labels_of(runs), methods, strict=True)], colours_only=True
    )
    return [
        Loaded(label, look.colour, run, _some_rows(run), run.summary())
        for label, look, run in zip(labels_of(runs), looks, runs, strict=True)
    ]


def _method_of(run: Run) -> str:
    """The name under which a study would have the run's method, so that it has the same colour."""
    config = run.config
    if config.train.method.name != MethodConfig().name:
        return config.train.method.name
    return " ".join(filter(None, (config.weighting.name, config.weighting.options.get("solver"))))


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
