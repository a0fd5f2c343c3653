"""q-fair federated learning: weight for those whose losses are large."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, keeping, proportional, start
from fedgradnorm.weighting.losses import LossKind, check_loss, has_a_rate, losses_of

__all__ = ["QFFL"]


@dataclass(frozen=True)
class QFFL:
    """p_i ∝ F_i^q: the gradient of Σ F_i^(q+1) / (q+1) (Li, Sanjabi, Beirami, Smith, ICLR 2020, arXiv 1905.10497).

    q = 0 is equal weights; q → ∞ serves the largest loss only. By default the weights are a mean's, and the step size is yours. With the
    paper's estimate of the Lipschitz constant L (its Algorithm 2) the direction is Σ F_i^q g_i / Σ (F_i^q + q F_i^(q-1) ‖g_i‖² / L),
    which is shorter the more the objective bends.

    The paper's clients have one loss in common. Where tasks differ, the largest loss is perhaps only the one in the largest unit: then
    compare F_i / F_i(0), with ``loss="relative"``; the gradients stay those of F_i. Losses are taken from the task's floor on. A loss of 0,
    or below 10⁻⁶ of the initial one, counts as that much. With q > 0 a client without a training rate keeps its weight: one whose F_i(0)
    is not above the floor, or whose F_i is below it.

    Args:
        q: from 0 to 100.
        loss: ``"absolute"`` for F_i as reported, as in the paper, or ``"relative"`` for F_i / F_i(0).
        lipschitz: L > 0, for absolute losses, which the paper takes as one over the tuned step size of q = 0. None: the weighted mean.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, loss):
    ...     return Report(client, "a task", torch.ones(1), loss=loss, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = QFFL(q=2.0).update(QFFL().init(["a", "b"]), [report("a", 1.0), report("b", 3.0)])
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}  # 1 to 9
    {'a': 0.2, 'b': 1.8}
    """

    q: float = 1.0
    loss: LossKind = "absolute"
    lipschitz: float | None = None

    def __post_init__(self) -> None:
        require(0 <= self.q <= 100, "q", "a number from 0 to 100", self.q)
        check_loss(self.loss)
        require(
            self.lipschitz is None or 0 < self.lipschitz <= 1e12,
            "lipschitz",
            "a number above 0, at most 1e12",
            self.lipschitz,
        )
        require(
            self.lipschitz is None or self.loss == "absolute",
            "lipschitz",
            "none where losses are relative",
            self.lipschitz,
        )

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """Weights by the losses of this round."""
        if self.q == 0:
            return proportional(state, reports, np.ones(len(reports)))
        return keeping(state, reports, has_a_rate, self._update)

    @property
    def needs_positive_losses(self) -> bool:
        """Whether powers of the losses are taken."""
        return self.q > 0

    def _update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        losses = losses_of(reports, self.loss, positive=True)
        powers = (losses / losses.max()) ** self.q
        if self.lipschitz is None:
            return proportional(state, reports, powers)
        squares = np.array(
            [
                torch.linalg.vector_norm(report.gradient, dtype=torch.float64).item() ** 2
                for report in reports
            ]
        )
        return combination(
            state,
            reports,
            powers / (powers * (1 + self.q * squares / losses / self.lipschitz)).sum(),
        )
