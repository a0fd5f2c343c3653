"""What the weightings share that read the gradients g_i: their Gram matrix, and the least norm."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import scipy

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState
from fedgradnorm.weighting.combination import combination

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**22
"""How many numbers are converted to double precision at a time."""

RIDGE = 1e-12
"""This share of each squared length is added to it, so that the least norm has unique weights."""

EQUAL = 1e-12
"""Gradients are equal if their squared distance is below this share of the longest one's square."""

SUM_WEIGHT, TRIES = 30.0, 20
"""In `least_norm_near`: the weight of the sum's equation, and how often its error is corrected."""


class Updates(NamedTuple):
    """A round's gradients, as a method sees them that reads nothing but their inner products.

    Attributes:
        gram: G_ij = ⟨g_i, g_j⟩ of the clients' gradients, or of the tasks' mean gradients, shape
            ``(groups, groups)``. At least one of them is not 0.
        examples: the number of training examples of each client or task, shape ``(groups,)``.
        memory: the memory of the next state.
    """

    gram: np.ndarray
    examples: np.ndarray
    memory: Mapping[str, Any]


@dataclass(frozen=True)
class FromUpdates(Weighting):
    """The base of weightings whose direction Σ a_i g_i follows from the Gram matrix of the g_i.

    With ``group_by="task"`` a task's coefficient is divided evenly among its clients, so that the
    direction is Σ_t a_t · (mean of its g_i). If all gradients are 0, all a_i are 1 / n.

    Attributes:
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.
        sums_to_one: whether the a_i are divided by their sum, if that is above 0.
    """

    sums_to_one: ClassVar[bool] = False

    group_by: Literal["client", "task"] = field(default="client", kw_only=True)

    @abstractmethod
    def solve(self, updates: Updates) -> np.ndarray:
        """The coefficients of the clients' or the tasks' gradients, shape ``(groups,)``."""

    def remembered(self, memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """The memory of the next state, from that of this one; by default the same."""
        return memory

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """The weights and the scale of the direction Σ a_i g_i."""
        memory = self.remembered(state.memory)
        means = self._means(reports)
        gram = means @ gram_matrix([report.gradient for report in reports]) @ means.T
        if gram.trace() > 0:
            counts = np.array([report.num_examples for report in reports], dtype=np.float64)
            coefficients = means.T @ self.solve(Updates(gram, (means > 0) @ counts, memory))
        else:
            coefficients = np.full(len(reports), 1 / len(reports))
        total = coefficients.sum()
        if self.sums_to_one and total > 0:
            coefficients = coefficients / total
        return combination(state, reports, coefficients, memory)

    def _means(self, reports: Reports) -> np.ndarray:
        """The matrix that takes gradients to the means of their groups, shape ``(groups, n)``."""
        if self.group_by == "client":
            return np.eye(len(reports))
        tasks = [report.task for report in reports]
        members = np.array([[float(task == of) for task in tasks] for of in dict.fromkeys(tasks)])
        means: np.ndarray = members / members.sum(axis=1, keepdims=True)
        return means


def gram_matrix(gradients: "Sequence[Tensor]") -> np.ndarray:
    """G_ij = ⟨g_i, g_j⟩ in double precision, shape ``(n, n)``, of n gradients of shape ``(P,)``.

    It copies only a part of the gradients at a time.

    >>> import torch
    >>> gram_matrix([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])])
    array([[5., 6.],
           [6., 9.]])
    """
    import torch

    from fedgradnorm.threads import kernel_threads

    count, length = len(gradients), gradients[0].numel()
    gram = torch.zeros(count, count, dtype=torch.float64, device=gradients[0].device)
    width = max(1, BLOCK // count)
    with kernel_threads(1):  # so that sums do not depend on the number of cores
        for begin in range(0, length, width):
            parts = [gradient[begin : begin + width] for gradient in gradients]
            block = torch.stack(parts).double()
            gram.addmm_(block, block.T)
    matrix: np.ndarray = gram.cpu().numpy()
    symmetric: np.ndarray = (matrix + matrix.T) / 2
    return symmetric


def without_zeros(gram: np.ndarray, solve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The coefficients of the gradients that are not 0; the others get the mean of these.

    >>> gram = np.array([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> without_zeros(gram, lambda gram: 1 / gram.diagonal())
    array([0.25 , 0.625, 1.   ])
    """
    moving = np.flatnonzero(gram.diagonal() > 0)
    if len(moving) == len(gram):
        return solve(gram)
    solution = solve(gram[np.ix_(moving, moving)])
    coefficients = np.full(len(gram), solution.mean())
    coefficients[moving] = solution
    return coefficients


def least_norm(gram: np.ndarray) -> np.ndarray:
    r"""The weights w ≥ 0 with Σ w_i = 1 that minimise ‖Σ w_i g_i‖² = wᵀGw, shape ``(n,)``.

    If there are several, the most even ones. This is one non-negative least-squares problem: for
    u = t w with t ≥ 0 and w on the simplex, the minimum over t of ‖Σ u_i g_i‖² + (Σ u_i - 1)² is
    q / (1 + q) with q = wᵀGw. It grows with q, so the minimiser u, divided by its sum, is w.

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
    """Like `least_norm`, with |w_i - base_i| ≤ radius for every i; ``base`` is on the simplex.

    Each try solves a least-squares problem with bounds, in which the sum is one more equation. The
    error of the sum is then added to the right-hand side of that equation.

    >>> near = least_norm_near(np.array([[1.0, 0.0], [0.0, 4.0]]), np.array([0.5, 0.5]), 0.1)
    >>> near.round(9)
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
    near: np.ndarray = weights / weights.sum()
    return near


def _evened(weights: np.ndarray, gram: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The weights with equal ones for equal gradients, which the norm cannot tell apart."""
    squares = gram.diagonal()
    apart = squares[:, None] + squares - 2 * gram  # ‖g_i - g_j‖²
    alike = (apart <= EQUAL * squares.max()) & (base[:, None] == base)
    evened: np.ndarray = (alike @ weights) / alike.sum(axis=1)
    return evened


def _is_least(weights: np.ndarray, gram: np.ndarray) -> bool:
    """Whether weights have the least norm: no ⟨g_i, d⟩ is below ⟨d, d⟩, with d = Σ w_j g_j."""
    slopes = gram @ weights
    return bool(slopes.min() >= weights @ slopes - 1e-14 * np.abs(slopes).max())


def _root(gram: np.ndarray) -> np.ndarray:
    """R with RᵀR = G in units of the longest gradient, up to the ridge, by way of the cosines."""
    lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    lengths /= lengths.max()
    known = np.where(lengths > 0, lengths, 1.0)
    cosines = gram / gram.diagonal().max() / np.outer(known, known) + RIDGE * np.eye(len(gram))
    values, vectors = np.linalg.eigh(cosines)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, 0.0))).T * lengths
    return root
