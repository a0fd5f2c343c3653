"""Dynamic weight average: more weight for clients whose losses fall slowly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy
from pydantic import Field

from fedgradnorm.weighting.base import Reports, Update, WeightingState
from fedgradnorm.weighting.combination import proportional, start
from fedgradnorm.weighting.losses import FromLosses, losses_of

LARGEST_RATE = 1e6


@dataclass(frozen=True)
class DWA(FromLosses):
    """p_i ∝ exp(r_i / T), with r_i = F_i(k) / F_i(k') the ratio of the client's last two losses.

    Source: Liu, Johns, Davison, CVPR 2019.

    The paper takes the means of the two epochs before the present one. A server has this round's
    loss when it sets the weights, so it takes this one and that of the last round in which the
    client took part. Before there are two, r_i = 1. r_i does not depend on the scale of a loss, and
    counts as at most 10⁶.

    Args:
        temperature: T from 1e-3 to 1e6; the larger, the more even the weights. The paper's is 2.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, loss):
    ...     return Report(client, "task", torch.zeros(1), loss, 1.0, 1.0, num_examples=9)
    >>> method = DWA(temperature=0.5)
    >>> _, state = method.update(method.init(["a", "b"]), [report("a", 1.0), report("b", 1.0)])
    >>> weights, _ = method.update(state, [report("a", 1.0), report("b", 0.5)])
    >>> {client: round(weight, 3) for client, weight in weights.values.items()}  # e² to e¹
    {'a': 1.462, 'b': 0.538}
    """

    temperature: Annotated[float, Field(ge=1e-3, le=1e6)] = 2.0

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for every client, and no loss yet."""
        return start(client_ids, losses={})

    def weigh(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by how the losses have changed since the client's last report."""
        losses = losses_of(reports, positive=True).tolist()
        now = {report.client: loss for report, loss in zip(reports, losses, strict=True)}
        before = {**now, **state.memory["losses"]}
        rates = np.array([min(loss / before[client], LARGEST_RATE) for client, loss in now.items()])
        shares = scipy.special.softmax(rates / self.temperature)
        return proportional(state, reports, shares, {"losses": {**before, **now}})
