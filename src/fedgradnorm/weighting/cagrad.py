"""Conflict-averse gradient descent."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy
from pydantic import Field

from fedgradnorm.weighting.updates import FromUpdates, Updates, least_norm

NO_LENGTH = 1e-6
"""A g_w below this share of the longest gradient counts as 0: its direction is rounding."""


@dataclass(frozen=True)
class CAGrad(FromUpdates):
    r"""The direction near the mean gradient that serves the worst-served task best.

    Source: Liu et al., NeurIPS 2021, Algorithm 1.

    With g_0 the mean gradient, w on the simplex::

        max over d of min_i ⟨g_i, d⟩ with ‖d - g_0‖ ≤ c ‖g_0‖
        d = g_0 + c ‖g_0‖ g_w / ‖g_w‖    with g_w = Σ w_i g_i
        for the w that minimises ⟨g_w, g_0⟩ + c ‖g_0‖ ‖g_w‖

    so a_i = 1/n + c ‖g_0‖ w_i / ‖g_w‖. c = 0 is equal weights; c < 1 still goes to a minimum of the
    mean loss; a large c approaches MGDA's direction. If g_w is 0, which takes c ≥ 1, no direction
    lowers all losses, and a_i = 1/n (ours).

    Args:
        c: from 0 to 100; the paper's 0.4 or 0.5.
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", 0.0, 4.0)]
    >>> weights, _ = CAGrad(c=0.5).update(CAGrad().init(["a", "b"]), reports)
    >>> {client: round(weight, 2) for client, weight in weights.values.items()}
    {'a': 1.51, 'b': 0.49}
    """

    c: Annotated[float, Field(ge=0, le=100)] = 0.4

    def solve(self, updates: Updates) -> np.ndarray:
        """The coefficients of the conflict-averse direction."""
        return conflict_averse(updates.gram, self.c)


def conflict_averse(gram: np.ndarray, c: float) -> np.ndarray:
    r"""CAGrad's coefficients a_i, shape ``(n,)``, from G_ij = ⟨g_i, g_j⟩.

    For x = g_w and s = c ‖g_0‖: s ‖x‖ = min over ρ > 0 of s (‖x‖² / ρ + ρ) / 2. For a fixed ρ, w is
    that of the least norm of the g_i + (ρ/s) g_0. The best ρ equals the ‖g_w‖ that it leads to; the
    derivative in ρ, which is convex, changes its sign there.
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

    def excess(rho: float) -> float:
        return best(rho)[1] - rho

    least, most = NO_LENGTH, 1.0 + NO_LENGTH
    if best(least)[1] <= least:
        return mean
    rho = scipy.optimize.brentq(excess, least, most, xtol=1e-15, rtol=1e-13, maxiter=500)
    weights, length = best(rho)
    coefficients: np.ndarray = mean + reach / length * weights
    return coefficients
