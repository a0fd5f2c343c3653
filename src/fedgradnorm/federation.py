"""What is trained: the clients, each with its own task and data, and the encoder that they share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypeIs  # the standard library has it from Python 3.13 on

from fedgradnorm.data import Data, misfit, size, take
from fedgradnorm.errors import FederationError, FedGradNormError, described, nearest, warn
from fedgradnorm.modules import (
    Source,
    have_memory_in_common,
    is_lazy,
    kind_of,
    makeup_of,
    materialise,
    overlaps_itself,
    reads_tensors_of,
    shared_memory,
)
from fedgradnorm.parameters import norm_layer_slices, trainable
from fedgradnorm.randomness import seeded
from fedgradnorm.task import Metric, Task
from fedgradnorm.trial import Trial, check_client

__all__ = ["Client", "Federation", "Members", "absent", "absent_client"]

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
        FederationError: an id that is not such a name, no task, or data of another kind. Data that a function gives are
            checked when they are loaded.
    """

    id: str
    task: Task
    train: Data | Callable[[], Data]
    test: Data | Callable[[], Data] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not CLIENT_ID.fullmatch(self.id):
            raise FederationError(
                f"client id '{self.id}': expected up to 100 letters, digits, '.', '_', '-', the first no '.' or '-'"
            )
        if not isinstance(self.task, Task):
            raise FederationError(
                f"client '{self.id}': task: expected a Task, found {type(self.task).__name__}"
            )
        for source, kind in ((self.train, "training"), (self.test, "test")):
            if not _is_loader(source) and not (source is None and kind == "test"):
                self._check(source, kind)

    @cached_property
    def train_data(self) -> Data:
        """The training data, loaded on first use. Raises FederationError where that fails or there are none."""
        return self._loaded(self.train, "training")

    @cached_property
    def test_data(self) -> Data | None:
        """The test data, loaded on first use, or None. Raises FederationError where that fails or they are empty."""
        return None if self.test is None else self._loaded(self.test, "test")

    def _loaded(self, source: Data | Callable[[], Data], kind: str) -> Data:
        if not _is_loader(source):
            return source
        try:
            with seeded(0, 0, self.id, f"{kind} data"):
                data = source()
        except FedGradNormError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise FederationError(
                f"client '{self.id}': the function that loads its {kind} data raised {described(error)}"
            ) from error
        self._check(data, kind)
        return data

    def _check(self, data: object, kind: str) -> None:
        """Raise FederationError for what is no data of a client, or has no examples."""
        if (why := misfit(data)) is not None:
            raise FederationError(f"client '{self.id}': {kind} data: {why}")
        if isinstance(data, tuple) and len(data[0]) != len(data[1]):
            raise FederationError(
                f"client '{self.id}': {len(data[0])} {kind} inputs, but {len(data[1])} targets"
            )
        if size(data) == 0:  # type: ignore[arg-type]  # it fits
            raise FederationError(
                f"client '{self.id}' is empty: expected at least one {kind} example"
            )


def _is_loader(source: Data | Callable[[], Data] | None) -> TypeIs[Callable[[], Data]]:
    """Whether data are a function that loads them. A dataset may be callable too."""
    return callable(source) and not hasattr(source, "__getitem__")


def absent(*_: object) -> Any:
    """Stands for data, heads, losses and metrics that are with the client alone. Raises LookupError."""
    raise LookupError("a client's data and losses are with the client alone")


