"""Impartial multi-task learning, its gradient part."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgradnorm.weighting.updates import FromUpdates, Updates

RANK = 1e-12


@dataclass(frozen=True)
class IMTLG(FromUpdates):
    r"""The combination Σ a_i g_i, Σ a_i = 1, with equal projections onto all g_i / ‖g_i‖.

    Source: Liu et al., ICLR 2021, IMTL-G.

    With G_ij = ⟨g_i, g_j⟩ and v = G⁺ (‖g_1‖, ..., ‖g_n‖), whose projections are all 1, a = v / Σ
    v_i. G⁺ is the pseudo-inverse, so that linearly dependent gradients have a solution too
    (Quinton, Rey, arXiv 2406.16232).

    **Weights may be negative.** If gradients conflict strongly, equal projections need a direction
    away from some client's minimum. If Σ v_i itself is negative, the paper's direction raises every
    loss; such a round, and one in which the v_i cancel, has equal weights here (`combination`).

    Args:
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), 1.0, 1.0, 1.0, num_examples=9)
    >>> reports = [report("a", 1.0, 0.0), report("b", 0.0, 3.0)]
    >>> weights, _ = IMTLG().update(IMTLG().init(["a", "b"]), reports)
    >>> # orthogonal gradients: 1 / ‖g_i‖
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}
    {'a': 1.5, 'b': 0.5}
    """

    sums_to_one: ClassVar[bool] = True

    def solve(self, updates: Updates) -> np.ndarray:
        """The v = G⁺ (‖g_1‖, ..., ‖g_n‖), up to a factor."""
        most = updates.gram.diagonal().max()
        lengths = np.sqrt(np.maximum(updates.gram.diagonal(), 0.0) / most)
        inverse = np.linalg.pinv(updates.gram / most, rcond=RANK, hermitian=True)
        solution: np.ndarray = inverse @ lengths
        return solution
