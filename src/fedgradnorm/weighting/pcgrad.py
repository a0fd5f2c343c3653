"""Gradient surgery: projecting conflicting gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.randomness import generator
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import GroupBy, check_group_by, coefficients_of

__all__ = ["PCGrad"]


@dataclass(frozen=True)
class PCGrad:
    r"""The mean of the g_i, each projected off those it conflicts with (Yu et al., NeurIPS 2020, arXiv 2001.06782, Algorithm 1).

    Each g_i is taken through the others in a random order: where ⟨g_i, g_j⟩ < 0 at that moment, g_i ← g_i - ⟨g_i, g_j⟩ g_j / ‖g_j‖². Only
    inner products are needed, so it is done on coefficients, and Σ a_i g_i is the result. a_i ≥ 1/n. The paper sums where this takes the
    mean, so that without conflicts it is equal weights. The orders are drawn from (seed, round, i) alone; the state counts the rounds
    that were done.

    Args:
        seed: the seed of the orders, at least 0; the run's own seed does not enter.
        group_by: ``"client"``, or ``"task"`` for surgery on the tasks' mean gradients.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = PCGrad().update(PCGrad().init(["a", "b"]), [report("a", 1.0, 0.0), report("b", -1.0, 1.0)])
    >>> weights.values, weights.scale  # coefficients (1 + 1, 1 + ½) / 2
    ({'a': 1.1428571428571428, 'b': 0.8571428571428571}, 1.75)
    """

    seed: int = 0
    group_by: GroupBy = "client"

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        check_group_by(self.group_by)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone, and no round done."""
        return start(client_ids, round=0)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of the projected gradients' mean."""
        round = state.memory["round"] + 1
        coefficients = coefficients_of(reports, self.group_by, partial(self._solve, round=round))
        return combination(state, reports, coefficients, {"round": round})

    def _solve(self, gram: np.ndarray, round: int) -> np.ndarray:
        orders = [
            generator(self.seed, round, str(index), "pcgrad").permutation(len(gram))
            for index in range(len(gram))
        ]
        return projected(gram, orders)


def projected(gram: np.ndarray, orders: Sequence[np.ndarray]) -> np.ndarray:
    """The coefficients of the mean of the projected gradients, shape ``(n,)``, each taken through the others in its own order."""
    count = len(gram)
    total = np.zeros(count)
    for index, order in enumerate(orders):
        own = np.zeros(count)
        own[index] = 1.0
        products, others = (
            gram[index].copy(),
            order[order != index],
        )  # of what g_i is now with all gradients
        while (conflicts := np.nonzero(products[others] < 0)[0]).size:
            other, others = others[conflicts[0]], others[conflicts[0] + 1 :]
            factor = -products[other] / gram[other, other]
            own[other] += factor
            products += factor * gram[other]
        total += own
    mean: np.ndarray = total / count
    return mean
