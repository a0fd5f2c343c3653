"""What a weighting is: a pure pair ``init`` / ``update`` from reports to weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedgradnorm.messages import Report

__all__ = ["Weighting", "WeightingState", "Weights"]


@dataclass(frozen=True)
class WeightingState:
    """What a weighting remembers from one round to the next. It holds JSON values only, so that it can be saved and sent.

    Attributes:
        weights: p_i for every client known so far, by client id; they are above 0 and sum to their number N.
        memory: whatever else the method needs.
    """

    weights: Mapping[str, float]
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """The weights of one round's participants, by client id.

    Attributes:
        values: p_i, which multiply the gradients g_i; their sum is above 0. With some methods single ones are 0 or negative.
        targets: what p_i n_i should be, where the method has such a target; for the record.
        scale: a factor above 0 on the aggregated direction.
    """

    values: Mapping[str, float]
    targets: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0


class Weighting(Protocol):
    """A method that weights the clients: a frozen dataclass of its options with these two methods.

    Both are pure: the state is handed in and handed back, never kept.

    A method that looks at the numbers of the reports alone, and not at their gradients, says so by a class attribute
    ``reads_gradients: ClassVar[bool] = False``; without it an engine works out each gradient to the last digit. One that
    needs losses above their floors has ``needs_positive_losses = True``: a run in which an initial loss is not is refused.
    """

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """The state before the first round."""
        ...

    def update(
        self, state: WeightingState, reports: Sequence[Report]
    ) -> tuple[Weights, WeightingState]:
        """The weights of this round, and the next state.

        Args:
            state: the state so far.
            reports: the sound reports of this round, at least one, sorted by client id: every number in them is finite.
                ``grad_norm`` may be 0, where a task has nothing to learn; losses may be 0 or negative, and
                ``inverse_training_rate`` is then not a number. A client that is missing keeps its weight; a client that
                is not in the state yet starts with weight 1.
        """
        ...
