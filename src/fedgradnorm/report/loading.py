"""The runs of a report with their files read, and the names and colours that tell them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedgradnorm.errors import RunError
from fedgradnorm.history import Row, Run

__all__ = ["Loaded", "labels_of", "load"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The Okabe-Ito palette, less its yellow, which is hard to see on white."""

ROW_KEYS = ("round", "client", "task", "participated", "dropped", "inverse_training_rate", "grad_norm", "weight", "target", "metric")
"""What a report reads of a line of metrics.jsonl."""


@dataclass(frozen=True)
class Loaded:
    """A run with its files read, and the name and colour that it has throughout a report."""

    label: str
    colour: str
    run: Run
    rows: list[Row]
    summary: dict[str, Any]


def load(runs: Sequence[Run]) -> list[Loaded]:
    """Read the files of every run, and give it its name and colour. Raises RunError where one is missing or damaged."""
    return [
        Loaded(label, COLOURS[number % len(COLOURS)], run, _sound_rows(run), run.summary())
        for number, (label, run) in enumerate(zip(labels_of(runs), runs, strict=True))
    ]


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: with as many of the folders above as that takes, and numbered if a folder comes twice."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = next((depth for depth in range(1, 5) if len({part[-depth:] for part in parts}) == len(parts)), 1)
    names = ["/".join(part[-depth:]) for part in parts]
    return [f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _sound_rows(run: Run) -> list[Row]:
    """The lines of metrics.jsonl, if there are any and none lacks a key that a report reads."""
    path, rows = run.folder / "metrics.jsonl", run.rows()
    if not rows:
        raise RunError(f"{path}: expected a line per round and client, found none")
    for number, row in enumerate(rows, start=1):
        if missing := [key for key in ROW_KEYS if key not in row]:
            raise RunError(f"{path} line {number}: expected what this version writes; it lacks {', '.join(missing)}")
    return rows
