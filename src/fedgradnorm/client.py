"""The client's half of the algorithm: pure functions of a client, its state and an instruction."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fedgradnorm.config import TrainConfig
from fedgradnorm.data import Data, size, take
from fedgradnorm.federation import Client, Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of, flatten, load_buffers, load_flat, norm_over, trainable
from fedgradnorm.randomness import generator, seeded_torch
from fedgradnorm.task import Task
from fedgradnorm.training import LocalRound, method_of
from fedgradnorm.training.steps import PlainSteps, Steps

__all__ = [
    "ClientState",
    "Evaluation",
    "constant_guess",
    "evaluate",
    "evaluation_of",
    "initial_state",
    "load_model",
    "local_update",
    "loss_examples",
]

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
        encoder: the client's own trainable encoder parameters, flat, shape ``(P,)``, where its method keeps them; None where it goes on
            from the server's.
    """

    head: Mapping[str, Tensor]
    initial_loss: float | None = None
    encoder_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    head_velocity: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0
    encoder: Tensor | None = None


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
    client: Client,
    encoder: nn.Module,
    head: nn.Module,
    norm_layer: tuple[slice, ...],
    state: ClientState,
    instruction: Instruction,
    *,
    steps: Steps | None = None,
    random_model: bool = True,
) -> tuple[Report, ClientState]:
    """One round at one client: train its head and the encoder, as the method in the settings says.

    Args:
        client: who trains.
        encoder: scratch space; its parameters and buffers are overwritten with the instruction's and the state's.
        head: scratch space; overwritten with the state's.
        norm_layer: where the norm layer ω̃ lies in the flat encoder.
        state: the client's state after its last round.
        instruction: what the server sent.
        steps: how steps are computed; by default as `PlainSteps`.
        random_model: whether the model may draw random numbers, as dropout does; False leaves torch's global generator alone.

    Returns:
        The report for the server, and the client's next state.
    """
    start, training = perf_counter(), instruction.training
    method = method_of(training)
    load_model(encoder, head, state, instruction.encoder, instruction.buffers)
    initial_loss = state.initial_loss
    if initial_loss is None:
        initial_loss = mean_loss(client, encoder, head, training)

    encoder.train()
    head.train()
    velocity = {name: state.head_velocity[name].to(parameter.device) for name, parameter in trainable(head) if name in state.head_velocity}
    local = LocalRound(client, encoder, head, velocity, instruction, steps or PlainSteps())
    purpose = "dropout" if instruction.step is None else f"dropout {instruction.step}"
    key = (training.seed, instruction.round, client.id, purpose)
    with seeded_torch(*key, device=instruction.encoder.device) if random_model else nullcontext():
        with record_function("head steps"):
            method.train_head(local)
        exact_loss = mean_loss(client, encoder, head, training) if training.loss_estimate == "exact" else None
        head_seconds = perf_counter() - start
        with record_function("encoder steps"):
            gradient, batch_loss = method.train_encoder(local)

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
    own_encoder = flatten(encoder) if method.own_encoder else None
    return report, ClientState(
        _snapshot(head), initial_loss, {} if shares_buffers else buffers, local.velocity, instruction.round, own_encoder
    )


def load_model(encoder: nn.Module, head: nn.Module, state: ClientState, vector: Tensor, buffers: Mapping[str, Tensor]) -> None:
    """Put a client's model together in place: the shared or its own encoder, the shared or its own buffers, and its head."""
    load_flat(encoder, vector if state.encoder is None else state.encoder)
    load_buffers(encoder, {**state.encoder_buffers, **buffers}.items())
    head.load_state_dict(dict(state.head))


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


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
