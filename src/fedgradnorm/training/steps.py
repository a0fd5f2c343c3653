"""The SGD steps that methods are made of: on the head with the encoder fixed, on the encoder with the head fixed, or on both."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import batch_order, distinct, draws_few, num_passes, size, take
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import concatenated, trainable
from fedgradnorm.randomness import quick_generator

__all__ = [
    "ENCODER_BATCHES",
    "GATHERED_BYTES",
    "HEAD_BATCHES",
    "Encoded",
    "LocalRound",
    "PlainSteps",
    "Steps",
    "batches_of",
    "direction",
    "encoded",
    "encoder_order",
    "encoder_steps",
    "head_steps",
    "order_numbers",
    "order_of",
]

Encoded: TypeAlias = Callable[[Client, nn.Module, Instruction], Iterable[tuple[Tensor, Tensor]]]

HEAD_BATCHES, ENCODER_BATCHES = "head batches", "encoder batches"
"""What the two orders of batches are drawn for."""

GATHERED_BYTES = 16 * 2**20
"""Batches that take no more together are gathered at once."""


@dataclass(frozen=True)
class LocalRound:
    """One client in one round, as a method sees it.

    Attributes:
        client: who trains.
        encoder: the encoder as received, to be trained in place.
        head: the client's head, to be trained in place.
        velocity: the momentum of the head's parameters, by name, to be kept in place.
        instruction: what the server sent.
        steps: how steps are computed.
    """

    client: Client
    encoder: nn.Module
    head: nn.Module
    velocity: dict[str, Tensor]
    instruction: Instruction
    steps: "Steps"


class Steps(Protocol):
    """How steps are computed. An engine may know a faster way to the same numbers than `PlainSteps`."""

    def on_head(self, local: LocalRound) -> None:
        """As `head_steps`."""
        ...

    def on_encoder(self, local: LocalRound, *, with_head: bool, mu: float) -> tuple[Tensor, float]:
        """As `encoder_steps`."""
        ...


def head_steps(local: LocalRound) -> None:
    """τ_h SGD steps on the head with step size α, the encoder fixed."""
    local.steps.on_head(local)


def encoder_steps(
    local: LocalRound, *, with_head: bool = False, mu: float = 0.0
) -> tuple[Tensor, float]:
    """τ_ω SGD steps on the encoder with step size β: the mean gradient, shape ``(P,)``, and the mean loss of the batches.

    Args:
        local: who trains, and on what.
        with_head: whether the head takes a step of size α at each of them, along its gradient of the same loss.
        mu: μ of the proximal term (μ/2) ‖ω - ω_k‖², whose gradient μ (ω - ω_k) is then part of the mean. The losses are without it.
    """
    return local.steps.on_encoder(local, with_head=with_head, mu=mu)


def encoded(
    client: Client, encoder: nn.Module, instruction: Instruction
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the head's steps, their inputs as the fixed encoder's features."""
    for inputs, targets in batches_of(
        client, order_of(client, instruction, HEAD_BATCHES, instruction.training.head_steps)
    ):
        with torch.no_grad():
            features = encoder(inputs)
        yield features, targets


