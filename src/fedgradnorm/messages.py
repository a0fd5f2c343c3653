"""What goes down to a client and what comes back. Values only: no module, no data, no head."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedgradnorm.config import TrainConfig

__all__ = ["LARGEST", "Instruction", "Report", "has_rate", "no_rate"]

SCALAR_BYTES = 8

LARGEST = 1e100
"""No sound length, loss or training rate is above this; beyond it, products of them would overflow."""

NEAR, TINY = 1e-6, 1e-30
"""A loss that is above its floor by less than this share of its size, or by less than this, is at the floor but for rounding."""


def has_rate(initial_loss: float, loss_floor: float) -> bool:
    """Whether training rates can be taken of an initial loss F(0): whether it is above the task's floor.

    >>> has_rate(0.7, 0.0), has_rate(-0.3, 0.0), has_rate(-0.3, -1.0), has_rate(0.0, 0.0)
    (True, False, True, False)
    """
    return initial_loss - loss_floor > max(NEAR * max(abs(initial_loss), abs(loss_floor)), TINY)


def no_rate(initial_loss: float, loss: float, loss_floor: float, task: str) -> str:
    """Why no training rate can be taken of the losses of a task, and what to do."""
    first = (
        f"its first loss is {initial_loss:.4g}"
        if not has_rate(initial_loss, loss_floor)
        else f"its loss is {loss:.4g}"
    )
    near = (
        " (it is too near its floor)"
        if not has_rate(initial_loss, loss_floor) and initial_loss > loss_floor
        else ""
    )
    return (
        f"{first}{near}, and the weighting needs losses above the task's loss_floor, which is {loss_floor:g}: give "
        f"Task('{task}', ..., loss_floor=...) a number that no loss is below, or choose a weighting that reads no losses, such as 'equal'"
    )


@dataclass(frozen=True)
class Instruction:
    """What the server sends to one client at the start of a round.

    Attributes:
        round: the round k, from 1.
        client: the id of the client that it is for.
        encoder: the trainable encoder parameters ω_k, flat, shape ``(P,)``.
        buffers: the encoder's buffers by name, when the federation averages them; empty otherwise.
        training: how to train.
        attempt: 0, and one more each time that the round has to be repeated.
        step: which of the round's encoder steps to take, from 0, where the server steps after each of them; None: all.
        only_summed: whether the gradient that comes back is for the server's step alone, so that rounding counts as it does in ω; else
            it is compared with others, and its own digits count.
    """

    round: int
    client: str
    encoder: Tensor
    buffers: Mapping[str, Tensor]
    training: TrainConfig
    attempt: int = 0
    step: int | None = None
    only_summed: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes that this message brings down: tensors only, without the envelope of a transport."""
        return self.encoder.nbytes + sum(buffer.nbytes for buffer in self.buffers.values())


@dataclass(frozen=True)
class Report:
    """What one client sends back at the end of a round.

    Attributes:
        client: its id.
        task: the name of its task.
        gradient: its mean encoder gradient g_i over the encoder steps, flat, shape ``(P,)``.
        loss: its training loss F_i(k).
        initial_loss: F_i(0), its training loss before its first step ever.
        grad_norm: n_i, the 2-norm of ``gradient`` over the norm layer.
        num_examples: the number of training examples that it has.
        buffers: the encoder's buffers after the round, when the federation averages them; empty otherwise.
        seconds: how long the local update took; it enters no computation.
        head_seconds: the part of it up to the encoder's first step.
        round: the round that it belongs to.
        loss_floor: a number that no loss of its task is below.
    """

    client: str
    task: str
    gradient: Tensor
    loss: float
    initial_loss: float
    grad_norm: float
    num_examples: int
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    round: int = 0
    head_seconds: float = 0.0
    loss_floor: float = 0.0

    @property
    def inverse_training_rate(self) -> float:
        """F̃_i = F_i(k) / F_i(0): 1 at the start, smaller the further the task has got.

        Both losses are taken from the task's floor on. Not a number where F_i(0) is not above it, or F_i(k) is below.
        """
        if self.loss_floor == 0 and self.loss >= 0 and self.initial_loss > TINY:  # nearly always
            return self.loss / self.initial_loss
        above, slack = self.loss - self.loss_floor, NEAR * max(abs(self.loss), abs(self.loss_floor))
        if above < -slack or not has_rate(self.initial_loss, self.loss_floor):
            return math.nan
        return max(above, 0.0) / (self.initial_loss - self.loss_floor)

    @cached_property
    def length(self) -> float:
        """The 2-norm of the gradient over all of the encoder; infinite where that is not finite, or longer than 1e100."""
        length = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(length):  # perhaps only the squares have overflowed
            length = torch.linalg.vector_norm(self.gradient, dtype=torch.float64).item()
        return length if length <= LARGEST else math.inf

    @property
    def num_bytes(self) -> int:
        """Bytes that this message takes up: the tensors, and the three scalars that the server needs."""
        buffers = sum(buffer.nbytes for buffer in self.buffers.values()) if self.buffers else 0
        return self.gradient.nbytes + buffers + 3 * SCALAR_BYTES
