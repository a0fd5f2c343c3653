"""Weights by the number of examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import proportional, start

__all__ = ["Examples"]


@dataclass(frozen=True)
class Examples:
    """p_i ∝ m_i, the number of a client's training examples, as FedAvg weights (McMahan et al., AISTATS 2017).

    >>> import torch
    >>> def report(client, num_examples):
    ...     return Report(client, "a task", torch.zeros(1), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=num_examples)
    >>> Examples().update(Examples().init(["a", "b"]), [report("a", 10), report("b", 30)])[0].values
    {'a': 0.5, 'b': 1.5}
    """

    reads_gradients: ClassVar[bool] = False

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone: the numbers are not known before the first reports."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """Weights by the examples that the reports tell of."""
        return proportional(state, reports, [float(report.num_examples) for report in reports])
