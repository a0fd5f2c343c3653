"""Clients that are late again and again rest, so that not every round takes the whole time."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from fedgradnorm.flower.status import ANSWERED, Failure

log = logging.getLogger(__name__)


class Rests:
    """The rests of clients that did not answer in time.

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
