"""FedRep: the head first, then the encoder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgradnorm.training.base import Method
from fedgradnorm.training.round import LocalRound, encoder_steps, head_steps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedRep(Method):
    """τ_h steps on the head, the encoder fixed; then τ_ω steps on the encoder, the head fixed.

    Source: Collins et al., ICML 2021.

    With ω_k as received, and h_i as the client left it::

        h_i ← h_i - α ∇_h F_i(h_i, ω_k)     τ_h = head_steps times
        ω ← ω - β ∇_ω F_i(h_i, ω)           τ_ω = encoder_steps times, from ω_k on

    The report's gradient is the mean of the second line's. FedGradNorm trains this way; it is the
    default.

    >>> FedRep().lockstep, FedRep().own_encoder
    (False, False)
    """

    def train_head(self, local: LocalRound) -> None:
        """The head's steps."""
        head_steps(local)

    def train_encoder(self, local: LocalRound) -> "tuple[Tensor, float]":
        """The encoder's steps."""
        return encoder_steps(local)
