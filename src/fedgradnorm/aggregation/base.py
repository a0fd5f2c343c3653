"""What an aggregation is: a pure function from reports and weights to one direction."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fedgradnorm.options import Options
from fedgradnorm.weighting.base import Reports, Weights

if TYPE_CHECKING:  # torch loads when a direction is computed, not when options are checked
    from torch import Tensor


class Aggregation(Options, ABC):
    """A frozen dataclass of its options, called with a round's reports and weights."""

    @abstractmethod
    def __call__(self, reports: Reports, weights: Weights) -> "Tensor":
        """The direction of the server's step, shape ``(P,)``, from at least one report."""


def weighted_gradients(reports: Reports, weights: Weights) -> "Tensor":
    """The u_i = n p_i g_i / Σ p_j, times the scale, of n reports, shape ``(n, P)``.

    Their plain mean is the weighted mean.
    """
    import torch

    numbers = [weights.values[report.client] for report in reports]
    values = torch.tensor(numbers, dtype=torch.float64)
    factors = (values * (len(reports) * weights.scale / values.sum())).tolist()
    pairs = zip(factors, reports, strict=True)
    return torch.stack([factor * report.gradient for factor, report in pairs])
