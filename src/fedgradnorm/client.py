"""The client's half of the algorithm: pure functions of a client, its state and an instruction."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fedgradnorm.config import TrainConfig
from fedgradnorm.data import distinct, draws_few, size, take
from fedgradnorm.errors import ClientError, FederationError, raised_as
from fedgradnorm.evaluation import Evaluation, evaluate
from fedgradnorm.federation import Client, Federation
from fedgradnorm.guess import constant_answer
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.modules import follow, held_tensors
from fedgradnorm.parameters import buffers_of, flatten, load_buffers, load_flat, norm_over
from fedgradnorm.randomness import Generators, generator, seeded
from fedgradnorm.training import LocalRound, method_of
from fedgradnorm.training.round import Steps
from fedgradnorm.training.steps import PlainSteps

FEWEST_BATCHES = 64
"""A loss with random numbers, as with dropout, is the mean over at least this many batches."""


@dataclass(frozen=True)
class ClientState:
    """What stays with a client between rounds and is never sent.

    Attributes:
        head: the head's parameters and buffers, by name.
        initial_loss: F_i(0); None until the first local step.
        encoder_buffers: the client's own encoder buffers, when they are local; empty otherwise.
        head_velocity: the head optimiser's momentum, by parameter name; empty without momentum.
        round: the last round that the client was trained in; 0 before the first.
        encoder: the client's own trainable encoder parameters, flat, shape ``(P,)``, if its method
            keeps them; None if it starts every round from the server's.
    """

    head: Mapping[str, Tensor]
    initial_loss: float | None = None
    encoder_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    head_velocity: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 0
    encoder: Tensor | None = None


def initial_state(
    federation: Federation, client: Client, seed: int, encoder_buffers: Mapping[str, Tensor]
) -> ClientState:
    """A client's state before its first round: the initial head, and buffers if they are local."""
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
    """One round at one client: train its head and the encoder with the method in the settings.

    Args:
        client: the client.
        encoder: scratch space; overwritten with the instruction's and the state's tensors.
        head: scratch space; overwritten with the state's tensors.
        norm_layer: where the norm layer ω̃ lies in the flat encoder.
        state: the client's state after its last round.
        instruction: what the server sent.
        steps: how steps are computed; by default `PlainSteps`.
        random_model: whether the user's code may draw random numbers, as dropout does. If False,
            the global generators are left alone.

    Returns:
        The report for the server, and the client's next state.

    Raises:
        ClientError: the user's own code raised an error.
    """
    start = perf_counter()
    with naming(client.id, f"training in round {instruction.round}"):
        load_model(encoder, head, state, instruction.encoder, instruction.buffers)
        known = state.head_velocity
        heads = [pair for pair in head.named_parameters() if pair[0] in known]
        velocity = {name: known[name].to(own.device) for name, own in heads}
        local = LocalRound(client, encoder, head, velocity, instruction, steps or PlainSteps())
        report = _train(local, state.initial_loss, norm_layer, random_model, start)
    return report, ClientState(
        head=_snapshot(head, state.head),
        initial_loss=report.initial_loss,
        encoder_buffers={} if instruction.buffers else buffers_of(encoder),
        head_velocity=local.velocity,
        round=instruction.round,
        encoder=flatten(encoder) if method_of(instruction.training).own_encoder else None,
    )


def _train(
    local: LocalRound,
    initial_loss: float | None,
    norm_layer: tuple[slice, ...],
    random_model: bool,
    start: float,
) -> Report:
    """Train the head, then the encoder. The report's times are measured from ``start``."""
    client, encoder, head, instruction = local.client, local.encoder, local.head, local.instruction
    training = instruction.training
    method = method_of(training)

    def drawing(purpose: str, round: int) -> AbstractContextManager[None]:
        if not random_model:
            return nullcontext()
        return seeded(training.seed, round, client.id, purpose, instruction.encoder.device)

    if initial_loss is None:
        with drawing("initial loss", 0):
            if training.initial_loss == "guess":
                initial_loss = guess_loss(client, encoder, head, training)
            else:
                initial_loss = mean_loss(client, encoder, head, training, random_model=random_model)
    encoder.train()
    head.train()
    step = "" if instruction.step is None else f" {instruction.step}"
    with drawing("dropout" + step, instruction.round):
        with record_function("head steps"):
            method.train_head(local)
        exact_loss = None
        if training.loss_estimate == "exact":
            exact_loss = mean_loss(client, encoder, head, training, random_model=random_model)
        head_seconds = perf_counter() - start
        with record_function("encoder steps"):
            gradient, batch_loss = method.train_encoder(local)
    return Report(
        client=client.id,
        task=client.task.name,
        gradient=gradient,
        loss=batch_loss if exact_loss is None else exact_loss,
        initial_loss=initial_loss,
        grad_norm=norm_over(gradient, norm_layer).item(),
        num_examples=size(client.train_data),
        buffers=buffers_of(encoder) if instruction.buffers else {},
        seconds=perf_counter() - start,
        round=instruction.round,
        head_seconds=head_seconds,
        loss_floor=client.task.loss_floor,
    )


