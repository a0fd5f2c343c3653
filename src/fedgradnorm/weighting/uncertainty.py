"""Uncertainty weighting, learned at the server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedgradnorm.weighting.base import Reports, Update, WeightingState
from fedgradnorm.weighting.combination import proportional, start
from fedgradnorm.weighting.losses import FromLosses, losses_of

LARGEST_STEP = 1.0


@dataclass(frozen=True)
class Uncertainty(FromLosses):
    """p_i ∝ exp(-s_i), with s_i = log σ_i² a learned log variance of task i.

    Source: Kendall, Gal, Cipolla, CVPR 2018.

    The paper learns s with the network, by gradient steps on Σ ½ (exp(-s_i) F_i + s_i). The
    gradient in s_i needs only F_i, so the server takes these steps with the reported losses,
    ``weight_steps`` of them per round::

        s_i ← s_i - weight_lr · ½ (1 - exp(-s_i) F_i)        from s_i = 0

    A step is cut to 1 (ours), since a large loss would throw exp(-s_i) to 0. The paper's factor 1
    for classes against ½ for regression is left out; it is a constant shift of s. The weights are
    normalised to their sum, so that the step size means the same as with other weightings.

    The scale of losses matters on the way. The steps approach exp(-s_i) = 1 / F_i, where a loss
    times c has the weight over c, as balance asks. But they start at exp(-s_i) = 1, and take about
    2 |log F_i| / weight_lr rounds: if losses are far from 1, choose weight_lr accordingly, or
    `gls`, which is at that point from the first round on. IMTL-L (Liu et al., ICLR 2021) has the
    same fixed point.

    A loss of 0, or below 10⁻⁶ of the initial one, counts as that share.

    Args:
        weight_lr: the step size, above 0, at most 1.
        weight_steps: steps per round, at least 1.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, loss):
    ...     return Report(client, "task", torch.zeros(1), loss, 1.0, 1.0, num_examples=9)
    >>> method = Uncertainty(weight_steps=200)
    >>> weights, _ = method.update(method.init(["a", "b"]), [report("a", 0.5), report("b", 1.5)])
    >>> {client: round(weight, 3) for client, weight in weights.values.items()}  # 1 / F_i
    {'a': 1.5, 'b': 0.5}
    """

    weight_lr: Annotated[float, Field(gt=0, le=1)] = 0.1
    weight_steps: Annotated[int, Field(ge=1)] = 1

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for every client, and s = 0."""
        return start(client_ids, log_variances={})

    def weigh(self, state: WeightingState, reports: Reports) -> Update:
        """Steps on s with this round's losses, and the weights that follow."""
        known, losses = state.memory["log_variances"], losses_of(reports, positive=True)
        s = np.array([known.get(report.client, 0.0) for report in reports])
        for _ in range(self.weight_steps):
            ratio = np.exp(np.minimum(np.log(losses) - s, 700.0))  # exp(-s) F without an overflow
            s -= np.clip(self.weight_lr * (1 - ratio) / 2, -LARGEST_STEP, LARGEST_STEP)
        clients = [report.client for report in reports]
        memory = {**known, **dict(zip(clients, s.tolist(), strict=True))}
        return proportional(state, reports, np.exp(s.min() - s), {"log_variances": memory})
