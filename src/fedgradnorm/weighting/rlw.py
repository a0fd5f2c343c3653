"""Random loss weighting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import scipy

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.randomness import generator
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import proportional, start

__all__ = ["RLW"]


@dataclass(frozen=True)
class RLW:
    """p ∝ softmax(z), z_i standard normal, drawn anew each round (Lin, Ye, Zhang, Tsang, TMLR 2022, arXiv 2111.10603): a baseline.

    A method that means to balance tasks should do better than this. z_i is drawn from (seed, round, client) alone, so it is the same
    whoever else takes part, and after a resume; the state counts the rounds that were done.

    Args:
        seed: the seed of the draws, at least 0; the run's own seed does not enter.

    Raises:
        ConfigError: a seed below 0.

    >>> import torch
    >>> def report(client):
    ...     return Report(client, "a task", torch.zeros(1), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> method = RLW(seed=1)
    >>> weights, state = method.update(method.init(["a", "b"]), [report("a"), report("b")])
    >>> round(sum(weights.values.values()), 9), state.memory
    (2.0, {'round': 1})
    """

    reads_gradients: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone, and no round done."""
        return start(client_ids, round=0)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """New random weights, whatever the clients report."""
        round = state.memory["round"] + 1
        draws = [
            generator(self.seed, round, report.client, "rlw").standard_normal()
            for report in reports
        ]
        return proportional(state, reports, scipy.special.softmax(draws), {"round": round})
