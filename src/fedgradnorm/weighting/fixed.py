"""Weights that someone has chosen."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.errors import ConfigError, nearest, require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import proportional, start

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed:
    """p_i ∝ the given weight of client i, or else of its task, or else 1: weighting by hand.

    How far it gets when tuned: Kurin et al., NeurIPS 2022 (arXiv 2201.04122).

    Args:
        clients: weights above 0 by client id.
        tasks: weights above 0 by the name of a task, for each of its clients that has none of its own.

    Raises:
        ConfigError: a weight that is not above 0; when training begins, a client that does not exist; and once every client has reported, a
            task that none of them has.

    >>> import torch
    >>> def report(client, task):
    ...     return Report(client, task, torch.zeros(1), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> method = Fixed(tasks={"smile": 3.0})
    >>> method.update(method.init(["a", "b"]), [report("a", "pose"), report("b", "smile")])[0].values
    {'a': 0.5, 'b': 1.5}
    """

    reads_gradients: ClassVar[bool] = False

    clients: dict[str, float] | None = None
    tasks: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for option, given in (("clients", self.clients), ("tasks", self.tasks)):
            for name, weight in (given or {}).items():
                require(
                    0 < weight < math.inf, f"{option}.{name}", "a finite number above 0", weight
                )

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone: tasks are not known before the first reports. Without ids, where clients come later, none is unknown."""
        if client_ids:
            _check_known("client", self.clients or {}, client_ids)
        return start(client_ids, tasks={})

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The given weights."""
        own, by_task = self.clients or {}, self.tasks or {}
        tasks = {**state.memory["tasks"], **{report.client: report.task for report in reports}}
        if state.weights.keys() <= tasks.keys():
            _check_known("task", by_task, tasks.values())
        shares = [own.get(report.client, by_task.get(report.task, 1.0)) for report in reports]
        return proportional(state, reports, shares, {"tasks": tasks})


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in sorted(set(given) - set(known)):
        raise ConfigError(
            f"weighting.{what}s.{name}: there is no {what} '{name}'; {nearest(name, known)}"
        )
