"""Agnostic federated learning: the worst mixture of the clients."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedgradnorm.weighting.base import Reports, Update, WeightingState
from fedgradnorm.weighting.combination import proportional
from fedgradnorm.weighting.losses import FromLosses, LossKind, losses_of


@dataclass(frozen=True)
class AFL(FromLosses):
    """The worst mixture of losses: λ ← Π(λ + weight_lr · F), p ∝ λ.

    Source: Mohri, Sivek, Suresh, ICML 2019, Algorithm 1.

    It is the ascent in: min over ω, max over λ on the simplex, of Σ λ_i F_i(ω).

    Π is the Euclidean projection onto the simplex. λ are the participants' weights over their sum,
    so the weights remember the mixture, and an absent client keeps its share. λ_i may become 0; its
    client then moves nothing until its loss is large again.

    The paper's clients share one loss. If tasks differ, the worst loss may just be the one in the
    largest unit: then compare F_i / F_i(0), with ``loss="relative"``; the gradients remain those of
    F_i. Losses are measured from the task's floor, and absolute ones may have any sign. With
    relative ones a client without a training rate keeps its weight.

    Args:
        weight_lr: the step size of the ascent, above 0, at most 1e6.
        loss: ``"absolute"`` for F_i as reported, as in the paper, or ``"relative"`` for
            F_i / F_i(0).

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, loss):
    ...     return Report(client, "task", torch.zeros(1), loss, 1.0, 1.0, num_examples=9)
    >>> method = AFL(weight_lr=0.25)
    >>> weights, _ = method.update(method.init(["a", "b"]), [report("a", 1.0), report("b", 3.0)])
    >>> weights.values  # λ = (½ - ¼, ½ + ¼)
    {'a': 0.5, 'b': 1.5}
    """

    weight_lr: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    loss: LossKind = "absolute"

    @property
    def needs_positive_losses(self) -> bool:
        """Whether training rates are compared."""
        return self.loss == "relative"

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """One step of the ascent. Absolute losses need no training rate."""
        method = self.weigh if self.loss == "absolute" else super().update
        return method(state, reports)

    def weigh(self, state: WeightingState, reports: Reports) -> Update:
        """The ascent's mixture as weights."""
        before = np.array([state.weights.get(report.client, 1.0) for report in reports])
        ascent = self.weight_lr * losses_of(reports, self.loss)
        mixture = on_simplex(before / before.sum() + (ascent - ascent.max()))
        return proportional(state, reports, mixture)


def on_simplex(point: np.ndarray) -> np.ndarray:
    """The nearest point with entries of at least 0 that sum to 1 (Duchi et al., ICML 2008, Fig. 1).

    >>> on_simplex(np.array([0.5, 1.5, -4.0]))
    array([0., 1., 0.])
    """
    descending = np.sort(point)[::-1]
    surplus = (np.cumsum(descending) - 1) / np.arange(1, len(point) + 1)
    level = surplus[np.nonzero(descending > surplus)[0][-1]]
    projected: np.ndarray = np.maximum(point - level, 0.0)
    return projected
