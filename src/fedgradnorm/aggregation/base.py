"""What an aggregation is: a pure function from reports and weights to one direction."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weights

__all__ = ["Aggregation", "weighted_gradients"]


class Aggregation(Protocol):
    """A frozen dataclass of its options that is called with a round's reports and weights."""

    def __call__(self, reports: Sequence[Report], weights: Weights) -> Tensor:
        """The direction of the server's step, shape ``(P,)``, from at least one report."""
        ...


def weighted_gradients(reports: Sequence[Report], weights: Weights) -> Tensor:
    """The u_i = n p_i g_i / Σ p_j, times the scale, of n reports: their plain mean is the weighted mean. Shape ``(n, P)``."""
    values = torch.tensor(
        [weights.values[report.client] for report in reports], dtype=torch.float64
    )
    factors = values * (len(reports) * weights.scale / values.sum())
    return torch.stack(
        [factor * report.gradient for factor, report in zip(factors.tolist(), reports, strict=True)]
    )
