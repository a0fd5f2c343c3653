"""All tasks in one place: multi-task learning without a federation."""

from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.training.base import Joint


@dataclass(frozen=True)
class Centralized(Joint):
    """Multi-task SGD on pooled data: each step takes one batch of every client.

    A round is τ_ω = encoder_steps such steps on the weighted sum of the losses, all clients in
    lockstep at one encoder. In each of them::

        h_i ← h_i - α ∇_h F_i(h_i, ω)     for every i
        ω ← ω - β · server_lr · Σ_i p_i ∇_ω F_i(h_i, ω) / Σ_i p_i

    This is the upper reference for what an exchange once per round can reach. The weighting, the
    aggregation and the server's optimiser work after every step, not after every round.
    ``weighting.name = "equal"`` is equal-weight multi-task learning.

    ``"fedgradnorm"`` is GradNorm (Chen et al., ICML 2018, arXiv 1711.02257) on the norms and losses
    of single batches, with one difference. As in FedGradNorm, a step is taken with the weights that
    it has just led to; Chen et al. use them from the next step on. A head has one loss only, so no
    weight changes its step.

    >>> Centralized().lockstep
    True
    """

    lockstep: ClassVar[bool] = True
