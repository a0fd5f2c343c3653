"""Controls of the studies: is a method faster because it points elsewhere, or because its steps have another length?

They are weightings of a user's own, which a study names by ``module:Class``, so their commands are given in the repository's folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedgradnorm.messages import Report
from fedgradnorm.weighting import Equal, FedGradNorm, Weighting, WeightingState, Weights
from fedgradnorm.weighting.updates import gram_matrix

__all__ = ["UnitLength"]


@dataclass(frozen=True)
class UnitLength(Weighting):
    r"""The weights of another method, with the aggregated direction d = Σ p_i g_i / Σ p_i scaled to length 1: d / ‖d‖.

    That is the length which `NashMTL` gives its direction in every round. With equal weights nothing but the length is new; so what a
    method with steps of length 1 gains over this control is what its direction gains.

    Args:
        of: whose weights: ``"equal"``, or FedGradNorm's with the solver ``"step"`` or ``"exact"`` and its default options.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = UnitLength().update(UnitLength().init(["a", "b"]), [report("a", 6.0, 0.0), report("b", 0.0, 8.0)])
    >>> weights.values, round(weights.scale, 9)  # d = (3, 4)
    ({'a': 1.0, 'b': 1.0}, 0.2)
    """

    of: Literal["equal", "step", "exact"] = "equal"

    @property
    def _weighting(self) -> Weighting:
        return Equal() if self.of == "equal" else FedGradNorm(solver=self.of)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """The other method's."""
        return self._weighting.init(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The other method's weights, and the scale that makes the direction's length 1; a direction of length 0 stays as it is."""
        weights, state = self._weighting.update(state, reports)
        p = np.array([weights.values[report.client] for report in reports])
        length = (
            np.sqrt(max(p @ gram_matrix([report.gradient for report in reports]) @ p, 0.0))
            / p.sum()
        )
        return replace(weights, scale=float(1 / length) if length > 0 else weights.scale), state
