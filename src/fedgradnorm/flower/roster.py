"""The clients of a run across machines, as far as a server knows them: their keys, their tasks, how many examples they have."""

from typing import Any

from torch import Tensor, nn

from fedgradnorm.federation import Client, Federation
from fedgradnorm.flower.messages import Greeting
from fedgradnorm.task import Metric, Task

__all__ = ["Remote", "Roster", "module_of", "roster_of"]


class Remote:
    """Data of which nothing but their number is here."""

    def __init__(self, num_examples: int = 0) -> None:
        self.num_examples = num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        raise LookupError("a client's data are with the client alone")


class Roster(Federation):
    """A federation whose clients are elsewhere. Of them it checks nothing but key and task: data and heads are not here.

    Without clients at first, it takes in whoever comes; else nobody who is not among them.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(self.clients))
        self.__dict__["open"] = not self.clients

    def expect(self, client: str, task: str, metric: str = "", higher_is_better: bool = True) -> None:
        """One more client, unless it is known."""
        if client not in self.client_ids:
            metrics = (Metric(metric, _nowhere, higher_is_better),) if metric else ()
            object.__setattr__(self, "clients", (*self.clients, Client(client, Task(task, nn.Identity, _nowhere, metrics), Remote())))
            self.__dict__.pop("_by_id", None)

    def admit(self, greeting: Greeting) -> str | None:
        """Take a client in; a reason where that is not to be."""
        if self.__dict__["open"]:
            self.expect(greeting.client, greeting.task, greeting.metric, greeting.higher_is_better)
        if greeting.client not in self.client_ids:
            return f"there is no client '{greeting.client}' in the federation"
        client = self.client(greeting.client)
        if greeting.task != client.task.name:
            return f"client '{greeting.client}' has task '{client.task.name}', and the node says '{greeting.task}'"
        client.__dict__["train_data"] = Remote(greeting.num_examples)
        return None


def roster_of(federation: Federation) -> Roster:
    """The clients of a federation without their data."""
    clients = [Client(client.id, client.task, Remote()) for client in federation.clients]
    return Roster(clients, federation.encoder, federation.norm_layer, federation.buffers, federation.example)


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


def _nowhere(*_: Tensor) -> Any:
    raise LookupError("a client's loss is with the client alone")
