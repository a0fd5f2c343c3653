"""What is trained: the clients, each with its own task and data, and the encoder that they share."""

import re
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
from fedgradnorm.task import Task

__all__ = ["Client", "Federation"]

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
        if not CLIENT_ID.fullmatch(self.id):
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


@dataclass(frozen=True)
class Federation:
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
        if not self.clients:
            raise FederationError("a federation needs at least one client")
        ids = [client.id for client in self.clients]
        repeated = [id for id, count in Counter(ids).items() if count > 1]
        if repeated:
            raise FederationError(f"two clients have the id '{repeated[0]}': expected different ids")
        if self.buffers not in ("local", "averaged"):
            raise FederationError(f"buffers: expected 'local' or 'averaged', found '{self.buffers}'")
        encoder = self.make_encoder(seed=0)
        if len({parameter.dtype for _, parameter in trainable(encoder)}) != 1:
            raise FederationError("the encoder needs trainable parameters, all of one dtype")
        norm_layer_slices(encoder, self.norm_layer)
        for client in self.clients:
            self._check_fit(client, encoder)

    @property
    def client_ids(self) -> list[str]:
        """The ids of the clients, in their order."""
        return [client.id for client in self.clients]

    def client(self, id: str) -> Client:
        """The client with this id. Raises FederationError where there is none."""
        try:
            return self._by_id[id]
        except KeyError:
            raise FederationError(f"there is no client '{id}'; {nearest(id, self.client_ids)}") from None

    @cached_property
    def _by_id(self) -> dict[str, Client]:
        return {client.id: client for client in self.clients}

    def make_encoder(self, seed: int) -> nn.Module:
        """The encoder as initialised under this seed."""
        with seeded_torch(seed, 0, "", "encoder"):
            return self.encoder()

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

    def check_data(self) -> None:
        """Load every client's data and check that they pass through its model and its loss.

        Raises:
            FederationError: data that are empty, or that the encoder, the head or the loss cannot take.
            DataError: a source that cannot be read.
        """
        encoder = self.make_encoder(seed=0)
        for client in self.clients:
            head = self.make_head(client, seed=0).eval()
            for kind, data in (("training", client.train_data), ("test", client.test_data)):
                if data is None:
                    continue
                inputs, targets = take(data, np.zeros(1, dtype=np.int64))
                where = f"client '{client.id}': its {kind} data"
                try:
                    with torch.no_grad():
                        loss = client.task.loss(head(_encode(encoder, inputs)), targets)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    raise FederationError(f"{where} do not pass through its model and loss: {error}") from error
                if loss.numel() != 1:
                    raise FederationError(f"{where} give a loss of shape {tuple(loss.shape)}, expected one number for a batch")

    def _example_of(self, client: Client) -> Tensor:
        if self.example is not None:
            return self.example
        return take(client.train_data, np.zeros(1, dtype=np.int64))[0]

    def _check_fit(self, client: Client, encoder: nn.Module) -> None:
        try:
            features = _encode(encoder, self._example_of(client))
        except (RuntimeError, ValueError, TypeError) as error:
            raise FederationError(f"client '{client.id}': its inputs do not pass through the encoder: {error}") from error
        if features.ndim < 2:
            raise FederationError(f"the encoder gives shape {tuple(features.shape)} for a batch of one, expected (1, features)")
        try:
            with torch.no_grad():
                self.make_head(client, seed=0).eval()(features)
        except (RuntimeError, ValueError, TypeError) as error:
            shape = tuple(features.shape)
            raise FederationError(f"client '{client.id}': the encoder's output of shape {shape} does not fit its head: {error}") from error


@torch.no_grad()
def _encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    output = encoder.eval()(inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"expected the encoder to give a tensor, found {type(output).__name__}")
    return output
