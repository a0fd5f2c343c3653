"""What is odd about clients and drops no report: other versions, lost states, changed data."""

import logging

from fedgradnorm.errors import MessageError
from fedgradnorm.flower.messages import VERSIONS, Greeting
from fedgradnorm.flower.reports import Reply

log = logging.getLogger(__name__)


class Notes:
    """Collects notes on clients for the run's records, and logs each of them."""

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

    def heed(
        self, client: str, reply: Reply, base: int, initial_loss: float | None, examples: int | None
    ) -> None:
        """Note what a client says about the state that it began with, and about its data.

        Args:
            client: the client's key.
            reply: what it says.
            base: the round of the state that it was told to begin with.
            initial_loss: the F(0) that it was told; None where the server knows none.
            examples: how many examples it trained with; None for a test.

        Raises:
            MessageError: it names a round that cannot be.
        """
        rounds = (("began", reply.began, base - 1), ("data_since", reply.data_since, base))
        for name, round, last in rounds:
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
