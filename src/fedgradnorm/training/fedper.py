"""FedPer: head and encoder jointly."""

from dataclasses import dataclass

from fedgradnorm.training.base import Joint


@dataclass(frozen=True)
class FedPer(Joint):
    """Head and encoder in the same steps; only the encoder is sent.

    Source: Arivazhagan et al., 2019, arXiv 1912.00818.

    With ω_k as received, and h_i as the client left it, τ_ω = encoder_steps times, both right sides
    at the same (h_i, ω)::

        h_i ← h_i - α ∇_h F_i(h_i, ω)
        ω ← ω - β ∇_ω F_i(h_i, ω)

    ``head_steps`` has no meaning here. The batches are those of FedRep's encoder steps. The
    report's gradient is the mean of the second line's.

    >>> FedPer()
    FedPer()
    """
