"""The geometric loss strategy."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState
from fedgradnorm.weighting.combination import combination, keeping
from fedgradnorm.weighting.losses import has_a_rate, losses_of


@dataclass(frozen=True)
class GLS(Weighting):
    """The gradient of the geometric mean of the losses, (Π F_i)^(1/n).

    Source: Chennupati et al., CVPR Workshops 2019.

    The direction is Σ a_i g_i with a_i = (Π_j F_j)^(1/n) / (n F_i): p_i ∝ 1 / F_i, and the scale is
    the geometric over the harmonic mean of the losses. The scale of a loss cancels in the ratios
    p_i F_i.

    Losses are measured from the task's floor. A loss of 0, or below 10⁻⁶ of the initial one, counts
    as that share, since the method divides by it. A client without a training rate keeps its
    weight: one whose F_i(0) is not above the floor, or whose F_i is below it.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, loss):
    ...     return Report(client, "task", torch.zeros(1), loss, 1.0, 1.0, num_examples=9)
    >>> weights, _ = GLS().update(GLS().init(["a", "b"]), [report("a", 1.0), report("b", 4.0)])
    >>> weights.values, weights.scale  # 2 over 8/5
    ({'a': 1.6, 'b': 0.4}, 1.25)
    """

    reads_gradients: ClassVar[bool] = False
    needs_positive_losses: ClassVar[bool] = True

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by the inverse losses of this round."""
        return keeping(state, reports, has_a_rate, self._update)

    def _update(self, state: WeightingState, reports: Reports) -> Update:
        logarithms = np.log(losses_of(reports, positive=True))
        return combination(state, reports, np.exp(logarithms.mean() - logarithms) / len(reports))
