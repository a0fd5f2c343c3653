"""Multi-task learning as a bargaining game."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy
from pydantic import Field

from fedgradnorm.weighting.updates import FromUpdates, Updates, without_zeros

RIDGE = 1e-10
MOST_STEPS = 200


@dataclass(frozen=True)
class NashMTL(FromUpdates):
    r"""The Nash bargaining solution: a > 0 with G a = 1 / a, and G_ij = ⟨g_i, g_j⟩.

    Source: Navon et al., ICML 2022, arXiv 2202.01017.

    Σ a_i g_i maximises Π ⟨g_i, d⟩ over the directions d of a given length. So no client's relative
    gain can grow at a smaller relative cost to the others, and the scale of a loss cancels.

    a minimises ½ aᵀGa - Σ log a_i, which Newton's method finds, in place of the authors'
    convex-concave steps. 10⁻¹⁰ of each ‖g_i‖² is added to it: without that there is no solution if
    a convex combination of gradients is 0. A gradient of 0, of a task that has nothing to learn,
    does not bargain (ours), and n is the number of the others.

    **The direction's length** is √n whatever the gradients' lengths, and is cut to ``max_norm``,
    as in the authors' code. It does not shrink as training converges, and needs its own step size:
    tune ``train.server_lr`` or ``max_norm``.

    Args:
        max_norm: the direction's maximum length, above 0.
        group_by: ``"client"``, or ``"task"`` for a bargain among the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", 0.0, 3.0)]
    >>> weights, _ = NashMTL().update(NashMTL().init(["a", "b"]), reports)
    >>> # orthogonal gradients: 1 / ‖g_i‖
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}
    {'a': 1.5, 'b': 0.5}
    """

    max_norm: Annotated[float, Field(gt=0)] = 1.0

    def solve(self, updates: Updates) -> np.ndarray:
        """The coefficients of the bargain, cut to the maximum length."""
        count = np.count_nonzero(updates.gram.diagonal())
        bargained = without_zeros(updates.gram, bargain)
        return bargained * min(1.0, self.max_norm / math.sqrt(count))


def bargain(gram: np.ndarray) -> np.ndarray:
    """The a > 0 with G a = 1 / a, shape ``(n,)``; no gradient is 0.

    It is computed in units of 1 / ‖g_i‖, so that only the gradients' cosines matter. The damped
    Newton steps converge from any start, since the function is self-concordant (Nesterov,
    Introductory Lectures on Convex Optimization, 2004, §4.1.5).

    >>> bargain(np.array([[4.0, 0.0], [0.0, 1.0]])).round(9)
    array([0.5, 1. ])
    """
    count = len(gram)
    lengths = np.sqrt(gram.diagonal())
    cosines = gram / lengths / lengths[:, None] + RIDGE * np.eye(count)
    solution = np.full(count, 1 / np.sqrt(max(cosines.sum() / count, RIDGE)))
    for _ in range(MOST_STEPS):
        slope = cosines @ solution - 1 / solution
        hessian = cosines + np.diag(1 / solution**2)
        step = scipy.linalg.cho_solve(scipy.linalg.cho_factor(hessian), slope)
        decrement = np.sqrt(max(slope @ step, 0.0))
        solution = solution - step / (1 + decrement if decrement > 0.25 else 1)
        if decrement < 1e-12:
            break
    coefficients: np.ndarray = solution / lengths
    return coefficients
