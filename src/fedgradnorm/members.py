"""Who takes part: clients with their tasks and data, and what a server has to know about them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn
from typing_extensions import TypeIs  # the standard library has it from Python 3.13 on

from fedgradnorm.data import Data, misfit, size
from fedgradnorm.errors import FederationError, raised_as
from fedgradnorm.modules import Source
from fedgradnorm.parameters import trainable
from fedgradnorm.randomness import seeded
from fedgradnorm.task import Metric, Task

CLIENT_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Client:
    """One site: a task, and private data.

    Args:
        id: a stable name of letters, digits, ``.``, ``_`` and ``-``. Weights, heads and randomness
            are keyed by it.
        task: what it trains.
        train: its training data, or a function without arguments that loads them. It is called on
            first use.
        test: its test data, or a function that loads them; None: it has none.

    Raises:
        FederationError: an id that is not such a name, no task, or data of an unknown kind. Data
            that a function gives are checked when they are loaded.
    """

    id: str
    task: Task
    train: Data | Callable[[], Data]
    test: Data | Callable[[], Data] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not CLIENT_ID.fullmatch(self.id):
            expected = "expected up to 100 letters, digits, '.', '_', '-', the first no '.' or '-'"
            raise FederationError(f"client id '{self.id}': {expected}")
        if not isinstance(self.task, Task):
            kind = type(self.task).__name__
            raise FederationError(f"client '{self.id}': task: expected a Task, found {kind}")
        if not _is_loader(self.train):
            self._check(self.train, "training")
        if self.test is not None and not _is_loader(self.test):
            self._check(self.test, "test")

    @cached_property
    def train_data(self) -> Data:
        """The training data. Raises FederationError if they cannot be loaded, or are empty."""
        return self._loaded(self.train, "training")

    @cached_property
    def test_data(self) -> Data | None:
        """The test data, or None. Raises FederationError if they cannot be loaded, or are empty."""
        return None if self.test is None else self._loaded(self.test, "test")

    def _loaded(self, source: Data | Callable[[], Data], kind: str) -> Data:
        if not _is_loader(source):
            return source
        text = f"client '{self.id}': the function that loads its {kind} data raised"
        with raised_as(FederationError, text), seeded(0, 0, self.id, f"{kind} data"):
            data = source()
        self._check(data, kind)
        return data

    def _check(self, data: object, kind: str) -> None:
        """Raise FederationError for data of an unknown kind, or without examples."""
        if (why := misfit(data)) is not None:
            raise FederationError(f"client '{self.id}': {kind} data: {why}")
        if isinstance(data, tuple) and len(data[0]) != len(data[1]):
            counts = f"{len(data[0])} {kind} inputs, but {len(data[1])} targets"
            raise FederationError(f"client '{self.id}': {counts}")
        if size(data) == 0:  # type: ignore[arg-type]  # it fits
            expected = f"expected at least one {kind} example"
            raise FederationError(f"client '{self.id}' is empty: {expected}")


def _is_loader(source: Data | Callable[[], Data] | None) -> TypeIs[Callable[[], Data]]:
    """Whether this is a function that loads data. A dataset may be callable too."""
    return callable(source) and not hasattr(source, "__getitem__")


def absent(*_: object) -> Any:
    """Stands for data, heads, losses and metrics on another machine. Raises LookupError."""
    raise LookupError("a client's data and losses are with the client alone")


def absent_client(
    id: str, task: str, metric: str = "", higher_is_better: bool = True, percent: bool = False
) -> Client:
    """A client on another machine, of which only names are known: ``metric`` is "" for none."""
    metrics = (Metric(metric, absent, higher_is_better, percent),) if metric else ()
    return Client(id, Task(task, absent, absent, metrics), absent)


class Members(ABC):
    """Who takes part, as far as a server has to know it. The data may be on other machines.

    Attributes:
        clients: the clients, in the order in which tables and files list them.
        encoder: makes the shared network.
        buffers: whether the encoder's buffers are local to each client, or averaged.
    """

    clients: Sequence[Client]
    encoder: Callable[[], nn.Module]
    buffers: Literal["local", "averaged"]

    @property
    def client_ids(self) -> list[str]:
        """The clients' ids in order."""
        return [client.id for client in self.clients]

    @abstractmethod
    def client(self, id: str) -> Client:
        """The client with this id. Raises FederationError if there is none."""

    @abstractmethod
    def num_examples(self, id: str) -> int:
        """How many training examples a client has; 0 if that is not known."""

    @abstractmethod
    def new_encoder(self) -> nn.Module:
        """Call the encoder's factory. Lazy parameters of its module get their shapes."""

    @cached_property
    def encoders(self) -> Source:
        """The encoder's factory as a `Source` of copies. Its key is a seed."""

        def call(seed: int) -> nn.Module:
            with seeded(seed, 0, "", "encoder"):
                return self.new_encoder()

        return Source(call, 0, "encoder")

    def make_encoder(self, seed: int) -> nn.Module:
        """A new encoder, as initialised under this seed."""
        return self.encoders.make(seed)

    @cached_property
    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the encoder's trainable parameters, as in the flat vector."""
        parameters = trainable(self.make_encoder(seed=0))
        return [(name, tuple(parameter.shape)) for name, parameter in parameters]
