"""The weighted mean of the clients' gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weights

__all__ = ["Mean"]


@dataclass(frozen=True)
class Mean:
    """Σ_{i∈S} p_i g_i / Σ_{i∈S} p_i, times the weights' scale.

    With every client taking part Σp = N, so this is the gradient of the objective (1/N) Σ p_i F_i, and the only aggregation for which
    FedGradNorm's claims are made. A single client can move it anywhere; screening is what keeps gross outliers out.

    >>> def report(client, *gradient):
    ...     return Report(client, "a task", torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> Mean()([report("a", 1.0, 0.0), report("b", 0.0, 4.0)], Weights({"a": 1.5, "b": 0.5}))
    tensor([0.7500, 1.0000])
    """

    def __call__(self, reports: Sequence[Report], weights: Weights) -> Tensor:
        """The direction, shape ``(P,)``."""
        total = sum(weights.values[report.client] for report in reports)
        direction = torch.zeros_like(reports[0].gradient)
        for report in reports:
            direction.add_(
                report.gradient, alpha=weights.values[report.client] * weights.scale / total
            )
        return direction