@dataclass(frozen=True)
class PlainSteps:
    """Steps in plain torch, one after another.

    Attributes:
        encoded: gives the batches of the head's steps, as features.
    """

    encoded: Encoded = encoded

    def on_head(self, local: LocalRound) -> None:
        """As `head_steps`."""
        task, head = local.client.task, local.head
        parameters = trainable(head)
        if not parameters:  # a task may do without: an encoder's output can be its prediction
            return
        for features, targets in self.encoded(local.client, local.encoder, local.instruction):
            loss = task.loss(head(features), targets)
            gradients = torch.autograd.grad(
                loss, [parameter for _, parameter in parameters], allow_unused=True
            )
            _move_head(parameters, gradients, local)

    def on_encoder(self, local: LocalRound, *, with_head: bool, mu: float) -> tuple[Tensor, float]:
        """As `encoder_steps`."""
        training, losses = local.instruction.training, []
        parameters: list[Tensor] = [parameter for _, parameter in trainable(local.encoder)]
        of_head = trainable(local.head) if with_head else []
        received = [parameter.detach().clone() for parameter in parameters] if mu else []
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for inputs, targets in batches_of(local.client, encoder_order(local)):
            loss = local.client.task.loss(local.head(local.encoder(inputs)), targets)
            found = torch.autograd.grad(
                loss, [*parameters, *(parameter for _, parameter in of_head)], allow_unused=True
            )
            with torch.no_grad():
                pairs = zip(parameters, found, strict=False)
                gradients = [
                    torch.zeros_like(parameter) if gradient is None else gradient
                    for parameter, gradient in pairs
                ]
                for place, parameter in enumerate(parameters):
                    gradient = gradients[place]
                    if mu:  # in this order, because a gradient may be sparse
                        gradient = (parameter - received[place]) * mu + gradient
                    parameter.sub_(gradient, alpha=training.encoder_lr)  # β
                    sums[place].add_(gradient)
            if with_head:
                _move_head(of_head, found[len(parameters) :], local)
            losses.append(loss.detach())
        return concatenated(sums) / len(losses), float(torch.stack(losses).double().mean())


@torch.no_grad()
def _move_head(
    parameters: list[tuple[str, nn.Parameter]],
    gradients: Iterable[Tensor | None],
    local: LocalRound,
) -> None:
    """A step of size α. A parameter without a gradient stays where it is."""
    training = local.instruction.training
    for (name, parameter), gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            step = direction(name, gradient, local.velocity, training.head_momentum)
            parameter.sub_(step, alpha=training.head_lr)  # α


def direction(name: str, gradient: Tensor, velocity: dict[str, Tensor], momentum: float) -> Tensor:
    """Where SGD goes: along the gradient, or with momentum along v ← momentum · v + gradient, which is kept in ``velocity``."""
    if momentum == 0:
        return gradient
    velocity[name] = velocity[name] * momentum + gradient if name in velocity else gradient
    return velocity[name]


def encoder_order(local: LocalRound) -> np.ndarray:
    """The examples of the encoder's steps, shape ``(steps, batch)``: all of the round, or the one that the instruction asks for."""
    order = order_of(
        local.client, local.instruction, ENCODER_BATCHES, local.instruction.training.encoder_steps
    )
    step = local.instruction.step
    return order if step is None else order[step : step + 1]


def batches_of(client: Client, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of these examples, shape ``(steps, batch)``."""
    data = client.train_data
    if isinstance(data, tuple) and order.size * data[0][0].nbytes <= GATHERED_BYTES:
        inputs, targets = take(data, order.reshape(-1))
        yield from zip(inputs.split(order.shape[1]), targets.split(order.shape[1]), strict=True)
    else:
        for indices in order:
            yield take(data, indices)


def order_of(client: Client, instruction: Instruction, purpose: str, steps: int) -> np.ndarray:
    """The examples of a round's batches, shape ``(steps, batch)``.

    Time and memory grow with the batches, and not with a data set that is much larger than they are.
    """
    training, examples = instruction.training, size(client.train_data)
    batch = min(training.batch_size, examples)
    if draws_few(examples, steps * batch):
        rng = quick_generator(training.seed, instruction.round, client.id, purpose)
        return distinct(rng, examples, steps * batch).reshape(steps, batch)
    return batch_order(
        order_numbers(client, instruction, purpose, steps), training.batch_size, steps
    )


def order_numbers(client: Client, instruction: Instruction, purpose: str, steps: int) -> np.ndarray:
    """The random numbers that `batch_order` orders a client's examples by, shape ``(passes, examples)``, where it has not too many."""
    training, examples = instruction.training, size(client.train_data)
    shape = num_passes(examples, training.batch_size, steps), examples
    return quick_generator(training.seed, instruction.round, client.id, purpose).random(shape)
