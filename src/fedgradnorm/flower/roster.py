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
        """One client more, or a known one with this metric."""
        metrics = (Metric(metric, _nowhere, higher_is_better),) if metric else ()
        known = {one.id: one for one in self.clients} | {client: _remote(client, Task(task, nn.Identity, _nowhere, metrics))}
        object.__setattr__(self, "clients", tuple(known.values()))
        self.__dict__.pop("_by_id", None)

    def admit(self, greeting: Greeting) -> str | None:
        """Take a client in; a reason where that is not to be."""
        id, is_open = greeting.client, self.__dict__["open"]
        tasks = {client.id: client.task for client in self.clients}
        if id not in tasks and not is_open:
            return f"there is no client '{id}' in the federation"
        if id in tasks and tasks[id].name != greeting.task:
            return f"client '{id}' has task '{tasks[id].name}', and the node says '{greeting.task}'"
        if is_open:
            for other, task in tasks.items():
                metric = task.main_metric
                same = metric is None or (metric.name, metric.higher_is_better) == (greeting.metric, greeting.higher_is_better)
                if other != id and task.name == greeting.task and greeting.metric and not same:
                    return f"client '{id}' measures task '{greeting.task}' in another way than client '{other}'"
            self.expect(id, greeting.task, greeting.metric, greeting.higher_is_better)
        self.client(id).__dict__["train_data"] = Remote(greeting.num_examples)
        return None


def roster_of(federation: Federation) -> Roster:
    """The clients of a federation without their data."""
    clients = [_remote(client.id, client.task) for client in federation.clients]
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


def _remote(id: str, task: Task) -> Client:
    client = Client(id, task, Remote())
    client.__dict__["train_data"] = Remote()  # none are known before it has said how many: that is no error here
    return client


def _nowhere(*_: Tensor) -> Any:
    raise LookupError("a client's loss is with the client alone")
