"""How long a server waits for its clients, and for how many."""

import math
from dataclasses import dataclass

from fedgradnorm.errors import require

SHORTEST, LONGEST = 60.0, 1e8
"""Seconds: a SuperLink has at least the first to say who is connected; no limit is above the second
(three years)."""


@dataclass(frozen=True)
class Limits:
    """How long a server waits, and for how many clients.

    Attributes:
        min_nodes: clients that have to be connected before a round.
        node_timeout: seconds to wait for them; then the run stops, and can be resumed.
        round_timeout: maximum seconds to wait for the replies of a round; a client that has not
            answered by then counts as dropped.
        min_replies: a share of the clients that were asked. When this share has answered, the
            others get the same time again. With 1 they have all of ``round_timeout``.
        max_rest: a client that is late again rests for 1 round, then for 2, 4, ... rounds, at most
            for this number; with 0 no client ever rests.
        greeting_timeout: seconds to wait until new nodes have said who they are.
        poll: seconds between looks for new nodes.
        ask_again: seconds until a node that stays out is asked again who it is; the time doubles
            each time that the node does not answer.

    Raises:
        ConfigError: a number is out of range.
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
        nodes, share, wait = self.min_nodes, self.min_replies, self.node_timeout
        require(nodes >= 1, "min_nodes", "a number of at least 1", nodes)
        require(0 <= wait <= LONGEST, "node_timeout", f"seconds, from 0 to {LONGEST:g}", wait)
        for name in ("round_timeout", "greeting_timeout"):
            seconds, expected = getattr(self, name), f"seconds, more than 0 and at most {LONGEST:g}"
            require(0 < seconds <= LONGEST, name, expected, seconds)
        require(0 < share <= 1, "min_replies", "a share, more than 0 and at most 1", share)
        rest = self.max_rest
        require(rest >= 0, "max_rest", "a number of rounds, at least 0", rest)

    def enough(self, asked: int, least: int = 1) -> int | None:
        """After how many answers the other clients get only the same time again; None: all time."""
        if self.min_replies == 1:
            return None
        return max(math.ceil(self.min_replies * asked - 1e-9), least)
