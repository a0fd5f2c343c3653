"""What is trained: the clients, each with its own task and data, and the encoder that they share."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import Data, load, size, take
from fedgradnorm.errors import FederationError, nearest
from fedgradnorm.parameters import norm_layer_slices, trainable
from fedgradnorm.randomness import seeded_torch
from fedgradnorm.records import ClientRecord, MembersRecord
from fedgradnorm.task import Task

__all__ = ["Client", "Federation", "Members"]

CLIENT_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Client:
    """One site: a task, and private data.

    Args:
        id: a stable name of letters, digits, ``.``, ``_`` and ``-``. Weights, heads and randomness are keyed by it.
        task: what it trains.
        train: its training data, or a function without arguments that loads them (called on first use).
        test: its test data, likewise; None where there are none.

    Raises:
        FederationError: an id that is not such a name.
    """

    id: str
    task: Task
    train: Data | Callable[[], Data]
    test: Data | Callable[[], Data] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not CLIENT_ID.fullmatch(self.id):
            raise FederationError(f"client id '{self.id}': expected up to 100 letters, digits, '.', '_', '-', the first no '.' or '-'")

    @cached_property
    def train_data(self) -> Data:
        """The training data, loaded on first use. Raises FederationError where there are none."""
        return self._loaded(self.train, "training")

    @cached_property
    def test_data(self) -> Data | None:
        """The test data, loaded on first use, or None. Raises FederationError where they are empty."""
        return None if self.test is None else self._loaded(self.test, "test")

    def _loaded(self, source: Data | Callable[[], Data], kind: str) -> Data:
        data = load(source)
        if isinstance(data, tuple) and len(data[0]) != len(data[1]):
            raise FederationError(f"client '{self.id}': {len(data[0])} {kind} inputs, but {len(data[1])} targets")
        if size(data) == 0:
            raise FederationError(f"client '{self.id}' is empty: expected at least one {kind} example")
        return data


class Members(ABC):
    """Who takes part, as far as a server has to know it: wherever the clients' data are.

    Attributes:
        clients: the clients, in the order of tables and files.
        encoder: makes the shared network.
        buffers: what becomes of the encoder's buffers.
    """

    clients: Sequence[Client]
    encoder: Callable[[], nn.Module]
    buffers: Literal["local", "averaged"]

    @property
    def client_ids(self) -> list[str]:
        """The ids of the clients, in their order."""
        return [client.id for client in self.clients]

    @abstractmethod
    def client(self, id: str) -> Client:
        """The client with this id. Raises FederationError where there is none."""

    @abstractmethod
    def num_examples(self, id: str) -> int:
        """How many training examples a client has; 0 where that is not known."""

    def make_encoder(self, seed: int) -> nn.Module:
        """The encoder as initialised under this seed."""
        with seeded_torch(seed, 0, "", "encoder"):
            return self.encoder()

    @cached_property
    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """The encoder's trainable parameters: names and shapes in the order of the flat vector."""
        return [(name, tuple(parameter.shape)) for name, parameter in trainable(self.make_encoder(seed=0))]

    def record(self) -> MembersRecord:
        """Who trains what, for a run that is gone on with."""
        return {"encoder": self.layout, "clients": {client.id: self._record_of(client) for client in self.clients}}

    def _record_of(self, client: Client) -> ClientRecord:
        metric = client.task.main_metric
        return {
            "task": client.task.name,
            "metric": "" if metric is None else metric.name,
            "higher_is_better": metric is None or metric.higher_is_better,
            "examples": self.num_examples(client.id),
        }


