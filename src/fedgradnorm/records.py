"""What a run's files hold, as types: lines of metrics.jsonl, summary.json, who trained what. They are checked when they are read."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict  # the standard library's cannot be checked before Python 3.12

__all__ = ["ClientRecord", "ClientSummary", "MembersRecord", "MetricSummary", "Row", "Summary", "TaskSummary"]

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


class ClientRecord(TypedDict):
    """What a server knows of a client."""

    task: str
    metric: str
    higher_is_better: bool
    examples: Count


class MembersRecord(TypedDict):
    """Who trains what: the clients, and the encoder's trainable parameters, names and shapes in the order of the flat vector."""

    encoder: list[tuple[str, tuple[int, ...]]]
    clients: dict[str, ClientRecord]


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


class ClientSummary(TypedDict):
    """A client after the last round."""

    task: str
    examples: Count
    weight: FiniteFloat
    test_loss: FiniteFloat | None
    metrics: Mapping[str, FiniteFloat | None]
    guess: Mapping[str, FiniteFloat | None]


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
