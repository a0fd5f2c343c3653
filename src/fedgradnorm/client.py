"""The client's half of the algorithm: pure functions of a client, its state and an instruction."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fedgradnorm.config import TrainConfig
from fedgradnorm.data import Data, batch_order, size, take
from fedgradnorm.federation import Client, Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of, concatenated, load_buffers, load_flat, trainable
from fedgradnorm.randomness import generator, seeded_torch
from fedgradnorm.task import Task

__all__ = [
    "ENCODER_BATCHES",
    "HEAD_BATCHES",
    "ClientState",
    "Evaluation",
    "constant_guess",
    "direction",
    "evaluate",
    "evaluation_of",
    "initial_state",
    "load_model",
    "local_update",
    "loss_examples",
    "norm_over",
    "order_of",
]

Encoded: TypeAlias = Callable[[Client, nn.Module, Instruction], Iterable[tuple[Tensor, Tensor]]]

HEAD_BATCHES, ENCODER_BATCHES = "head batches", "encoder batches"
"""What the two orders of batches are drawn for."""

GATHERED_BYTES = 16 * 2**20
"""Batches that take no more together are gathered at once."""

EVALUATION_BATCH = 512
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class ClientState:
    """What stays with a client between rounds and is never sent.

    Attributes:
        head: the head's parameters and buffers, by name.
        initial_loss: F_i(0); None until the first local step.
        encoder_buffers: the client's own encoder buffers, when they are local; empty otherwise.
        head_velocity: the head optimiser's momentum, by parameter name; empty without momentum.
        round: the last round that it was trained in; 0 before the first.
    """

    head: Mapping[str, Tensor]
    initial_loss: float | None = None
    encoder_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    head_velocity: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The loss and the metrics, by name, over a whole set of examples."""

    loss: float
    metrics: Mapping[str, float]
    num_examples: int


def initial_state(federation: Federation, client: Client, seed: int, encoder_buffers: Mapping[str, Tensor]) -> ClientState:
    """A client's state before its first round: its head as initialised, and the encoder's initial buffers if they are local."""
    buffers = encoder_buffers if federation.buffers == "local" else {}
    return ClientState(head=_snapshot(federation.make_head(client, seed)), encoder_buffers=buffers)


