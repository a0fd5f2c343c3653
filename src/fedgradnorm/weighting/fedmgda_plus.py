"""FedMGDA+: the least norm of unit gradients near given weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import (
    GroupBy,
    averaging,
    check_group_by,
    coefficients_of,
    least_norm_near,
)

__all__ = ["FedMGDAPlus"]


@dataclass(frozen=True)
class FedMGDAPlus:
    r"""min ‖Σ λ_i ĝ_i‖ over λ on the simplex with |λ_i - λ⁰_i| ≤ epsilon, ĝ_i = g_i / ‖g_i‖ (Hu et al., IEEE TNSE 2022).

    The direction is Σ λ_i ĝ_i, so a_i = λ_i / ‖g_i‖. Unit gradients keep a client with a long one, honest or not, from deciding; epsilon
    goes from the base weights of unit gradients (0) to MGDA on them (1). A gradient of 0 adds nothing.

    Its length is at most 1 whatever the gradients' lengths are: it does not get shorter as they do, and needs a step size of its own
    (``train.server_lr``). The paper lets that decay.

    Args:
        epsilon: from 0 to 1; 0.1 is common.
        base: λ⁰ is ``"equal"``, or the share of the ``"examples"``.
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> method = FedMGDAPlus()
    >>> weights, _ = method.update(method.init(["a", "b"]), [report("a", 1.0, 0.0), report("b", 0.0, 3.0)])
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}  # λ = (½, ½), over ‖g_i‖
    {'a': 1.5, 'b': 0.5}
    """

    epsilon: float = 0.1
    base: Literal["equal", "examples"] = "equal"
    group_by: GroupBy = "client"

    def __post_init__(self) -> None:
        require(0 <= self.epsilon <= 1, "epsilon", "a number from 0 to 1", self.epsilon)
        require(self.base in ("equal", "examples"), "base", "'equal' or 'examples'", self.base)
        check_group_by(self.group_by)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of the least norm near the base weights."""
        members = averaging(reports, self.group_by) > 0
        examples = members @ np.array([report.num_examples for report in reports], dtype=np.float64)
        even = np.full(len(members), 1 / len(members))
        base = examples / examples.sum() if self.base == "examples" and examples.sum() > 0 else even

        def solve(gram: np.ndarray) -> np.ndarray:
            lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0))
            inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
            near = least_norm_near(gram * inverse * inverse[:, None], base, self.epsilon)
            found: np.ndarray = near * inverse
            return found

        return combination(state, reports, coefficients_of(reports, self.group_by, solve))
