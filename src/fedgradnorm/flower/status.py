"""The progress of a run across machines and its clients: ``status.json`` in the run's folder.

The run itself keeps the file up to date. While the run's folder does not exist, or still holds the
run that will be replaced, the file is beside it: ``.NAME.status.json``.
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
"""Seconds by which a run may exceed its limits before it counts as gone."""
MOST_NOTES = 20
"""How many notes on a client are kept: the last ones."""

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


class Watcher:
    """Notes what happens in a run, and keeps its status.json up to date while it is `watching`.

    If the file cannot be written, that is logged once.

    Args:
        members: the clients.
        patience: maximum seconds between two calls during a run.
    """

    def __init__(self, members: Members, patience: float) -> None:
        self.members, self.patience = members, patience
        self._folder: Path | None = None
        self._status = _new("", 1)
        self._unwritten = ""

    @contextmanager
    def watching(self, folder: Path | None, config: RunConfig, done: int = 0) -> Iterator[None]:
        """Keep a run's status.json while the block runs, and note how it ends.

        Args:
            folder: the run's folder, which may not exist yet, or may hold a run that will be
                replaced. None: nothing is written.
            config: the run's settings.
            done: how many rounds are done.
        """
        self._folder = folder
        self._status = _new(str(config.run.experiment), config.train.num_rounds)
        before = None if folder is None else _read_soundly(folder / STATUS)
        if before is not None and before.experiment == self._status.experiment:  # it is resumed
            away = {"connected": False, "node": None, "resting_until": None}
            clients = before.clients.items()
            self._status.clients = {id: client.model_copy(update=away) for id, client in clients}
            self._status.round_began = before.round_began
            self._status.round_ended = before.round_ended
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
        """Note the connected nodes by client id, and why other nodes stay out by node id."""
        now, changed = time.time(), False
        for id in [*nodes, *(id for id in self._status.clients if id not in nodes)]:
            client, node = self._client(id), str(nodes[id]) if id in nodes else None
            if client.node != node:
                client.node, client.connected, client.since = node, node is not None, now
                client.last_seen, changed = client.last_seen if node is None else now, True
        outside = {str(node): str(why) for node, why in strangers.items()}
        if changed or outside != self._status.strangers:
            self._status.strangers = outside
            self._write()

    def waits(self) -> None:
        """Note that the run waits for clients. The file is written again from time to time."""
        if self._status.state != "waiting" or time.time() > self._status.written + GRACE:
            self._status.state = "waiting"
            self._write()

    def round_begins(self, round: int, attempt: int) -> None:
        """Note that a round's messages will be sent; ``attempt`` is 0 the first time."""
        status = self._status
        status.state, status.round = "training", round
        if attempt == 0:
            status.round_began = time.time()
        self._write()

    def heard(self, clients: Collection[str]) -> None:
        """Note that these clients have answered. The next call that writes includes it."""
        for id in clients:
            self._client(id).last_seen = time.time()

    def reported(self, round: int, failures: Mapping[str, str]) -> None:
        """Note that the replies of a round are in, and why clients have no report."""
        for id, why in failures.items():
            kind = why.kind if isinstance(why, Failure) else "other"
            if kind in ANSWERED:
                self.heard([id])
            self._drop(id, round, kind, why)
        self._write()

    def tests(self) -> None:
        """Note that the clients will be asked to test."""
        self._status.state = "testing"
        self._write()

    def round_ends(self, rows: Sequence[Row], failures: Mapping[str, str]) -> None:
        """Note that a round is done.

        A client that was dropped and is not among the failures sent a report that was refused.
        """
        status, round = self._status, rows[0]["round"]
        status.state, status.done, status.round_ended = "training", round, time.time()
        for row in rows:
            if row["dropped"] is not None and row["client"] not in failures:
                self._drop(row["client"], round, "refused-report", row["dropped"])
            client = self._client(row["client"])
            notes = (f"round {round}: {note}" for note in row.get("notes", ()))
            client.notes = [*client.notes, *notes][-MOST_NOTES:]
        self._write()

    def rest(self, until: Mapping[str, int]) -> None:
        """Note the last round of each client's rest. The next call that writes includes it."""
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
        except OSError as error:  # the run itself does not need this file
            why = f"{self._folder / STATUS}: cannot be written: {error.strerror or error}"
            if self._unwritten != why:
                log.warning("%s", why)
            self._unwritten = why


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "it was stopped from outside, by flwr stop or a signal"
    words = str(error) if isinstance(error, FedGradNormError) else described(error)
    return " ".join(words.split())[:1000]


def beside(folder: Path) -> Path:
    """The path of a run's status while its folder does not exist or still holds another run."""
    real = folder.resolve()
    return real.with_name(f".{real.name}.{STATUS}")


def read_status(folder: Path) -> RunStatus:
    """The status of the run that was last written to a folder.

    Raises:
        RunError: there is none, it is damaged, or it has another format.
    """
    paths = [path for path in (folder / STATUS, beside(folder)) if path.is_file()]
    if not paths:
        raise RunError(
            f"{folder / STATUS}: there is no such file: expected that of a run across machines, "
            "as this version of fedgradnorm writes it"
        )
    return max((_read(path) for path in paths), key=lambda status: status.written)


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


def _read_soundly(path: Path) -> RunStatus | None:
    try:
        return _read(path)
    except RunError:
        return None


def _experiment_in(folder: Path) -> str | None:
    """The experiment of the run in a folder; None where there is no run."""
    try:
        settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run = settings.get("run")
    return str(run.get("experiment")) if isinstance(run, dict) else None
