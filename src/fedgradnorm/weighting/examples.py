"""Weights by the number of examples."""

from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState
from fedgradnorm.weighting.combination import proportional


@dataclass(frozen=True)
class Examples(Weighting):
    """p_i ∝ m_i, the number of a client's training examples, as in FedAvg.

    Source: McMahan et al., AISTATS 2017.

    Before the first reports all weights are 1.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, num_examples):
    ...     return Report(client, "task", torch.zeros(1), 1.0, 1.0, 1.0, num_examples)
    >>> weights, _ = Examples().update(Examples().init("ab"), [report("a", 10), report("b", 30)])
    >>> weights.values
    {'a': 0.5, 'b': 1.5}
    """

    reads_gradients: ClassVar[bool] = False

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by the numbers of examples in the reports."""
        return proportional(state, reports, [float(report.num_examples) for report in reports])
