"""Many small clients at once: their models stacked, and every step one batched operation for all of them (``torch.func.vmap``).

The clients may differ in task, head and number of examples. What they share is the encoder, the shape of an input, and the size of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.profiler import record_function

from fedgradnorm.client import ClientState, Evaluation, evaluation_of, loss_examples, norm_over
from fedgradnorm.config import TrainConfig
from fedgradnorm.data import size, take, tensors
from fedgradnorm.engines.workspace import Workspace, head_kind, views
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import load_flat, trainable
from fedgradnorm.task import Task
from fedgradnorm.training.steps import ENCODER_BATCHES, HEAD_BATCHES, direction, order_of

__all__ = ["Member", "stacked_encoder", "stacked_evaluations", "stacked_losses", "stacked_update"]

ENCODED_AT_ONCE = 4096
"""Examples of all clients together in one pass for features."""

Stacked = Mapping[str, Tensor]
"""Parameters by name, of many clients along dimension 0."""


class Member(NamedTuple):
    """A client of a stack: who, its training data, its state after its last round, and what the server sent."""

    client: Client
    data: tuple[Tensor, Tensor]
    state: ClientState
    instruction: Instruction


def stacked_encoder(encoder: nn.Module) -> Callable[[Stacked, Tensor], Tensor]:
    """From parameters and inputs of shape ``(clients, batch, ...)`` to features ``(clients, batch, ...)``."""

    def encode(parameters: Stacked, inputs: Tensor) -> Tensor:
        return functional_call(encoder, dict(parameters), (inputs,))  # type: ignore[no-any-return]  # a module may give anything

    return vmap(encode)


def stacked_losses(head: nn.Module, task: Task) -> Callable[[Stacked, Tensor, Tensor], Tensor]:
    """From the heads' parameters, features and targets, all ``(clients, ...)``, to the losses of shape ``(clients,)``."""

    def loss(parameters: Stacked, features: Tensor, targets: Tensor) -> Tensor:
        return task.loss(functional_call(head, dict(parameters), (features,)), targets).reshape(())

    return vmap(loss)


