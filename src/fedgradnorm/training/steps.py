"""The SGD steps of methods, in plain torch: on the head, on the encoder, or on both."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import batch_order, distinct, draws_few, num_passes, size, take
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import concatenated, trainable
from fedgradnorm.randomness import quick_generator
from fedgradnorm.training.round import LocalRound

Encoded: TypeAlias = Callable[[Client, nn.Module, Instruction], Iterable[tuple[Tensor, Tensor]]]

HEAD_BATCHES, ENCODER_BATCHES = "head batches", "encoder batches"
"""The purposes that the two orders of batches are drawn for."""

GATHERED_BYTES = 16 * 2**20
"""Batches that together take at most this are gathered at once."""


def encoded(
    client: Client, encoder: nn.Module, instruction: Instruction
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the head's steps, with the fixed encoder's features in place of inputs."""
    order = order_of(client, instruction, HEAD_BATCHES, instruction.training.head_steps)
    for inputs, targets in batches_of(client, order):
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
        if not parameters:  # the encoder's output can be the prediction
            return
        for features, targets in self.encoded(local.client, local.encoder, local.instruction):
            loss = task.loss(head(features), targets)
            tensors = [parameter for _, parameter in parameters]
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            _move_head(parameters, gradients, local)

    def on_encoder(self, local: LocalRound, *, with_head: bool, mu: float) -> tuple[Tensor, float]:
        """As `encoder_steps`."""
        training, losses = local.instruction.training, []
        parameters: list[Tensor] = [parameter for _, parameter in trainable(local.encoder)]
        of_head = trainable(local.head) if with_head else []
        received = [parameter.detach().clone() for parameter in parameters] if mu else []
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        moving = [*parameters, *(parameter for _, parameter in of_head)]
        for inputs, targets in batches_of(local.client, encoder_order(local)):
            loss = local.client.task.loss(local.head(local.encoder(inputs)), targets)
            computed = torch.autograd.grad(loss, moving, allow_unused=True)
            with torch.no_grad():
                gradients = [
                    torch.zeros_like(parameter) if gradient is None else gradient
                    for parameter, gradient in zip(parameters, computed, strict=False)
                ]
                if mu:  # the sum in this order, since a gradient may be sparse
                    places = zip(parameters, received, gradients, strict=True)
                    gradients = [(now - start) * mu + gradient for now, start, gradient in places]
                for parameter, gradient, total in zip(parameters, gradients, sums, strict=True):
                    parameter.sub_(gradient, alpha=training.encoder_lr)  # β
                    total.add_(gradient)
            if with_head:
                _move_head(of_head, computed[len(parameters) :], local)
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
    """The direction of an SGD step: the gradient, or with momentum v ← momentum · v + gradient.

    ``velocity`` keeps the v of each name.
    """
    if momentum == 0:
        return gradient
    velocity[name] = velocity[name] * momentum + gradient if name in velocity else gradient
    return velocity[name]


def encoder_order(local: LocalRound) -> np.ndarray:
    """The examples of the encoder's steps, shape ``(steps, batch)``.

    They are those of the whole round, or of the one step that the instruction asks for.
    """
    instruction = local.instruction
    steps = instruction.training.encoder_steps
    order = order_of(local.client, instruction, ENCODER_BATCHES, steps)
    step = instruction.step
    return order if step is None else order[step : step + 1]


def batches_of(client: Client, order: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of these examples; ``order`` has the shape ``(steps, batch)``."""
    data = client.train_data
    if isinstance(data, tuple) and order.size * data[0][0].nbytes <= GATHERED_BYTES:
        inputs, targets = take(data, order.reshape(-1))
        yield from zip(inputs.split(order.shape[1]), targets.split(order.shape[1]), strict=True)
    else:
        for indices in order:
            yield take(data, indices)


def order_of(client: Client, instruction: Instruction, purpose: str, steps: int) -> np.ndarray:
    """The examples of a round's batches, shape ``(steps, batch)``.

    Time and memory grow with the batches, not with the size of a much larger data set.
    """
    training, examples = instruction.training, size(client.train_data)
    batch = min(training.batch_size, examples)
    if draws_few(examples, steps * batch):
        rng = quick_generator(training.seed, instruction.round, client.id, purpose)
        return distinct(rng, examples, steps * batch).reshape(steps, batch)
    numbers = order_numbers(client, instruction, purpose, steps)
    return batch_order(numbers, training.batch_size, steps)


def order_numbers(client: Client, instruction: Instruction, purpose: str, steps: int) -> np.ndarray:
    """The random numbers by which `batch_order` sorts a client's examples.

    Their shape is ``(passes, examples)``. `order_of` uses them unless the data set is large.
    """
    training, examples = instruction.training, size(client.train_data)
    shape = num_passes(examples, training.batch_size, steps), examples
    return quick_generator(training.seed, instruction.round, client.id, purpose).random(shape)
