"""The mean of weighted gradients, of which none is much longer than most."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedgradnorm.aggregation.base import Aggregation, weighted_gradients
from fedgradnorm.weighting.base import Reports, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClippedMean(Aggregation):
    """The mean of the weighted gradients u_i, each times min(1, clip · M / ‖u_i‖).

    Source: Karimireddy, He and Jaggi, ICML 2021, arXiv 2012.10333, in its simplest form.

    M is the median of the ‖u_i‖. Whatever a client sends, it then moves the encoder by at most
    ``clip`` times what a usual one does. With ``clip=1`` the longer half is cut to the median
    length. FedGradNorm, which evens out the norms itself, needs that less than equal weights do. A
    larger ``clip`` is closer to the mean, and lets one client count for ``clip``: with few clients
    that is too much.

    Args:
        clip: the maximum length, in multiples of the median norm.

    Raises:
        ConfigError: a ``clip`` that is not above 0.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, "task", torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0), report("b", 1.0), report("c", 1000.0)]
    >>> ClippedMean(clip=2.0)(reports, Weights(dict.fromkeys("abc", 1.0)))
    tensor([1.3333])
    """

    clip: Annotated[float, Field(gt=0)] = 1.0

    def __call__(self, reports: Reports, weights: Weights) -> "Tensor":
        """The direction, shape ``(P,)``."""
        import torch

        gradients = weighted_gradients(reports, weights)
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True, dtype=torch.float64)
        most = self.clip * norms.median()
        factors = torch.where(norms > most, most / norms, 1.0).to(gradients.dtype)
        direction: Tensor = (gradients * factors).mean(dim=0)
        return direction