@dataclass
class _Heads:
    """The heads of neighbours in a stack that have one kind of head and one loss.

    Attributes:
        module: such a head, as scratch space.
        task: a task that has this head and loss.
        place: where these clients are in the stack.
        parameters: of all of them.
        velocity: the momentum of those parameters that have one.
        targets: of all their examples, one client after another.
    """

    module: nn.Module
    task: Task
    place: slice
    parameters: dict[str, Tensor]
    velocity: dict[str, Tensor]
    targets: Tensor
    losses: Callable[[Stacked, Tensor, Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = stacked_losses(self.module, self.task)

    def train(self, features: Tensor, targets: Tensor, training: TrainConfig) -> None:
        """The SGD steps with step size α, on features ``(clients, steps, batch, ...)`` and targets likewise."""
        learned = {name: self.parameters[name].requires_grad_() for name, _ in trainable(self.module)}
        for step in range(training.head_steps if learned else 0):
            losses = self.losses(self.parameters, features[:, step], targets[:, step])
            gradients = torch.autograd.grad(losses.sum(), list(learned.values()), allow_unused=True)
            with torch.no_grad():
                for (name, parameter), gradient in zip(learned.items(), gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(direction(name, gradient, self.velocity, training.head_momentum), alpha=training.head_lr)  # α
        self.parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}


def stacked_update(members: Sequence[Member], workspace: Workspace) -> list[tuple[Report, ClientState]]:
    """`local_update` with the method FedRep for many clients, in their order.

    Args:
        members: clients whose data are tensors, whose models draw no random numbers, have no buffers, and treat every example by
            itself. All were sent the same encoder. Neighbours with the same kind of head are computed together.
        workspace: scratch space.
    """
    start, first = perf_counter(), members[0].instruction
    training, device = first.training, workspace.device
    load_flat(workspace.encoder, first.encoder)
    heads = _stack_heads(members, workspace)
    starting = _mean_losses(members, workspace, heads) if any(member.state.initial_loss is None for member in members) else []
    known = [member.state.initial_loss for member in members]
    initial_losses = [starting[index] if loss is None else loss for index, loss in enumerate(known)]

    sizes = [size(member.data) for member in members]
    offsets = torch.from_numpy(np.cumsum([0, *sizes]))
    inputs = torch.cat([member.data[0] for member in members]).to(device)
    with record_function("head steps"):
        order = _order(members, HEAD_BATCHES, training.head_steps) + offsets[:-1, None, None]
        features = _features(workspace.encoder.train(), inputs, order)
        for some in heads:
            some.module.train()
            some.train(features[some.place], _targets(some, order, offsets), training)
    exact_losses = _mean_losses(members, workspace, heads) if training.loss_estimate == "exact" else None
    head_seconds = (perf_counter() - start) / len(members)
    with record_function("encoder steps"):
        order = _order(members, ENCODER_BATCHES, training.encoder_steps) + offsets[:-1, None, None]
        targets = [_targets(some, order, offsets) for some in heads]
        gradients, losses = _train_encoders(workspace.encoder, first.encoder, inputs[order], heads, targets, training)

    norms = norm_over(gradients, workspace.norm_layer).tolist()
    rows = gradients.cpu().unbind()
    states = [state for some in heads for state in _states(some)]
    seconds = (perf_counter() - start) / len(members)
    outcomes = []
    for index, (member, (head, velocity)) in enumerate(zip(members, states, strict=True)):
        report = Report(
            client=member.client.id,
            task=member.client.task.name,
            gradient=rows[index],
            loss=losses[index] if exact_losses is None else exact_losses[index],
            initial_loss=initial_losses[index],
            grad_norm=norms[index],
            num_examples=sizes[index],
            seconds=seconds,
            round=member.instruction.round,
            head_seconds=head_seconds,
        )
        outcomes.append((report, ClientState(head, initial_losses[index], {}, velocity, member.instruction.round)))
    return outcomes


def _kind_of(member: Member) -> tuple[object, ...]:
    targets = member.data[1]
    return head_kind(member.client), targets.dtype, targets.shape[1:]


def _stack_heads(members: Sequence[Member], workspace: Workspace) -> list[_Heads]:
    heads, end = [], 0
    for _, neighbours in groupby(members, key=_kind_of):
        some = list(neighbours)
        end += len(some)
        states = [member.state for member in some]
        parameters = {name: torch.stack([state.head[name] for state in states]).to(workspace.device) for name in states[0].head}
        moving = [name for name in parameters if any(name in state.head_velocity for state in states)]
        velocity = {
            name: torch.stack([state.head_velocity.get(name, torch.zeros_like(state.head[name])) for state in states]).to(workspace.device)
            for name in moving
        }
        targets = torch.cat([member.data[1] for member in some]).to(workspace.device)
        head, task = workspace.head(some[0].client), some[0].client.task
        heads.append(_Heads(head, task, slice(end - len(some), end), parameters, velocity, targets))
    return heads


def _order(members: Sequence[Member], purpose: str, steps: int) -> Tensor:
    """The examples of the batches, shape ``(clients, steps, batch)``, each counted within its client."""
    return torch.from_numpy(np.stack([order_of(member.client, member.instruction, purpose, steps) for member in members]))


def _targets(heads: _Heads, order: Tensor, offsets: Tensor) -> Tensor:
    """The targets of the batches of these clients, shape ``(clients, steps, batch, ...)``."""
    return heads.targets[order[heads.place] - offsets[heads.place.start]]


@torch.no_grad()
def _features(encoder: nn.Module, inputs: Tensor, order: Tensor) -> Tensor:
    """The features of the batches, shape ``(clients, steps, batch, ...)``. No example is encoded more often than it has to be."""
    if order.numel() >= len(inputs):
        return _encode(encoder, inputs)[order]
    features = _encode(encoder, inputs[order.view(-1)])
    return features.view(*order.shape, *features.shape[1:])


def _encode(encoder: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([encoder(part) for part in inputs.split(ENCODED_AT_ONCE)])


def _train_encoders(
    encoder: nn.Module, start: Tensor, inputs: Tensor, heads: Sequence[_Heads], targets: Sequence[Tensor], training: TrainConfig
) -> tuple[Tensor, list[float]]:
    """The SGD steps with step size β: the mean gradients g_i, shape ``(clients, P)``, and the mean losses of the batches.

    After s steps of size β the parameters are ω - β Σ g.
    """
    vectors = start.expand(len(inputs), -1).clone()
    total = torch.zeros_like(vectors)
    parameters = {name: part.requires_grad_() for name, part in views(encoder, vectors).items()}
    sums, encode, seen = views(encoder, total), stacked_encoder(encoder), []
    for step in range(training.encoder_steps):
        features = encode(parameters, inputs[:, step])
        pairs = zip(heads, targets, strict=True)
        losses = torch.cat([some.losses(some.parameters, features[some.place], expected[:, step]) for some, expected in pairs])
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].add_(gradient)
        torch.add(start, total, alpha=-training.encoder_lr, out=vectors)  # β
        seen.append(losses.detach())
    return total.div_(training.encoder_steps), torch.stack(seen).double().mean(dim=0).tolist()


@torch.no_grad()
def _mean_losses(members: Sequence[Member], workspace: Workspace, heads: Sequence[_Heads]) -> list[float]:
    """The mean training losses as `client.mean_loss` gives them, in evaluation mode."""
    training = members[0].instruction.training
    examples = [take(member.data, loss_examples(member.client, training)) for member in members]
    features = _encode(workspace.encoder.eval(), torch.cat([inputs for inputs, _ in examples]).to(workspace.device))
    parts = features.split([len(inputs) for inputs, _ in examples])
    losses: list[float] = []
    for some in heads:
        some.module.eval()
        for _, alike in groupby(range(some.place.start, some.place.stop), key=lambda index: len(parts[index])):
            indices = list(alike)
            place = slice(indices[0] - some.place.start, indices[-1] + 1 - some.place.start)
            parameters = {name: value[place] for name, value in some.parameters.items()}
            targets = torch.stack([examples[index][1] for index in indices]).to(workspace.device)
            losses += some.losses(parameters, torch.stack([parts[index] for index in indices]), targets).tolist()
        some.module.train()
    workspace.encoder.train()
    return losses


def _states(heads: _Heads) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The parameters and the momentum of each client's head, as copies of its own."""
    count = heads.place.stop - heads.place.start
    unstacked = []
    for stack in (heads.parameters, heads.velocity):
        parts = {name: [part.clone() for part in value.cpu().unbind()] for name, value in stack.items()}
        unstacked.append([{name: values[index] for name, values in parts.items()} for index in range(count)])
    return list(zip(*unstacked, strict=True))


@torch.no_grad()
def stacked_evaluations(
    clients: Sequence[Client], states: Mapping[str, ClientState], encoder: Tensor, workspace: Workspace
) -> dict[str, Evaluation]:
    """`client.evaluate` for many clients with test data that are tensors: all their inputs pass through the encoder at once."""
    load_flat(workspace.encoder, encoder)
    data = [tensors(client.test_data) for client in clients if client.test_data is not None]
    features = _encode(workspace.encoder.eval(), torch.cat([inputs for inputs, _ in data]).to(workspace.device))
    evaluations = {}
    parts = features.split([len(inputs) for inputs, _ in data])
    for client, part, (_, targets) in zip(clients, parts, data, strict=True):
        head = workspace.head(client).eval()
        head.load_state_dict(dict(states[client.id].head))
        outputs, expected = head(part), targets.to(workspace.device)
        evaluations[client.id] = evaluation_of(client.task, client.task.loss(outputs, expected).item(), outputs, expected)
    return evaluations
