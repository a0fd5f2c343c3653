"""What an engine is: it moves values between the server and the clients, and knows no weighting."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.messages import Instruction, Report


class Engine(ABC):
    """Runs the clients, and keeps their states; made with ``(federation, seed, **options)``.

    Attributes:
        lockstep: whether it can run methods in which the server takes a step after each step of
            the clients (`Method.lockstep`).
    """

    lockstep: ClassVar[bool] = True

    @property
    def failures(self) -> Mapping[str, str]:
        """By client, why there was no report when it was last instructed, where this is known."""
        return {}

    def take_notes(self) -> Mapping[str, list[str]]:
        """By client, what was noticed since the last call; it goes into the run's records."""
        return {}

    @property
    @abstractmethod
    def client_states(self) -> Mapping[str, ClientState]:
        """The state of every client, by id."""

    @abstractmethod
    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back to what ``client_states`` was."""

    @abstractmethod
    def execute(self, instructions: Sequence[Instruction]) -> Sequence[Report]:
        """Let the instructed clients train. A client that fails has no report."""

    @abstractmethod
    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> Mapping[str, Evaluation]:
        """Test every client that has test data, with this encoder and the client's own head.

        Args:
            encoder: ω, shape ``(P,)``.
            buffers: the averaged buffers of the encoder, by name.
            batch_size: how many examples go through the model at a time.
        """
