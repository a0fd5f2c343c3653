"""Where a run across machines has got to, and who takes part: ``status.json`` in the run's folder, kept up to date by the run itself.

As long as the run's folder is not there, or still holds the run that is to be replaced, the file is beside it: ``.NAME.status.json``.
"""

import json
import logging
import os
import socket
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import psutil
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fedgradnorm.atomic import write_atomically
from fedgradnorm.config import RunConfig
from fedgradnorm.errors import FedGradNormError, RunError, described
from fedgradnorm.federation import Members
from fedgradnorm.runs.folder import STATUS, being_written
from fedgradnorm.runs.records import Row

__all__ = [
    "ANSWERED",
    "ENDED",
    "KINDS",
    "STATES",
    "ClientStatus",
    "Drop",
    "Failure",
    "Kind",
    "RunStatus",
    "Watcher",
    "beside",
    "read_status",
    "why_gone",
]

log = logging.getLogger(__name__)

FORMAT: Literal[1] = 1
GRACE = 60.0
"""Seconds that a run may take longer than its limits say before it counts as gone."""
MOST_NOTES = 20
"""Notes that are kept of a client: the last ones."""

State = Literal["waiting", "training", "testing", "completed", "stopped"]
STATES: tuple[State, ...] = get_args(State)
ENDED: tuple[State, ...] = ("completed", "stopped")

Time = Annotated[FiniteFloat, Field(ge=0, lt=2.5e11)]
"""Unix seconds, up to the year 9892: no calendar has later ones."""

