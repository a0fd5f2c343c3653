"""The progress of a run across machines and its clients: ``status.json`` in the run's folder.

The run itself keeps the file up to date (`Watcher`). While the run's folder does not exist, or
still holds the run that will be replaced, the file is beside it: ``.NAME.status.json``.
"""

import json
import socket
import time
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import psutil
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fedgradnorm.errors import RunError
from fedgradnorm.runs.entries import STATUS
from fedgradnorm.runs.lock import being_written

FORMAT: Literal[1] = 1

State = Literal["waiting", "training", "testing", "completed", "stopped"]
STATES: tuple[State, ...] = get_args(State)
ENDED: tuple[State, ...] = ("completed", "stopped")

Time = Annotated[FiniteFloat, Field(ge=0, lt=2.5e11)]
"""Unix seconds, up to the year 9892, the last that calendars support."""

Kind = Literal[
    "late", "gone", "not-connected", "resting", "error", "crashed", "refused-report", "other"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERED: tuple[Kind, ...] = ("error", "crashed", "refused-report")
"""Kinds of failures in which the client's node has answered."""


class Failure(str):
    """Why a client has no report: the reason in words, with its kind."""

    kind: Kind

    def __new__(cls, text: str, kind: Kind) -> Self:
        """Make a failure of its words and its kind."""
        failure = super().__new__(cls, text)
        failure.kind = kind
        return failure


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Drop(_Record):
    """A round in which a client had no sound report; ``time`` in unix seconds."""

    round: int
    time: Time
    kind: Kind
    reason: str


class ClientStatus(_Record):
    """A client. Times are unix seconds.

    Attributes:
        task: the name of its task.
        node: the id of its node while it is connected.
        connected: whether it is connected.
        since: since when; None before it was connected first.
        last_seen: when it last answered; None if it never did.
        last_drop: its last drop.
        drops: how often it was dropped, by kind.
        resting_until: the last round in which it is not asked, as it was late again and again; None
            where it is asked.
        notes: other notes on it, each with its round, the latest last.
    """

    task: str
    node: str | None = None
    connected: bool = False
    since: Time | None = None
    last_seen: Time | None = None
    last_drop: Drop | None = None
    drops: dict[Kind, Annotated[int, Field(ge=0)]] = {}
    resting_until: int | None = None
    notes: list[str] = []


class RunStatus(_Record):
    """What status.json holds. Times are unix seconds.

    Attributes:
        format: the format of this file.
        experiment: the name under which the run's clients keep their states.
        state: ``waiting`` for clients, ``training``, ``testing``, ``completed``, or ``stopped``
            before the last round.
        reason: why it was stopped.
        round: the round that was begun last; 0 before the first.
        done: how many rounds are done.
        num_rounds: how many rounds the run has.
        started: when the run was begun, or last resumed.
        written: when this was written.
        due: the time by which a run that is not over writes again.
        round_began: when the first attempt at the last round began.
        round_ended: when the last finished round ended.
        pid: the process that writes it.
        host: the name of its machine.
        clients: by id.
        strangers: by node id, why it stays out.
    """

    format: Literal[1] = FORMAT
    experiment: str
    state: State = "waiting"
    reason: str | None = None
    round: int = Field(0, ge=0)
    done: int = Field(0, ge=0)
    num_rounds: int = Field(ge=1)
    started: Time
    written: Time
    due: Time
    round_began: Time | None = None
    round_ended: Time | None = None
    pid: int = Field(gt=0, lt=2**31)
    host: str
    clients: dict[str, ClientStatus] = {}
    strangers: dict[str, str] = {}


def beside(folder: Path) -> Path:
    """The path of a run's status while its folder does not exist or still holds another run."""
    real = folder.resolve()
    return real.with_name(f".{real.name}.{STATUS}")


def read_status(folder: Path) -> RunStatus:
    """The status of the run that was last written to a folder.

    Raises RunError if there is none, it is damaged, or it has another format.
    """
    paths = [path for path in (folder / STATUS, beside(folder)) if path.is_file()]
    if not paths:
        expected = "that of a run across machines, as this version of fedgradnorm writes it"
        raise RunError(f"{folder / STATUS}: there is no such file: expected {expected}")
    return max((read_file(path) for path in paths), key=lambda status: status.written)


def why_gone(status: RunStatus, folder: Path) -> str | None:
    """In words, why the process of a run counts as gone; None for a run that is over or goes on.

    On the machine that writes the run, the lock on its folder shows this, or, where the lock cannot
    be read, the process's number. On another machine the run counts as gone if nothing was written
    for longer than its limits allow.
    """
    if status.state in ENDED or (written := being_written(folder)) is True:
        return None
    here, process = socket.gethostname() == status.host, f"pid {status.pid} on {status.host}"
    if written is False or (here and not psutil.pid_exists(status.pid)):
        return f"its process ({process}) has ended without a word"
    if not here and time.time() > status.due:
        silent = time.time() - status.written
        return f"its process ({process}) has written nothing for {silent:.0f} s"
    return None


def read_file(path: Path) -> RunStatus:
    """The status in a file. Raises RunError where it cannot be read, or is damaged."""
    try:
        values = json.loads(path.read_bytes())
        format = values.get("format") if isinstance(values, dict) else None
        if isinstance(format, int) and format != FORMAT:
            found = f"found {format}: another version of fedgradnorm has written it"
            raise RunError(f"{path}: expected format {FORMAT}, {found}")
        return RunStatus.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        found = repr(first["input"])[:100]
        raise RunError(f"{path}: damaged: {where}: {first['msg']}, found {found}") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged: expected JSON; {error}") from error
