"""The geometric loss strategy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, keeping, start
from fedgradnorm.weighting.losses import has_a_rate, losses_of

__all__ = ["GLS"]


@dataclass(frozen=True)
class GLS:
    """The gradient of the geometric mean of the losses, (Π F_i)^(1/n) (Chennupati et al., CVPR Workshops 2019).

    It is Σ a_i g_i with a_i = (Π_j F_j)^(1/n) / (n F_i): p_i ∝ 1 / F_i, and the scale is the geometric over the harmonic mean of the
    losses. The scale of a loss cancels in the ratios p_i F_i. Losses are taken from the task's floor on. A loss of 0, or below 10⁻⁶ of the
    initial one, counts as that much: one would divide by it. A client without a training rate keeps its weight: one whose F_i(0) is not
    above the floor, or whose F_i is below it.

    >>> import torch
    >>> def report(client, loss):
    ...     return Report(client, "a task", torch.zeros(1), loss=loss, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = GLS().update(GLS().init(["a", "b"]), [report("a", 1.0), report("b", 4.0)])
    >>> weights.values, weights.scale  # 2 over 8/5
    ({'a': 1.6, 'b': 0.4}, 1.25)
    """

    reads_gradients: ClassVar[bool] = False
    needs_positive_losses: ClassVar[bool] = True

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """Weights by the inverse losses of this round."""
        return keeping(state, reports, has_a_rate, self._update)

    def _update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        logarithms = np.log(losses_of(reports, positive=True))
        return combination(state, reports, np.exp(logarithms.mean() - logarithms) / len(reports))