@dataclass(frozen=True)
class Federation(Members):
    """The clients and what they share. It checks itself when it is built.

    Args:
        clients: the clients, in the order in which tables and files list them; nothing else depends on that order.
        encoder: makes the shared network, without arguments. Frozen parameters (``requires_grad=False``) stay as made.
        norm_layer: which encoder parameters are the norm layer ω̃; see `norm_layer_slices`. None: the last layer.
        buffers: what becomes of the encoder's buffers, such as BatchNorm's running statistics: ``"local"`` leaves them with
            each client, ``"averaged"`` sends them and takes their mean.
        example: one input as a batch of one, shape ``(1, ...)``. Needed only where the data load on first use: with it the
            encoder and the heads can be checked, and models loaded, without the data.

    Raises:
        FederationError: no clients, two clients with one id, an empty client, a norm layer that names no parameter,
            or an encoder whose output does not fit a head.
    """

    clients: Sequence[Client]
    encoder: Callable[[], nn.Module]
    norm_layer: str | Sequence[str] | None = None
    buffers: Literal["local", "averaged"] = "local"
    example: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(self.clients))
        if not self.clients:
            raise FederationError("a federation needs at least one client")
        ids = [client.id for client in self.clients]
        repeated = [id for id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise FederationError(f"two clients have the id '{repeated[0]}': expected different ids")
        if isinstance(self.encoder, nn.Module) or not callable(self.encoder):
            raise FederationError(f"encoder: expected a function that makes the encoder, found {type(self.encoder).__name__}")
        tasks: dict[str, Task] = {}
        for client in self.clients:
            other = tasks.setdefault(client.task.name, client.task)
            if [(m.name, m.higher_is_better) for m in other.metrics] != [(m.name, m.higher_is_better) for m in client.task.metrics]:
                raise FederationError(f"client '{client.id}': two tasks with different metrics have the name '{client.task.name}'")
        if self.buffers not in ("local", "averaged"):
            raise FederationError(f"buffers: expected 'local' or 'averaged', found '{self.buffers}'")
        encoder = self.make_encoder(seed=0)
        if len({parameter.dtype for _, parameter in trainable(encoder)}) != 1:
            raise FederationError("the encoder needs trainable parameters, all of one dtype")
        norm_layer_slices(encoder, self.norm_layer)
        for client in self.clients:
            self._check_fit(client, encoder)

    def client(self, id: str) -> Client:
        """The client with this id. Raises FederationError where there is none."""
        try:
            return self._by_id[id]
        except KeyError:
            raise FederationError(f"there is no client '{id}'; {nearest(id, self.client_ids)}") from None

    @cached_property
    def _by_id(self) -> dict[str, Client]:
        return {client.id: client for client in self.clients}

    def num_examples(self, id: str) -> int:
        """How many training examples a client has."""
        return size(self.client(id).train_data)

    def make_head(self, client: Client, seed: int) -> nn.Module:
        """The head of a client as initialised under this seed."""
        with seeded_torch(seed, 0, client.id, "head"):
            return client.task.head(self.num_features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self._example_of(self.clients[0]).shape[1:])

    @cached_property
    def num_features(self) -> int:
        """The size of the encoder's output, which every head is given."""
        return int(_encode(self.make_encoder(seed=0), self._example_of(self.clients[0])).shape[1])

    def check_data(self, batch_size: int = 64) -> None:
        """Load every client's data, and let them pass once through its model, its loss and its metrics.

        Every client trains one batch on a copy of the model, and its loss and metrics see all targets of data that are tensors.

        Raises:
            FederationError: data that are empty, or that the encoder, the head, the loss or a metric cannot take.
            DataError: a source that cannot be read.
        """
        encoder = self.make_encoder(seed=0)
        for client in self.clients:
            for kind, data in (("training", client.train_data), ("test", client.test_data)):
                if data is None:
                    continue
                try:
                    with seeded_torch(0, 0, client.id, "check"):
                        self._try(client, encoder, data, batch_size if kind == "training" else 1)
                except Exception as error:  # the user's own code may raise anything
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    raise FederationError(
                        f"client '{client.id}': its {kind} data do not pass through its model and loss: {reason}"
                    ) from error

    def _try(self, client: Client, encoder: nn.Module, data: Data, batch_size: int) -> None:
        task, head = client.task, client.task.head(self.num_features)
        inputs, targets = take(data, np.arange(min(batch_size, size(data))))
        if batch_size > 1:
            loss = task.loss(head.train()(encoder.train()(inputs)), targets)
            torch.autograd.grad(_one_number(loss), [parameter for _, parameter in trainable(encoder)], allow_unused=True)
        with torch.no_grad():
            output = head.eval()(encoder.eval()(inputs[:1]))
            targets = data[1] if isinstance(data, tuple) else targets
            outputs = output.expand(len(targets), *output.shape[1:])
            _one_number(task.loss(outputs, targets))
            for metric in task.metrics:
                float(metric.function(outputs, targets))

    def _example_of(self, client: Client) -> Tensor:
        if self.example is not None:
            return self.example
        return take(client.train_data, np.zeros(1, dtype=np.int64))[0]

    def _check_fit(self, client: Client, encoder: nn.Module) -> None:
        example = self._example_of(client)
        try:
            features = _encode(encoder, example)
        except Exception as error:  # the user's own code may raise anything
            raise FederationError(f"client '{client.id}': its inputs do not pass through the encoder: {error}") from error
        if features.ndim < 2:
            raise FederationError(f"the encoder gives shape {tuple(features.shape)} for a batch of one, expected (1, features)")
        try:
            with torch.no_grad():
                self.make_head(client, seed=0).eval()(features)
        except Exception as error:  # the user's own code may raise anything
            shape = tuple(features.shape)
            raise FederationError(f"client '{client.id}': the encoder's output of shape {shape} does not fit its head: {error}") from error


def _one_number(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the loss gives {found}, expected a tensor of one number for a batch")
    return loss.squeeze()


@torch.no_grad()
def _encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    output = encoder.eval()(inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"expected the encoder to give a tensor, found {type(output).__name__}")
    return output
