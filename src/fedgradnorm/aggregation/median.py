"""The coordinate-wise median of the weighted gradients."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgradnorm.aggregation.base import Aggregation, weighted_gradients
from fedgradnorm.weighting.base import Reports, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Median(Aggregation):
    """In each coordinate the median of the weighted gradients.

    Source: Yin et al., ICML 2018, arXiv 1803.01498.

    The median of an even number is the mean of the middle two. It tolerates anything from fewer
    than half of the clients, but it assumes that honest clients want about the same. If only one
    task needs a feature, that task is outvoted in the feature's coordinates, however large its
    weight. So this is for many clients per task. FedGradNorm's weights move the median less than
    they move a mean.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, "task", torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0), report("b", 2.0), report("c", 1000.0)]
    >>> Median()(reports, Weights(dict.fromkeys("abc", 1.0)))
    tensor([2.])
    """

    def __call__(self, reports: Reports, weights: Weights) -> "Tensor":
        """The direction, shape ``(P,)``."""
        ordered = weighted_gradients(reports, weights).sort(dim=0).values
        return (ordered[(len(reports) - 1) // 2] + ordered[len(reports) // 2]) / 2
