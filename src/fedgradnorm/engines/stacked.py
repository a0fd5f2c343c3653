"""Many small clients at once: models stacked, every step one batched operation for all of them.

The clients of a stack are identical: one kind of head and loss, the same shapes of an example and
of a batch. They may have different numbers of examples.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.profiler import record_function

from fedgradnorm.client import ClientState, guess_loss, load_head, loss_batches
from fedgradnorm.config import TrainConfig
from fedgradnorm.data import batch_order, size, take
from fedgradnorm.engines.looped import hold_features
from fedgradnorm.engines.phases import ENCODER, HEAD, Batch, Phase, both
from fedgradnorm.engines.workspace import Workspace, encode
from fedgradnorm.federation import Client
from fedgradnorm.messages import LARGEST, Instruction, Report
from fedgradnorm.parameters import load_flat, norm_over
from fedgradnorm.training.steps import ENCODER_BATCHES, HEAD_BATCHES, order_numbers

__all__ = [
    "Member",
    "Stack",
    "Trained",
    "outcomes",
    "stack_of",
    "stacked_order",
    "stacked_update",
]


class Member(NamedTuple):
    """A client of a stack, its data, its state after its last round, and what the server sent."""

    client: Client
    data: tuple[Tensor, Tensor]
    state: ClientState
    instruction: Instruction


class Stack(NamedTuple):
    """The steps of ``width`` identical clients on their heads and on their encoders."""

    width: int
    head: Phase
    encoder: Phase


def stack_of(client: Client, workspace: Workspace, batch: Batch, width: int) -> Stack:
    """A stack of clients like this one, traced with one of its batches.

    Raises:
        Exception: whatever `Phase` raises on a model that cannot be stacked.
    """
    encoder, head = workspace.encoder, workspace.head(client)
    with torch.no_grad():
        features = encoder(batch[0])
    on_head = Phase(both(nn.Identity(), head), client.task, (HEAD,), (features, batch[1]), width)
    return Stack(
        width,
        on_head,
        Phase(both(encoder, head), client.task, (ENCODER,), batch, width, shared=(ENCODER,)),
    )


class Trained(NamedTuple):
    """The results of a stack's clients after their steps, still stacked."""

    heads: Mapping[str, Tensor]
    velocity: Mapping[str, Tensor]
    gradients: Tensor
    norms: Sequence[float]
    lengths: Sequence[float]
    losses: Sequence[float]
    initial_losses: Sequence[float]
    seconds: float
    head_seconds: float


def stacked_order(members: Sequence[Member], width: int) -> tuple[Tensor, Tensor]:
    """The examples of the head's and of the encoder's batches, shapes ``(steps, width, batch)``.

    They are places among the examples of all members. This is Python for the most part: threads
    would wait for each other.
    """
    training = members[0].instruction.training
    sizes = np.array([size(member.data) for member in members])
    offsets, batch = (sizes.cumsum() - sizes)[:, None, None], min(training.batch_size, sizes[0])

    def order_for(purpose: str, steps: int) -> Tensor:
        order = np.empty((len(members), steps, batch), dtype=np.int64)
        for examples in np.unique(sizes):
            places = np.flatnonzero(sizes == examples)
            clients = [members[place] for place in places.tolist()]
            numbers = [order_numbers(m.client, m.instruction, purpose, steps) for m in clients]
            order[places] = batch_order(np.stack(numbers), training.batch_size, steps)
        order += offsets
        return torch.from_numpy(np.ascontiguousarray(order[_rows(members, width)].swapaxes(0, 1)))

    of_heads = order_for(HEAD_BATCHES, training.head_steps)
    return of_heads, order_for(ENCODER_BATCHES, training.encoder_steps)


def _rows(members: Sequence[Member], width: int) -> list[int]:
    """The member at each place of a stack: the last member also has the places that are left."""
    return [min(row, len(members) - 1) for row in range(width)]


