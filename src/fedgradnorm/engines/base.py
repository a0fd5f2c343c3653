"""What an engine is: it moves values between the server and the clients, and knows no weighting."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.messages import Instruction, Report

__all__ = ["Engine"]


class Engine(Protocol):
    """Runs the clients. It is made with ``(federation, seed, **options)`` and keeps the clients' states.

    It may also have ``failures``: by client, why there was no report when it was last instructed, in words for the run's records.
    """

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """The state of every client, by id."""
        ...

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back to what ``client_states`` was."""
        ...

    def execute(self, instructions: Sequence[Instruction]) -> Sequence[Report]:
        """Let the instructed clients train. A client that fails has no report."""
        ...

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> Mapping[str, Evaluation]:
        """Test every client that has test data with this encoder and its own head, by client id, so many examples at a time."""
        ...
