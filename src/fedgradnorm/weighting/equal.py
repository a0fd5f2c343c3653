"""Equal weights: p_i = 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import WeightingState, Weights

__all__ = ["Equal"]


@dataclass(frozen=True)
class Equal:
    """p_i = 1 for every client: FedRep (Collins et al., ICML 2021) with one task a client, the baseline.

    >>> Equal().init(["a", "b"]).weights
    {'a': 1.0, 'b': 1.0}
    """

    reads_gradients: ClassVar[bool] = False

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for everyone."""
        return WeightingState(dict.fromkeys(client_ids, 1.0))

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """Weight 1 for everyone, whatever they report."""
        values = {report.client: 1.0 for report in reports}
        return Weights(values), WeightingState({**state.weights, **values})