def encoded(client: Client, encoder: nn.Module, instruction: Instruction) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the head's steps, their inputs as the fixed encoder's features."""
    for inputs, targets in _batches(client, instruction, HEAD_BATCHES, instruction.training.head_steps):
        with torch.no_grad():
            features = encoder(inputs)
        yield features, targets


def local_update(
    client: Client,
    encoder: nn.Module,
    head: nn.Module,
    norm_layer: tuple[slice, ...],
    state: ClientState,
    instruction: Instruction,
    *,
    encoded: Encoded = encoded,
    random_model: bool = True,
) -> tuple[Report, ClientState]:
    """One round at one client: train the head with the encoder fixed, then the encoder with the head fixed.

    Args:
        client: who trains.
        encoder: scratch space; its parameters and buffers are overwritten with the instruction's and the state's.
        head: scratch space; overwritten with the state's.
        norm_layer: where the norm layer ω̃ lies in the flat encoder.
        state: the client's state after its last round.
        instruction: what the server sent.
        encoded: gives the batches of the head's steps, as features; an engine may know a faster way to the same ones.
        random_model: whether the model may draw random numbers, as dropout does; False leaves torch's global generator alone.

    Returns:
        The report for the server, and the client's next state.
    """
    start, training = perf_counter(), instruction.training
    load_model(encoder, head, state, instruction.encoder, instruction.buffers)
    initial_loss = state.initial_loss
    if initial_loss is None:
        initial_loss = mean_loss(client, encoder, head, training)

    encoder.train()
    head.train()
    key = (training.seed, instruction.round, client.id, "dropout")
    with seeded_torch(*key, device=instruction.encoder.device) if random_model else nullcontext():
        with record_function("head steps"):
            velocity = _train_head(client.task, head, encoded(client, encoder, instruction), state.head_velocity, training)
        exact_loss = mean_loss(client, encoder, head, training) if training.loss_estimate == "exact" else None
        head_seconds = perf_counter() - start
        with record_function("encoder steps"):
            gradient, batch_loss = _train_encoder(client, encoder, head, instruction)

    buffers = buffers_of(encoder)
    shares_buffers = bool(instruction.buffers)
    report = Report(
        client=client.id,
        task=client.task.name,
        gradient=gradient,
        loss=batch_loss if exact_loss is None else exact_loss,
        initial_loss=initial_loss,
        grad_norm=norm_over(gradient, norm_layer).item(),
        num_examples=size(client.train_data),
        buffers=buffers if shares_buffers else {},
        seconds=perf_counter() - start,
        round=instruction.round,
        head_seconds=head_seconds,
    )
    return report, ClientState(_snapshot(head), initial_loss, {} if shares_buffers else buffers, velocity, instruction.round)


def _train_head(
    task: Task, head: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], velocity: Mapping[str, Tensor], training: TrainConfig
) -> dict[str, Tensor]:
    """An SGD step on the head with step size α for each batch of features. Gives the momentum after it."""
    parameters = trainable(head)
    velocity = {name: velocity[name].to(parameter.device) for name, parameter in parameters if name in velocity}
    if not parameters:  # a task may do without: an encoder's output can be its prediction
        return {}
    for features, targets in batches:
        loss = task.loss(head(features), targets)
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in parameters], allow_unused=True)
        used = [
            (name, parameter, gradient) for (name, parameter), gradient in zip(parameters, gradients, strict=True) if gradient is not None
        ]
        with torch.no_grad():
            directions = [direction(name, gradient, velocity, training.head_momentum) for name, _, gradient in used]
            torch._foreach_sub_([parameter for _, parameter, _ in used], directions, alpha=training.head_lr)  # α
    return velocity


def direction(name: str, gradient: Tensor, velocity: dict[str, Tensor], momentum: float) -> Tensor:
    """Where SGD goes: along the gradient, or with momentum along v ← momentum · v + gradient, which is kept in ``velocity``."""
    if momentum == 0:
        return gradient
    velocity[name] = velocity[name] * momentum + gradient if name in velocity else gradient
    return velocity[name]


def _train_encoder(client: Client, encoder: nn.Module, head: nn.Module, instruction: Instruction) -> tuple[Tensor, float]:
    """τ_ω SGD steps on the encoder with step size β, the head fixed: the mean gradient g_i, and the mean loss of the batches."""
    training, losses = instruction.training, []
    parameters: list[Tensor] = [parameter for _, parameter in trainable(encoder)]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in _batches(client, instruction, ENCODER_BATCHES, training.encoder_steps):
        loss = client.task.loss(head(encoder(inputs)), targets)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_sub_(parameters, gradients, alpha=training.encoder_lr)  # β
            torch._foreach_add_(sums, gradients)
        losses.append(loss.detach())
    return concatenated(sums) / training.encoder_steps, float(torch.stack(losses).double().mean())


def load_model(encoder: nn.Module, head: nn.Module, state: ClientState, vector: Tensor, buffers: Mapping[str, Tensor]) -> None:
    """Put a client's model together in place: the shared encoder, the shared or its own buffers, and its head."""
    load_flat(encoder, vector)
    load_buffers(encoder, {**state.encoder_buffers, **buffers}.items())
    head.load_state_dict(dict(state.head))


