"""Equal weights: p_i = 1."""

from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState, Weights


@dataclass(frozen=True)
class Equal(Weighting):
    """p_i = 1 for every client: FedRep (Collins et al., ICML 2021) with one task per client.

    It is the baseline.

    >>> Equal().init(["a", "b"]).weights
    {'a': 1.0, 'b': 1.0}
    """

    reads_gradients: ClassVar[bool] = False

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """Weight 1 for every client, whatever it reports."""
        values = {report.client: 1.0 for report in reports}
        return Weights(values), WeightingState({**state.weights, **values})
