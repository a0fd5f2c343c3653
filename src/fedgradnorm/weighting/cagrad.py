"""Conflict-averse gradient descent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import GroupBy, check_group_by, coefficients_of, least_norm

__all__ = ["CAGrad", "conflict_averse"]

NO_LENGTH = 1e-6
"""A g_w shorter than this share of the longest gradient is 0: it has no direction that rounding has not made."""


@dataclass(frozen=True)
class CAGrad:
    r"""The direction near the mean gradient that serves the worst-served task best (Liu et al., NeurIPS 2021, Algorithm 1).

    With g_0 the mean gradient, and w on the simplex::

        max over d of min_i ⟨g_i, d⟩ with ‖d - g_0‖ ≤ c ‖g_0‖
        d = g_0 + c ‖g_0‖ g_w / ‖g_w‖    for the w that makes ⟨g_w, g_0⟩ + c ‖g_0‖ ‖g_w‖ least,    g_w = Σ w_i g_i

    so a_i = 1/n + c ‖g_0‖ w_i / ‖g_w‖. c = 0 is equal weights; c < 1 still goes to a minimum of the mean loss; large c comes to MGDA's
    direction. Where g_w is 0, which takes c ≥ 1, no direction lowers all losses, and a_i = 1/n (ours).

    Args:
        c: from 0 to 100; the paper's 0.4 or 0.5.
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = CAGrad(c=0.5).update(CAGrad().init(["a", "b"]), [report("a", 1.0, 0.0), report("b", 0.0, 4.0)])
    >>> {client: round(weight, 2) for client, weight in weights.values.items()}
    {'a': 1.51, 'b': 0.49}
    """

    c: float = 0.4
    group_by: GroupBy = "client"

    def __post_init__(self) -> None:
        require(0 <= self.c <= 100, "c", "a number from 0 to 100", self.c)
        check_group_by(self.group_by)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of the conflict-averse direction."""
        return combination(
            state,
            reports,
            coefficients_of(reports, self.group_by, partial(conflict_averse, c=self.c)),
        )


def conflict_averse(gram: np.ndarray, c: float) -> np.ndarray:
    r"""CAGrad's coefficients a_i, shape ``(n,)``, from G_ij = ⟨g_i, g_j⟩.

    For x = g_w and s = c ‖g_0‖: s ‖x‖ = min over ρ > 0 of s (‖x‖² / ρ + ρ) / 2. With ρ held, w is that of the least norm of the g_i +
    (ρ/s) g_0; the best ρ is the one that ‖g_w‖ has, where the derivative in ρ, which is convex, changes its sign.
    """
    count = len(gram)
    mean = np.full(count, 1 / count)
    gram = gram / gram.diagonal().max()
    onto_mean = gram @ mean
    reach = c * np.sqrt(max(mean @ onto_mean, 0.0))  # s
    if reach <= 0:
        return mean

    def best(rho: float) -> tuple[np.ndarray, float]:
        shift = rho / reach
        weights = least_norm(
            gram + shift * (onto_mean[:, None] + onto_mean) + shift**2 * (mean @ onto_mean)
        )
        return weights, float(np.sqrt(max(weights @ gram @ weights, 0.0)))

    least, most = NO_LENGTH, 1.0 + NO_LENGTH
    if best(least)[1] <= least:
        return mean
    weights, length = best(
        scipy.optimize.brentq(
            lambda rho: best(rho)[1] - rho, least, most, xtol=1e-15, rtol=1e-13, maxiter=500
        )
    )
    coefficients: np.ndarray = mean + reach / length * weights
    return coefficients
