"""A federation: the clients, and the encoder that they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm import federation_checks as checks
from fedgradnorm.data import size, take
from fedgradnorm.errors import FederationError, described, nearest, raised_as, warn
from fedgradnorm.members import Client, Members, absent, absent_client
from fedgradnorm.modules import Source, is_lazy, kind_of, makeup_of, materialise
from fedgradnorm.parameters import norm_layer_slices
from fedgradnorm.randomness import seeded
from fedgradnorm.trial import Trial, check_client

__all__ = ["Client", "Federation", "Members", "absent", "absent_client"]


@dataclass(frozen=True)
class Federation(Members):
    """The clients and what they share. It checks itself when it is built.

    Args:
        clients: the clients, in the order in which tables and files list them. Nothing else depends
            on that order.
        encoder: makes the shared network, without arguments. Frozen parameters
            (``requires_grad=False``) stay as the function makes them.
        norm_layer: which encoder parameters are the norm layer ω̃; see `norm_layer_slices`. None:
            the last layer.
        buffers: what is done with the encoder's buffers, such as BatchNorm's running statistics:
            ``"local"`` leaves them with each client, ``"averaged"`` sends and averages them.
        example: one input as a batch of one, shape ``(1, ...)``. Needed only if the data are loaded
            on first use: then encoder and heads can be checked, and models loaded, without data.

    Raises:
        FederationError: no clients, two clients with one id, an empty client, a norm layer that
            names no parameter, or an encoder whose output does not fit a head.
    """

    clients: Sequence[Client]
    encoder: Callable[[], nn.Module]
    norm_layer: str | Sequence[str] | None = None
    buffers: Literal["local", "averaged"] = "local"
    example: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", checks.listed(self.clients))
        checks.check_ids(self.client_ids)
        checks.check_factory(self.encoder)
        checks.check_example(self.example)
        checks.check_tasks(self.clients)
        if self.buffers not in ("local", "averaged"):
            expected = "expected 'local' or 'averaged'"
            raise FederationError(f"buffers: {expected}, found '{self.buffers}'")
        encoder = self.make_encoder(seed=0)
        checks.check_types(encoder)
        checks.check_memory(self.encoders.original(0), "encoder")
        norm_layer_slices(encoder, self.norm_layer)
        checked: set[object] = set()
        for client in self.clients:
            example = self.example_of(client)
            features = checks.features_of(client, encoder, example)
            if self.encoders.shared and client is self.clients[0]:
                checks.check_copied(self.encoders, 0, example)
            self._check_head(client, features, alike=kind_of(client.task.head) in checked)
            checked.add(kind_of(client.task.head))

    def _check_head(self, client: Client, features: Tensor, *, alike: bool) -> None:
        """Check a client's head; some of it only once for heads that are alike."""
        output = checks.output_of(client, self.make_head(client, seed=0), features)
        self.outputs[client.id] = tuple(output.shape[1:]), output.dtype
        if alike:
            return
        heads, key = self.heads_of(client), (0, client.id)
        original = heads.original(key)
        checks.check_memory(original, heads.what)
        checks.check_ties(heads.what, self.encoders.original(0), original, features)
        if heads.shared:
            checks.check_copied(heads, key, features)

    def client(self, id: str) -> Client:
        """The client with this id. Raises FederationError if there is none."""
        if id not in self._by_id:
            hint = nearest(id, self.client_ids)
            raise FederationError(f"there is no client '{id}'; {hint}")
        return self._by_id[id]

    @cached_property
    def _by_id(self) -> dict[str, Client]:
        return {client.id: client for client in self.clients}

    def num_examples(self, id: str) -> int:
        """How many training examples a client has. Data that load on first use are loaded."""
        return size(self.client(id).train_data)

    def new_encoder(self) -> nn.Module:
        """Call the encoder's factory. Lazy parameters get the shapes that an input gives them."""
        encoder = self.encoder()
        if isinstance(encoder, nn.Module) and is_lazy(encoder):
            _materialise(encoder, self.example_of(self.clients[0]), "encoder")
        return encoder

    @cached_property
    def _heads(self) -> dict[object, Source]:
        return {}

    def heads_of(self, client: Client) -> Source:
        """The factory of a client's head as a `Source`. Its key is a seed and the client's id."""
        # computed before the generators are seeded: computing it may draw from them
        features = self.num_features

        def call(key: tuple[int, str]) -> nn.Module:
            seed, id = key
            with seeded(seed, 0, id, "head"):
                head = client.task.head(features)
                if isinstance(head, nn.Module) and is_lazy(head):
                    _materialise(head, self._example_features, f"client '{client.id}': head")
            return head

        kind = kind_of(client.task.head)
        if kind not in self._heads:
            self._heads[kind] = Source(call, (0, client.id), f"client '{client.id}': head")
        return self._heads[kind]

    def make_head(self, client: Client, seed: int) -> nn.Module:
        """A new head for a client, as initialised under this seed."""
        return self.heads_of(client).make((seed, client.id))

    @cached_property
    def _kinds(self) -> tuple[dict[tuple[int, str], int], dict[object, int]]:
        return {}, {}

    def head_kind(self, client: Client, seed: int) -> int:
        """A number for clients whose heads compute the same function, and whose losses are equal.

        Their heads may differ in the values of their parameters only.
        """
        known, numbers = self._kinds
        if (seed, client.id) not in known:
            task, makeup = client.task, makeup_of(self.make_head(client, seed))
            kind = kind_of(task.head), kind_of(task.loss), makeup
            known[seed, client.id] = numbers.setdefault(kind, len(numbers))
        return known[seed, client.id]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.example_of(self.clients[0]).shape[1:])

    @cached_property
    def num_features(self) -> int:
        """The size of the encoder's output, with which every head is made."""
        return int(self._example_features.shape[1])

    @cached_property
    def _example_features(self) -> Tensor:
        return checks.encoded(self.make_encoder(seed=0), self.example_of(self.clients[0]))

    @cached_property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """By client, the shape of one output without the batch dimension, and its type."""
        return {}

    def check_data(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 512,
        *,
        positive_losses: bool = False,
        initial_guess: bool = False,
        seed: int = 0,
    ) -> None:
        """Load every client's data, and pass them once through its model, loss and metrics.

        Every client trains one batch on a copy of the model. Its loss sees all targets of data that
        are tensors. `fedgradnorm.trial` says what is checked.

        Args:
            batch_size: examples in a mini-batch of training.
            eval_batch_size: examples in a batch when nothing is trained.
            positive_losses: whether the weighting needs losses above `Task.loss_floor`.
            initial_guess: whether F(0) is to be the loss of the constant answer.
            seed: of the initial encoder and heads.

        Raises:
            FederationError: data that are empty, not finite, or that the encoder, the head, the
                loss or a metric cannot take; a loss that cannot be trained with; a norm layer that
                no gradient reaches.
            DataError: a data file cannot be read.
        """
        encoder, checked = self.make_encoder(seed), set[object]()
        sources = [source for source in (self.encoders, *self._heads.values()) if source.shared]
        originals = [source.original(source.key) for source in sources]
        trials: dict[str, Trial] = {}
        for client in self.clients:
            with seeded(0, 0, client.id, "check"):
                trials[client.id] = check_client(
                    client,
                    encoder,
                    self.make_head(client, seed),
                    batch_size,
                    eval_batch_size,
                    checked,
                    positive_losses=positive_losses,
                    initial_guess=initial_guess,
                    originals=originals,
                )
        reached = {id: trial.reached for id, trial in trials.items()}
        checks.check_reached(encoder, self.norm_layer, reached)
        checks.check_measures(self.clients, {id: trial.failed for id, trial in trials.items()})
        for source in (self.encoders, *self._heads.values()):
            if source.varying is not None:
                text = "two calls of its factory under one seed give other values of"
                used = "those of the first call are used, and another process will have others"
                hint = "draw all numbers from the generators of torch, NumPy or random"
                warn(f"{source.what}: {text} '{source.varying}'; {used}: {hint}")

    def example_of(self, client: Client) -> Tensor:
        """One input of a client as a batch of one, shape ``(1, ...)``.

        Raises:
            FederationError: the client's data cannot be read.
        """
        if self.example is not None:
            return self.example
        try:
            return take(client.train_data, np.zeros(1, dtype=np.int64))[0]
        except FederationError:
            raise
        except Exception as error:  # the user's own code may raise anything
            reason = f"training data: {described(error)}"
            raise FederationError(f"client '{client.id}': {reason}") from error


def _materialise(module: nn.Module, example: Tensor, what: str) -> None:
    text = "its lazy parameters cannot be given their shapes by an example"
    with raised_as(FederationError, f"{what}: {text}:"):
        materialise(module, example)
