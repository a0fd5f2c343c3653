"""Which node stands for which client, and which nodes stay out."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping

from fedgradnorm.flower.messages import Greeting, Refusal
from fedgradnorm.flower.records import one_line

log = logging.getLogger(__name__)


class Attendance:
    """Notes which nodes are online, and which clients they said they stand for.

    Two nodes that claim one client's key both stay out until one of them is gone. A node that
    claims the key of a connected node stays out until that node is gone. When a node is gone, all
    nodes that stay out are asked again at once.

    Args:
        admit: takes in the client of a greeting, or gives a refusal.
        ask_again: seconds until a node that stays out is asked again; the time doubles each time
            that the node does not answer.

    Attributes:
        nodes: by client key, the id of the connected node.
        refusals: by node id, why it stays out.
    """

    def __init__(self, admit: Callable[[Greeting], Refusal | None], ask_again: float) -> None:
        self.admit, self.ask_again = admit, ask_again
        self.nodes: dict[str, int] = {}
        self.refusals: dict[int, Refusal] = {}
        self._online: set[int] = set()
        self._ask_at: dict[int, float] = {}
        self._silent: Counter[int] = Counter()
        self._claims: dict[int, str] = {}

    @property
    def clients(self) -> list[str]:
        """The keys of the connected clients, sorted."""
        return sorted(self.nodes)

    @property
    def words(self) -> dict[int, str]:
        """By node id, in words why it stays out."""
        return {node: refusal.words for node, refusal in self.refusals.items()}

    def see(self, online: set[int]) -> None:
        """Note which nodes are online, and forget all others."""
        if self._online - online:  # a node that kept another one out may be gone
            self._ask_at = {node: at for node, at in self._ask_at.items() if self._silent[node]}
            silent = {node: times for node, times in self._silent.items() if node in online}
            self._silent = Counter(silent)
        self._online = online
        self.nodes = {client: node for client, node in self.nodes.items() if node in online}
        self.refusals = {node: why for node, why in self.refusals.items() if node in online}
        self._claims = {node: client for node, client in self._claims.items() if node in online}

    def to_ask(self, now: float) -> list[int]:
        """The nodes that are to be asked at this time who they are, sorted."""
        unknown = self._online - set(self.nodes.values())
        return sorted(node for node in unknown if now >= self._ask_at.get(node, -math.inf))

    def hear(self, answers: Mapping[int, Greeting | Refusal], now: float) -> list[Greeting]:
        """Note what nodes answered when they were asked who they are.

        Args:
            answers: by node id; a refusal with the code ``no-answer`` for a node without an answer.
            now: the time in seconds.

        Returns:
            The greetings of the clients that are connected from now on.
        """
        greetings: dict[int, Greeting] = {}
        for node, answer in answers.items():
            if isinstance(answer, Greeting):
                greetings[node] = answer
            else:
                self._refuse(node, answer)
            if isinstance(answer, Refusal) and answer.code == "no-answer":
                self._silent[node] += 1  # it has not given up an earlier claim
            else:
                self._silent.pop(node, None)
                self._claims.pop(node, None)
            self._ask_at[node] = now + self.ask_again * 2 ** max(0, self._silent[node] - 1)
        self._claims |= {node: greeting.client for node, greeting in greetings.items()}
        claims = Counter(self._claims.values())
        return [
            greeting
            for node, greeting in greetings.items()
            if self._connect(node, greeting, claims[greeting.client])
        ]

    def leave(self, client: str) -> None:
        """Forget a client's node, so that it is asked again at once who it is."""
        node = self.nodes.pop(client, -1)
        self._ask_at.pop(node, None)
        self._claims.pop(node, None)

    def why_absent(self, client: str) -> str | None:
        """In words, why the node of a client was refused; None where no node was refused as it."""
        reasons = (why.words for why in self.refusals.values() if why.client == client)
        return next(reasons, None)

    def _connect(self, node: int, greeting: Greeting, claims: int) -> bool:
        key, refusal = f"client key '{greeting.client}'", None
        if greeting.client in self.nodes:
            words = f"{key} belongs to a node that is connected"
            refusal = Refusal(code="key-in-use", words=words, client=greeting.client)
        elif claims > 1:
            words = f"{key} is claimed by {claims} nodes"
            refusal = Refusal(code="key-claimed", words=words, client=greeting.client)
        else:
            refusal = self.admit(greeting)
        if refusal is not None:
            self._refuse(node, refusal)
            return False
        self.refusals.pop(node, None)
        self.nodes[greeting.client] = node
        log.info("client %s is connected, node %d", greeting.client, node)
        return True

    def _refuse(self, node: int, refusal: Refusal) -> None:
        refusal = refusal.model_copy(update={"words": one_line(refusal.words)})
        if self.refusals.get(node) != refusal:
            log.warning("node %d stays out: %s", node, refusal.words)
        self.refusals[node] = refusal
