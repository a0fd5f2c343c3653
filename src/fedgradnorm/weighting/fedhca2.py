"""The encoder's aggregation of FedHCA²."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgradnorm.errors import require
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights
from fedgradnorm.weighting.cagrad import conflict_averse
from fedgradnorm.weighting.combination import combination, start
from fedgradnorm.weighting.updates import GroupBy, check_group_by, coefficients_of

__all__ = ["FedHCA2"]


@dataclass(frozen=True)
class FedHCA2:
    r"""The mean update plus a conflict-averse one (Lu et al., CVPR 2024, arXiv 2311.13250, hyper conflict-averse aggregation of encoders).

    There client i gets an encoder of its own, moved by g_i + h_i u with u = d / (1 + c²), where d is CAGrad's direction. Here all share
    one encoder, which is moved by the mean of that over the clients::

        g_0 + h u        a_i = 1/n + h a_i(CAGrad) / (1 + c²)

    What is left out, and why: encoders of one's own, since there is one; that h_i is learned, by ⟨g_i(k + 1), u(k)⟩ through those own
    encoders (h is an option; the authors' train.py starts it at 0.1, its --enc_alpha_init); the mean over clients with the same task and
    data, which the mean over all contains; and the cross attention of the decoders, since heads never leave their clients.

    Args:
        c: CAGrad's c, from 0 to 100; 0.4 in the authors' code.
        hyper_weight: h from 0 to 1; 0.1 is where the authors' code begins to learn it.
        group_by: ``"client"``, or ``"task"`` for a combination of the tasks' mean gradients.

    Raises:
        ConfigError: an option out of range.

    >>> import torch
    >>> def report(client, *gradient):
    ...     return Report(client, client, torch.tensor(gradient), loss=1.0, initial_loss=1.0, grad_norm=1.0, num_examples=9)
    >>> weights, _ = FedHCA2(c=0.5).update(FedHCA2().init(["a", "b"]), [report("a", 1.0, 0.0), report("b", 0.0, 1.0)])
    >>> weights.values, round(weights.scale, 2)  # no conflict: 1 + h (1 + c) / (1 + c²)
    ({'a': 1.0, 'b': 1.0}, 1.12)
    """

    c: float = 0.4
    hyper_weight: float = 0.1
    group_by: GroupBy = "client"

    def __post_init__(self) -> None:
        require(0 <= self.c <= 100, "c", "a number from 0 to 100", self.c)
        require(
            0 <= self.hyper_weight <= 1, "hyper_weight", "a number from 0 to 1", self.hyper_weight
        )
        check_group_by(self.group_by)

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return start(client_ids)

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of both updates together."""
        return combination(state, reports, coefficients_of(reports, self.group_by, self._solve))

    def _solve(self, gram: np.ndarray) -> np.ndarray:
        return 1 / len(gram) + self.hyper_weight / (1 + self.c**2) * conflict_averse(gram, self.c)
