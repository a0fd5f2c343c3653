"""Random loss weighting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import scipy
from pydantic import Field

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState
from fedgradnorm.weighting.combination import proportional, start


@dataclass(frozen=True)
class RLW(Weighting):
    """p ∝ softmax(z), z_i standard normal, drawn anew in each round: a baseline.

    Source: Lin, Ye, Zhang, Tsang, TMLR 2022, arXiv 2111.10603.

    A method that is meant to balance tasks should do better than this. z_i is drawn from (seed,
    round, client) alone, so it does not depend on who else takes part, and is the same after a
    resume; the state counts the rounds.

    Args:
        seed: the seed of the draws, at least 0; it is independent of the run's seed.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> reports = [Report(client, "task", torch.zeros(1), 1.0, 1.0, 1.0, 9) for client in "ab"]
    >>> method = RLW(seed=1)
    >>> weights, state = method.update(method.init(["a", "b"]), reports)
    >>> round(sum(weights.values.values()), 9), state.memory
    (2.0, {'round': 1})
    """

    reads_gradients: ClassVar[bool] = False

    seed: Annotated[int, Field(ge=0)] = 0

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for every client, and round 0."""
        return start(client_ids, round=0)

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """New random weights, whatever the clients report."""
        from fedgradnorm.randomness import generator  # loads torch

        round = state.memory["round"] + 1
        generators = [generator(self.seed, round, report.client, "rlw") for report in reports]
        shares = scipy.special.softmax([draws.standard_normal() for draws in generators])
        return proportional(state, reports, shares, {"round": round})