def stacked_update(
    members: Sequence[Member],
    order: tuple[Tensor, Tensor],
    workspace: Workspace,
    stack: Stack,
    tried: int | None = None,
) -> Trained:
    """The steps of `local_update` with the method FedRep for many clients.

    Args:
        members: no more than the stack is wide, all with the same encoder.
        order: of their batches, see `stacked_order`.
        workspace: scratch space.
        stack: of clients like these.
        tried: chooses the client and the steps that are compared with autograd; None: none are.

    Raises:
        WrongProgram: these steps differ.
    """
    start, device, count = perf_counter(), workspace.device, len(members)
    training, rows = members[0].instruction.training, _rows(members, stack.width)
    load_flat(workspace.encoder, members[0].instruction.encoder)
    heads = {
        name: torch.stack([members[row].state.head[name] for row in rows]).to(device)
        for name in members[0].state.head
    }
    initial_losses = _initial_losses(members, workspace, heads)
    inputs, targets = (
        torch.cat([member.data[part] for member in members]).to(device) for part in (0, 1)
    )
    of_heads, of_encoders = (places.to(device) for places in order)
    with record_function("head steps"):
        features = _features(workspace.encoder.train(), inputs, of_heads)
        batches = targets[of_heads]
        if tried is not None:
            row, step = tried % count, tried % len(features)
            hold_features(workspace.encoder, inputs[of_heads[step, row]], features[step, row])
            _hold_heads(members, workspace, stack.head, heads, features, batches, tried)
        velocity = _train_heads(heads, stack.head, features, batches, members, rows)
    exact = training.loss_estimate == "exact"
    exact_losses = _mean_losses(members, workspace, heads) if exact else None
    head_seconds = (perf_counter() - start) / count
    with record_function("encoder steps"):
        model = both(workspace.encoder, workspace.head(members[0].client))
        phase, gathered = stack.encoder, (inputs[of_encoders], targets[of_encoders])
        if tried is not None:
            _hold_encoders(members, model, phase, heads, *gathered, tried)
        gradients, losses = _train_encoders(model, training, heads, phase, *gathered)
    norms = norm_over(gradients, workspace.norm_layer).tolist()
    lengths = torch.linalg.vector_norm(gradients, dim=1).tolist()
    losses, seconds = exact_losses or losses, ((perf_counter() - start) / count, head_seconds)
    return Trained(heads, velocity, gradients, norms, lengths, losses, initial_losses, *seconds)


def outcomes(members: Sequence[Member], trained: Trained) -> list[tuple[Report, ClientState]]:
    """The report and the next state of each client, as `local_update` returns them."""
    count = len(members)
    gradients, heads = trained.gradients.cpu().unbind(), _apart(trained.heads, count)
    velocity = _apart(trained.velocity, count)
    pairs = []
    for index, member in enumerate(members):
        report = Report(
            client=member.client.id,
            task=member.client.task.name,
            gradient=gradients[index],
            loss=trained.losses[index],
            initial_loss=trained.initial_losses[index],
            grad_norm=trained.norms[index],
            num_examples=size(member.data),
            seconds=trained.seconds,
            round=member.instruction.round,
            head_seconds=trained.head_seconds,
            loss_floor=member.client.task.loss_floor,
        )
        if trained.lengths[index] <= LARGEST:  # else the report computes it, and finds out why
            vars(report)["length"] = trained.lengths[index]  # the server needs it, in one thread
        state = ClientState(heads[index], report.initial_loss, {}, velocity[index], report.round)
        pairs.append((report, state))
    return pairs


@torch.no_grad()
def _features(encoder: nn.Module, inputs: Tensor, order: Tensor) -> Tensor:
    """The features of the batches, shape ``(steps, width, batch, ...)``.

    No example is encoded more often than necessary.
    """
    if order.numel() >= len(inputs):
        return encode(encoder, inputs)[order]
    features = encode(encoder, inputs[order.view(-1)])
    return features.view(*order.shape, *features.shape[1:])


def _train_heads(
    heads: dict[str, Tensor],
    phase: Phase,
    features: Tensor,
    targets: Tensor,
    members: Sequence[Member],
    rows: Sequence[int],
) -> dict[str, Tensor]:
    """The SGD steps with step size α, on the stacked heads in place.

    Returns:
        The heads' momentum, stacked likewise.
    """
    training, velocity = members[0].instruction.training, dict[str, Tensor]()
    names = [name.removeprefix(HEAD) for name in phase.trained]
    if training.head_momentum:
        for name, has_gradient in zip(names, phase.program.has_gradient, strict=True):
            if has_gradient:
                zero = torch.zeros_like(members[0].state.head[name])
                velocity[name] = torch.stack(
                    [members[row].state.head_velocity.get(name, zero) for row in rows]
                ).to(features.device)
    phase.program.run(
        [heads[name] for name in names],
        [heads[name.removeprefix(HEAD)] for name in phase.fixed],
        features.unbind(),
        targets.unbind(),
        [training.head_lr] * len(names),  # α
        momentum=training.head_momentum,
        velocity=[velocity.get(name) for name in names] if velocity else (),
    )
    return velocity


def _train_encoders(
    model: nn.Module,
    training: TrainConfig,
    heads: Mapping[str, Tensor],
    phase: Phase,
    inputs: Tensor,
    targets: Tensor,
) -> tuple[Tensor, list[float]]:
    """The SGD steps with step size β.

    Returns:
        The mean gradients g_i, shape ``(width, P)``, and the mean losses of the batches.
    """
    width, starts = inputs.shape[1], phase.of(model)[0]
    sums = [
        torch.zeros(width, *part.shape, dtype=part.dtype, device=part.device) for part in starts
    ]
    losses = phase.program.run(
        [part.expand(width, *part.shape).clone() for part in starts],
        _fixed(phase, model, heads),
        inputs.unbind(),
        targets.unbind(),
        [training.encoder_lr] * len(starts),  # β
        starts=starts,
        sums=sums,
    )
    gradients = torch.cat([total.view(width, -1) for total in sums], dim=1)
    return gradients.div_(training.encoder_steps), losses.double().mean(dim=0).tolist()