def absent_client(
    id: str, task: str, metric: str = "", higher_is_better: bool = True, percent: bool = False
) -> Client:
    """A client of whom no more is known than names: its id, its task's, and that of its main metric, empty for none."""
    metrics = (Metric(metric, absent, higher_is_better, percent),) if metric else ()
    return Client(id, Task(task, absent, absent, metrics), absent)


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

    @abstractmethod
    def new_encoder(self) -> nn.Module:
        """What the encoder's factory gives, under the generators as they are; all of its parameters have their shapes."""

    @cached_property
    def encoders(self) -> Source:
        """The encoder's factory, made safe to be called again and again; a key is a seed."""

        def call(seed: int) -> nn.Module:
            with seeded(seed, 0, "", "encoder"):
                return self.new_encoder()

        return Source(call, 0, "encoder")

    def make_encoder(self, seed: int) -> nn.Module:
        """An encoder of its own, as initialised under this seed."""
        return self.encoders.make(seed)

    @cached_property
    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """The encoder's trainable parameters: names and shapes in the order of the flat vector."""
        return [
            (name, tuple(parameter.shape))
            for name, parameter in trainable(self.make_encoder(seed=0))
        ]


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
        object.__setattr__(self, "clients", _listed(self.clients))
        _check_ids([client.id for client in self.clients])
        if isinstance(self.encoder, nn.Module) or not callable(self.encoder):
            hint = (
                "; for a trained one: encoder=lambda: module"
                if isinstance(self.encoder, nn.Module)
                else ""
            )
            raise FederationError(
                f"encoder: expected a function that makes the encoder, found {type(self.encoder).__name__}{hint}"
            )
        if self.example is not None and not (
            isinstance(self.example, Tensor) and self.example.ndim and len(self.example) == 1
        ):
            found = (
                tuple(self.example.shape)
                if isinstance(self.example, Tensor)
                else type(self.example).__name__
            )
            raise FederationError(
                f"example: expected one input as a batch of one, of shape (1, ...), found {found}"
            )
        tasks: dict[str, Task] = {}
        for client in self.clients:
            other = tasks.setdefault(client.task.name, client.task)
            if [(m.name, m.higher_is_better) for m in other.metrics] != [
                (m.name, m.higher_is_better) for m in client.task.metrics
            ]:
                raise FederationError(
                    f"client '{client.id}': two tasks with different metrics have the name '{client.task.name}'"
                )
        if self.buffers not in ("local", "averaged"):
            raise FederationError(
                f"buffers: expected 'local' or 'averaged', found '{self.buffers}'"
            )
        encoder = self.make_encoder(seed=0)
        if len({parameter.dtype for _, parameter in trainable(encoder)}) != 1:
            raise FederationError(_of_no_one_type(encoder))
        _check_memory(self.encoders.original(0), "encoder")
        norm_layer_slices(encoder, self.norm_layer)
        checked: set[object] = set()
        for client in self.clients:
            features = self._check_encoder(client, encoder)
            self._check_head(client, features, alike=kind_of(client.task.head) in checked)
            checked.add(kind_of(client.task.head))

    def client(self, id: str) -> Client:
        """The client with this id. Raises FederationError where there is none."""
        try:
            return self._by_id[id]
        except KeyError:
            raise FederationError(
                f"there is no client '{id}'; {nearest(id, self.client_ids)}"
            ) from None

    @cached_property
    def _by_id(self) -> dict[str, Client]:
        return {client.id: client for client in self.clients}

    def num_examples(self, id: str) -> int:
        """How many training examples a client has."""
        return size(self.client(id).train_data)

    def new_encoder(self) -> nn.Module:
        """What the encoder's factory gives, its lazy parameters with the shapes that an input gives them."""
        made = self.encoder()
        if isinstance(made, nn.Module) and is_lazy(made):
            _materialise(made, self.example_of(self.clients[0]), "encoder")
        return made

    @cached_property
    def _heads(self) -> dict[object, Source]:
        return {}

    def heads_of(self, client: Client) -> Source:
        """The factory of a client's head, made safe to be called again and again; a key is a seed and the client's id."""
        features = (
            self.num_features
        )  # known before the generators are seeded: to find it out may draw from them

        def call(key: tuple[int, str]) -> nn.Module:
            with seeded(key[0], 0, key[1], "head"):
                made = client.task.head(features)
                if isinstance(made, nn.Module) and is_lazy(made):
                    _materialise(made, self._example_features, f"client '{client.id}': head")
            return made

        kind = kind_of(client.task.head)
        if kind not in self._heads:
            self._heads[kind] = Source(call, (0, client.id), f"client '{client.id}': head")
        return self._heads[kind]

    def make_head(self, client: Client, seed: int) -> nn.Module:
        """A head of its own for a client, as initialised under this seed."""
        return self.heads_of(client).make((seed, client.id))

    @cached_property
    def _kinds(self) -> tuple[dict[tuple[int, str], int], dict[object, int]]:
        return {}, {}

    def head_kind(self, client: Client, seed: int) -> int:
        """A number that clients share whose heads do the same with the same parameters, and whose losses are one."""
        known, numbers = self._kinds
        if (seed, client.id) not in known:
            kind = (
                kind_of(client.task.head),
                kind_of(client.task.loss),
                makeup_of(self.make_head(client, seed)),
            )
            known[seed, client.id] = numbers.setdefault(kind, len(numbers))
        return known[seed, client.id]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.example_of(self.clients[0]).shape[1:])

    @cached_property
    def num_features(self) -> int:
        """The size of the encoder's output, which every head is given."""
        return int(self._example_features.shape[1])

    @cached_property
    def _example_features(self) -> Tensor:
        return _encode(self.make_encoder(seed=0), self.example_of(self.clients[0]))

    @cached_property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """By client, the shape of one output, without the batch, and its type."""
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
        """Load every client's data, and let them pass once through its model, its loss and its metrics.

        Every client trains one batch on a copy of the model, and its loss sees all targets of data that are tensors. What is
        looked for is in `fedgradnorm.trial`.

        Args:
            batch_size: examples in a mini-batch of training.
            eval_batch_size: examples that pass through the model at once where nothing is trained.
            positive_losses: whether the weighting needs losses above the task's `Task.loss_floor`.
            initial_guess: whether F(0) is to be the loss of the constant answer.
            seed: of the initial encoder and heads.

        Raises:
            FederationError: data that are empty or not finite, or that the encoder, the head, the loss or a metric cannot take;
                a loss that does not do what a loss has to do; a norm layer that no gradient reaches.
            DataError: a source that cannot be read.
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
        self._check_norm_layer(encoder, {id: trial.reached for id, trial in trials.items()})
        self._check_metrics({id: trial.failed for id, trial in trials.items()})
        for source in (self.encoders, *self._heads.values()):
            if source.varying is not None:
                warn(
                    f"{source.what}: two calls of its factory under one seed give other values of '{source.varying}'; those of the first "
                    "call are used, and another process will have others: draw all numbers from the generators of torch, NumPy or random"
                )

    def _check_norm_layer(self, encoder: nn.Module, reached: Mapping[str, Sequence[str]]) -> None:
        """Raise FederationError where no client's gradient reaches the norm layer, and warn where one client's does not.

        Args:
            encoder: the encoder.
            reached: by client, the names of the parameters that its loss has a gradient for.
        """
        layer = names_in(encoder, norm_layer_slices(encoder, self.norm_layer))
        without = [id for id, names in reached.items() if not set(layer) & set(names)]
        if len(without) == len(reached):
            every = set().union(*reached.values())
            used = [
                name
                for name, parameter in trainable(encoder)
                if parameter.ndim >= 2 and name in every
            ]
            hint = f", such as '{used[-1].rpartition('.')[0] or used[-1]}'" if used else ""
            raise FederationError(
                f"norm_layer: no gradient reaches '{layer[0]}' from any client; name another layer{hint}"
            )
        for id in without:
            warn(
                f"client '{id}': no gradient reaches the norm layer, '{layer[0]}', from it: FedGradNorm leaves its weight as it is"
            )

    def _check_metrics(self, failed: Mapping[str, Mapping[str, str]]) -> None:
        """Raise FederationError for a metric that can be taken of no client that has its task, and warn of others that cannot be taken."""
        for id, reasons in failed.items():
            task = self.client(id).task.name
            alike = [
                client.id
                for client in self.clients
                if client.task.name == task and client.test is not None
            ]
            for metric, why in reasons.items():
                if all(metric in failed[other] for other in alike):
                    raise FederationError(
                        f"client '{id}': metric '{metric}' cannot be taken of its test data: {why}"
                    )
                warn(
                    f"client '{id}': metric '{metric}' cannot be taken of its test data, and will be missing: {why}"
                )

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
            raise FederationError(
                f"client '{client.id}': training data: {described(error)}"
            ) from error

    def _check_encoder(self, client: Client, encoder: nn.Module) -> Tensor:
        """The features of an example of a client."""
        example = self.example_of(client)
        try:
            features = _encode(encoder, example)
        except Exception as error:  # the user's own code may raise anything
            reason = f"its inputs do not pass through the encoder one at a time: {described(error)}"
            raise FederationError(f"client '{client.id}': {reason}") from error
        if features.ndim < 2:
            raise FederationError(
                f"the encoder gives shape {tuple(features.shape)} for a batch of one, expected (1, features)"
            )
        if self.encoders.shared and client is self.clients[0]:
            _check_copied(self.encoders, 0, example)
        return features

    def _check_head(self, client: Client, features: Tensor, *, alike: bool) -> None:
        """Raise FederationError where a head does not fit the features; some of it is done once for heads that are alike."""
        head = self.make_head(client, seed=0)
        try:
            with torch.no_grad():
                output = head.eval()(features)
        except Exception as error:  # the user's own code may raise anything
            shape = tuple(features.shape)
            raise FederationError(
                f"client '{client.id}': the encoder's output of shape {shape} does not fit its head: {described(error)}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != 1:
            found = (
                f"shape {tuple(output.shape)}"
                if isinstance(output, Tensor)
                else type(output).__name__
            )
            raise FederationError(
                f"client '{client.id}': head: expected outputs of shape (1, ...) for a batch of one, found {found}"
            )
        self.outputs[client.id] = tuple(output.shape[1:]), output.dtype
        if not alike:
            self._check_ties(client, features)
            if self.heads_of(client).shared:
                _check_copied(self.heads_of(client), (0, client.id), features)

    def _check_ties(self, client: Client, features: Tensor) -> None:
        """Raise FederationError for a head with parameters that share memory, or that has or reads tensors of an encoder."""
        what, encoder = f"client '{client.id}': head", self.encoders.original(0)
        head = self.heads_of(client).original((0, client.id))
        _check_memory(head, what)
        with torch.no_grad():
            if have_memory_in_common(encoder, head) or reads_tensors_of(
                encoder, lambda: head.eval()(features)
            ):
                raise FederationError(
                    f"{what}: it has or reads a tensor of the encoder, of which every client trains copies: expected a head with "
                    "tensors of its own, which gets the encoder's output"
                )


def names_in(encoder: nn.Module, slices: Sequence[slice]) -> list[str]:
    """The names of the parameters that lie in these parts of the flat vector."""
    names, start = [], 0
    for name, parameter in trainable(encoder):
        names += [name] if any(part.start <= start < part.stop for part in slices) else []
        start += parameter.numel()
    return names


def _listed(clients: object) -> tuple[Client, ...]:
    if isinstance(clients, Client | Mapping | str) or not hasattr(clients, "__iter__"):
        raise FederationError(f"clients: expected a list of Client, found {type(clients).__name__}")
    listed = tuple(clients)
    for place, client in enumerate(listed):
        if not isinstance(client, Client):
            raise FederationError(
                f"clients: expected a list of Client, found {type(client).__name__} at place {place}"
            )
    if not listed:
        raise FederationError("a federation needs at least one client")
    return listed


def _check_ids(ids: Sequence[str]) -> None:
    """Raise FederationError for an id that is there twice, or differs from another by case alone."""
    known: dict[str, str] = {}
    for id in ids:
        other = known.setdefault(id.lower(), id)
        if other != id:
            raise FederationError(
                f"the ids '{other}' and '{id}' differ by case only: expected ids that are two on every system, where files have their names"
            )
    if len(known) < len(ids):
        twice = next(id for place, id in enumerate(ids) if id in ids[:place])
        raise FederationError(f"two clients have the id '{twice}': expected different ids")


def _materialise(module: nn.Module, example: Tensor, what: str) -> None:
    try:
        materialise(module, example)
    except Exception as error:  # the user's own code may raise anything
        raise FederationError(
            f"{what}: its lazy parameters cannot be given their shapes by an example: {described(error)}"
        ) from error


def _of_no_one_type(encoder: nn.Module) -> str:
    """What is wrong with an encoder whose trainable parameters are none, or of several types."""
    types = sorted(
        {str(parameter.dtype).removeprefix("torch.") for _, parameter in trainable(encoder)}
    )
    if types:
        return f"encoder: expected trainable parameters of one type, found {' and '.join(types)}: encoder.float() makes them alike"
    found = (
        "all parameters are frozen: requires_grad_(True) lets them be trained"
        if list(encoder.parameters())
        else "it has no parameters"
    )
    return f"encoder: expected trainable parameters, and {found}"


def _check_memory(module: nn.Module, what: str) -> None:
    """Raise FederationError for tensors that share memory without being one parameter, or whose numbers share it."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and overlaps_itself(parameter):
            raise FederationError(
                f"{what}: several numbers of '{name}' lie in the same memory: expected a parameter of its own, .clone()"
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise FederationError(
                f"{what}: '{name}' has a hook after its gradient is accumulated, which never runs here: take it off"
            )
    if (names := shared_memory(module)) is not None:
        raise FederationError(
            f"{what}: '{names[0]}' and '{names[1]}' share memory, and would be trained as two: use one parameter in both places, "
            "or compute one from the other in forward()"
        )


def _check_copied(source: Source, key: object, example: Tensor) -> None:
    """Raise FederationError where a copy of the module that a factory gives again and again is not on its own."""
    original, own = source.original(key), source.make(key).eval()
    with torch.no_grad():
        if reads_tensors_of(original, lambda: own(example)):
            raise FederationError(
                f"{source.what}: its factory gives the same module again and again, and a copy of it still reads the original, by a hook "
                "or a stored function: let every call make a new one"
            )


@torch.no_grad()
def _encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    output = encoder.eval()(inputs)
    if not isinstance(output, Tensor):
        raise TypeError(f"expected the encoder to give a tensor, found {type(output).__name__}")
    return output
