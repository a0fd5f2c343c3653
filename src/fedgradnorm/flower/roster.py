"""The clients of a run across machines, as the server knows them: keys, tasks, example counts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from fedgradnorm.errors import FederationError, nearest
from fedgradnorm.federation import Client, Federation, Members, absent, absent_client
from fedgradnorm.flower.layout import arrays_of
from fedgradnorm.flower.messages import Greeting, Refusal
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.parameters import buffers_of, trainable
from fedgradnorm.task import Task


class Roster(Members):
    """Clients on other machines. Only keys and tasks are checked: data and heads are not here.

    Args:
        encoder: makes the encoder.
        buffers: whether each client keeps the encoder's buffers, or the server averages them.
        clients: their keys and tasks. Without any, the roster is open and admits every client.
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
        if id not in self._clients:
            raise FederationError(f"there is no client '{id}'; {nearest(id, self._clients)}")
        return self._clients[id]

    def num_examples(self, id: str) -> int:
        """How many training examples a client has said that it has; 0 before."""
        return self._examples.get(id, 0)

    def learn(self, id: str, num_examples: int) -> None:
        """Note how many training examples a client has, where it says so."""
        self._examples[id] = num_examples or self._examples.get(id, 0)

    def recall(self, members: MembersRecord) -> None:
        """Restore the clients of a resumed run: those that stay away keep lines and metric."""
        for id, client in members["clients"].items():
            if self.open:
                self._expect(id, client["task"], client["metric"], client["higher_is_better"])
            self.learn(id, client["examples"])

    def _expect(self, id: str, task: str, metric: str, higher_is_better: bool) -> None:
        self._clients[id] = absent_client(id, task, metric, higher_is_better)

    def admit(self, greeting: Greeting) -> Refusal | None:
        """Admit the client of a greeting, or refuse it."""
        id, task, known = greeting.client, greeting.task, self._clients.get(greeting.client)
        if known is None and not self.open:
            words = f"there is no client '{id}' in the federation"
            return Refusal(code="unknown-client", words=words, client=id)
        if known is not None and known.task.name != task:
            words = f"client '{id}' has task '{known.task.name}', and the node says '{task}'"
            return Refusal(code="other-task", words=words, client=id)
        if self.open:
            other = self._with_other_metric(greeting)
            if other is not None:
                words = f"client '{id}' measures task '{task}' in another way than client '{other}'"
                return Refusal(code="other-metric", words=words, client=id)
            self._expect(id, task, greeting.metric, greeting.higher_is_better)
        self.learn(id, greeting.num_examples)
        return None

    def _with_other_metric(self, greeting: Greeting) -> str | None:
        """The key of another client that measures the same task by another metric."""
        own = greeting.metric, greeting.higher_is_better
        for other in self._clients.values():
            metric = other.task.main_metric
            same = metric is None or (metric.name, metric.higher_is_better) == own
            shares = other.id != greeting.client and other.task.name == greeting.task
            if shares and greeting.metric and not same:
                return other.id
        return None


def roster_of(federation: Federation) -> Roster:
    """The clients of a federation without their data.

    Raises FederationError for an encoder that no message can hold.
    """
    encoder = federation.make_encoder(seed=0)
    averaged = buffers_of(encoder) if federation.buffers == "averaged" else {}
    arrays_of({**dict(trainable(encoder)), **averaged})
    clients = [(client.id, client.task) for client in federation.clients]
    return Roster(federation.new_encoder, federation.buffers, clients)


def module_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A module that has parameters with these names and values, and computes nothing."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(tensor.clone()))
    return root
