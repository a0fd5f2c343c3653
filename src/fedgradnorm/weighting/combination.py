"""From a method's coefficients a_i, direction Σ a_i g_i, to weights p_i and a scale that mean the same: one place for all methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights

__all__ = ["combination", "keeping", "proportional", "start"]

LEAST = 1e-6
"""No remembered weight is below this, so that no set of clients ever has the sum 0."""

CANCELLED = 1e-6
"""Coefficients of either sign whose sum is below this share of their absolute sum have no mean to speak of."""


def start(client_ids: Sequence[str], **memory: Any) -> WeightingState:
    """The state before the first round: weight 1 for everyone, and whatever else the method remembers."""
    return WeightingState(dict.fromkeys(client_ids, 1.0), memory)


def combination(
    state: WeightingState,
    reports: Sequence[Report],
    coefficients: Sequence[float] | np.ndarray,
    memory: Mapping[str, Any] | None = None,
) -> tuple[Weights, WeightingState]:
    r"""The weights and the scale with which the aggregation `Mean` makes the direction Σ a_i g_i, and the next state.

    With T the sum of the participants' weights so far, newcomers counting 1::

        p_i = T a_i / Σ a_j        scale = Σ a_j        so that        scale · Σ p_i g_i / Σ p_j = Σ a_i g_i

    Thus all weights keep the sum N, and an absent client keeps its own. Three cases need a rule:

    - **Some a_i is 0 or negative.** So is then p_i, which is applied and recorded as it is. What the *state* remembers is p_i raised to at
      least 10⁻⁶, the others lowered as much, so that T is above 0 in every later round, whoever takes part in it.
    - **Σ a_j is not positive**, or not finite, or less than 10⁻⁶ of Σ |a_j|: coefficients that cancel, or that are all 0, have no direction
      of their own. This round then has equal weights, p_i = T / n and scale 1.
    - **There is a single participant.** Its weight stays what it was, and only the scale says something.

    Args:
        state: the state so far.
        reports: the round's reports, n of them.
        coefficients: a_i, in the order of the reports, shape ``(n,)``.
        memory: what the next state remembers beside the weights; None: what this one does.

    >>> import torch
    >>> def report(client):
    ...     return Report(client, "a task", torch.zeros(1), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, state = combination(start(["a", "b"]), [report("a"), report("b")], [0.125, 0.375])
    >>> weights.values, weights.scale
    ({'a': 0.5, 'b': 1.5}, 0.5)
    """
    clients = [report.client for report in reports]
    before = np.array([state.weights.get(client, 1.0) for client in clients])
    shares, scale = _shares(np.asarray(coefficients, dtype=np.float64))
    applied = before.sum() * shares
    remembered = {**state.weights, **dict(zip(clients, _raised(applied).tolist(), strict=True))}
    values = dict(zip(clients, applied.tolist(), strict=True))
    return Weights(values, scale=scale), WeightingState(
        remembered, state.memory if memory is None else memory
    )


def proportional(
    state: WeightingState,
    reports: Sequence[Report],
    shares: Sequence[float] | np.ndarray,
    memory: Mapping[str, Any] | None = None,
) -> tuple[Weights, WeightingState]:
    """The same for a weighted mean of the gradients, p_i ∝ shares, with the scale 1: only the shares' ratios count.

    >>> import torch
    >>> def report(client):
    ...     return Report(client, "a task", torch.zeros(1), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, state = proportional(start(["a", "b"]), [report("a"), report("b")], [1, 3])
    >>> weights.values, weights.scale
    ({'a': 0.5, 'b': 1.5}, 1.0)
    """
    return combination(state, reports, _shares(np.asarray(shares, dtype=np.float64))[0], memory)


def keeping(
    state: WeightingState,
    reports: Sequence[Report],
    can_be_weighed: Callable[[Report], bool],
    update: Callable[[WeightingState, Sequence[Report]], tuple[Weights, WeightingState]],
) -> tuple[Weights, WeightingState]:
    """Weights for those reports that a method can weigh; the other clients keep the weights that they had.

    >>> import torch
    >>> def report(client, loss):
    ...     return Report(client, "a task", torch.zeros(1), loss=loss, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> def inverse(state, reports):
    ...     return proportional(state, reports, [1 / report.loss for report in reports])
    >>> reports = [report("a", 1.0), report("b", 0.0), report("c", 3.0)]
    >>> keeping(start(["a", "b", "c"]), reports, lambda report: report.loss > 0, inverse)[0].values
    {'a': 1.5, 'b': 1.0, 'c': 0.5}
    """
    weighed = [report for report in reports if can_be_weighed(report)]
    if len(weighed) == len(reports):
        return update(state, reports)
    old = {report.client: state.weights.get(report.client, 1.0) for report in reports}
    if not weighed:
        return Weights(old), replace(state, weights={**state.weights, **old})
    weights, after = update(state, weighed)
    return (
        replace(weights, values={**old, **weights.values}),
        replace(
            after,
            weights={
                **state.weights,
                **old,
                **{report.client: after.weights[report.client] for report in weighed},
            },
        ),
    )


def _shares(coefficients: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients over their sum, and the sum; equal ones and 1 where there is no such thing."""
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
    """The weights raised to at least `LEAST`, their sum kept by what the others have above it."""
    total = weights.sum()
    least = min(LEAST, total / len(weights))
    if weights.min() >= least:
        return weights
    above = np.maximum(weights, least) - least
    spare = total - least * len(weights)
    raised: np.ndarray = least + above * (spare / above.sum() if above.sum() > 0 else 0.0)
    return raised
