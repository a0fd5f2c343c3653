"""Dynamic weight average: weight for those whose losses fall slowly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import keeping, proportional, start
from fedgradnorm.weighting.losses import has_a_rate, losses_of

__all__ = ["DWA"]

LARGEST_RATE = 1e6


@dataclass(frozen=True)
class DWA:
    """p_i ∝ exp(r_i / T), with r_i = F_i(k) / F_i(k') the ratio of the client's last two losses (Liu, Johns, Davison, CVPR 2019).

    The paper takes the means of the two epochs before the present one; a server has this round's loss when it sets the weights, and takes
    it and that of the last round in which the client took part. Before there are two, r_i = 1. r_i does not depend on the scale of a
    loss, and is counted as at most 10⁶.

    Args:
        temperature: T from 1e-3 to 1e6; the larger, the more even the weights. The paper's is 2.

    Raises:
        ConfigError: a temperature out of range.

    >>> import torch
    >>> def report(client, loss):
    ...     return Report(client, "a task", torch.zeros(1), loss=loss, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> method = DWA(temperature=0.5)
    >>> _, state = method.update(method.init(["a", "b"]), [report("a", 1.0), report("b", 1.0)])
    >>> weights, _ = method.update(state, [report("a", 1.0), report("b", 0.5)])
    >>> {client: round(weight, 3) for client, weight in weights.values.items()}  # e² to e¹
    {'a': 1.462, 'b': 0.538}
    """

    reads_gradients: ClassVar[bool] = False
    needs_positive_losses: ClassVar[bool] = True

    temperature: float = 2.0

    def __post_init__(self) -> None:
        require(
            1e-3 <= self.temperature <= 1e6,
            "temperature",
            "a number from 1e-3 to 1e6",
            self.temperature,
        )

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone, and no loss yet."""
        return start(client_ids, losses={})

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """Weights by how the losses have changed since the client's last report."""
        return keeping(state, reports, has_a_rate, self._update)

    def _update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        now = dict(
            zip(
                (report.client for report in reports),
                losses_of(reports, positive=True).tolist(),
                strict=True,
            )
        )
        before = {**now, **state.memory["losses"]}
        rates = np.array([min(loss / before[client], LARGEST_RATE) for client, loss in now.items()])
        return proportional(
            state,
            reports,
            scipy.special.softmax(rates / self.temperature),
            {"losses": {**before, **now}},
        )
