"""The coordinate-wise mean of the weighted gradients without the largest and the smallest."""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedgradnorm.aggregation.base import Aggregation, weighted_gradients
from fedgradnorm.weighting.base import Reports, Weights

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-9  # so that 0.3 of 10 clients are 3


@dataclass(frozen=True)
class TrimmedMean(Aggregation):
    """In each coordinate the mean of the weighted gradients without a share of them at either end.

    Source: Yin et al., ICML 2018, arXiv 1803.01498.

    The share ``trim`` is rounded up to whole clients. The mean tolerates anything from as many
    clients as are cut at one end. Like the median, but less so, it treats what a single task alone
    wants as an outlier, and FedGradNorm's weights move it less than they move a mean. Of one or two
    clients nothing is cut.

    Args:
        trim: the share that is cut at either end, between 0 and 0.5.

    Raises:
        ConfigError: a ``trim`` that is not between 0 and 0.5.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, "task", torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> values = {"a": -1000.0, "b": 1.0, "c": 2.0, "d": 1000.0}
    >>> reports = [report(client, value) for client, value in values.items()]
    >>> TrimmedMean()(reports, Weights(dict.fromkeys("abcd", 1.0)))
    tensor([1.5000])
    """

    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    def __call__(self, reports: Reports, weights: Weights) -> "Tensor":
        """The direction, shape ``(P,)``."""
        gradients = weighted_gradients(reports, weights)
        cut = min(ceil(self.trim * len(gradients) - ROUNDING), (len(gradients) - 1) // 2)
        ordered = gradients.sort(dim=0).values
        return ordered[cut : len(gradients) - cut].mean(dim=0)
