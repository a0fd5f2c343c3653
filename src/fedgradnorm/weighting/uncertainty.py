"""Uncertainty weighting, learned at the server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import keeping, proportional, start
from fedgradnorm.weighting.losses import has_a_rate, losses_of

__all__ = ["Uncertainty"]

LARGEST_STEP = 1.0


@dataclass(frozen=True)
class Uncertainty:
    """p_i ∝ exp(-s_i), s_i = log σ_i² a learned log variance of task i (Kendall, Gal, Cipolla, CVPR 2018).

    The paper learns s with the network, by gradient steps on Σ ½ (exp(-s_i) F_i + s_i). Its gradient in s_i needs nothing but F_i, so the
    server can take these steps itself, with the losses that are reported, ``weight_steps`` of them a round::

        s_i ← s_i - weight_lr · ½ (1 - exp(-s_i) F_i)        from s_i = 0

    A step is cut to 1 (ours): a large loss would else throw exp(-s_i) to 0. The paper's factor 1 for classes against ½ for regression is
    left out; it is a constant shift of s. The weights are normalised to their sum, so that the step size means the same as with other
    weightings.

    A note on the scale of losses: the steps approach exp(-s_i) = 1 / F_i, where a loss times c has the weight over c, as balance asks. On
    the way there they do depend on it, since they start at exp(-s_i) = 1 and take about 2 |log F_i| / weight_lr rounds: with losses far
    from 1, choose weight_lr accordingly, or `gls`, which is at that point from the first round on. IMTL-L (Liu et al., ICLR 2021) has the
    same fixed point.

    Losses are taken from the task's floor on; one of 0, or below 10⁻⁶ of the initial one, counts as that much. A client without a training
    rate keeps its weight: one whose F_i(0) is not above the floor, or whose F_i is below it.

    Args:
        weight_lr: the step size, above 0, at most 1.
        weight_steps: steps a round, at least 1.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, loss):
    ...     return Report(client, "a task", torch.zeros(1), loss=loss, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> method = Uncertainty(weight_steps=200)
    >>> weights, _ = method.update(method.init(["a", "b"]), [report("a", 0.5), report("b", 1.5)])
    >>> {client: round(weight, 3) for client, weight in weights.values.items()}  # 1 / F_i
    {'a': 1.5, 'b': 0.5}
    """

    reads_gradients: ClassVar[bool] = False
    needs_positive_losses: ClassVar[bool] = True

    weight_lr: float = 0.1
    weight_steps: int = 1

    def __post_init__(self) -> None:
        require(0 < self.weight_lr <= 1, "weight_lr", "a number above 0, at most 1", self.weight_lr)
        require(self.weight_steps >= 1, "weight_steps", "at least 1", self.weight_steps)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone, s = 0."""
        return start(client_ids, log_variances={})

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """Steps on s with this round's losses, and the weights that follow."""
        return keeping(state, reports, has_a_rate, self._update)

    def _update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        known, losses = state.memory["log_variances"], losses_of(reports, positive=True)
        s = np.array([known.get(report.client, 0.0) for report in reports])
        for _ in range(self.weight_steps):
            ratio = np.exp(
                np.minimum(np.log(losses) - s, 700.0)
            )  # exp(-s) F, which cannot overflow
            s -= np.clip(self.weight_lr * (1 - ratio) / 2, -LARGEST_STEP, LARGEST_STEP)
        memory = {
            **known,
            **dict(zip((report.client for report in reports), s.tolist(), strict=True)),
        }
        return proportional(state, reports, np.exp(s.min() - s), {"log_variances": memory})
