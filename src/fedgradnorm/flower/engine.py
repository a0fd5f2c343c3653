"""The clients as an engine sees them, behind a Flower Grid: on other machines, or in this process."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.engine import Engine
from fedgradnorm.errors import MessageError, StoppedError, require
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.federation import Federation
from fedgradnorm.flower.client import WRONG_CLIENT, Node
from fedgradnorm.flower.exchange import Exchange, exchange, node_ids
from fedgradnorm.flower.local_grid import LocalGrid
from fedgradnorm.flower.messages import (
    ARRAYS,
    BUFFERS,
    CONFIG,
    CONTROL,
    VERSIONS,
    Control,
    Greeting,
    Layout,
    Reply,
    arrays_of,
    greeting_of,
    one_line,
    read_evaluation,
    read_report,
    reply_of,
)
from fedgradnorm.flower.rests import Rests
from fedgradnorm.flower.roster import Roster, roster_of
from fedgradnorm.flower.states import MemoryStates
from fedgradnorm.flower.status import ANSWERED, Failure, Kind, Watcher
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.threads import kernel_threads

__all__ = ["FlowerLocalEngine", "GridEngine", "Limits"]

log = logging.getLogger(__name__)

SHORTEST, LONGEST = 60.0, 1e8
"""Seconds: the least that a SuperLink has to say who is connected, and nothing is waited for longer than three years."""
EXPIRED = 3
CODES = {
    0: "an unknown error",
    1: "its app could not be loaded",
    2: "its app raised an error",
    EXPIRED: "the message expired before it was answered",
    4: "the reply expired",
    5: "its node is gone",
    6: "a mod refused",
    7: "its app bundle is invalid",
    8: "its app crashed or was killed",
}
"""Flower's error codes in words."""
CODE_KINDS: dict[int, Kind] = {
    1: "error",
    2: "error",
    EXPIRED: "late",
    4: "late",
    5: "gone",
    6: "error",
    7: "error",
    8: "crashed",
}
"""Flower's error codes by the kind of failure that they are; others are of no kind of their own."""


@dataclass(frozen=True)
class Limits:
    """How long a server waits, and for whom.

    Attributes:
        min_nodes: clients that have to be connected before a round.
        node_timeout: seconds to wait for them; then the run stops, and can be resumed.
        round_timeout: seconds to wait for the replies of a round, an upper bound; who has not answered then counts as dropped.
        min_replies: a share of the clients that were asked: when this share has answered, the others have as long again as that took. 1:
            they have all of ``round_timeout``.
        max_rest: a client that is late again rests for 1 round, and for twice as many each time that it is late after that, at most this
            number; 0: none ever rests.
        greeting_timeout: seconds to wait until new nodes have said who they are.
        poll: seconds between looks for new nodes.
        ask_again: seconds until a node that stays out is asked once more who it is; each time twice as many for one that does not answer.

    Raises:
        ConfigError: a number out of range.
    """

    min_nodes: int = 1
    node_timeout: float = 600.0
    round_timeout: float = 3600.0
    min_replies: float = 1.0
    max_rest: int = 16
    greeting_timeout: float = 120.0
    poll: float = 1.0
    ask_again: float = 60.0

    def __post_init__(self) -> None:
        require(self.min_nodes >= 1, "min_nodes", "a number of at least 1", self.min_nodes)
        require(
            0 <= self.node_timeout <= LONGEST,
            "node_timeout",
            f"seconds, from 0 to {LONGEST:g}",
            self.node_timeout,
        )
        for name in ("round_timeout", "greeting_timeout"):
            require(
                0 < getattr(self, name) <= LONGEST,
                name,
                f"seconds, more than 0 and at most {LONGEST:g}",
                getattr(self, name),
            )
        require(
            0 < self.min_replies <= 1,
            "min_replies",
            "a share, more than 0 and at most 1",
            self.min_replies,
        )
        require(self.max_rest >= 0, "max_rest", "a number of rounds, at least 0", self.max_rest)


