"""What a method is: which steps a client takes in a round, before its encoder moves and while it does."""

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

from torch import Tensor

from fedgradnorm import registry
from fedgradnorm.config import MethodConfig, TrainConfig
from fedgradnorm.training.steps import LocalRound, encoder_steps

__all__ = ["Joint", "Method", "method_of"]


class Method(ABC):
    """How a client trains: a frozen dataclass of its options with these two functions, called one after the other in every round.

    Attributes:
        own_encoder: whether every client goes on from an encoder of its own. The server's then stays as initialised.
        lockstep: whether the server takes its step after each step of the clients' encoders, and not once a round.
        weighting: the name of the weighting that belongs to the method, for settings that name none; None for the default one.
    """

    own_encoder: ClassVar[bool] = False
    lockstep: ClassVar[bool] = False
    weighting: ClassVar[str | None] = None

    @abstractmethod
    def train_head(self, local: LocalRound) -> None:
        """What comes before the encoder's first step. The encoder is not to be changed here."""

    @abstractmethod
    def train_encoder(self, local: LocalRound) -> tuple[Tensor, float]:
        """The encoder's steps, and what moves with it.

        Returns:
            The report's gradient, (ω at the start - ω at the end) / (steps · β), shape ``(P,)``, and the mean loss of the batches.
        """


class Joint(Method):
    """Head and encoder move in the same τ_ω steps: h ← h - α ∇_h F and ω ← ω - β ∇_ω F, both at the same (h, ω)."""

    def train_head(self, local: LocalRound) -> None:
        """Nothing: the head moves with the encoder."""

    def train_encoder(self, local: LocalRound) -> tuple[Tensor, float]:
        """The joint steps."""
        return encoder_steps(local, with_head=True)


def method_of(training: TrainConfig) -> Method:
    """The method that the settings name. Raises ConfigError where there is no such method, or an option of it is wrong.

    >>> method_of(TrainConfig(method={"name": "fedprox", "mu": 0.5}))
    FedProx(mu=0.5)
    """
    return _made(training.method.model_dump_json())


@cache
def _made(method: str) -> Method:
    made: Method = registry.build("method", MethodConfig.model_validate_json(method))
    return made
