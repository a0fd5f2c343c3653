"""The geometric loss strategy."""

from dataclasses import dataclass

import numpy as np

from fedgradnorm.weighting.base import Reports, Update, WeightingState
from fedgradnorm.weighting.combination import combination
from fedgradnorm.weighting.losses import FromLosses, losses_of


@dataclass(frozen=True)
class GLS(FromLosses):
    """The gradient of the geometric mean of the losses, (Π F_i)^(1/n).

    Source: Chennupati et al., CVPR Workshops 2019.

    The direction is Σ a_i g_i with a_i = (Π_j F_j)^(1/n) / (n F_i): p_i ∝ 1 / F_i, and the scale is
    the geometric over the harmonic mean of the losses. The scale of a loss cancels in the ratios
    p_i F_i.

    A loss of 0, or below 10⁻⁶ of the initial one, counts as that share, since the method divides by
    it.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, loss):
    ...     return Report(client, "task", torch.zeros(1), loss, 1.0, 1.0, num_examples=9)
    >>> weights, _ = GLS().update(GLS().init(["a", "b"]), [report("a", 1.0), report("b", 4.0)])
    >>> weights.values, weights.scale  # 2 over 8/5
    ({'a': 1.6, 'b': 0.4}, 1.25)
    """

    def weigh(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by the inverse losses of this round."""
        logarithms = np.log(losses_of(reports, positive=True))
        return combination(state, reports, np.exp(logarithms.mean() - logarithms) / len(reports))