class GridEngine(Engine):
    """Sends instructions to the nodes of a Grid, and reads what comes back.

    A node is asked for its client's key once; weights and states go by that key, never by the node's id, which is another one after a
    restart. Two nodes that claim one key at once both stay out until one is gone; a node that claims the key of one that is already
    connected stays out until that one is gone. Whenever a node is gone, those that stay out are asked again.

    States stay with the clients: here a `ClientState` is but the round that the state is of. What the server has not taken (a lost report,
    a round that is repeated, a checkpoint that a run goes on from) the client undoes, for each message names the round to begin with.

    Args:
        grid: Flower's.
        roster: the clients; it decides who is one.
        layout: of the encoder.
        limits: for how long to wait, and for whom.
        keep: so many earlier states stay with the clients, besides the last, for a run that is resumed.
        federated: whether the clients run a Federation, and need the settings of training.
        settings: the server's words on that federation and its model, for the clients to follow.

    Attributes:
        experiment: the name under which the clients keep their states. It has to be set before anything is sent.
        config: for users' own apps, what goes along with messages for training and for evaluation.
        failures: by client, why there was no report when it was last instructed, as a `Failure`, which has its kind.
        notes: by client, what is odd about it and drops no report, since `take_notes` was called.
        watcher: is told of all that matters to who watches a run.
    """

    lockstep = False
    """No method whose server steps after each of the clients' steps: that would be a message for every step."""

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        layout: Layout,
        limits: Limits = Limits(),
        keep: int = 3,
        federated: bool = True,
        settings: str = "",
    ) -> None:
        self.grid, self.roster, self.layout, self.limits, self.keep = (
            grid,
            roster,
            layout,
            limits,
            keep,
        )
        self.federated, self.settings = federated, settings
        self.experiment, self.config = "", dict[str, ConfigRecord]()
        self.messages: dict[str, Message] = {}
        self._failures: dict[str, str] = {}
        self.notes: dict[str, list[str]] = {}
        self.watcher = Watcher(
            roster, max(limits.node_timeout, limits.round_timeout, limits.greeting_timeout)
        )
        self._nodes: dict[str, int] = {}
        self._strangers: dict[int, str] = {}
        self._online: set[int] = set()
        self._ask_at: dict[int, float] = {}
        self._silent: Counter[int] = Counter()
        self._untested: set[str] = set()
        self._claims: dict[int, str] = {}
        self._late: set[int] = set()
        self._sent: Mapping[str, Tensor] = {}
        self._rests, self._test_rests, self._tests = (
            Rests(limits.max_rest),
            Rests(limits.max_rest),
            0,
        )
        self._states: dict[str, ClientState] = {}
        self._bases: dict[str, list[int]] = {}
        self._round, self._attempt, self._training = 0, 0, ""
        self._versions: dict[str, str] = {}
        self._other_versions: dict[str, list[str]] = {}
        self._changed: dict[str, str] = {}

    @property
    def clients(self) -> list[str]:
        """The keys of the clients that are connected."""
        return sorted(self._nodes)

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """The round that each client's state is of, by key."""
        return {**dict.fromkeys(self.roster.client_ids, ClientState({})), **self._states}

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Let the clients go on from these rounds."""
        self._states = dict(states)

    def wait(self, least: int | None = None, among: Collection[str] | None = None) -> None:
        """Wait until enough clients are connected: as many as given, or as the limits say; any, or some of those named.

        Raises:
            StoppedError: there are too few after ``node_timeout`` seconds.
        """
        least, end = (
            self.limits.min_nodes if least is None else least,
            time.monotonic() + self.limits.node_timeout,
        )
        while True:
            self._greet()
            found = len(self._nodes if among is None else self._nodes.keys() & among)
            if found >= least:
                return
            self.watcher.waits()
            if time.monotonic() >= end:
                whom = "clients" if among is None else f"of the clients {', '.join(sorted(among))}"
                refused = "".join(
                    f"; node {node} stays out: {why}"
                    for node, why in sorted(self._strangers.items())
                )
                raise StoppedError(
                    f"{found} {whom} are connected after {self.limits.node_timeout:g} s, expected at least {least}; "
                    f"connected: {', '.join(self.clients) or 'none'}{refused}"
                )
            time.sleep(self.limits.poll)

    def execute(self, instructions: Sequence[Instruction]) -> list[Report]:
        """Let the instructed clients train. Who is not connected, fails or is late has no report, and a reason in ``failures``."""
        self.wait()
        if (
            instructions and instructions[0].attempt
        ):  # there were too few before, and at once there would be again
            self.wait(
                min(instructions[0].training.min_clients, len(instructions)),
                {one.client for one in instructions},
            )
        messages = self.messages_for(instructions)
        least = instructions[0].training.min_clients if instructions else 1
        came = self._send(messages, enough=self._enough(len(messages), least))
        return self.reports(came.replies, came)

    def _enough(self, asked: int, least: int = 1) -> int | None:
        """How many answers are enough for the others to have no more than as long again."""
        return (
            None
            if self.limits.min_replies == 1
            else max(math.ceil(self.limits.min_replies * asked - 1e-9), least)
        )

    def messages_for(self, instructions: Sequence[Instruction]) -> dict[str, Message]:
        """The messages for those of the instructed clients that are connected, by key."""
        self._failures, self._late = {}, set()
        for instruction in instructions:
            self._remember(instruction)
        if instructions and self.federated:
            self._training = instructions[0].training.model_dump_json()
        arrays = self.layout.arrays(instructions[0].encoder) if instructions else arrays_of({})
        self._sent = instructions[0].buffers if instructions else {}
        self.messages, resting = {}, self._resting(instructions)
        for instruction in instructions:
            id, state = instruction.client, self._states.get(instruction.client, ClientState({}))
            if id not in self._nodes:
                self._failures[id] = Failure(self._refused(id) or "not connected", "not-connected")
                continue
            if id in resting:
                self._failures[id] = Failure("it rests, as it was late again and again", "resting")
                continue
            keep = tuple(sorted({*self._bases.get(id, ()), state.round}))
            begin = {"base": state.round, "keep": keep, "initial_loss": self._initial_loss(id)}
            control = self._control(
                "train", client=id, round=instruction.round, attempt=instruction.attempt, **begin
            )
            content = RecordDict(
                {ARRAYS: arrays, CONTROL: control, CONFIG: self._config("train", instruction.round)}
            )
            if instruction.buffers:
                content[BUFFERS] = arrays_of(instruction.buffers)
            self.messages[id] = self._message(
                content, "train", self._nodes[id], str(instruction.round)
            )
        if instructions:
            self.watcher.round_begins(instructions[0].round, instructions[0].attempt)
        return self.messages

    def _resting(self, instructions: Sequence[Instruction]) -> Mapping[str, int]:
        """Who rests in this round, and until when: nobody where the others are too few, or the round is repeated."""
        resting = self._rests.resting(self._round)
        awake = sum(one.client in self._nodes and one.client not in resting for one in instructions)
        if not resting or self._attempt or awake < max(1, instructions[0].training.min_clients):
            return {}
        return resting

    def reports(self, replies: Iterable[Message], came: Exchange | None = None) -> list[Report]:
        """The reports in the replies to the last ``messages_for``; the other clients have a reason in ``failures``."""
        reports = []
        sound = self._sound(self.messages, replies, came=came)
        if self._attempt == 0:
            self._note_late(self._rests, self._round, "rounds")
        for id, reply in sound.items():
            try:
                report = read_report(reply, self.layout, self._sent)
                answered, asked = (
                    (report.client, report.task, report.round),
                    (id, self.roster.client(id).task.name, self._round),
                )
                if answered != asked:
                    raise MessageError(
                        "it answered as client '{}' with task '{}' for round {}".format(*answered)
                    )
                self._heed(id, reply_of(reply), report.num_examples)
            except MessageError as error:
                self._failures[id] = Failure(one_line(error), "refused-report")
                continue
            reports.append(report)
            self.roster.learn(id, report.num_examples)
            self._took(id, report)
        self.watcher.heard([report.client for report in reports])
        self.watcher.rest(self._rests.resting(self._round + 1))
        self.watcher.reported(self._round, self.failures)
        return reports

    def evaluate(
        self,
        encoder: Tensor,
        buffers: Mapping[str, Tensor],
        batch_size: int = EVALUATION_BATCH,  # noqa: ARG002  # the messages have it
    ) -> dict[str, Evaluation]:
        """Let every client that is connected test this encoder with its own head; who fails has no evaluation.

        How many examples pass through a model at once is in the settings of training, which every message has.
        """
        self._greet()
        messages = self.tests_for(encoder, buffers)
        came = self._send(messages, enough=self._enough(len(messages)))
        return self.evaluations(came.replies, came)

    def tests_for(self, encoder: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Message]:
        """The messages that ask the connected clients to test, by key: less those that rest or were late in this round, and may hang."""
        self._tests += 1
        arrays, self.messages = self.layout.arrays(encoder), {}
        resting = self._rests.resting(self._round) | self._test_rests.resting(self._tests)
        for id, node in self._nodes.items():
            if id in self._untested or id in resting or node in self._late:
                continue
            base = self._states.get(id, ClientState({})).round
            control = self._control(
                "evaluate",
                client=id,
                round=self._round,
                base=base,
                initial_loss=self._initial_loss(id),
            )
            content = RecordDict(
                {ARRAYS: arrays, CONTROL: control, CONFIG: self._config("evaluate", self._round)}
            )
            if buffers:
                content[BUFFERS] = arrays_of(buffers)
            self.messages[id] = self._message(content, "evaluate", node, str(self._round))
        self.watcher.tests()
        return self.messages

    def evaluations(
        self, replies: Iterable[Message], came: Exchange | None = None
    ) -> dict[str, Evaluation]:
        """The evaluations in the replies to the last ``tests_for``."""
        evaluations, failures = {}, dict(self.failures)
        for id, reply in self._sound(self.messages, replies, came=came).items():
            try:
                who, evaluation = read_evaluation(reply)
                main = self.roster.client(id).task.main_metric
                if who != id:
                    raise MessageError(f"it answered as client '{who}'")
                if main is not None and main.name not in evaluation.metrics:
                    raise MessageError(
                        f"metrics: expected '{main.name}', found {sorted(evaluation.metrics)}"
                    )
                self._heed(id, reply_of(reply), None)
                evaluations[id] = evaluation
            except MessageError as error:
                log.warning("client %s: no evaluation: %s", id, one_line(error))
        self._note_late(self._test_rests, self._tests, "tests")
        self._failures = failures
        self.watcher.heard(evaluations)
        return evaluations

    def _note_late(self, rests: Rests, number: int, what: str) -> None:
        """Note who of those that were asked answered, and who was late; the latter may rest."""
        for id in self.messages:
            failure = self.failures.get(id)
            kind = failure.kind if isinstance(failure, Failure) else None
            if kind == "late" and (rest := rests.was_late(id, number)):
                log.warning(
                    "client %s was late in %d %s in a row: it rests for %d",
                    id,
                    rests.times[id],
                    what,
                    rest,
                )
            elif kind in (None, *ANSWERED):
                rests.answered(id)

    def _took(self, id: str, report: Report) -> None:
        self._states[id] = ClientState({}, report.initial_loss, round=report.round)

    def _initial_loss(self, client: str) -> float | None:
        """A client's F(0); None before it has one, and for a client of a version that would refuse a message with it."""
        state = self._states.get(client)
        return (
            None
            if state is None or state.round == 0 or not self._versions.get(client)
            else state.initial_loss
        )

    def _heed(self, client: str, reply: Reply, examples: int | None) -> None:
        """Note what a client says of the state that it began with, and of its data; ``examples`` is None where it was tested.

        Raises MessageError for what cannot be.
        """
        base, did = (
            self._states.get(client, ClientState({})).round,
            "was tested" if examples is None else "trained",
        )
        for name, round, last in (
            ("began", reply.began, base - 1),
            ("data_since", reply.data_since, base),
        ):
            if round is not None and round > last:
                raise MessageError(f"{name}: expected a round before {last + 1}, found {round}")
        if reply.began is not None:
            first = self._initial_loss(client)
            fresh = "a fresh head" + (
                ", its F(0) measured anew" if first is None else f" and its F(0) of {first:.4g}"
            )
            start = f"that of round {reply.began}" if reply.began else fresh
            self._note(client, f"its state of round {base} is lost: it {did} with {start}")
        if reply.data_since is not None and examples is not None:
            many = (
                f"{examples} examples, before {reply.data_before}"
                if examples != reply.data_before
                else f"{examples} other examples"
            )
            text = f"its training data changed after round {reply.data_since}: {many}"
            if text != self._changed.get(
                client
            ):  # where its report was dropped, it says the same in the next round
                self._changed[client] = text
                self._note(client, text)

    def _compare_versions(self, greeting: Greeting) -> None:
        """Note once that a client runs another version than the server."""
        client, own, texts = greeting.client, VERSIONS["version"], list[str]()
        self._versions[client] = greeting.version
        if greeting.version != own:
            version = greeting.version or "of an older version that does not say which"
            texts.append(
                f"it runs fedgradnorm {version}, this server {own}: expected one version on every machine"
            )
        if greeting.torch_version not in ("", VERSIONS["torch_version"]):
            what = (
                f"it runs torch {greeting.torch_version}, this server {VERSIONS['torch_version']}"
            )
            texts.append(f"{what}: its figures may differ by more than rounding")
        if texts != self._other_versions.get(client, []):
            self._other_versions[client] = texts
            for text in texts:
                self._note(client, text)

    def _remember(self, instruction: Instruction) -> None:
        """Note which state each client had before a round: a checkpoint of that moment may have to be gone back to.

        As long as not all such moments are known, round 0 stands for them, and the client keeps whatever it has.
        """
        if instruction.attempt == 0:
            bases = self._bases.setdefault(instruction.client, [0] * (self.keep + 1))
            bases.append(self._states.get(instruction.client, ClientState({})).round)
            del bases[: -self.keep - 1]
        self._round, self._attempt = instruction.round, instruction.attempt

    def _greet(self) -> None:
        """Ask new nodes who they are, and forget those that are gone."""
        online = node_ids(self.grid, max(self.limits.node_timeout, SHORTEST))
        if self._online - online:  # who stood in the way of another may be gone
            self._ask_at = {node: at for node, at in self._ask_at.items() if self._silent[node]}
            self._silent = Counter(
                {node: times for node, times in self._silent.items() if node in online}
            )
        self._online = online
        self._nodes = {client: node for client, node in self._nodes.items() if node in online}
        self._strangers = {node: why for node, why in self._strangers.items() if node in online}
        self._claims = {node: client for node, client in self._claims.items() if node in online}
        self.watcher.present(self._nodes, self._strangers)
        known = set(self._nodes.values())
        now = time.monotonic()
        new = sorted(node for node in online - known if now >= self._ask_at.get(node, -math.inf))
        if not new:
            return
        content = RecordDict(
            {
                ARRAYS: arrays_of({}),
                CONTROL: self._control("hello"),
                CONFIG: self._config("train", 0),
            }
        )
        timeout = min(self.limits.round_timeout, self.limits.greeting_timeout)
        asked = {str(node): self._message(content, "train", node, "hello", timeout) for node in new}
        came = self._send(asked, timeout)
        answers = self._sound(asked, came.replies, "node", came)
        greetings: dict[int, Greeting] = {}
        for node in new:
            try:
                if str(node) in answers:
                    self._silent.pop(node, None)
                    greetings[node] = greeting_of(answers[str(node)])
                else:
                    self._silent[node] += 1
                    self._refuse(node, self._failures.pop(str(node)))
            except MessageError as error:
                self._claims.pop(node, None)
                self._refuse(node, one_line(error))
            self._ask_at[node] = time.monotonic() + self.limits.ask_again * 2 ** max(
                0, self._silent[node] - 1
            )
        self._claims |= {node: greeting.client for node, greeting in greetings.items()}
        claims = Counter(
            self._claims.values()
        )  # one that says nothing this time has not given up its claim
        for node, greeting in greetings.items():
            if greeting.client in self._nodes:
                why: str | None = (
                    f"client key '{greeting.client}' belongs to a node that is connected"
                )
            elif claims[greeting.client] > 1:
                why = (
                    f"client key '{greeting.client}' is claimed by {claims[greeting.client]} nodes"
                )
            else:
                why = self.roster.admit(greeting)
            if why is not None:
                self._refuse(node, why)
            else:
                self._strangers.pop(node, None)
                (self._untested.discard if greeting.tests else self._untested.add)(greeting.client)
                self._nodes[greeting.client] = node
                self._states.setdefault(greeting.client, ClientState({}))
                self._rests.answered(greeting.client)
                self._test_rests.answered(greeting.client)
                log.info("client %s is connected, node %d", greeting.client, node)
                self._compare_versions(greeting)
        self.watcher.present(self._nodes, self._strangers)

    @property
    def failures(self) -> Mapping[str, str]:
        """By client, why there was no report when it was last instructed."""
        return self._failures

    def take_notes(self) -> dict[str, list[str]]:
        """What was noted of clients since the last call, by key."""
        notes, self.notes = self.notes, {}
        return notes

    def _note(self, client: str, text: str) -> None:
        """Log what is odd about a client and drops no report, and keep it for the run's records."""
        if text not in self.notes.setdefault(client, []):
            log.warning("client %s: %s", client, text)
            self.notes[client].append(text)

    def _refuse(self, node: int, why: str) -> None:
        why = one_line(why)
        if self._strangers.get(node) != why:
            log.warning("node %d stays out: %s", node, why)
        self._strangers[node] = why

    def _refused(self, client: str) -> str | None:
        """Why nobody stands for a client, if a node that was refused says so."""
        return next((why for why in self._strangers.values() if f"'{client}'" in why), None)

    def _send(
        self,
        messages: Mapping[str, Message],
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Exchange:
        return exchange(
            self.grid, list(messages.values()), timeout or self.limits.round_timeout, enough
        )

    def _sound(
        self,
        messages: Mapping[str, Message],
        replies: Iterable[Message],
        whom: str = "client",
        came: Exchange | None = None,
    ) -> dict[str, Message]:
        if came is not None and came.early:
            waited = "no answer within twice the time of enough others"
            log.info("enough have answered: the others had %.1f s in all", came.seconds)
        else:
            waited = f"no answer within {came.seconds if came else self.limits.round_timeout:g} s"
        unfetched = {} if came is None else came.failed
        asked = {
            message.metadata.message_id or name: name for name, message in messages.items()
        }  # without an id it was not sent
        sound: dict[str, Message] = {}
        for reply in replies:
            id = reply.metadata.reply_to_message_id
            if id not in asked:
                log.warning("a reply to no message of this round is left alone")
            elif reply.has_error() and not (reply.error.code == EXPIRED and id in unfetched):
                name, said = asked.pop(id), one_line(reply.error.reason or "")
                words = CODES.get(reply.error.code, f"error code {reply.error.code}") + (
                    f": {said}" if said else ""
                )
                self._failures[name] = Failure(words, CODE_KINDS.get(reply.error.code, "other"))
                log.warning("%s %s: %s", whom, name, self._failures[name])
                if reply.error.code == EXPIRED:
                    self._late.add(messages[name].metadata.dst_node_id)
                if WRONG_CLIENT in said:  # its node was restarted as another one: ask who it is
                    node = self._nodes.pop(name, -1)
                    self._ask_at.pop(node, None)
                    self._claims.pop(node, None)
            elif not reply.has_error():
                sound[asked.pop(id)] = reply
        for id, name in asked.items():
            if not messages[name].metadata.message_id:
                self._failures[name] = Failure(
                    f"its message could not be sent: {one_line(unfetched.get('', 'no reason is known'))}",
                    "other",
                )
            elif id in unfetched:
                self._failures[name] = Failure(
                    f"its reply could not be fetched: {one_line(unfetched[id])}", "other"
                )
            else:
                self._late.add(messages[name].metadata.dst_node_id)
                self._failures[name] = Failure(waited, "late")
            log.warning("%s %s: %s", whom, name, self._failures[name])
        return sound

    def _control(self, kind: str, **fields: Any) -> ConfigRecord:
        control = Control(
            kind=kind,
            experiment=self.experiment,
            training=self._training,
            settings=self.settings,
            **fields,
        )
        return control.record()

    def _config(self, kind: str, round: int) -> ConfigRecord:
        return ConfigRecord({**self.config.get(kind, {}), "server-round": round})

    def _message(
        self, content: RecordDict, kind: str, node: int, group: str, ttl: float | None = None
    ) -> Message:
        ttl = ttl or self.limits.round_timeout
        if isinstance(self.grid, LocalGrid):
            return self.grid.create_message(content, kind, node, group, ttl)
        return Message(content, node, kind, group_id=group, ttl=ttl)


class FlowerLocalEngine(GridEngine):
    """Flower messages in this process, without Ray: the same messages as between machines, the clients' states in memory.

    Args:
        federation: whose clients it runs.
        seed: of the models' initialisation.
        threads: kernel threads, as in `ReferenceEngine`.
    """

    def __init__(self, federation: Federation, seed: int, threads: int = 1) -> None:
        require(1 <= threads <= 1024, "threads", "a number from 1 to 1024", threads)
        self._stores = {client.id: MemoryStates() for client in federation.clients}
        nodes = [
            Node(federation, client, seed, lambda _, store=self._stores[client.id]: store)  # type: ignore[misc]
            for client in federation.clients
        ]

        def answering(node: Node) -> Callable[[Message, Context], Message]:
            def answer(message: Message, _: Context) -> Message:
                with kernel_threads(threads):
                    return node.answer(message)

            return answer

        grid = LocalGrid({number: answering(node) for number, node in enumerate(nodes, start=2)})
        super().__init__(grid, roster_of(federation), nodes[0].layout)
        self.experiment = "local"
        self._initial = {node.client.id: node.initial for node in nodes}
        self._states = dict(self._initial)

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back."""
        for id, state in states.items():
            if state.round:
                self._stores[id].by_round[state.round] = state
        super().restore(states)

    def _took(self, id: str, report: Report) -> None:
        self._states[id] = self._stores[id].load(report.round)
