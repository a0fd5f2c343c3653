"""Impartial multi-task learning, its gradient part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import GroupBy, check_group_by, coefficients_of

__all__ = ["IMTLG"]

RANK = 1e-12


@dataclass(frozen=True)
class IMTLG:
    r"""The combination Σ a_i g_i, Σ a_i = 1, with equal projections onto all g_i / ‖g_i‖ (Liu et al., ICLR 2021, IMTL-G).

    With G_ij = ⟨g_i, g_j⟩ and v = G⁺ (‖g_1‖, ..., ‖g_n‖), whose projections are all 1, a = v / Σ v_i; G⁺ is the pseudo-inverse, so that
    linearly dependent gradients have a solution too (Quinton, Rey, arXiv 2406.16232).

    **Weights may be negative.** Where gradients conflict strongly, equal projections ask to walk away from some client's minimum. Where Σ
    v_i itself is negative the paper's direction raises every loss; such a round, and one in which the v_i cancel, has equal weights here
    (`combination`).

    Args:
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    Raises:
        ConfigError: an option that is none of these.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = IMTLG().update(IMTLG().init(["a", "b"]), [report("a", 1.0, 0.0), report("b", 0.0, 3.0)])
    >>> {client: round(weight, 9) for client, weight in weights.values.items()}  # 1 / ‖g_i‖ where they are orthogonal
    {'a': 1.5, 'b': 0.5}
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
        """The weights of the impartial direction."""
        coefficients = coefficients_of(reports, self.group_by, impartial)
        total = coefficients.sum()
        return combination(state, reports, coefficients / total if total > 0 else coefficients)


def impartial(gram: np.ndarray) -> np.ndarray:
    """The v = G⁺ (‖g_1‖, ..., ‖g_n‖), shape ``(n,)``."""
    lengths = np.sqrt(np.maximum(gram.diagonal(), 0.0) / gram.diagonal().max())
    solution: np.ndarray = (
        np.linalg.pinv(gram / gram.diagonal().max(), rcond=RANK, hermitian=True) @ lengths
    )
    return solution
