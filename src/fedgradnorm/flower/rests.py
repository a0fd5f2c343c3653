"""Who is late again and again rests, so that it does not cost everybody the whole time of every round."""

from collections import Counter

__all__ = ["Rests"]


class Rests:
    """The rests of clients that did not answer in time.

    The first time costs nothing. From the second on, if it answered at no time between, a client rests for 1 round, then for 2, 4, ...

    Args:
        longest: the most rounds; 0: none ever rests.

    >>> rests = Rests(longest=16)
    >>> [rests.was_late("a", round) for round in (1, 2, 4, 7)], rests.resting(8)
    ([0, 1, 2, 4], {'a': 11})
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.times = Counter[str]()
        self._until: dict[str, int] = {}

    def was_late(self, client: str, round: int) -> int:
        """Note that a client was late in a round. For how many rounds it rests now."""
        self.times[client] += 1
        rest = (
            min(2 ** min(self.times[client] - 2, 30), self.longest) if self.times[client] > 1 else 0
        )
        self._until[client] = round + rest
        return rest

    def answered(self, client: str) -> None:
        """Note that a client answered, or that another node stands for it."""
        self.times.pop(client, None)
        self._until.pop(client, None)

    def resting(self, round: int) -> dict[str, int]:
        """The clients that rest in a round, and the last round of each one's rest."""
        return {client: until for client, until in self._until.items() if until >= round}
