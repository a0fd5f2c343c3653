"""The coordinate-wise median of the weighted gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgradnorm.aggregation.base import weighted_gradients
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weights

__all__ = ["Median"]


@dataclass(frozen=True)
class Median:
    """In each coordinate the median over S of the weighted gradients; of an even number, the mean of the middle two.

    It stands anything from fewer than half of the clients. But it presumes that honest clients want about the same: a task that alone
    needs a feature is outvoted in the coordinates that make it, however large its weight. So it is for many clients a task, and there
    FedGradNorm's weights move the median less than they move a mean. Source: Yin et al., ICML 2018 (arXiv 1803.01498).

    >>> def report(client, *gradient):
    ...     return Report(client, "a task", torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> Median()([report("a", 1.0), report("b", 2.0), report("c", 1000.0)], Weights({"a": 1.0, "b": 1.0, "c": 1.0}))
    tensor([2.])
    """

    def __call__(self, reports: Sequence[Report], weights: Weights) -> Tensor:
        """The direction, shape ``(P,)``."""
        ordered, _ = torch.sort(weighted_gradients(reports, weights), dim=0)
        return (ordered[(len(reports) - 1) // 2] + ordered[len(reports) // 2]) / 2
