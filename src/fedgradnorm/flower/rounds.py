"""The rounds that the clients' states belong to, and those that a run may go back to."""

from collections.abc import Mapping

from fedgradnorm.client import ClientState
from fedgradnorm.messages import Instruction

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

        While not all such rounds are known, round 0 stands for them, and the client keeps all it
        has.
        """
        if instruction.attempt == 0:
            bases = self._bases.setdefault(instruction.client, [0] * (self.keep + 1))
            bases.append(self.base(instruction.client))
            del bases[: -self.keep - 1]

    def kept(self, client: str) -> tuple[int, ...]:
        """The rounds whose states a client has to keep, ascending; with 0 among them, all."""
        return tuple(sorted({*self._bases.get(client, ()), self.base(client)}))

    def all_of(self, clients: list[str]) -> Mapping[str, ClientState]:
        """The states of these clients and of all others that are known, by client."""
        return {**dict.fromkeys(clients, INITIAL), **self.states}
