"""The multiple-gradient descent algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import (
    GroupBy,
    check_group_by,
    coefficients_of,
    least_norm,
    without_zeros,
)

__all__ = ["MGDA"]


@dataclass(frozen=True)
class MGDA:
    r"""The shortest convex combination of the gradients: min ‖Σ a_i g_i‖ over a ≥ 0, Σ a_i = 1 (Désidéri, C. R. Math. 2012).

    As in Sener, Koltun, NeurIPS 2018, for tasks.

    Along it every loss falls, to first order, at the rate ‖Σ a_i g_i‖² or faster; where it is 0 no direction lowers all. It leans to the
    shortest gradients, so a task that is nearly learned, or whose loss has a small unit, decides; and a_i = 0 for those that it needs
    not. The problem is solved exactly (`least_norm`), in place of the paper's Frank-Wolfe steps. A gradient of 0, of a task that has
    nothing to learn, is left out (ours): it would be the shortest combination, and end everybody's training.

    Args:
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    Raises:
        ConfigError: an option that is none of these.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = MGDA().update(MGDA().init(["a", "b"]), [report("a", 1.0, 0.0), report("b", 0.0, 2.0)])
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}
    {'a': 1.6, 'b': 0.4}
    """

    group_by: GroupBy = "client"

    def __post_init__(self) -> None:
        check_group_by(self.group_by)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of the least norm."""
        return combination(
            state,
            reports,
            coefficients_of(reports, self.group_by, partial(without_zeros, solve=least_norm)),
        )
