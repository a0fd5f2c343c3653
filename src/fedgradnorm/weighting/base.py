"""What a weighting is: a pure pair ``init`` and ``update`` that turns reports into weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fedgradnorm.options import Options

if TYPE_CHECKING:  # it loads torch, which checking a configuration does not need
    from fedgradnorm.messages import Report


@dataclass(frozen=True)
class WeightingState:
    """What a weighting remembers between rounds: JSON values only, so it can be saved and sent.

    Attributes:
        weights: p_i of every client known so far, by client id. All are above 0, and they sum to
            the number N of these clients.
        memory: whatever else the method needs.
    """

    weights: Mapping[str, float]
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """The weights of one round's participants, by client id.

    Attributes:
        values: p_i, the factors of the gradients g_i. Their sum is above 0; with some methods a
            single one is 0 or negative.
        targets: the target of p_i n_i, for the record, if the method has one.
        scale: a factor above 0 on the aggregated direction.
    """

    values: Mapping[str, float]
    targets: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0


Reports: TypeAlias = Sequence["Report"]
Update: TypeAlias = tuple[Weights, WeightingState]


class Weighting(Options, ABC):
    """A method that weights the clients: a frozen dataclass of its options.

    ``init`` and ``update`` are pure: they take the state and return the next one, and keep nothing.
    An option out of range raises ConfigError when the object is made.

    Attributes:
        reads_gradients: whether ``update`` reads the gradients in the reports. If False, it needs
            only their numbers, and only the server's sum reads gradients.
    """

    reads_gradients: ClassVar[bool] = True

    @property
    def needs_positive_losses(self) -> bool:
        """Whether losses have to be above their task's floor; by default False.

        If True, a run is refused in which an initial loss is not. A class attribute will do.
        """
        return False

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """The state before the first round: weight 1 for every client."""
        return WeightingState(dict.fromkeys(client_ids, 1.0))

    @abstractmethod
    def update(self, state: WeightingState, reports: Reports) -> Update:
        """The weights of this round, and the next state.

        Args:
            state: the state so far.
            reports: the sound reports of this round, at least one, sorted by client id. Every
                number in them is finite. ``grad_norm`` is 0 where a task has nothing to learn.
                Losses may be 0 or negative; ``inverse_training_rate`` is then NaN. A client that
                is missing keeps its weight; one that is not in the state starts with weight 1.
        """
