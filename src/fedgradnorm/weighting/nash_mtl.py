"""Multi-task learning as a bargaining game."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import GroupBy, check_group_by, coefficients_of, without_zeros

__all__ = ["NashMTL", "bargain"]

RIDGE = 1e-10
MOST_STEPS = 200


@dataclass(frozen=True)
class NashMTL:
    r"""The Nash bargaining solution: a > 0 with G a = 1 / a, G_ij = ⟨g_i, g_j⟩ (Navon et al., ICML 2022, arXiv 2202.01017).

    Σ a_i g_i maximises Π ⟨g_i, d⟩ over directions d of a given length, so no client's relative gain can grow at a lesser relative cost of
    the others, and the scale of a loss cancels. a is the minimiser of ½ aᵀGa - Σ log a_i, which Newton's method finds, in place of the
    authors' convex-concave steps. 10⁻¹⁰ of each ‖g_i‖² is added to it: where a convex combination of gradients is 0 there would be no
    solution. A gradient of 0, of a task that has nothing to learn, does not bargain (ours), and n is the number of the others.

    **Its length** is √n whatever the gradients' lengths are, and is cut to ``max_norm``, as in the authors' code. So it does not get
    shorter as training converges, and needs a step size of its own: tune ``train.server_lr``, or ``max_norm``.

    Args:
        max_norm: the direction's greatest length, above 0.
        group_by: ``"client"``, or ``"task"`` for a bargain among the tasks' mean gradients.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = NashMTL().update(NashMTL().init(["a", "b"]), [report("a", 1.0, 0.0), report("b", 0.0, 3.0)])
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}  # 1 / ‖g_i‖ where they are orthogonal
    {'a': 1.5, 'b': 0.5}
    """

    max_norm: float = 1.0
    group_by: GroupBy = "client"

    def __post_init__(self) -> None:
        require(
            0 < self.max_norm < float("inf"), "max_norm", "a finite number above 0", self.max_norm
        )
        check_group_by(self.group_by)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of the bargain."""
        return combination(state, reports, coefficients_of(reports, self.group_by, self._solve))

    def _solve(self, gram: np.ndarray) -> np.ndarray:
        count = np.count_nonzero(gram.diagonal())
        return without_zeros(gram, bargain) * min(1.0, self.max_norm / math.sqrt(count))


def bargain(gram: np.ndarray) -> np.ndarray:
    """The a > 0 with G a = 1 / a, shape ``(n,)``; no gradient is 0.

    In units of 1 / ‖g_i‖, so that only the gradients' cosines matter; damped Newton steps, which get there from anywhere, as the function
    is self-concordant (Nesterov, Introductory Lectures on Convex Optimization, 2004, §4.1.5).

    >>> bargain(np.array([[4.0, 0.0], [0.0, 1.0]])).round(9)
    array([0.5, 1. ])
    """
    count = len(gram)
    lengths = np.sqrt(gram.diagonal())
    cosines = gram / lengths / lengths[:, None] + RIDGE * np.eye(count)
    solution = np.full(count, 1 / np.sqrt(max(cosines.sum() / count, RIDGE)))
    for _ in range(MOST_STEPS):
        slope = cosines @ solution - 1 / solution
        step = scipy.linalg.cho_solve(
            scipy.linalg.cho_factor(cosines + np.diag(1 / solution**2)), slope
        )
        decrement = np.sqrt(max(slope @ step, 0.0))
        solution = solution - step / (1 + decrement if decrement > 0.25 else 1)
        if decrement < 1e-12:
            break
    found: np.ndarray = solution / lengths
    return found
