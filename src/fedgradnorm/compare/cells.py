"""A cell on the disk: a run's folder when it is trained, a note of the reason where it failed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedgradnorm.api import resume, run
from fedgradnorm.atomic import write_atomically
from fedgradnorm.build import resolve_config
from fedgradnorm.compare.grid import Cell, identity
from fedgradnorm.config import RunConfig
from fedgradnorm.errors import FedGradNormError, RunError, StoppedError
from fedgradnorm.runs.folder import Run
from fedgradnorm.runs.records import Row

__all__ = [
    "Ended",
    "Order",
    "State",
    "end_of",
    "folder_of",
    "note_end",
    "order_for",
    "state_of",
    "train_cell",
]

State = Literal["trained", "diverged", "failed", "missing"]


@dataclass(frozen=True)
class Ended:
    """How a cell ended.

    Attributes:
        state: ``trained`` to its last round; ``diverged``, its reports no longer sound; ``failed``; or ``missing``, not trained yet.
        reason: why, where it is not trained.
    """

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Order:
    """What a worker is told: where, and with which settings."""

    folder: str
    settings: Mapping[str, Any]
    num_rounds: int


def folder_of(root: Path, cell: Cell) -> Path:
    """A cell's folder in the study's."""
    return root / "cells" / cell.name


def order_for(root: Path, cell: Cell) -> Order:
    """What a worker is told for a cell."""
    folder = folder_of(root, cell)
    own = {"dir": str(folder), "page": False, "tensorboard": False, "keep": 1}
    config = cell.config.model_copy(update={"run": cell.config.run.model_copy(update=own)})
    return Order(str(folder), config.model_dump(mode="json"), config.train.num_rounds)


def state_of(root: Path, cell: Cell) -> Ended:
    """What became of a cell so far.

    Raises:
        RunError: the folder holds a run with other settings than its name says: somebody changed it by hand.
    """
    folder = folder_of(root, cell)
    if (folder / "summary.json").is_file():
        opened = Run(folder)
        if identity(resolve_config(opened.config)) != identity(cell.config):
            raise RunError(
                f"{folder}: its config.toml was changed after it was made; remove the folder, and it is trained again"
            )
        if opened.summary()["rounds"] == cell.config.train.num_rounds:
            return Ended("trained")
    try:
        note = json.loads(_note(folder).read_text(encoding="utf-8"))
        return (
            Ended(note["state"], str(note["reason"]))
            if note["state"] in ("diverged", "failed")
            else Ended("missing")
        )
    except FileNotFoundError:
        return Ended("missing")
    except (OSError, ValueError, KeyError, TypeError):
        return Ended(
            "missing"
        )  # a note that cannot be read is as good as none: the cell is trained again


def note_end(folder: Path, ended: Ended) -> None:
    """Write down how a cell ended, where it is not trained; one that is needs no note."""
    note = _note(folder)
    if ended.state == "trained":
        note.unlink(missing_ok=True)
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        note, (json.dumps({"state": ended.state, "reason": ended.reason}) + "\n").encode()
    )


def train_cell(
    order: Order, on_round: Callable[[int], None], should_stop: Callable[[], bool]
) -> None:
    """Train a cell to its end: begin, or go on where a run is half done. Raises whatever the run raises."""

    def show(rows: Sequence[Row]) -> None:
        on_round(rows[0]["round"])

    folder, config = Path(order.folder), RunConfig.model_validate(order.settings)
    if (folder / "config.toml").is_file():
        try:
            if identity(resolve_config(Run(folder).config)) == identity(config):
                resume(folder, on_round=show, should_stop=should_stop)
                return
        except StoppedError:
            raise
        except FedGradNormError:
            pass  # a damaged half is begun again
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(config, overwrite=True, on_round=show, should_stop=should_stop)


def end_of(
    order: Order, on_round: Callable[[int], None], should_stop: Callable[[], bool]
) -> Ended | None:
    """Train a cell and say how it ended; None where it was stopped, to go on later."""
    asked = False

    def stop() -> bool:
        nonlocal asked
        asked = asked or should_stop()
        return asked

    try:
        train_cell(order, on_round, stop)
    except StoppedError as error:
        return None if asked else Ended("diverged", str(error).partition("; to go on:")[0])
    except FedGradNormError as error:
        return Ended("failed", str(error))
    except Exception as error:  # noqa: BLE001  # whatever the user's own parts raise, the other cells go on
        return Ended("failed", f"{type(error).__name__}: {error}")
    return Ended("trained")


def _note(folder: Path) -> Path:
    return folder.parent.parent / "failures" / f"{folder.name}.json"
