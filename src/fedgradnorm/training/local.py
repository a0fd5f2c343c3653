"""No exchange: every client trains alone."""

from dataclasses import dataclass
from typing import ClassVar

from fedgradnorm.training.base import Joint


@dataclass(frozen=True)
class Local(Joint):
    """Single-task SGD: every client trains its own encoder and head, without the others.

    All start from the same initial encoder. A round is τ_ω = encoder_steps joint steps, as in
    `FedPer`, from where the last round left head *and* encoder. The server's encoder stays as
    initialised, and its settings (weighting, aggregation, ``server_lr``, optimiser) move nothing.
    The reports are recorded as usual. This shows what a task reaches without the others.

    >>> Local().own_encoder
    True
    """

    own_encoder: ClassVar[bool] = True
