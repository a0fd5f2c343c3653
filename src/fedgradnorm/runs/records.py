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
