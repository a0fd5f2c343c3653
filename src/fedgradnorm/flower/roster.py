"""The clients of a run across machines, as far as a server knows them: their keys, their tasks, how many examples they have."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from fedgradnorm.errors import FederationError, nearest
from fedgradnorm.federation import Client, Federation, Members, absent, absent_client
from fedgradnorm.flower.messages import Greeting, arrays_of
from fedgradnorm.parameters import buffers_of, trainable
from fedgradnorm.runs.records import MembersRecord
from fedgradnorm.task import Task

__all__ = ["Roster", "module_of", "roster_of"]


class Roster(Members):
    """Clients that are elsewhere. Of them it checks nothing but key and task: data and heads are not here.

    Args:
        encoder: makes the encoder.
        buffers: what becomes of its buffers.
        clients: their keys and tasks. Without any it is open, and takes in whoever comes; else nobody who is not among them.
    """

    def __init__(
        self,
        encoder: Callable[[], nn.Module],
        buffers: Literal["local", "averaged"] = "local",
        clients: Iterable[tuple[str, Task]] = (),
    ) -> None:
        self.encoder, self.buffers = encoder, buffers
        self._clients = {id: Client(id, task, absent) for id, task in clients}
        self._examples: dict[str, int] = {}
        self.open = not self._clients

    def new_encoder(self) -> nn.Module:
        """What the encoder's factory gives."""
        return self.encoder()

    @property
    def clients(self) -> Sequence[Client]:  # type: ignore[override]
        """The clients, in the order in which they came."""
        return tuple(self._clients.values())

    def client(self, id: str) -> Client:
        """The client with this key. Raises FederationError where there is none."""
        try:
            return self._clients[id]
        except KeyError:
            raise FederationError(
                f"there is no client '{id}'; {nearest(id, self._clients)}"
            ) from None

    def num_examples(self, id: str) -> int:
        """How many training examples a client has said that it has; 0 before."""
        return self._examples.get(id, 0)

    def learn(self, id: str, num_examples: int) -> None:
        """Note how many training examples a client has, where it says so."""
        self._examples[id] = num_examples or self._examples.get(id, 0)

    def recall(self, members: MembersRecord) -> None:
        """Know again the clients of a run that is gone on with, so that one that does not come back keeps its lines and its metric."""
        for id, one in members["clients"].items():
            if self.open:
                self._expect(id, one["task"], one["metric"], one["higher_is_better"])
            self.learn(id, one["examples"])

    def _expect(self, id: str, task: str, metric: str, higher_is_better: bool) -> None:
        self._clients[id] = absent_client(id, task, metric, higher_is_better)

    def admit(self, greeting: Greeting) -> str | None:
        """Take a client in; a reason where that is not to be."""
        id, task = greeting.client, greeting.task
        known = self._clients.get(id)
        if known is None and not self.open:
            return f"there is no client '{id}' in the federation"
        if known is not None and known.task.name != task:
            return f"client '{id}' has task '{known.task.name}', and the node says '{task}'"
        if self.open:
            for other in self._clients.values():
                metric = other.task.main_metric
                same = metric is None or (metric.name, metric.higher_is_better) == (
                    greeting.metric,
                    greeting.higher_is_better,
                )
                if other.id != id and other.task.name == task and greeting.metric and not same:
                    return f"client '{id}' measures task '{task}' in another way than client '{other.id}'"
            self._expect(id, task, greeting.metric, greeting.higher_is_better)
        self.learn(id, greeting.num_examples)
        return None


def roster_of(federation: Federation) -> Roster:
    """The clients of a federation without their data. Raises FederationError for an encoder that no message can hold."""
    encoder = federation.make_encoder(seed=0)
    arrays_of(
        {
            **dict(trainable(encoder)),
            **(buffers_of(encoder) if federation.buffers == "averaged" else {}),
        }
    )
    return Roster(
        federation.new_encoder,
        federation.buffers,
        [(client.id, client.task) for client in federation.clients],
    )


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A module whose parameters have these names and values, and that computes nothing."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root
