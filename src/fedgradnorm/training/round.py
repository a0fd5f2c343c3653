"""One client in one round, as a method sees it, and the steps that it can take."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch loads when a client trains, not when a method's options are checked
    from torch import Tensor, nn

    from fedgradnorm.federation import Client
    from fedgradnorm.messages import Instruction


@dataclass(frozen=True)
class LocalRound:
    """One client in one round, as a method sees it.

    Attributes:
        client: the client that trains.
        encoder: the encoder as received, which is trained in place.
        head: the client's head, which is trained in place.
        velocity: the momentum of the head's parameters, by name, which is updated in place.
        instruction: what the server sent.
        steps: how steps are computed.
    """

    client: "Client"
    encoder: "nn.Module"
    head: "nn.Module"
    velocity: "dict[str, Tensor]"
    instruction: "Instruction"
    steps: "Steps"


class Steps(Protocol):
    """How steps are computed. An engine may have a faster way to the same numbers."""

    def on_head(self, local: LocalRound) -> None:
        """As `head_steps`."""
        ...

    def on_encoder(
        self, local: LocalRound, *, with_head: bool, mu: float
    ) -> "tuple[Tensor, float]":
        """As `encoder_steps`."""
        ...


def head_steps(local: LocalRound) -> None:
    """τ_h SGD steps on the head with step size α, the encoder fixed."""
    local.steps.on_head(local)


def encoder_steps(
    local: LocalRound, *, with_head: bool = False, mu: float = 0.0
) -> "tuple[Tensor, float]":
    """τ_ω SGD steps on the encoder with step size β.

    Args:
        local: the client and its round.
        with_head: whether the head takes a step of size α at each of them, along its gradient of
            the same loss.
        mu: μ of the proximal term (μ/2) ‖ω - ω_k‖². Its gradient μ (ω - ω_k) is part of the mean
            gradient; the losses are without the term.

    Returns:
        The mean gradient, shape ``(P,)``, and the mean loss of the batches.
    """
    return local.steps.on_encoder(local, with_head=with_head, mu=mu)
