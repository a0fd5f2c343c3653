"""What the server notes about its clients: their states' rounds, their rests, and what is odd."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from fedgradnorm.client import ClientState
from fedgradnorm.errors import MessageError
from fedgradnorm.flower.messages import VERSIONS, Greeting
from fedgradnorm.flower.reports import Reply
from fedgradnorm.flower.status import ANSWERED, Failure
from fedgradnorm.messages import Instruction

log = logging.getLogger(__name__)

INITIAL = ClientState({})


class Rounds:
    """The server's record of the states that its clients keep.

    Args:
        keep: how many states before the last one each client keeps.

    Attributes:
        states: by client, its state as far as the server knows it: the round and F(0).
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.states: dict[str, ClientState] = {}
        self._bases: dict[str, list[int]] = {}

    def base(self, client: str) -> int:
        """The round whose state a client begins with; 0: its initial state."""
        return self.states.get(client, INITIAL).round

    def initial_loss(self, client: str) -> float | None:
        """A client's F(0); None before it has one."""
        return self.states[client].initial_loss if self.base(client) else None

    def remember(self, instruction: Instruction) -> None:
        """Note which state a client has before a round: a run may go back to that checkpoint.

        While not all such rounds are known, round 0 stands for them: the client keeps all it has.
        """
        if instruction.attempt == 0:
            bases = self._bases.setdefault(instruction.client, [0] * (self.keep + 1))
            bases.append(self.base(instruction.client))
            del bases[: -self.keep - 1]

    def kept(self, client: str) -> tuple[int, ...]:
        """The rounds whose states a client has to keep, ascending; with 0 among them, all."""
        return tuple(sorted({*self._bases.get(client, ()), self.base(client)}))


class Rests:
    """The rests of clients that did not answer in time, so that not every round takes all its time.

    The first time costs nothing. From the second time on, a client rests for 1 round, then for 2,
    4, ..., unless it has answered in between.

    Args:
        longest: the maximum number of rounds; with 0 no client ever rests.

    >>> rests = Rests(longest=16)
    >>> [rests.was_late("a", round) for round in (1, 2, 4, 7)], rests.resting(8)
    ([0, 1, 2, 4], {'a': 11})
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.times = Counter[str]()
        self._until: dict[str, int] = {}

    def was_late(self, client: str, round: int) -> int:
        """Note that a client was late in a round. Returns for how many rounds it rests now."""
        self.times[client] += 1
        times = self.times[client]
        rest = min(2 ** min(times - 2, 30), self.longest) if times > 1 else 0
        self._until[client] = round + rest
        return rest

    def answered(self, client: str) -> None:
        """Note that a client answered, or that another node stands for it."""
        self.times.pop(client, None)
        self._until.pop(client, None)

    def note(
        self, asked: Iterable[str], failures: Mapping[str, Failure], number: int, what: str
    ) -> None:
        """Note which of the asked clients answered, and which were late and may rest.

        Args:
            asked: the clients.
            failures: by client, why it has no sound reply.
            number: of the round, or of the test.
            what: ``rounds`` or ``tests``, for the log.
        """
        for client in asked:
            kind = failures[client].kind if client in failures else None
            if kind == "late" and (rest := self.was_late(client, number)):
                text = "client %s was late in %d %s in a row: it rests for %d"
                log.warning(text, client, self.times[client], what, rest)
            elif kind in (None, *ANSWERED):
                self.answered(client)

    def resting(self, round: int) -> dict[str, int]:
        """By client, the last round of its rest, for those that rest in a round."""
        return {client: until for client, until in self._until.items() if until >= round}


class Notes:
    """Collects for the run's records what is odd about clients and drops no report, and logs it.

    These are other versions, lost states and changed data.
    """

    def __init__(self) -> None:
        self._notes: dict[str, list[str]] = {}
        self._versions: dict[str, list[str]] = {}
        self._changed: dict[str, str] = {}

    def take(self) -> dict[str, list[str]]:
        """The notes since the last call, by client."""
        notes, self._notes = self._notes, {}
        return notes

    def add(self, client: str, text: str) -> None:
        """Note something about a client, unless the same was noted since the last `take`."""
        if text not in self._notes.setdefault(client, []):
            log.warning("client %s: %s", client, text)
            self._notes[client].append(text)

    def compare_versions(self, greeting: Greeting) -> None:
        """Note once that a client runs other versions than the server."""
        texts, own, torch = list[str](), VERSIONS["version"], VERSIONS["torch_version"]
        if greeting.version != own:
            runs = f"it runs fedgradnorm {greeting.version}, this server {own}"
            texts.append(f"{runs}: expected one version on every machine")
        if greeting.torch_version != torch:
            runs = f"it runs torch {greeting.torch_version}, this server {torch}"
            texts.append(f"{runs}: its figures may differ by more than rounding")
        if texts != self._versions.get(greeting.client, []):
            self._versions[greeting.client] = texts
            for text in texts:
                self.add(greeting.client, text)

    def heed(self, client: str, reply: Reply, rounds: Rounds, examples: int | None) -> None:
        """Note what a client says about the state that it began with, and about its data.

        Args:
            client: the client's key.
            reply: what it says.
            rounds: which state it was told to begin with, and its F(0).
            examples: how many examples it trained with; None for a test.

        Raises:
            MessageError: it names a round that cannot be.
        """
        base, initial_loss = rounds.base(client), rounds.initial_loss(client)
        limits = (("began", reply.began, base - 1), ("data_since", reply.data_since, base))
        for name, round, last in limits:
            if round is not None and round > last:
                raise MessageError(f"{name}: expected a round before {last + 1}, found {round}")
        if reply.began is not None:
            if reply.began:
                start = f"that of round {reply.began}"
            elif initial_loss is None:
                start = "a fresh head, its F(0) measured anew"
            else:
                start = f"a fresh head and its F(0) of {initial_loss:.4g}"
            did = "was tested" if examples is None else "trained"
            self.add(client, f"its state of round {base} is lost: it {did} with {start}")
        if reply.data_since is not None and examples is not None:
            many = f"{examples} other examples"
            if examples != reply.data_before:
                many = f"{examples} examples, before {reply.data_before}"
            text = f"its training data changed after round {reply.data_since}: {many}"
            # a client whose report was dropped says the same in the next round
            if text != self._changed.get(client):
                self._changed[client] = text
                self.add(client, text)
