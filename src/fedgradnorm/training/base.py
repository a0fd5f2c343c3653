"""What a method is: the steps of a client before its encoder moves, and while it moves."""

from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from fedgradnorm import registry
from fedgradnorm.config import MethodConfig, TrainConfig
from fedgradnorm.options import Options
from fedgradnorm.training.round import LocalRound, encoder_steps

if TYPE_CHECKING:
    from torch import Tensor


class Method(Options, ABC):
    """How a client trains: a frozen dataclass of its options, with the two halves of a round.

    Attributes:
        own_encoder: whether every client keeps its own encoder from round to round. The server's
            encoder then stays as initialised.
        lockstep: whether the server takes its step after each step of the clients' encoders, and
            not once per round.
        weighting: the name of the weighting that belongs to the method, for settings that name
            none; None for the default one.
    """

    own_encoder: ClassVar[bool] = False
    lockstep: ClassVar[bool] = False
    weighting: ClassVar[str | None] = None

    @abstractmethod
    def train_head(self, local: LocalRound) -> None:
        """The steps before the encoder's first one. They must not change the encoder."""

    @abstractmethod
    def train_encoder(self, local: LocalRound) -> "tuple[Tensor, float]":
        """The encoder's steps, and what moves with it.

        Returns:
            The report's gradient, (ω at the start - ω at the end) / (steps · β), shape ``(P,)``,
            and the mean loss of the batches.
        """


class Joint(Method):
    """Head and encoder move in the same τ_ω steps.

    h ← h - α ∇_h F and ω ← ω - β ∇_ω F, both at the same (h, ω).
    """

    def train_head(self, local: LocalRound) -> None:
        """Nothing: the head moves with the encoder."""

    def train_encoder(self, local: LocalRound) -> "tuple[Tensor, float]":
        """The joint steps."""
        return encoder_steps(local, with_head=True)


def method_of(training: TrainConfig) -> Method:
    """The method in the settings: the object that they hold, or the one that they name.

    Raises:
        ConfigError: an unknown method, or a wrong option of it.

    >>> method_of(TrainConfig(method={"name": "fedprox", "mu": 0.5}))
    FedProx(mu=0.5)
    """
    held: Method | None = training.method.part
    return _built(training.method.model_dump_json()) if held is None else held


@cache
def _built(method: str) -> Method:
    built: Method = registry.build("method", MethodConfig.model_validate_json(method))
    return built