def norm_over(gradients: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The 2-norms of these parts of flat gradients of shape ``(..., P)``, n_i = ‖∇_ω̃ F_i‖₂, in double precision."""
    norms = [torch.linalg.vector_norm(gradients[..., part], dim=-1, dtype=torch.float64) for part in slices]
    return torch.stack(norms).square().sum(dim=0).sqrt()


def mean_loss(client: Client, encoder: nn.Module, head: nn.Module, training: TrainConfig) -> float:
    """The mean training loss over at most ``loss_examples`` examples, always the same ones, in evaluation mode. Modes are put back."""
    modes = encoder.training, head.training
    loss, _, _ = _outputs(client.task, encoder, head, client.train_data, loss_examples(client, training))
    encoder.train(modes[0])
    head.train(modes[1])
    return loss


def loss_examples(client: Client, training: TrainConfig) -> np.ndarray:
    """The indices of these examples, ascending."""
    order = generator(training.seed, 0, client.id, "loss examples").permutation(size(client.train_data))
    return np.sort(order[: training.loss_examples])


def evaluate(task: Task, encoder: nn.Module, head: nn.Module, data: Data) -> Evaluation:
    """The loss and all metrics of a task over a whole set of data, in evaluation mode, which the modules are left in."""
    loss, outputs, targets = _outputs(task, encoder, head, data, np.arange(size(data)))
    return evaluation_of(task, loss, outputs, targets)


def evaluation_of(task: Task, loss: float, outputs: Tensor, targets: Tensor) -> Evaluation:
    """An evaluation, from the loss, the outputs and the targets of all examples."""
    outputs, targets = outputs.cpu(), targets.cpu()
    return Evaluation(loss, {metric.name: float(metric.function(outputs, targets)) for metric in task.metrics}, len(targets))


def constant_guess(task: Task, test: Data) -> dict[str, float]:
    """The metrics of an answer that looks at no input, chosen in hindsight: the test data's majority class, or their mean target.

    Classes are whole numbers of shape ``(n,)``, and numbers are floating. Empty for other targets, and where the task's
    outputs do not have the shape that such a guess has.
    """
    targets = take(test, np.arange(size(test)))[1]
    if targets.dtype == torch.bool:
        targets = targets.long()
    if targets.is_floating_point():
        guess = targets.double().mean(dim=0).to(targets.dtype)
    elif targets.ndim == 1 and targets.min() >= 0 and targets.max() < MOST_CLASSES:
        counts = torch.bincount(targets)
        guess = nn.functional.one_hot(counts.argmax(), len(counts)).float()
    else:
        return {}
    outputs = guess.expand(len(targets), *guess.shape)
    try:
        return {metric.name: float(metric.function(outputs, targets)) for metric in task.metrics}
    except Exception:  # noqa: BLE001  # the user's own metric may raise anything
        return {}


@torch.no_grad()
def _outputs(task: Task, encoder: nn.Module, head: nn.Module, data: Data, indices: np.ndarray) -> tuple[float, Tensor, Tensor]:
    """The mean loss over these examples, with all outputs and targets."""
    encoder.eval()
    head.eval()
    losses, outputs, targets = [], [], []
    for start in range(0, len(indices), EVALUATION_BATCH):
        inputs, expected = take(data, indices[start : start + EVALUATION_BATCH])
        outputs.append(head(encoder(inputs)))
        targets.append(expected)
        losses.append(task.loss(outputs[-1], expected).item() * len(expected))
    return sum(losses) / len(indices), torch.cat(outputs), torch.cat(targets)


def _batches(client: Client, instruction: Instruction, purpose: str, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    data, order = client.train_data, order_of(client, instruction, purpose, steps)
    if isinstance(data, tuple) and order.size * data[0][0].nbytes <= GATHERED_BYTES:
        inputs, targets = take(data, order.reshape(-1))
        yield from zip(inputs.split(order.shape[1]), targets.split(order.shape[1]), strict=True)
    else:
        for indices in order:
            yield take(data, indices)


def order_of(client: Client, instruction: Instruction, purpose: str, steps: int) -> np.ndarray:
    """The examples of a round's batches, shape ``(steps, batch)``."""
    training = instruction.training
    rng = generator(training.seed, instruction.round, client.id, purpose)
    return batch_order(size(client.train_data), training.batch_size, steps, rng)


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
