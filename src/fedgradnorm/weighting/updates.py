"""What weightings share that look at the updates g_i themselves: their Gram matrix, tasks as one, and the least norm."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.threads import kernel_threads

__all__ = [
    "GroupBy",
    "averaging",
    "check_group_by",
    "coefficients_of",
    "gram_matrix",
    "least_norm",
    "least_norm_near",
    "without_zeros",
]

GroupBy = Literal["client", "task"]

BLOCK = 2**22
"""So many numbers are turned to double precision at a time."""

RIDGE = 1e-12
"""This share of each squared length is added to it, so that the weights are unique where the least norm has several."""

EQUAL = 1e-12
"""Gradients whose squared distance is below this share of the longest one's square are the same."""

SUM_WEIGHT, TRIES = 30.0, 20
"""How much the sum counts beside the norm in `least_norm_near`, and how often what it lacks is made up for."""


def check_group_by(group_by: str) -> None:
    """Raise a ConfigError unless it is one of the two."""
    require(group_by in ("client", "task"), "group_by", "'client' or 'task'", group_by)


@kernel_threads(1)  # so that sums do not depend on the number of cores
def gram_matrix(gradients: Sequence[Tensor]) -> np.ndarray:
    """G_ij = ⟨g_i, g_j⟩ in double precision, shape ``(n, n)``, of n gradients of shape ``(P,)``; it copies a few of the P at a time.

    >>> gram_matrix([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])])
    array([[5., 6.],
           [6., 9.]])
    """
    count, length = len(gradients), gradients[0].numel()
    gram = torch.zeros(count, count, dtype=torch.float64, device=gradients[0].device)
    width = max(1, BLOCK // count)
    for begin in range(0, length, width):
        block = torch.stack([gradient[begin : begin + width] for gradient in gradients]).double()
        gram.addmm_(block, block.T)
    matrix: np.ndarray = gram.cpu().numpy()
    symmetric: np.ndarray = (matrix + matrix.T) / 2
    return symmetric


def averaging(reports: Sequence[Report], group_by: GroupBy) -> np.ndarray:
    """The matrix that takes gradients to the mean of each group, shape ``(groups, n)``: the identity for ``"client"``."""
    if group_by == "client":
        return np.eye(len(reports))
    tasks = [report.task for report in reports]
    members = np.array([[float(task == group) for task in tasks] for group in dict.fromkeys(tasks)])
    matrix: np.ndarray = members / members.sum(axis=1, keepdims=True)
    return matrix


def coefficients_of(
    reports: Sequence[Report], group_by: GroupBy, solve: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The coefficients a_i of a method that takes a Gram matrix to coefficients: of the clients, or of the tasks' mean gradients.

    A task's coefficient is shared out evenly among its clients, since Σ_t A_t · (mean of its g_i) is to be the direction. Where every
    gradient is 0 all a_i are 1 / n.
    """
    means = averaging(reports, group_by)
    gram = means @ gram_matrix([report.gradient for report in reports]) @ means.T
    if not gram.trace() > 0:
        return np.full(len(reports), 1 / len(reports))
    shared: np.ndarray = means.T @ solve(gram)
    return shared


def without_zeros(gram: np.ndarray, solve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The coefficients of those gradients that are not 0; the others, which move nothing, get the mean of these.

    >>> without_zeros(np.array([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), lambda gram: 1 / gram.diagonal())
    array([0.25 , 0.625, 1.   ])
    """
    moving = np.flatnonzero(gram.diagonal() > 0)
    if len(moving) == len(gram):
        return solve(gram)
    found = solve(gram[np.ix_(moving, moving)])
    coefficients = np.full(len(gram), found.mean())
    coefficients[moving] = found
    return coefficients


def least_norm(gram: np.ndarray) -> np.ndarray:
    r"""The weights w ≥ 0 with Σ w_i = 1 for which ‖Σ w_i g_i‖² = wᵀGw is least, shape ``(n,)``. Among several, the most even.

    It is one non-negative least-squares problem. For u = t w with t ≥ 0 and w on the simplex, ‖Σ u_i g_i‖² + (Σ u_i - 1)² has its minimum
    over t at q / (1 + q) with q = wᵀGw, which grows with q; so its minimiser u, divided by its sum, is w.

    >>> least_norm(np.array([[1.0, 0.0], [0.0, 4.0]]))
    array([0.8, 0.2])
    """
    count = len(gram)
    even = np.full(count, 1 / count)
    if _is_least(even, gram):
        return even
    root = np.vstack([_root(gram), np.ones(count)])
    solution, _ = scipy.optimize.nnls(root, np.append(np.zeros(count), 1.0), maxiter=100 * count)
    weights: np.ndarray = solution / solution.sum()
    return weights


def least_norm_near(gram: np.ndarray, base: np.ndarray, radius: float) -> np.ndarray:
    """The same with |w_i - base_i| ≤ radius for every i as well, ``base`` being on the simplex.

    Each try is a least-squares problem with bounds in which the sum is one more equation; what the sum lacks is added to its right-hand
    side.

    >>> least_norm_near(np.array([[1.0, 0.0], [0.0, 4.0]]), np.array([0.5, 0.5]), 0.1).round(9)
    array([0.6, 0.4])
    """
    count = len(gram)
    if radius == 0 or not gram.trace() > 0 or _is_least(base, gram):
        return base
    root = np.vstack([_root(gram), np.full(count, SUM_WEIGHT)])
    bounds, aim = (np.maximum(base - radius, 0.0), np.minimum(base + radius, 1.0)), 1.0
    for _ in range(TRIES):
        sides = np.append(np.zeros(count), SUM_WEIGHT * aim)
        weights = scipy.optimize.lsq_linear(
            root, sides, bounds, method="bvls", tol=1e-14, max_iter=10 * count
        ).x
        lacking = 1.0 - weights.sum()
        if abs(lacking) < 1e-13:
            break
        aim += lacking
    weights = _evened(np.clip(weights, 0.0, 1.0), gram, base)
    found: np.ndarray = weights / weights.sum()
    return found


def _evened(weights: np.ndarray, gram: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The weights with the same one for gradients that are the same: the norm does not tell them apart, and a solver ends where it is."""
    squares = gram.diagonal()
    apart = squares[:, None] + squares - 2 * gram  # ‖g_i - g_j‖²
    alike = (apart <= EQUAL * squares.max()) & (base[:, None] == base)
    evened: np.ndarray = (alike @ weights) / alike.sum(axis=1)
    return evened


def _is_least(weights: np.ndarray, gram: np.ndarray) -> bool:
    """Whether weights have the least norm on the simplex: no g_i has a smaller product with Σ w_j g_j than that has with itself."""
    slopes = gram @ weights
    return bool(slopes.min() >= weights @ slopes - 1e-14 * np.abs(slopes).max())


def _root(gram: np.ndarray) -> np.ndarray:
    """R with RᵀR = G in units of the longest gradient, up to the ridge. All lengths are divided out before, and come back last."""
    lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    lengths /= lengths.max()
    known = np.where(lengths > 0, lengths, 1.0)
    cosines = gram / gram.diagonal().max() / np.outer(known, known) + RIDGE * np.eye(len(gram))
    values, vectors = np.linalg.eigh(cosines)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))).T * lengths
    return root