def load_model(
    encoder: nn.Module,
    head: nn.Module,
    state: ClientState,
    vector: Tensor,
    buffers: Mapping[str, Tensor],
) -> None:
    """Load a client's model in place: its head, and the shared or its own encoder and buffers."""
    follow(encoder, head)
    load_flat(encoder, vector if state.encoder is None else state.encoder)
    load_buffers(encoder, {**state.encoder_buffers, **buffers}.items())
    load_head(head, state.head)


@torch.no_grad()
def load_head(head: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a head's tensors into it, in place. Raises FederationError if they are another's."""
    needed = {name for name, _ in (*head.named_parameters(), *head.named_buffers())}
    for name, own in held_tensors(head).items():
        given = tensors.get(name)
        if given is not None and given.shape == own.shape:
            own.copy_(given)
        elif name in needed:
            found = sorted(tensors)[:10] if given is None else f"it of shape {tuple(given.shape)}"
            expected = f"'{name}' of shape {tuple(own.shape)}"
            raise FederationError(f"head: expected {expected}, found {found}")


def naming(client: str, what: str) -> AbstractContextManager[None]:
    """Raise an error of the user's own code as a ClientError that names the client and its work."""
    return raised_as(ClientError, f"client '{client}': {what}:")


@torch.no_grad()
def mean_loss(
    client: Client,
    encoder: nn.Module,
    head: nn.Module,
    training: TrainConfig,
    *,
    random_model: bool = True,
) -> float:
    """The mean training loss in training mode over the batches of `loss_batches`.

    It is F(0), and an exact F(k). Modes and buffers are restored. A client with few examples has
    few batches; they are taken several times if the model or the loss draws random numbers. Without
    ``random_model`` that is not looked at, because other threads may use the generators.
    """
    modes, buffers = (encoder.training, head.training), (buffers_of(encoder), buffers_of(head))
    encoder.train()
    head.train()
    batches, device = loss_batches(client, training), next(encoder.parameters()).device
    generators = Generators.now(device)

    def loss(indices: np.ndarray) -> float:
        inputs, targets = take(client.train_data, indices)
        return float(client.task.loss(head(encoder(inputs)), targets))

    losses = [loss(indices) for indices in batches]
    if random_model and len(batches) < FEWEST_BATCHES and Generators.now(device) != generators:
        numbers = range(len(batches), FEWEST_BATCHES)
        losses += [loss(batches[number % len(batches)]) for number in numbers]
    for module, mode, before in zip((encoder, head), modes, buffers, strict=True):
        module.train(mode)
        load_buffers(module, before.items())
    return fmean(losses)


@torch.no_grad()
def guess_loss(client: Client, encoder: nn.Module, head: nn.Module, training: TrainConfig) -> float:
    """The training loss of the constant answer.

    It is log C for C classes, else the loss of the mean target, or for an absolute error of the
    median target, or of the task's own `Task.guess`.

    Raises:
        FederationError: it is not known what a constant answer is.
    """
    inputs, _ = take(client.train_data, np.zeros(1, dtype=np.int64))
    modes = encoder.training, head.training
    output = head.eval()(encoder.eval()(inputs))
    encoder.train(modes[0])
    head.train(modes[1])
    targets = [take(client.train_data, indices)[1] for indices in loss_batches(client, training)]
    answer = constant_answer(client.task, tuple(output.shape[1:]), output.dtype, targets, even=True)
    if answer is None:
        what = "what a constant answer is to its task is not known"
        raise FederationError(f"client '{client.id}': initial_loss = 'guess': {what}")
    loss = client.task.loss
    return fmean(loss(answer.expand(len(batch), *answer.shape), batch).item() for batch in targets)


def loss_batches(client: Client, training: TrainConfig) -> np.ndarray:
    """The examples of F(0) and of an exact F(k): always the same ones, in batches as in training.

    Returns:
        Indices of different examples in a random order, shape ``(batches, batch)``: at most
        ``loss_examples`` of them, but at least one batch.
    """
    examples = size(client.train_data)
    batch = min(training.batch_size, examples)
    count = max(min(training.loss_examples, examples) // batch, 1) * batch
    rng = generator(training.seed, 0, client.id, "loss examples")
    few = draws_few(examples, count)
    order = distinct(rng, examples, count) if few else rng.permutation(examples)[:count]
    return order.reshape(-1, batch)


def evaluate_client(
    client: Client, encoder: nn.Module, head: nn.Module, seed: int, batch_size: int
) -> Evaluation:
    """The loss and the metrics over a client's test data, with the generators seeded.

    Raises:
        ClientError: the user's own code raised an error.
        FederationError: the client has no test data.
    """
    if client.test_data is None:
        raise FederationError(f"client '{client.id}' has no test data")
    device = next(encoder.parameters()).device
    with naming(client.id, "testing"), seeded(seed, 0, client.id, "test", device):
        return evaluate(client.task, encoder, head, client.test_data, batch_size)


def _snapshot(head: nn.Module, names: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of a head's tensors: all, or those with these names."""
    tensors = held_tensors(head).items()
    return {name: tensor.clone() for name, tensor in tensors if names is None or name in names}
