"""q-fair federated learning: more weight for clients whose losses are large."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedgradnorm.errors import require
from fedgradnorm.weighting.base import Reports, Update, WeightingState
from fedgradnorm.weighting.combination import combination, proportional
from fedgradnorm.weighting.losses import FromLosses, LossKind, losses_of


@dataclass(frozen=True)
class QFFL(FromLosses):
    """p_i ∝ F_i^q: the gradient of Σ F_i^(q+1) / (q+1).

    Source: Li, Sanjabi, Beirami, Smith, ICLR 2020, arXiv 1905.10497.

    q = 0 is equal weights; q → ∞ serves the largest loss only. By default the direction is a
    weighted mean, and the step size is the user's. With the paper's estimate of the Lipschitz
    constant L (its Algorithm 2) it is Σ F_i^q g_i / Σ (F_i^q + q F_i^(q-1) ‖g_i‖² / L), which is
    shorter where the objective bends.

    The paper's clients share one loss. If tasks differ, the largest loss may just be the one in the
    largest unit: then compare F_i / F_i(0), with ``loss="relative"``; the gradients remain those of
    F_i. A loss of 0, or below 10⁻⁶ of the initial one, counts as that share.

    Args:
        q: from 0 to 100.
        loss: ``"absolute"`` for F_i as reported, as in the paper, or ``"relative"`` for
            F_i / F_i(0).
        lipschitz: L > 0, for absolute losses. The paper takes one over the tuned step size of
            q = 0. None: the weighted mean.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, loss):
    ...     return Report(client, "task", torch.ones(1), loss, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0), report("b", 3.0)]
    >>> weights, _ = QFFL(q=2.0).update(QFFL().init(["a", "b"]), reports)
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}  # 1 to 9
    {'a': 0.2, 'b': 1.8}
    """

    reads_gradients: ClassVar[bool] = True

    q: Annotated[float, Field(ge=0, le=100)] = 1.0
    loss: LossKind = "absolute"
    lipschitz: Annotated[float, Field(gt=0, le=1e12)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        absolute = self.lipschitz is None or self.loss == "absolute"
        require(absolute, "lipschitz", "none with relative losses", self.lipschitz)

    @property
    def needs_positive_losses(self) -> bool:
        """Whether powers of the losses are taken."""
        return self.q > 0

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by the losses of this round; with q = 0 they need no training rate."""
        if self.q == 0:
            return proportional(state, reports, np.ones(len(reports)))
        return super().update(state, reports)

    def weigh(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by the powers of the losses."""
        losses = losses_of(reports, self.loss, positive=True)
        powers = (losses / losses.max()) ** self.q
        if self.lipschitz is None:
            return proportional(state, reports, powers)
        squares = _squared_lengths(reports)
        bounds = powers * (1 + self.q * squares / losses / self.lipschitz)
        return combination(state, reports, powers / bounds.sum())


def _squared_lengths(reports: Reports) -> np.ndarray:
    """‖g_i‖² in double precision, shape ``(n,)``."""
    import torch

    norm = torch.linalg.vector_norm
    lengths = [norm(report.gradient, dtype=torch.float64).item() for report in reports]
    return np.array([length**2 for length in lengths])
