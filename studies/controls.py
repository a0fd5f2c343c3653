"""Controls of the studies: is a method faster by its direction, or by the length of its steps?

They are own weightings, which a study names by ``module:Class``. So its commands have to run in the
repository's folder.
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
    r"""The weights of another method, with the direction d = Σ p_i g_i / Σ p_i scaled to length 1.

    `NashMTL` gives its direction this length in every round. With equal weights only the length
    differs from plain equal weights. So the gain of a method with steps of length 1 over this
    control is the gain of its direction.

    Args:
        of: the other method: ``"equal"``, or FedGradNorm with the solver ``"step"`` or ``"exact"``.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 6.0, 0.0), report("b", 0.0, 8.0)]
    >>> weights, _ = UnitLength().update(UnitLength().init(["a", "b"]), reports)
    >>> weights.values, round(weights.scale, 9)  # d = (3, 4)
    ({'a': 1.0, 'b': 1.0}, 0.2)
    """

    of: Literal["equal", "step", "exact"] = "equal"

    @property
    def _weighting(self) -> Weighting:
        return Equal() if self.of == "equal" else FedGradNorm(solver=self.of)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """The initial state of the other method."""
        return self._weighting.init(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The other method's weights, with a scale for a direction of length 1.

        A direction of length 0 keeps its scale.
        """
        weights, state = self._weighting.update(state, reports)
        p = np.array([weights.values[report.client] for report in reports])
        gram = gram_matrix([report.gradient for report in reports])
        length = np.sqrt(max(p @ gram @ p, 0.0)) / p.sum()
        return replace(weights, scale=float(1 / length) if length > 0 else weights.scale), state