def _fixed(phase: Phase, model: nn.Module, heads: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that the encoder's steps only read: those of the heads stacked."""
    stacked = {HEAD + name: value for name, value in heads.items()}
    own = zip(phase.fixed, phase.of(model)[1], strict=True)
    return [stacked.get(name, tensor) for name, tensor in own]


def _hold_heads(
    members: Sequence[Member],
    workspace: Workspace,
    phase: Phase,
    heads: Mapping[str, Tensor],
    features: Tensor,
    targets: Tensor,
    tried: int,
) -> None:
    """Compare a step on one client's head with autograd. Raises WrongProgram."""
    row, step = tried % len(members), tried % len(features)
    head = workspace.head(members[0].client).train()
    load_head(head, {name: value[row] for name, value in heads.items()})
    trained, fixed = (
        [heads[name.removeprefix(HEAD)] for name in names] for names in (phase.trained, phase.fixed)
    )
    batch = features[step, row], targets[step, row]
    model = both(nn.Identity(), head)
    phase.hold_against_autograd(
        model, members[0].client.task, batch, (trained, fixed, features[step], targets[step]), row
    )


def _hold_encoders(
    members: Sequence[Member],
    model: nn.Module,
    phase: Phase,
    heads: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    tried: int,
) -> None:
    """Compare a step on one client's encoder with autograd. Raises WrongProgram."""
    row, step, width = tried % len(members), tried % len(inputs), inputs.shape[1]
    load_head(model.get_submodule("head"), {name: value[row] for name, value in heads.items()})
    trained = [part.expand(width, *part.shape) for part in phase.of(model)[0]]
    given = trained, _fixed(phase, model, heads), inputs[step], targets[step]
    batch = inputs[step, row], targets[step, row]
    phase.hold_against_autograd(model, members[0].client.task, batch, given, row)


def _initial_losses(
    members: Sequence[Member], workspace: Workspace, heads: Mapping[str, Tensor]
) -> list[float]:
    """F(0) of each client: known from its first round, or as `client.initial_loss_of` gives it."""
    known = [member.state.initial_loss for member in members]
    if None not in known:
        return [loss for loss in known if loss is not None]
    if members[0].instruction.training.initial_loss == "measured":
        starting = _mean_losses(members, workspace, heads)
    else:
        head = workspace.head(members[0].client)
        starting = [
            guess_loss(member.client, workspace.encoder, head, member.instruction.training)
            for member in members
        ]
    return [new if loss is None else loss for new, loss in zip(starting, known, strict=True)]


@torch.no_grad()
def _mean_losses(
    members: Sequence[Member], workspace: Workspace, heads: Mapping[str, Tensor]
) -> list[float]:
    """The mean training losses as in `client.mean_loss`, all batches of all clients at once."""
    training, task = members[0].instruction.training, members[0].client.task
    head, encoder = workspace.head(members[0].client).train(), workspace.encoder.train()
    orders = [loss_batches(member.client, training) for member in members]
    examples = [
        take(member.data, order.reshape(-1)) for member, order in zip(members, orders, strict=True)
    ]
    features = encode(encoder, torch.cat([inputs for inputs, _ in examples]).to(workspace.device))
    targets = torch.cat([expected for _, expected in examples]).to(workspace.device)
    batch, counts = orders[0].shape[1], [len(order) for order in orders]

    def loss(parameters: dict[str, Tensor], features: Tensor, targets: Tensor) -> Tensor:
        return task.loss(functional_call(head, parameters, (features,)), targets).reshape(())

    of_clients = vmap(vmap(loss, in_dims=(None, 0, 0)))
    losses: list[float] = []
    done = 0
    for count, alike in groupby(range(len(members)), key=counts.__getitem__):
        rows = list(alike)
        end = done + count * len(rows)
        parts = (
            part.view(-1, batch, *part.shape[1:])[done:end].unflatten(0, (len(rows), count))
            for part in (features, targets)
        )
        heads_of = {name: value[rows[0] : rows[-1] + 1] for name, value in heads.items()}
        losses += of_clients(heads_of, *parts).double().mean(dim=1).tolist()
        done = end
    return losses


def _apart(stacked: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The tensors of the first clients of a stack, as separate copies."""
    parts = {
        name: [part.clone() for part in value[:count].cpu().unbind()]
        for name, value in stacked.items()
    }
    return [{name: values[index] for name, values in parts.items()} for index in range(count)]
