"""The client's half of the algorithm: pure functions of a client, its state and an instruction."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.config import TrainConfig
from fedgradnorm.data import Data, batches, size, take
from fedgradnorm.federation import Client, Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of, concatenated, load_buffers, load_flat, trainable
from fedgradnorm.randomness import generator, seeded_torch
from fedgradnorm.task import Task

__all__ = ["ClientState", "Evaluation", "constant_guess", "evaluate", "initial_state", "local_update"]

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
    """

    head: Mapping[str, Tensor]
    initial_loss: float | None = None
    encoder_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    head_velocity: Mapping[str, Tensor] = field(default_factory=dict)


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


def local_update(
    client: Client, encoder: nn.Module, head: nn.Module, norm_layer: tuple[slice, ...], state: ClientState, instruction: Instruction
) -> tuple[Report, ClientState]:
    """One round at one client: train the head with the encoder fixed, then the encoder with the head fixed.

    Args:
        client: who trains.
        encoder: scratch space; its parameters and buffers are overwritten with the instruction's and the state's.
        head: scratch space; overwritten with the state's.
        norm_layer: where the norm layer ω̃ lies in the flat encoder.
        state: the client's state after its last round.
        instruction: what the server sent.

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
    with seeded_torch(training.seed, instruction.round, client.id, "dropout"):
        velocity = _train_head(client, encoder, head, state.head_velocity, instruction)
        exact_loss = mean_loss(client, encoder, head, training) if training.loss_estimate == "exact" else None
        gradient, batch_loss = _train_encoder(client, encoder, head, instruction)

    buffers = buffers_of(encoder)
    shares_buffers = bool(instruction.buffers)
    report = Report(
        client=client.id,
        task=client.task.name,
        gradient=gradient,
        loss=batch_loss if exact_loss is None else exact_loss,
        initial_loss=initial_loss,
        grad_norm=norm_over(gradient, norm_layer),
        num_examples=size(client.train_data),
        buffers=buffers if shares_buffers else {},
        seconds=perf_counter() - start,
        round=instruction.round,
    )
    return report, ClientState(_snapshot(head), initial_loss, {} if shares_buffers else buffers, velocity)


def _train_head(
    client: Client, encoder: nn.Module, head: nn.Module, velocity: Mapping[str, Tensor], instruction: Instruction
) -> dict[str, Tensor]:
    """τ_h SGD steps on the head with step size α, the encoder fixed. Gives the optimiser's momentum back."""
    training = instruction.training
    parameters = trainable(head)
    if not parameters:  # a task may do without: an encoder's output can be its prediction
        return {}
    optimizer = torch.optim.SGD(
        [parameter for _, parameter in parameters], lr=training.head_lr, momentum=training.head_momentum
    )  # head_lr: α
    for name, parameter in parameters:
        if name in velocity:
            optimizer.state[parameter]["momentum_buffer"] = velocity[name].clone()
    for inputs, targets in _batches(client, instruction, "head batches", training.head_steps):
        with torch.no_grad():
            features = encoder(inputs)
        optimizer.zero_grad()
        client.task.loss(head(features), targets).backward()
        optimizer.step()
    momentum = {name: optimizer.state.get(parameter, {}).get("momentum_buffer") for name, parameter in parameters}
    return {name: buffer for name, buffer in momentum.items() if buffer is not None}


def _train_encoder(client: Client, encoder: nn.Module, head: nn.Module, instruction: Instruction) -> tuple[Tensor, float]:
    """τ_ω SGD steps on the encoder with step size β, the head fixed: the mean gradient g_i, and the mean loss of the batches."""
    training = instruction.training
    parameters = [parameter for _, parameter in trainable(encoder)]
    gradient, losses = torch.zeros_like(instruction.encoder), []
    for inputs, targets in _batches(client, instruction, "encoder batches", training.encoder_steps):
        loss = client.task.loss(head(encoder(inputs)), targets)
        step_gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for parameter, step_gradient in zip(parameters, step_gradients, strict=True):
                parameter.sub_(step_gradient, alpha=training.encoder_lr)  # β
        gradient += concatenated(step_gradients)
        losses.append(loss.item())
    return gradient / training.encoder_steps, float(np.mean(losses))


def load_model(encoder: nn.Module, head: nn.Module, state: ClientState, vector: Tensor, buffers: Mapping[str, Tensor]) -> None:
    """Put a client's model together in place: the shared encoder, the shared or its own buffers, and its head."""
    load_flat(encoder, vector)
    load_buffers(encoder, {**state.encoder_buffers, **buffers}.items())
    head.load_state_dict(dict(state.head))


def norm_over(gradient: Tensor, slices: tuple[slice, ...]) -> float:
    """The 2-norm of these parts of a flat gradient, n_i = ‖∇_ω̃ F_i‖₂."""
    return float(torch.linalg.vector_norm(torch.cat([gradient[part] for part in slices]), dtype=torch.float64))


def mean_loss(client: Client, encoder: nn.Module, head: nn.Module, training: TrainConfig) -> float:
    """The mean training loss over at most ``loss_examples`` examples, always the same ones, in evaluation mode. Modes are put back."""
    modes = encoder.training, head.training
    order = generator(training.seed, 0, client.id, "loss examples").permutation(size(client.train_data))
    loss, _, _ = _outputs(client.task, encoder, head, client.train_data, np.sort(order[: training.loss_examples]))
    encoder.train(modes[0])
    head.train(modes[1])
    return loss


def evaluate(task: Task, encoder: nn.Module, head: nn.Module, data: Data) -> Evaluation:
    """The loss and all metrics of a task over a whole set of data, in evaluation mode, which the modules are left in."""
    loss, outputs, targets = _outputs(task, encoder, head, data, np.arange(size(data)))
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
    training = instruction.training
    rng = generator(training.seed, instruction.round, client.id, purpose)
    return batches(client.train_data, training.batch_size, steps, rng)


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
