"""What several test files share."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgradnorm import Client, Federation, Metric, Task
from fedgradnorm.messages import Report

PROFILE = os.environ.get("FEDGRADNORM_HYPOTHESIS", "quick")
"""How many examples Hypothesis tries: ``quick``, or ten times as many, ``thorough``."""
QUICK_EXAMPLES = 30


def examples(number: int) -> int:
    """How many examples a costly property is tried with, of which this is the number for ``quick``."""
    return number if PROFILE == "quick" else 10 * number


def report(
    client: str,
    grad_norm: float,
    rate: float = 1.0,
    *,
    task: str = "",
    initial_loss: float = 1.0,
    **fields: Any,
) -> Report:
    """A report for a weighting: only its numbers matter."""
    values = {"gradient": torch.ones(3), "num_examples": 10, **fields}
    return Report(
        client,
        task or client,
        loss=rate * initial_loss,
        initial_loss=initial_loss,
        grad_norm=grad_norm,
        **values,
    )


def reports(norms: Mapping[str, float], rates: Mapping[str, float]) -> list[Report]:
    return [report(client, norms[client], rates[client]) for client in sorted(norms)]


def timeless(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a run less the seconds."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


def small_task(name: str, classes: int = 2) -> Task:
    head = partial(nn.Linear, out_features=classes)
    return Task(
        name, head, functional.cross_entropy, (Metric("accuracy", accuracy, higher_is_better=True),)
    )


def small_client(
    id: str, *, task: Task | None = None, examples: int = 20, features: int = 6
) -> Client:
    rng = np.random.default_rng(len(id))
    inputs = torch.tensor(rng.normal(size=(examples, features)), dtype=torch.float32)
    targets = (inputs[:, 0] > 0).long()
    return Client(id, task or small_task("sign"), (inputs, targets), (inputs, targets))


def small_federation(
    ids: Sequence[str] = ("a", "b", "c"),
    encoder: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> Federation:
    clients = [small_client(id, examples=20 + 5 * index) for index, id in enumerate(sorted(ids))]
    by_id = {client.id: client for client in clients}
    return Federation([by_id[id] for id in ids], encoder or small_encoder, **options)


def small_encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())


def batch_norm_encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def dropout_encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))


def with_clients(federation: Federation, clients: Sequence[Client]) -> Federation:
    return replace(federation, clients=clients)
