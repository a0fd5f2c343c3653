"""FedProx: an encoder that is held back to where the round began."""

from dataclasses import dataclass

from torch import Tensor

from fedgradnorm.errors import require
from fedgradnorm.training.base import Method
from fedgradnorm.training.steps import LocalRound, encoder_steps, head_steps

__all__ = ["FedProx"]


@dataclass(frozen=True)
class FedProx(Method):
    """As FedRep, with the proximal term (μ/2) ‖ω - ω_k‖² on the encoder's steps (Li et al., MLSys 2020, arXiv 1812.06127).

    With ω_k as received, after the head's steps::

        ω ← ω - β (∇_ω F_i(h_i, ω) + μ (ω - ω_k))     τ_ω = encoder_steps times, from ω_k on

    Clients with different tasks drift apart in a round; the term shortens how far. The report's gradient is the mean of the whole bracket,
    and so still (ω_k - ω) / (τ_ω β): with equal weights the server's step ends at the mean of the clients' encoders, as in the paper.
    The losses are the tasks', without the term. With μ = 0 it is FedRep. The head, which stays with its client, has no such term.

    Args:
        mu: μ ≥ 0, how strongly. β μ above 1 would swing past ω_k.

    Raises:
        ConfigError: ``mu`` out of range.

    >>> FedProx(mu=0.01)
    FedProx(mu=0.01)
    """

    mu: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.mu <= 1e6, "mu", "a number from 0 to 1e6", self.mu)

    def train_head(self, local: LocalRound) -> None:
        """The head's steps."""
        head_steps(local)

    def train_encoder(self, local: LocalRound) -> tuple[Tensor, float]:
        """The encoder's steps, with the proximal term."""
        return encoder_steps(local, mu=self.mu)
