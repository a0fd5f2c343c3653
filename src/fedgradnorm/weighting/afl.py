"""Agnostic federated learning: the worst mixture of the clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import keeping, proportional, start
from fedgradnorm.weighting.losses import LossKind, check_loss, has_a_rate, losses_of

__all__ = ["AFL", "on_simplex"]


@dataclass(frozen=True)
class AFL:
    """The worst mixture of losses: λ ← Π(λ + weight_lr · F), p ∝ λ (Mohri, Sivek, Suresh, ICML 2019, Algorithm 1).

    It is the ascent of: min over ω, max over λ on the simplex, of Σ λ_i F_i(ω).

    Π is the Euclidean projection onto the simplex. λ are the participants' weights over their sum, so the mixture is remembered in the
    weights; an absent client keeps its share. λ_i may become 0, and its client then moves nothing until its loss is large again.

    The paper's clients have one loss in common. Where tasks differ, the worst loss is perhaps only the one in the largest unit: then
    compare F_i / F_i(0), with ``loss="relative"``; the gradients stay those of F_i. Losses are taken from the task's floor on, and absolute
    ones may have any sign. With relative ones a client without a training rate keeps its weight: one whose F_i(0) is not above the
    floor, or whose F_i is below it.

    Args:
        weight_lr: the step size of the ascent, above 0, at most 1e6.
        loss: ``"absolute"`` for F_i as reported, as in the paper, or ``"relative"`` for F_i / F_i(0).

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, loss):
    ...     return Report(client, "a task", torch.zeros(1), loss=loss, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> method = AFL(weight_lr=0.25)
    >>> method.update(method.init(["a", "b"]), [report("a", 1.0), report("b", 3.0)])[0].values  # λ = (½ - ¼, ½ + ¼)
    {'a': 0.5, 'b': 1.5}
    """

    reads_gradients: ClassVar[bool] = False

    weight_lr: float = 0.1
    loss: LossKind = "absolute"

    def __post_init__(self) -> None:
        require(
            0 < self.weight_lr <= 1e6, "weight_lr", "a number above 0, at most 1e6", self.weight_lr
        )
        check_loss(self.loss)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """One step of the ascent."""
        return keeping(
            state, reports, has_a_rate if self.loss == "relative" else lambda _: True, self._update
        )

    @property
    def needs_positive_losses(self) -> bool:
        """Whether training rates are compared."""
        return self.loss == "relative"

    def _update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        before = np.array([state.weights.get(report.client, 1.0) for report in reports])
        ascent = self.weight_lr * losses_of(reports, self.loss)
        return proportional(
            state, reports, on_simplex(before / before.sum() + (ascent - ascent.max()))
        )


def on_simplex(point: np.ndarray) -> np.ndarray:
    """The nearest point with entries of at least 0 that sum to 1 (Duchi et al., ICML 2008, Figure 1).

    >>> on_simplex(np.array([0.5, 1.5, -4.0]))
    array([0., 1., 0.])
    """
    descending = np.sort(point)[::-1]
    surplus = (np.cumsum(descending) - 1) / np.arange(1, len(point) + 1)
    level = surplus[np.nonzero(descending > surplus)[0][-1]]
    projected: np.ndarray = np.maximum(point - level, 0.0)
    return projected
