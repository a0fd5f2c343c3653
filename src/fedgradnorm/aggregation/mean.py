"""The weighted mean of the clients' gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weights

__all__ = ["mean"]


def mean(reports: Sequence[Report], weights: Weights) -> Tensor:
    """Σ_{i∈S} p_i g_i / Σ_{i∈S} p_i, times the weights' scale; shape ``(P,)``.

    With every client taking part Σp = N, so this is the (1/N) Σ p_i g_i of the objective.
    """
    total = sum(weights.values[report.client] for report in reports)
    direction = torch.zeros_like(reports[0].gradient)
    for report in reports:
        direction.add_(report.gradient, alpha=weights.values[report.client] * weights.scale / total)
    return direction
