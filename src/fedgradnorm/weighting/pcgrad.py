"""Gradient surgery: projecting conflicting gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from fedgradnorm.weighting.base import WeightingState
from fedgradnorm.weighting.combination import start
from fedgradnorm.weighting.updates import FromUpdates, Updates


@dataclass(frozen=True)
class PCGrad(FromUpdates):
    r"""The mean of the g_i, each projected off those that it conflicts with.

    Source: Yu et al., NeurIPS 2020, arXiv 2001.06782, Algorithm 1.

    Each g_i passes the others in a random order: if ⟨g_i, g_j⟩ < 0 at that moment, g_i ← g_i -
    ⟨g_i, g_j⟩ g_j / ‖g_j‖². Only inner products are needed, so this is done on coefficients, and Σ
    a_i g_i is the result. a_i ≥ 1/n.

    The paper takes the sum; here it is the mean, which without conflicts is equal weights. The
    orders are drawn from (seed, round, i) alone; the state counts the rounds.

    Args:
        seed: the seed of the orders, at least 0; it is independent of the run's seed.
        group_by: ``"client"``, or ``"task"`` for surgery on the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", -1.0, 1.0)]
    >>> weights, _ = PCGrad().update(PCGrad().init(["a", "b"]), reports)
    >>> weights.values, weights.scale  # coefficients (1 + 1, 1 + ½) / 2
    ({'a': 1.1428571428571428, 'b': 0.8571428571428571}, 1.75)
    """

    seed: Annotated[int, Field(ge=0)] = 0

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for every client, and round 0."""
        return start(client_ids, round=0)

    def remembered(self, memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """The number of this round."""
        return {"round": memory["round"] + 1}

    def solve(self, updates: Updates) -> np.ndarray:
        """The coefficients of the projected gradients' mean."""
        from fedgradnorm.randomness import generator  # loads torch

        round, count = updates.memory["round"], len(updates.gram)
        draws = [generator(self.seed, round, str(index), "pcgrad") for index in range(count)]
        return projected(updates.gram, [rng.permutation(count) for rng in draws])


def projected(gram: np.ndarray, orders: Sequence[np.ndarray]) -> np.ndarray:
    """The coefficients of the mean of the projected gradients, shape ``(n,)``.

    Args:
        gram: G_ij = ⟨g_i, g_j⟩, shape ``(n, n)``.
        orders: for each gradient, the order in which it passes the others.
    """
    count = len(gram)
    total = np.zeros(count)
    for index, order in enumerate(orders):
        own = np.zeros(count)
        own[index] = 1.0
        products = gram[index].copy()  # of all gradients with the projected g_i
        others = order[order != index]
        while (conflicts := np.nonzero(products[others] < 0)[0]).size:
            other, others = others[conflicts[0]], others[conflicts[0] + 1 :]
            factor = -products[other] / gram[other, other]
            own[other] += factor
            products += factor * gram[other]
        total += own
    mean: np.ndarray = total / count
    return mean
