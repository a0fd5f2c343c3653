"""What a run's files hold, as types: lines of metrics.jsonl, summary.json, who trained what. They are checked when they are read."""

from collections.abc import Mapping
from typing import (
    Annotated,
    NotRequired,  # the standard library's cannot be checked before Python 3.12
)

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

__all__ = [
    "ClientRecord",
    "ClientSummary",
    "DataRecord",
    "Heard",
    "MembersRecord",
    "MetricSummary",
    "ModelRecord",
    "Row",
    "Sketch",
    "Summary",
    "TaskSummary",
]

Count = Annotated[int, Field(ge=0)]


class Row(TypedDict):
    """One client in one round. What it did not do, or what is no finite number, is None."""

    round: Annotated[int, Field(ge=1)]
    client: str
    task: str
    participated: bool
    dropped: str | None
    retries: Count
    loss: FiniteFloat | None
    initial_loss: FiniteFloat | None
    inverse_training_rate: FiniteFloat | None
    grad_norm: FiniteFloat | None
    weight: FiniteFloat
    target: FiniteFloat | None
    test_loss: FiniteFloat | None
    metric: FiniteFloat | None
    metrics: Mapping[str, FiniteFloat | None]
    examples: Count
    bytes_up: Count
    bytes_down: Count
    seconds: FiniteFloat
    missing: NotRequired[Mapping[str, str]]
    """By metric, why it could not be taken."""
    notes: NotRequired[list[str]]
    """What is odd about the client and drops no report, such as that its data changed."""


Sketch = list[FiniteFloat]
"""Numbers that are close to each other for tensors that differ by rounding alone."""


class DataRecord(TypedDict):
    """What some data are known by: their number, and a sketch of some of the inputs and targets; None where these are never the same.

    Of targets that are a tensor there is a sketch of them all as well.
    """

    examples: Count
    sample: list[Sketch] | None
    targets: NotRequired[Sketch | None]


class ModelRecord(TypedDict):
    """What a client's model and loss are known by: what the initial model gives for some of the client's training examples.

    Each is taken in training mode, and then in evaluation mode; ``initial`` has numbers of the initial tensors. The losses are of all these
    examples in either mode, and then of each of them.
    """

    initial: Sketch
    features: list[Sketch]
    outputs: list[Sketch]
    losses: list[FiniteFloat] | None


class ClientRecord(TypedDict):
    """What is known of a client: its head, names and shapes of its tensors, and its data only where they are."""

    task: str
    metric: str
    higher_is_better: bool
    examples: Count
    head: list[tuple[str, tuple[int, ...]]] | None
    train: DataRecord | None
    test: DataRecord | None
    percent: bool
    loss_floor: NotRequired[FiniteFloat | None]
    modules: NotRequired[list[str] | None]
    model: NotRequired[ModelRecord | None]


class MembersRecord(TypedDict):
    """Who trains what.

    The encoder's trainable parameters, names and shapes in the order of the flat vector; two numbers for each of its other tensors
    that are no buffers; the clients; what is done with the encoder's buffers; and where they are known, the names of the parameters in
    the norm layer, and of the classes of the encoder's modules that are torch's.
    """

    encoder: list[tuple[str, tuple[int, ...]]]
    fixed: dict[str, list[FiniteFloat]]
    clients: dict[str, ClientRecord]
    buffers: str
    norm_layer: NotRequired[list[str] | None]
    modules: NotRequired[list[str] | None]


class MetricSummary(TypedDict):
    """A task's main metric: its guess, and its mean over the task's clients."""

    name: str
    higher_is_better: bool
    percent: bool
    guess: FiniteFloat | None
    first: FiniteFloat
    best: FiniteFloat
    best_round: Count
    last: FiniteFloat | None


class TaskSummary(TypedDict):
    """A task over all of its clients."""

    clients: Count
    loss_ratio: FiniteFloat | None
    weight: FiniteFloat
    metric: MetricSummary | None
    rounds_to: dict[str, Count | None]


class Heard(TypedDict):
    """How often a client was asked for a report, how often one counted, and why others did not, by reason."""

    asked: Count
    heard: Count
    reasons: dict[str, Count]


class ClientSummary(TypedDict):
    """A client after the last round."""

    task: str
    examples: Count
    weight: FiniteFloat
    test_loss: FiniteFloat | None
    metrics: Mapping[str, FiniteFloat | None]
    guess: Mapping[str, FiniteFloat | None]
    reports: Heard
    missing: Mapping[str, str]
    """By metric, why it was missing when it was last to be taken."""


class Summary(TypedDict):
    """What summary.json holds."""

    rounds: Count
    seconds: FiniteFloat
    costs: dict[str, FiniteFloat]
    dropped: Count
    bytes_up: Count
    bytes_down: Count
    tasks: dict[str, TaskSummary]
    clients: dict[str, ClientSummary]
