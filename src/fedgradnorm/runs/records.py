"""What a run's files hold, as types. The files are checked against them when they are read."""

from collections.abc import Mapping
from typing import Annotated, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict  # pydantic refuses the standard library's before 3.12

Count = Annotated[int, Field(ge=0)]


class Row(TypedDict):
    """A client in a round: a line of metrics.jsonl.

    A figure is None if the client does not have it in this round, or if it is not a finite number.
    """

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
    """By metric, why it could not be computed."""
    notes: NotRequired[list[str]]
    """Oddities of the client that drop no report, such as changed data."""


Sketch = list[FiniteFloat]
"""Some numbers of a tensor. They are close for tensors that differ by rounding only."""


class DataRecord(TypedDict):
    """How data are recognised.

    ``sample`` has sketches of some inputs and targets; None for data that are random at every look.
    ``targets`` is a sketch of all targets; None if they are not a tensor.
    """

    examples: Count
    sample: list[Sketch] | None
    targets: Sketch | None


class ModelRecord(TypedDict):
    """How a client's model and loss are recognised: what they give for some training examples.

    Features and outputs are taken in training mode, and then in evaluation mode. ``initial`` has
    numbers of the initial tensors. The losses are those of all these examples in either mode, and
    then of each example.
    """

    initial: Sketch
    features: list[Sketch]
    outputs: list[Sketch]
    losses: list[FiniteFloat] | None


class ClientRecord(TypedDict):
    """A client: its task, and its head, data and model, each None if it is on another machine.

    ``head`` has the names and shapes of the head's tensors, ``modules`` the classes of its modules.
    """

    task: str
    metric: str
    higher_is_better: bool
    examples: Count
    head: list[tuple[str, tuple[int, ...]]] | None
    train: DataRecord | None
    test: DataRecord | None
    percent: bool
    loss_floor: FiniteFloat | None
    modules: list[str] | None
    model: ModelRecord | None


class MembersRecord(TypedDict):
    """Who trains what. ``norm_layer`` and ``modules`` are None if the clients are elsewhere."""

    encoder: list[tuple[str, tuple[int, ...]]]
    """Names and shapes of the encoder's trainable parameters, in the order of the flat vector."""
    fixed: dict[str, list[FiniteFloat]]
    """Two numbers for each of its other tensors that are not buffers."""
    clients: dict[str, ClientRecord]
    buffers: str
    """Whether the encoder's buffers are "local" or "averaged"."""
    norm_layer: list[str] | None
    """The names of the parameters in the norm layer."""
    modules: list[str] | None
    """The classes of the encoder's modules; empty names for classes that are not torch's."""


class MetricSummary(TypedDict):
    """A task's main metric, as a mean over the task's clients, and that of the constant guess."""

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
    """How often a client was asked for a report, how often one counted, and why others did not."""

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
    """By metric, why it could not be computed at the last test."""


class Summary(TypedDict):
    """The contents of summary.json."""

    rounds: Count
    seconds: FiniteFloat
    costs: dict[str, FiniteFloat]
    dropped: Count
    bytes_up: Count
    bytes_down: Count
    tasks: dict[str, TaskSummary]
    clients: dict[str, ClientSummary]
