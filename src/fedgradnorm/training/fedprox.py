"""FedProx: an encoder that is pulled back to where the round began."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedgradnorm.training.base import Method
from fedgradnorm.training.round import LocalRound, encoder_steps, head_steps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedProx(Method):
    """As FedRep, with the proximal term (μ/2) ‖ω - ω_k‖² on the encoder's steps.

    Source: Li et al., MLSys 2020, arXiv 1812.06127.

    With ω_k as received, after the head's steps, τ_ω = encoder_steps times, from ω_k on::

        ω ← ω - β (∇_ω F_i(h_i, ω) + μ (ω - ω_k))

    Clients with different tasks drift apart in a round; the term limits how far. The report's
    gradient is the mean of the whole bracket, and so still (ω_k - ω) / (τ_ω β): with equal weights
    the server's step ends at the mean of the clients' encoders, as in the paper. The losses are the
    tasks', without the term. With μ = 0 the method is FedRep. The head, which stays with its
    client, has no such term.

    Args:
        mu: μ ≥ 0, the strength of the term. A step with β μ above 1 overshoots ω_k.

    Raises:
        ConfigError: ``mu`` out of range.

    >>> FedProx(mu=0.01)
    FedProx(mu=0.01)
    """

    mu: Annotated[float, Field(ge=0, le=1e6)] = 0.1

    def train_head(self, local: LocalRound) -> None:
        """The head's steps."""
        head_steps(local)

    def train_encoder(self, local: LocalRound) -> "tuple[Tensor, float]":
        """The encoder's steps, with the proximal term."""
        return encoder_steps(local, mu=self.mu)
