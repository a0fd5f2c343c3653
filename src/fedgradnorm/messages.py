"""What the server sends to a client and gets back: values only, no module, data or head."""

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fedgradnorm.config import TrainConfig

SCALAR_BYTES = 8

LARGEST = 1e100
"""The largest sound length, loss or training rate. Products of larger ones would overflow."""

NEAR, TINY = 1e-6, 1e-30
"""A loss is at its floor if it is above it by less than this, relative and absolute."""


def has_rate(initial_loss: float, loss_floor: float) -> bool:
    """Whether an initial loss F(0) is above the task's floor, so that it gives training rates.

    >>> has_rate(0.7, 0.0), has_rate(-0.3, 0.0), has_rate(-0.3, -1.0), has_rate(0.0, 0.0)
    (True, False, True, False)
    """
    return initial_loss - loss_floor > max(NEAR * max(abs(initial_loss), abs(loss_floor)), TINY)


def no_rate(initial_loss: float, loss: float, loss_floor: float, task: str) -> str:
    """Why the losses of a task give no training rate, and what to do."""
    found = f"its loss is {loss:.4g}"
    if not has_rate(initial_loss, loss_floor):
        near = " (it is too near its floor)" if initial_loss > loss_floor else ""
        found = f"its first loss is {initial_loss:.4g}{near}"
    return (
        f"{found}, and the weighting needs losses above the task's loss_floor, which is "
        f"{loss_floor:g}: give Task('{task}', ..., loss_floor=...) a number that no loss is below, "
        "or choose a weighting that reads no losses, such as 'equal'"
    )


@dataclass(frozen=True)
class Instruction:
    """What the server sends to one client at the start of a round.

    Attributes:
        round: the round k, from 1.
        client: the id of the receiving client.
        encoder: the trainable encoder parameters ω_k, flat, shape ``(P,)``.
        buffers: the encoder's buffers by name, when the federation averages them; empty otherwise.
        training: how to train.
        attempt: how often the round was repeated before.
        step: which of the round's encoder steps to take, from 0, if the server steps after each of
            them; None: all.
    """

    round: int
    client: str
    encoder: Tensor
    buffers: Mapping[str, Tensor]
    training: TrainConfig
    attempt: int = 0
    step: int | None = None

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors, without the envelope of a transport."""
        return self.encoder.nbytes + sum(buffer.nbytes for buffer in self.buffers.values())


@dataclass(frozen=True)
class Report:
    """What one client sends back at the end of a round.

    Attributes:
        client: its id.
        task: the name of its task.
        gradient: its mean encoder gradient g_i over the steps, flat, shape ``(P,)``.
        loss: its training loss F_i(k).
        initial_loss: F_i(0), its training loss before its very first step.
        grad_norm: n_i, the 2-norm of ``gradient`` over the norm layer.
        num_examples: the number of its training examples.
        buffers: the encoder's buffers after the round, if the federation averages them; else empty.
        seconds: how long the local update took; no computation uses it.
        head_seconds: the part of it before the encoder's first step.
        round: the round that it belongs to.
        loss_floor: the lower bound of its task's loss.
        known_length: ``length``, where it was computed together with others.
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
    known_length: InitVar[float | None] = None

    def __post_init__(self, known_length: float | None) -> None:
        if known_length is not None and known_length <= LARGEST:  # else `length` finds out why
            object.__setattr__(self, "length", known_length)

    @property
    def inverse_training_rate(self) -> float:
        """F̃_i = F_i(k) / F_i(0): 1 at the start, and smaller with every improvement.

        Both losses are relative to the task's floor. NaN if F_i(0) is not above it, or F_i(k) is
        below it.
        """
        if self.loss_floor == 0 and self.loss >= 0 and self.initial_loss > TINY:  # nearly always
            return self.loss / self.initial_loss
        above, slack = self.loss - self.loss_floor, NEAR * max(abs(self.loss), abs(self.loss_floor))
        if above < -slack or not has_rate(self.initial_loss, self.loss_floor):
            return math.nan
        return max(above, 0.0) / (self.initial_loss - self.loss_floor)

    @cached_property
    def length(self) -> float:
        """The 2-norm of the whole gradient; infinite if it is not finite or above `LARGEST`."""
        length = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(length):  # only the squares may have overflowed
            length = torch.linalg.vector_norm(self.gradient, dtype=torch.float64).item()
        return length if length <= LARGEST else math.inf

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors, and of the three scalars that the server needs."""
        buffers = sum(buffer.nbytes for buffer in self.buffers.values()) if self.buffers else 0
        return self.gradient.nbytes + buffers + 3 * SCALAR_BYTES
