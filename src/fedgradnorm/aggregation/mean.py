"""The weighted mean of the clients' gradients."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.weighting.base import Reports, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean(Aggregation):
    """Σ_{i∈S} p_i g_i / Σ_{i∈S} p_i, times the weights' scale.

    If every client takes part, Σp = N, and this is the gradient of the objective (1/N) Σ p_i F_i.
    FedGradNorm's claims hold for this aggregation alone. A single client can move it anywhere; only
    screening keeps gross outliers out.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, "task", torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> Mean()([report("a", 1.0, 0.0), report("b", 0.0, 4.0)], Weights({"a": 1.5, "b": 0.5}))
    tensor([0.7500, 1.0000])
    """

    def __call__(self, reports: Reports, weights: Weights) -> "Tensor":
        """The direction, shape ``(P,)``."""
        import torch

        total = sum(weights.values[report.client] for report in reports)
        direction = torch.zeros_like(reports[0].gradient)
        for report in reports:
            factor = weights.values[report.client] * weights.scale / total
            direction.add_(report.gradient, alpha=factor)
        return direction
