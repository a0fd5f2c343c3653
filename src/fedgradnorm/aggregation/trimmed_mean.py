"""The coordinate-wise mean of the weighted gradients without the largest and the smallest."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from fedgradnorm.aggregation.base import weighted_gradients
from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weights

__all__ = ["TrimmedMean"]

ROUNDING = 1e-9  # so that 0.3 of 10 clients are 3


@dataclass(frozen=True)
class TrimmedMean:
    """In each coordinate the mean over S of the weighted gradients, less the ``trim`` share of them at either end, rounded up.

    It stands anything from as many clients as it cuts at one end. Like the median it takes what a single task alone wants for an outlier,
    if less so, and FedGradNorm's weights move it less than they move a mean. Of one or two clients nothing is cut.
    Source: Yin et al., ICML 2018 (arXiv 1803.01498).

    Args:
        trim: the share that is cut at either end.

    Raises:
        ConfigError: ``trim`` that is not between 0 and 0.5.

    >>> def report(client, *gradient):
    ...     return Report(client, "a task", torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> some = [report(client, value) for client, value in zip("abcd", (-1000.0, 1.0, 2.0, 1000.0))]
    >>> TrimmedMean()(some, Weights(dict.fromkeys("abcd", 1.0)))
    tensor([1.5000])
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        require(0 < self.trim < 0.5, "trim", "a number between 0 and 0.5", self.trim)

    def __call__(self, reports: Sequence[Report], weights: Weights) -> Tensor:
        """The direction, shape ``(P,)``."""
        gradients = weighted_gradients(reports, weights)
        cut = min(ceil(self.trim * len(gradients) - ROUNDING), (len(gradients) - 1) // 2)
        ordered, _ = torch.sort(gradients, dim=0)
        return ordered[cut : len(gradients) - cut].mean(dim=0)
