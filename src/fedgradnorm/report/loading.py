"""The runs of a report: their files, and the names and colours that tell them apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from fedgradnorm.config import MethodConfig
from fedgradnorm.errors import RunError
from fedgradnorm.federation import Client, absent_client
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.report.looks import looks_for
from fedgradnorm.runs.checkpoint import load_newest
from fedgradnorm.runs.entries import CHECKPOINTS
from fedgradnorm.runs.lock import being_written, lock_of
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import Row, Summary
from fedgradnorm.runs.summary import summarise

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Loaded:
    """A run with its files read, and its name and colour in the whole report.

    ``state`` is empty for a finished run.
    """

    label: str
    colour: str
    run: Run
    rows: list[Row]
    summary: Summary
    state: str


def load(runs: Sequence[Run]) -> list[Loaded]:
    """Read the files of every run, and give it its name and colour.

    Raises:
        RunError: a damaged run, or a run without a round.
    """
    labels, methods = labels_of(runs), [_method_of(run) for run in runs]
    names = [
        label if methods.count(method) > 1 else method
        for label, method in zip(labels, methods, strict=True)
    ]
    looks = looks_for(names, colours_only=True)
    return [
        Loaded(label, look.colour, run, *read(run))
        for label, look, run in zip(labels, looks, runs, strict=True)
    ]


def _method_of(run: Run) -> str:
    """The name that the run's method has in a study, so that it has the same colour here."""
    config = run.config
    if config.train.method.name != MethodConfig().name:
        return config.train.method.name
    return " ".join(filter(None, (config.weighting.name, config.weighting.options.get("solver"))))


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart.

    A name has as many of the folders above as are needed. A folder that comes twice is numbered.
    """
    parts = [run.folder.resolve().parts for run in runs]
    depth = next(
        (depth for depth in range(1, 5) if len({part[-depth:] for part in parts}) == len(parts)), 1
    )
    names = ["/".join(part[-depth:]) for part in parts]
    return [
        f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def read(run: Run) -> tuple[list[Row], Summary, str]:
    """A run's rows and summary, and how far it is; see `state_text`.

    The summary of an unfinished run is made from its rows. The text of a finished run is empty.

    Raises:
        RunError: a file is damaged, or no round is done yet.
    """
    rows = run.whole_rounds()
    if run.is_finished():
        if not rows:
            raise RunError(
                f"{run.folder / 'metrics.jsonl'}: expected a line per round and client, found none"
            )
        return rows, run.summary(), ""
    if not rows:
        raise RunError(
            f"{run.folder}: no round of {run.config.train.num_rounds} is done yet: "
            "there is nothing to report on"
        )
    checkpoint, _, _ = load_newest(run.folder / CHECKPOINTS)
    members = run.members() or (None if checkpoint is None else checkpoint.members)
    seconds, costs = (0.0, {}) if checkpoint is None else (checkpoint.seconds, checkpoint.costs)
    summary = summarise(_clients_of(rows, members), rows, {}, run.config.run, seconds, costs)
    return rows, summary, state_text(run, summary["rounds"])


def state_text(run: Run, done: int) -> str:
    """How far an unfinished run is, such as "running: round 7 of 100"."""
    place = f"round {done} of {run.config.train.num_rounds}"
    written = being_written(run.folder)
    # The lock of another machine cannot be asked. A copied folder has no lock.
    if written is None and lock_of(run.folder.resolve()).exists():
        return f"{place} so far"
    return f"running: {place}" if written else f"stopped after {place}"


def _clients_of(rows: Sequence[Row], members: MembersRecord | None) -> list[Client]:
    """The clients of the rows. Only the record of members says what their tasks measure."""
    tasks = {row["client"]: row["task"] for row in rows}
    metrics = {
        client["task"]: (client["metric"], client["higher_is_better"], client["percent"])
        for client in (members["clients"].values() if members else ())
    }
    return [absent_client(id, task, *metrics.get(task, ())) for id, task in tasks.items()]


def sound(report: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Convert errors caused by inconsistent files into RunError."""

    @wraps(report)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        try:
            return report(*args, **kwargs)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RunError(
                "metrics.jsonl and summary.json do not belong together, or this version did not "
                f"write them: {error!r}"
            ) from error

    return checked