Kind = Literal[
    "late", "gone", "not-connected", "resting", "error", "crashed", "refused-report", "other"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
ANSWERED: tuple[Kind, ...] = ("error", "crashed", "refused-report")
"""Kinds of failures with which a client's node has answered all the same."""


class Failure(str):
    """Why a client has no report, in words, and of which kind that is."""

    kind: Kind

    def __new__(cls, text: str, kind: Kind) -> Self:
        """A text with its kind."""
        failure = super().__new__(cls, text)
        failure.kind = kind
        return failure


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Drop(_Record):
    """That a client had no sound report: in which round, when (unix seconds), of which kind, and why in words."""

    round: int
    time: Time
    kind: Kind
    reason: str


class ClientStatus(_Record):
    """A client. Times are unix seconds.

    Attributes:
        task: the name of its task.
        node: the id of its node while it is connected.
        connected: whether it is.
        since: since when; None before it was connected first.
        last_seen: when it last answered anything; None where it never did.
        last_drop: its last drop.
        drops: how often it was dropped, by kind.
        resting_until: the last round in which it is not asked, as it was late again and again; None where it is asked.
        notes: what else there is to know of it, with the round, the latest last.
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
        format: of this file.
        experiment: the run's own name, under which its clients keep their states.
        state: ``waiting`` for clients, ``training``, ``testing``, ``completed``, or ``stopped`` before the last round.
        reason: why it was stopped.
        round: the round that was begun last; 0 before the first.
        done: the rounds that are done.
        num_rounds: how many there are to be.
        started: when the run was begun, or last resumed.
        written: when this was written.
        due: by when a run that is not over has to have written again.
        round_began: when the round was begun, by the first attempt at it.
        round_ended: when the last of the rounds that are done was over.
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


class Watcher:
    """Notes what happens in a run, and keeps its status.json up to date while it is `watching`. What it cannot write, it logs once.

    Args:
        members: the clients.
        patience: the longest time between two calls while a run goes on, in seconds.
    """

    def __init__(self, members: Members, patience: float) -> None:
        self.members, self.patience = members, patience
        self._folder: Path | None = None
        self._status = _new("", 1)
        self._unwritten = ""

    @contextmanager
    def watching(self, folder: Path | None, config: RunConfig, done: int = 0) -> Iterator[None]:
        """Keep a run's status.json while the block runs, and note how it ends. None: nothing is written.

        Args:
            folder: the run's folder, which may not be there yet, or may hold a run that is going to be replaced.
            config: the run's settings.
            done: the rounds that are done.
        """
        self._folder, self._status = (
            folder,
            _new(str(config.run.experiment), config.train.num_rounds),
        )
        before = None if folder is None else _read_soundly(folder / STATUS)
        if before is not None and before.experiment == self._status.experiment:  # it is resumed
            clients = {
                id: one.model_copy(update={"connected": False, "node": None, "resting_until": None})
                for id, one in before.clients.items()
            }
            self._status = self._status.model_copy(
                update={
                    "clients": clients,
                    "round_began": before.round_began,
                    "round_ended": before.round_ended,
                }
            )
        self._status.round = self._status.done = done
        for id in self.members.client_ids:
            self._client(id)
        self._write()
        try:
            yield
        except BaseException as error:
            self._end("stopped", _reason(error))
            raise
        self._end("completed")

    def present(self, nodes: Mapping[str, int], strangers: Mapping[int, str]) -> None:
        """Who is connected, by id, and which nodes stay out, and why."""
        now, changed = time.time(), False
        for id in [*nodes, *(id for id in self._status.clients if id not in nodes)]:
            client, node = self._client(id), str(nodes[id]) if id in nodes else None
            if client.node != node:
                client.node, client.connected, client.since, changed = (
                    node,
                    node is not None,
                    now,
                    True,
                )
                client.last_seen = client.last_seen if node is None else now
        outside = {str(node): str(why) for node, why in strangers.items()}
        if changed or outside != self._status.strangers:
            self._status.strangers = outside
            self._write()

    def waits(self) -> None:
        """It waits for clients. It may do so for long, and what nobody writes counts as gone."""
        if self._status.state != "waiting" or time.time() > self._status.written + GRACE:
            self._status.state = "waiting"
            self._write()

    def round_begins(self, round: int, attempt: int) -> None:
        """A round's messages are about to be sent; attempt 0 is the first one."""
        status = self._status
        status.state, status.round = "training", round
        if attempt == 0:
            status.round_began = time.time()
        self._write()

    def heard(self, clients: Collection[str]) -> None:
        """These clients have answered. It is written with what comes next."""
        for id in clients:
            self._client(id).last_seen = time.time()

    def reported(self, round: int, failures: Mapping[str, str]) -> None:
        """The replies of a round are in; these clients have no report."""
        for id, why in failures.items():
            kind = why.kind if isinstance(why, Failure) else "other"
            if kind in ANSWERED:
                self.heard([id])
            self._drop(id, round, kind, why)
        self._write()

    def tests(self) -> None:
        """The clients are about to be asked to test."""
        self._status.state = "testing"
        self._write()

    def round_ends(self, rows: Sequence[Row], failures: Mapping[str, str]) -> None:
        """A round is done, with these notes on clients. Who was dropped and is not among the failures sent a report that was refused."""
        status, round = self._status, rows[0]["round"]
        status.state, status.done, status.round_ended = "training", round, time.time()
        for row in rows:
            if row["dropped"] is not None and row["client"] not in failures:
                self._drop(row["client"], round, "refused-report", row["dropped"])
            client = self._client(row["client"])
            client.notes = [
                *client.notes,
                *(f"round {round}: {note}" for note in row.get("notes", ())),
            ][-MOST_NOTES:]
        self._write()

    def rest(self, until: Mapping[str, int]) -> None:
        """These clients are not asked before the round after this one; all others are. It is written with what comes next."""
        for id in self._status.clients:
            self._client(id).resting_until = until.get(id)

    def _client(self, id: str) -> ClientStatus:
        if id not in self._status.clients:
            self._status.clients[id] = ClientStatus(task=self.members.client(id).task.name)
        return self._status.clients[id]

    def _drop(self, id: str, round: int, kind: Kind, reason: str) -> None:
        client = self._client(id)
        client.last_drop = Drop(round=round, time=time.time(), kind=kind, reason=str(reason))
        client.drops = {**client.drops, kind: client.drops.get(kind, 0) + 1}

    def _end(self, state: State, reason: str | None = None) -> None:
        self._status.state, self._status.reason = state, reason
        self._write()
        self._folder = None

    def _write(self) -> None:
        if self._folder is None:
            return
        status, now = self._status, time.time()
        status.written, status.due = now, now + self.patience + GRACE
        content = (status.model_dump_json(indent=2) + "\n").encode()
        try:
            if _experiment_in(self._folder) == status.experiment:
                write_atomically(self._folder / STATUS, content)
                beside(self._folder).unlink(missing_ok=True)
            else:
                write_atomically(beside(self._folder), content)
        except OSError as error:  # a run goes on as long as its own files can be written
            if self._unwritten != str(error):
                log.warning(
                    "%s: cannot be written: %s", self._folder / STATUS, error.strerror or error
                )
            self._unwritten = str(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "it was stopped from outside, by flwr stop or a signal"
    return " ".join(
        (str(error) if isinstance(error, FedGradNormError) else described(error)).split()
    )[:1000]


def beside(folder: Path) -> Path:
    """Where the status of a run is while its folder is not there, or still holds another run."""
    real = folder.resolve()
    return real.with_name(f".{real.name}.{STATUS}")


def read_status(folder: Path) -> RunStatus:
    """The status of the run that was last written to a folder.

    Raises:
        RunError: there is none, it is damaged, or it is of another format.
    """
    found = [path for path in (folder / STATUS, beside(folder)) if path.is_file()]
    if not found:
        raise RunError(
            f"{folder / STATUS}: there is no such file: expected that of a run across machines, as this version of fedgradnorm writes it"
        )
    return max((_read(path) for path in found), key=lambda status: status.written)


def why_gone(status: RunStatus, folder: Path) -> str | None:
    """In words, why the process of a run that is not over is no longer there; None where it is over, or goes on as far as can be told.

    On the machine that writes it, the lock on the run's folder tells, and where it cannot be read the process's number. Elsewhere it is
    that nothing was written for longer than the run's limits allow.
    """
    if status.state in ENDED or (written := being_written(folder)) is True:
        return None
    here = socket.gethostname() == status.host
    if written is False or (here and not psutil.pid_exists(status.pid)):
        return f"its process (pid {status.pid} on {status.host}) has ended without a word"
    if not here and time.time() > status.due:
        return f"its process (pid {status.pid} on {status.host}) has written nothing for {time.time() - status.written:.0f} s"
    return None


def _new(experiment: str, num_rounds: int) -> RunStatus:
    now = time.time()
    return RunStatus(
        experiment=experiment,
        num_rounds=num_rounds,
        started=now,
        written=now,
        due=now,
        pid=os.getpid(),
        host=socket.gethostname(),
    )


def _read(path: Path) -> RunStatus:
    try:
        values = json.loads(path.read_bytes())
        found = values.get("format") if isinstance(values, dict) else None
        if isinstance(found, int) and found != FORMAT:
            raise RunError(
                f"{path}: expected format {FORMAT}, found {found}: another version of fedgradnorm has written it"
            )
        return RunStatus.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise RunError(
            f"{path}: damaged: {where}: {first['msg']}, found {repr(first['input'])[:100]}"
        ) from error
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged: expected JSON; {error}") from error


def _read_soundly(path: Path) -> RunStatus | None:
    try:
        return _read(path)
    except RunError:
        return None


def _experiment_in(folder: Path) -> str | None:
    """The experiment of the run that is in a folder; None where there is none."""
    try:
        settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run = settings.get("run")
    return str(run.get("experiment")) if isinstance(run, dict) else None
