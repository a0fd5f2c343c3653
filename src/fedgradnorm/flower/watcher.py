"""Keeps a run's status.json up to date while the run goes on."""

import logging
import os
import socket
import time
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fedgradnorm.flower.status as run_status
from fedgradnorm.atomic import write_atomically
from fedgradnorm.config import RunConfig
from fedgradnorm.errors import FedGradNormError, RunError, described
from fedgradnorm.federation import Members
from fedgradnorm.flower.status import ANSWERED, ClientStatus, Drop, Failure, Kind, RunStatus, State
from fedgradnorm.runs.entries import STATUS
from fedgradnorm.runs.records import Row

log = logging.getLogger(__name__)

GRACE = 60.0
"""Seconds by which a run may exceed its limits before it counts as gone."""
MOST_NOTES = 20
"""How many notes on a client are kept: the last ones."""


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
        before = None
        if folder is not None:
            with suppress(RunError):
                before = run_status.read_file(folder / STATUS)
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
                run_status.beside(self._folder).unlink(missing_ok=True)
            else:
                write_atomically(run_status.beside(self._folder), content)
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


def _new(experiment: str, num_rounds: int) -> RunStatus:
    times = dict.fromkeys(("started", "written", "due"), time.time())
    process: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
    return RunStatus(experiment=experiment, num_rounds=num_rounds, **times, **process)


def _experiment_in(folder: Path) -> str | None:
    """The experiment of the run in a folder; None where there is no run."""
    try:
        settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    run = settings.get("run")
    return str(run.get("experiment")) if isinstance(run, dict) else None
