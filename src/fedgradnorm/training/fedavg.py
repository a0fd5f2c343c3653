"""FedAvg, as far as it applies where tasks differ."""

from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.training.base import Joint


@dataclass(frozen=True)
class FedAvg(Joint):
    """The whole model in the same steps, the encoders averaged by numbers of examples.

    Source: McMahan et al., AISTATS 2017, arXiv 1602.05629.

    The client takes τ_ω = encoder_steps steps on head and encoder jointly. With the weighting
    ``examples``, p_i ∝ the number n_i of its training examples, the server's step (server_lr = 1)
    then ends at Σ n_i ω_i / Σ n_i. Settings that name no weighting get this one.

    FedAvg averages the whole model. Here tasks differ, and so do their heads: they stay with the
    clients. At a client the method is then the same as `FedPer`; the two differ in the weighting
    that belongs to them.

    >>> FedAvg()
    FedAvg()
    """

    weighting: ClassVar[str | None] = "examples"
