"""An engine for clients behind a Flower Grid: on other machines, or in this process."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.engine import Engine
from fedgradnorm.errors import MessageError, StoppedError
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.flower.attendance import Attendance
from fedgradnorm.flower.exchange import Exchange, exchange, node_ids
from fedgradnorm.flower.layout import Layout, arrays_of
from fedgradnorm.flower.limits import SHORTEST, Limits
from fedgradnorm.flower.local_grid import LocalGrid
from fedgradnorm.flower.messages import Control
from fedgradnorm.flower.notes import INITIAL, Notes, Rests, Rounds
from fedgradnorm.flower.records import ARRAYS, BUFFERS, CONFIG, CONTROL, one_line
from fedgradnorm.flower.replies import Answers, sort_replies
from fedgradnorm.flower.reports import read_evaluation, read_report, reply_of
from fedgradnorm.flower.roster import Roster
from fedgradnorm.flower.status import Failure
from fedgradnorm.flower.watcher import Watcher
from fedgradnorm.messages import Instruction, Report

log = logging.getLogger(__name__)


class GridEngine(Engine):
    """Sends instructions to the nodes of a Grid, and reads what comes back.

    A node is asked once for its client's key (`Attendance`). Weights and states go by that key and
    never by the node's id, which changes when the node restarts.

    The states stay with the clients. Here a `ClientState` only records the round it belongs to.
    Each message names the round to begin with, so a client undoes what the server has not taken:
    a lost report, a repeated round, or the rounds after the checkpoint from which a run resumes.

    Args:
        grid: Flower's.
        roster: the clients; it decides which client is admitted.
        layout: the encoder's.
        limits: how long to wait, and for how many clients; None: the defaults.
        keep: how many states before the last one each client keeps for a run that is resumed.
        federated: whether the clients run a Federation and need the settings of training.
        settings: the server's overrides for the federation and its model, for the clients to
            follow.

    Attributes:
        experiment: the name under which the clients keep their states. Set it before anything is
            sent.
        config: what goes along with messages, for users' own apps: by ``train`` and ``evaluate``.
        attendance: which node stands for which client.
        notes: what is odd about clients and drops no report.
        rests: the clients that rest because they were late.
        rounds: the rounds that the clients' states belong to.
        watcher: is told everything that matters to people who watch a run.
    """

    lockstep = False
    """A server step after each of the clients' steps would need a message for every step."""

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        layout: Layout,
        limits: Limits | None = None,
        keep: int = 3,
        federated: bool = True,
        settings: str = "",
    ) -> None:
        self.grid, self.roster, self.layout = grid, roster, layout
        self.limits = limits = limits or Limits()
        self.federated, self.settings = federated, settings
        self.experiment, self.config = "", dict[str, ConfigRecord]()
        self.messages: dict[str, Message] = {}
        self.attendance, self.notes = Attendance(roster.admit, limits.ask_again), Notes()
        self.rounds = Rounds(keep)
        self.rests, self._test_rests = Rests(limits.max_rest), Rests(limits.max_rest)
        patience = max(limits.node_timeout, limits.round_timeout, limits.greeting_timeout)
        self.watcher = Watcher(roster, patience)
        self._failures: dict[str, Failure] = {}
        self._untested: set[str] = set()
        self._late: set[int] = set()
        self._sent: Mapping[str, Tensor] = {}
        self._round, self._attempt, self._tests, self._training = 0, 0, 0, ""

    @property
    def clients(self) -> list[str]:
        """The keys of the clients that are connected."""
        return self.attendance.clients

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """The round that each client's state belongs to, by key."""
        return {**dict.fromkeys(self.roster.client_ids, INITIAL), **self.rounds.states}

    @property
    def failures(self) -> Mapping[str, str]:
        """By client, why it had no report when it was last instructed: a `Failure`."""
        return self._failures

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Let the clients continue from these rounds."""
        self.rounds.states = dict(states)

    def take_notes(self) -> dict[str, list[str]]:
        """What was noted about clients since the last call, by key."""
        return self.notes.take()

    def wait(self, least: int | None = None, among: Collection[str] | None = None) -> None:
        """Wait until enough clients are connected.

        Args:
            least: how many; None for ``min_nodes``.
            among: the clients that count; None for all.

        Raises:
            StoppedError: too few are connected after ``node_timeout`` seconds.
        """
        least = self.limits.min_nodes if least is None else least
        end = time.monotonic() + self.limits.node_timeout
        while True:
            self._greet()
            connected = self.clients if among is None else set(self.clients) & set(among)
            if len(connected) >= least:
                return
            self.watcher.waits()
            if time.monotonic() >= end:
                whom = "clients" if among is None else f"of the clients {', '.join(sorted(among))}"
                raise StoppedError(self._too_few(f"{len(connected)} {whom}", least))
            time.sleep(self.limits.poll)

    def _too_few(self, connected: str, least: int) -> str:
        text = f"{connected} are connected after {self.limits.node_timeout:g} s, "
        text += f"expected at least {least}; connected: {', '.join(self.clients) or 'none'}"
        refused = sorted(self.attendance.words.items())
        return "; ".join([text, *(f"node {node} stays out: {why}" for node, why in refused)])

    def execute(self, instructions: Sequence[Instruction]) -> list[Report]:
        """Let the instructed clients train; one without a report has a reason in ``failures``."""
        self.wait()
        least = instructions[0].training.min_clients if instructions else 1
        if instructions and instructions[0].attempt:
            # there were too few before; to try again at once would fail again
            asked = {instruction.client for instruction in instructions}
            self.wait(min(least, len(instructions)), asked)
        messages = self.messages_for(instructions)
        came = self._send(messages, self.limits.enough(len(messages), least))
        return self.reports(came.replies, came)

    def messages_for(self, instructions: Sequence[Instruction]) -> dict[str, Message]:
        """The messages for those of the instructed clients that are connected, by key."""
        self._failures, self._late, self.messages, self._sent = {}, set(), {}, {}
        if not instructions:
            return self.messages
        first = instructions[0]
        self._round, self._attempt, self._sent = first.round, first.attempt, first.buffers
        if self.federated:
            self._training = first.training.model_dump_json()
        arrays, resting = self.layout.arrays(first.encoder), self._resting(instructions)
        for instruction in instructions:
            id = instruction.client
            self.rounds.remember(instruction)
            if id not in self.attendance.nodes:
                why = self.attendance.why_absent(id) or "not connected"
                self._failures[id] = Failure(why, "not-connected")
            elif id in resting:
                self._failures[id] = Failure("it rests, as it was late again and again", "resting")
            else:
                fields = {"attempt": instruction.attempt, "keep": self.rounds.kept(id)}
                buffers = instruction.buffers
                self.messages[id] = self._to_client(id, "train", arrays, buffers, **fields)
        self.watcher.round_begins(first.round, first.attempt)
        return self.messages

    def _resting(self, instructions: Sequence[Instruction]) -> Mapping[str, int]:
        """The last round of each rest. None rest if the others are too few, or in a repetition."""
        resting = self.rests.resting(self._round)
        awake = self.attendance.nodes.keys() - resting.keys()
        asked = sum(instruction.client in awake for instruction in instructions)
        if self._attempt or asked < max(1, instructions[0].training.min_clients):
            return {}
        return resting

    def reports(self, replies: Iterable[Message], came: Exchange | None = None) -> list[Report]:
        """The reports in the replies to the last `messages_for`; others are in ``failures``."""
        reports, answers = [], self._sort(self.messages, replies, came)
        self._failures |= answers.failures
        if self._attempt == 0:
            self.rests.note(self.messages, self._failures, self._round, "rounds")
        for id, reply in answers.sound.items():
            try:
                report = self._report(id, reply)
            except MessageError as error:
                self._failures[id] = Failure(one_line(error), "refused-report")
                continue
            reports.append(report)
            self.roster.learn(id, report.num_examples)
            self._took(id, report)
        self.watcher.heard([report.client for report in reports])
        self.watcher.rest(self.rests.resting(self._round + 1))
        self.watcher.reported(self._round, self.failures)
        return reports

    def _report(self, id: str, reply: Message) -> Report:
        """Raises MessageError for a report that does not fit its message."""
        report = read_report(reply, self.layout, self._sent)
        answered = (report.client, report.task, report.round)
        if answered != (id, self.roster.client(id).task.name, self._round):
            words = "it answered as client '{}' with task '{}' for round {}"
            raise MessageError(words.format(*answered))
        self.notes.heed(id, reply_of(reply), self.rounds, report.num_examples)
        return report

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> dict[str, Evaluation]:
        """Let every connected client test this encoder with its own head.

        A client that fails has no evaluation. The messages' settings have the batch size.
        """
        del batch_size
        self._greet()
        messages = self.tests_for(encoder, buffers)
        came = self._send(messages, self.limits.enough(len(messages)))
        return self.evaluations(came.replies, came)

    def tests_for(self, encoder: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Message]:
        """The messages that ask the connected clients to test, by key.

        Clients that rest, or were late in this round and may hang, are not asked.
        """
        self._tests += 1
        arrays, self.messages = self.layout.arrays(encoder), {}
        resting = self.rests.resting(self._round) | self._test_rests.resting(self._tests)
        for id, node in self.attendance.nodes.items():
            if id not in self._untested and id not in resting and node not in self._late:
                self.messages[id] = self._to_client(id, "evaluate", arrays, buffers)
        self.watcher.tests()
        return self.messages

    def evaluations(
        self, replies: Iterable[Message], came: Exchange | None = None
    ) -> dict[str, Evaluation]:
        """The evaluations in the replies to the last ``tests_for``."""
        evaluations, answers = {}, self._sort(self.messages, replies, came)
        for id, reply in answers.sound.items():
            try:
                evaluations[id] = self._evaluation(id, reply)
            except MessageError as error:
                log.warning("client %s: no evaluation: %s", id, one_line(error))
        failures = {**self._failures, **answers.failures}
        self._test_rests.note(self.messages, failures, self._tests, "tests")
        self.watcher.heard(evaluations)
        return evaluations

    def _evaluation(self, id: str, reply: Message) -> Evaluation:
        """Raises MessageError for an evaluation that does not fit its message."""
        client, evaluation = read_evaluation(reply)
        main = self.roster.client(id).task.main_metric
        if client != id:
            raise MessageError(f"it answered as client '{client}'")
        if main is not None and main.name not in evaluation.metrics:
            found = sorted(evaluation.metrics)
            raise MessageError(f"metrics: expected '{main.name}', found {found}")
        self.notes.heed(id, reply_of(reply), self.rounds, None)
        return evaluation

    def _took(self, id: str, report: Report) -> None:
        self.rounds.states[id] = ClientState({}, report.initial_loss, round=report.round)

    def _greet(self) -> None:
        """Ask new nodes who they are, and forget those that are gone."""
        self.attendance.see(node_ids(self.grid, max(self.limits.node_timeout, SHORTEST)))
        self.watcher.present(self.attendance.nodes, self.attendance.words)
        new = self.attendance.to_ask(time.monotonic())
        if not new:
            return
        control, config = self._control("hello"), self._config("train", 0)
        content = RecordDict({ARRAYS: arrays_of({}), CONTROL: control, CONFIG: config})
        wait = min(self.limits.round_timeout, self.limits.greeting_timeout)
        asked = {str(id): self.create_message(content, "train", id, "hello", wait) for id in new}
        came = exchange(self.grid, list(asked.values()), wait)
        answers = self._sort(asked, came.replies, came, "node")
        said = {node: answers.greeting(str(node)) for node in new}
        for greeting in self.attendance.hear(said, time.monotonic()):
            client = greeting.client
            self._untested.discard(client)
            if not greeting.tests:
                self._untested.add(client)
            self.rounds.states.setdefault(client, ClientState({}))
            self.rests.answered(client)
            self._test_rests.answered(client)
            self.notes.compare_versions(greeting)
        self.watcher.present(self.attendance.nodes, self.attendance.words)

    def _send(self, messages: Mapping[str, Message], enough: int | None) -> Exchange:
        return exchange(self.grid, list(messages.values()), self.limits.round_timeout, enough)

    def _sort(
        self,
        messages: Mapping[str, Message],
        replies: Iterable[Message],
        came: Exchange | None,
        whom: str = "client",
    ) -> Answers:
        """Sort replies; note which nodes were late or have become another client's."""
        answers = sort_replies(messages, replies, self.limits.round_timeout, came)
        for name, why in answers.failures.items():
            log.warning("%s %s: %s", whom, name, why)
        self._late |= {messages[name].metadata.dst_node_id for name in answers.late}
        if whom == "client":
            for client in answers.misdirected:
                self.attendance.leave(client)
        return answers

    def _to_client(
        self, id: str, kind: str, arrays: Any, buffers: Mapping[str, Tensor], **fields: Any
    ) -> Message:
        """A message to a connected client for the current round."""
        fields |= {"base": self.rounds.base(id), "initial_loss": self.rounds.initial_loss(id)}
        control = self._control(kind, client=id, round=self._round, **fields)
        config = self._config(kind, self._round)
        content = RecordDict({ARRAYS: arrays, CONTROL: control, CONFIG: config})
        if buffers:
            content[BUFFERS] = arrays_of(buffers)
        return self.create_message(content, kind, self.attendance.nodes[id], str(self._round))

    def _control(self, kind: str, **fields: Any) -> ConfigRecord:
        fields |= {"training": self._training, "settings": self.settings}
        return Control(kind=kind, experiment=self.experiment, **fields).record()

    def _config(self, kind: str, round: int) -> ConfigRecord:
        return ConfigRecord({**self.config.get(kind, {}), "server-round": round})

    def create_message(
        self, content: RecordDict, kind: str, node: int, group: str, ttl: float | None = None
    ) -> Message:
        """A message to a node, for ``ttl`` seconds; None: as long as a round waits for replies."""
        ttl = ttl or self.limits.round_timeout
        if isinstance(self.grid, LocalGrid):
            return self.grid.create_message(content, kind, node, group, ttl)
        return Message(content, node, kind, group_id=group, ttl=ttl)
