"""A cell on the disk: a run's folder, and a note of why it is not trained."""

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
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import Row

State = Literal["trained", "diverged", "failed", "missing"]


@dataclass(frozen=True)
class Ended:
    """How a cell ended.

    Attributes:
        state: ``trained`` to its last round; ``diverged``: its reports are no longer sound;
            ``failed``; ``missing``: not trained yet.
        reason: why it is not trained.
    """

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Order:
    """What a worker trains: the folder and the settings."""

    folder: str
    settings: Mapping[str, Any]
    num_rounds: int


def folder_of(root: Path, cell: Cell) -> Path:
    """A cell's folder in the study's folder."""
    return root / "cells" / cell.name


def order_for(root: Path, cell: Cell) -> Order:
    """The order to train a cell."""
    folder = folder_of(root, cell)
    own = {"dir": str(folder), "page": False, "tensorboard": False, "keep": 1}
    config = cell.config.model_copy(update={"run": cell.config.run.model_copy(update=own)})
    return Order(str(folder), config.model_dump(mode="json"), config.train.num_rounds)


def state_of(root: Path, cell: Cell) -> Ended:
    """Whether a cell is trained, diverged, failed or missing so far.

    Raises:
        RunError: the folder's settings are not the cell's: somebody changed them by hand.
    """
    folder = folder_of(root, cell)
    if (folder / "summary.json").is_file():
        opened = Run(folder)
        if identity(resolve_config(opened.config)) != identity(cell.config):
            advice = "remove the folder, and it is trained again"
            raise RunError(f"{folder}: its config.toml was changed after it was made; {advice}")
        if opened.summary()["rounds"] == cell.config.train.num_rounds:
            return Ended("trained")
    try:
        note = json.loads(_note(folder).read_text(encoding="utf-8"))
        if note["state"] in ("diverged", "failed"):
            return Ended(note["state"], str(note["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is no note, or it cannot be read: the cell is trained again
    return Ended("missing")


def note_end(folder: Path, ended: Ended) -> None:
    """Write down how a cell ended. A trained cell needs no note."""
    note = _note(folder)
    if ended.state == "trained":
        note.unlink(missing_ok=True)
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"state": ended.state, "reason": ended.reason}) + "\n"
    write_atomically(note, text.encode())


def _train(order: Order, on_round: Callable[[int], None], should_stop: Callable[[], bool]) -> None:
    """Train a cell to its end, or resume its run."""

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
            pass  # a damaged run begins again
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(config, overwrite=True, on_round=show, should_stop=should_stop)


def end_of(
    order: Order, on_round: Callable[[int], None], should_stop: Callable[[], bool]
) -> Ended | None:
    """Train a cell and say how it ended. None: it was stopped, and can be resumed."""
    asked = False

    def stop() -> bool:
        nonlocal asked
        asked = asked or should_stop()
        return asked

    try:
        _train(order, on_round, stop)
    except StoppedError as error:
        return None if asked else Ended("diverged", error.reason)
    except FedGradNormError as error:
        return Ended("failed", str(error))
    except Exception as error:  # noqa: BLE001  # from a user's own part; the other cells go on
        return Ended("failed", f"{type(error).__name__}: {error}")
    return Ended("trained")


def _note(folder: Path) -> Path:
    return folder.parent.parent / "failures" / f"{folder.name}.json"
