"""The mean of weighted gradients of which none is much longer than most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgradnorm.aggregation.base import weighted_gradients
from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weights

__all__ = ["ClippedMean"]


@dataclass(frozen=True)
class ClippedMean:
    """With u_i the weighted gradients and M the median of their norms: mean over S of u_i · min(1, clip · M / ‖u_i‖).

    One client then moves the encoder by at most ``clip`` times what a usual one does, whatever it sends. With ``clip=1`` the longer half is
    cut to the median length, which FedGradNorm, that evens out the norms itself, needs less than equal weights do. A larger one is closer
    to the mean, and lets one client count for ``clip``: with few clients that is too much.
    Clipping against a median norm: Karimireddy, He and Jaggi, ICML 2021 (arXiv 2012.10333), in its simplest form.

    Args:
        clip: how many times the median norm is let through.

    Raises:
        ConfigError: ``clip`` that is not above 0.

    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, "a task", torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> ClippedMean(clip=2.0)([report("a", 1.0), report("b", 1.0), report("c", 1000.0)], Weights({"a": 1.0, "b": 1.0, "c": 1.0}))
    tensor([1.3333])
    """

    clip: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.clip < float("inf"), "clip", "a finite number above 0", self.clip)

    def __call__(self, reports: Sequence[Report], weights: Weights) -> Tensor:
        """The direction, shape ``(P,)``."""
        gradients = weighted_gradients(reports, weights)
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True, dtype=torch.float64)
        most = self.clip * norms.median()
        direction: Tensor = (
            gradients * torch.where(norms > most, most / norms, 1.0).to(gradients.dtype)
        ).mean(dim=0)
        return direction
