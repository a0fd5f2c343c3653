"""From a method's coefficients a_i, of the direction Σ a_i g_i, to weights p_i and a scale."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fedgradnorm.weighting.base import Reports, Update, WeightingState, Weights

Numbers: TypeAlias = Sequence[float] | np.ndarray

LEAST = 1e-6
"""The minimum of a remembered weight, so that any set of clients has a sum above 0."""

CANCELLED = 1e-6
"""Coefficients cancel if their sum is below this share of the sum of their absolute values."""


def start(client_ids: Sequence[str], **memory: Any) -> WeightingState:
    """The state before the first round: weight 1 for every client, and this memory."""
    return WeightingState(dict.fromkeys(client_ids, 1.0), memory)


def combination(
    state: WeightingState,
    reports: Reports,
    coefficients: Numbers,
    memory: Mapping[str, Any] | None = None,
) -> Update:
    r"""The weights and the scale with which `Mean` makes Σ a_i g_i, and the next state.

    With T the sum of the participants' weights so far, where a newcomer counts 1::

        p_i = T a_i / Σ a_j        scale = Σ a_j
        so that        scale · Σ p_i g_i / Σ p_j = Σ a_i g_i

    Thus the sum of all weights stays N, and an absent client keeps its weight. Three cases:

    - **Some a_i is 0 or negative.** So is p_i, which is applied and recorded as it is. The *state*
      remembers p_i raised to at least 10⁻⁶, and the others lowered as much, so that T is above 0
      in every later round, whoever takes part in it.
    - **Σ a_j is not positive**, not finite, or below 10⁻⁶ of Σ |a_j|. The coefficients cancel or
      are all 0, and have no direction. This round has equal weights, p_i = T / n, and scale 1.
    - **There is one participant.** Its weight stays, and only the scale changes.

    Args:
        state: the state so far.
        reports: the round's n reports.
        coefficients: a_i, in the order of the reports, shape ``(n,)``.
        memory: the memory of the next state; None: that of this one.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> reports = [Report(client, "task", torch.zeros(1), 1.0, 1.0, 1.0, 9) for client in "ab"]
    >>> weights, state = combination(start(["a", "b"]), reports, [0.125, 0.375])
    >>> weights.values, weights.scale
    ({'a': 0.5, 'b': 1.5}, 0.5)
    """
    clients = [report.client for report in reports]
    before = np.array([state.weights.get(client, 1.0) for client in clients])
    shares, scale = _shares(np.asarray(coefficients, dtype=np.float64))
    applied = before.sum() * shares
    remembered = {**state.weights, **dict(zip(clients, _raised(applied).tolist(), strict=True))}
    values = dict(zip(clients, applied.tolist(), strict=True))
    after = WeightingState(remembered, state.memory if memory is None else memory)
    return Weights(values, scale=scale), after


def proportional(
    state: WeightingState,
    reports: Reports,
    shares: Numbers,
    memory: Mapping[str, Any] | None = None,
) -> Update:
    """Like `combination`, for a weighted mean with p_i ∝ shares and scale 1.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> reports = [Report(client, "task", torch.zeros(1), 1.0, 1.0, 1.0, 9) for client in "ab"]
    >>> weights, state = proportional(start(["a", "b"]), reports, [1, 3])
    >>> weights.values, weights.scale
    ({'a': 0.5, 'b': 1.5}, 1.0)
    """
    return combination(state, reports, _shares(np.asarray(shares, dtype=np.float64))[0], memory)


def _shares(coefficients: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients over their sum, and the sum; equal shares and 1 if they have no direction."""
    most = np.abs(coefficients).max()
    if np.isfinite(most) and most > 0:
        relative = coefficients / most  # so that no sum overflows
        total = relative.sum()
        with np.errstate(over="ignore"):
            scale = total * most
        if total > CANCELLED * np.abs(relative).sum() and np.isfinite(scale):
            return relative / total, float(scale)
    return np.full(len(coefficients), 1 / len(coefficients)), 1.0


def _raised(weights: np.ndarray) -> np.ndarray:
    """The weights raised to at least `LEAST`. The larger ones are lowered to keep the sum."""
    total = weights.sum()
    least = min(LEAST, total / len(weights))
    if weights.min() >= least:
        return weights
    above = np.maximum(weights, least) - least
    spare = total - least * len(weights)
    raised: np.ndarray = least + above * (spare / above.sum() if above.sum() > 0 else 0.0)
    return raised
