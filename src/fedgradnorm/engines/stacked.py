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
from fedgradnorm.data import batch_order, size, take
from fedgradnorm.engines.looped import hold_features
from fedgradnorm.engines.phases import ENCODER, HEAD, Batch, Phase, both
from fedgradnorm.engines.programs import Tensors
from fedgradnorm.engines.workspace import Workspace, encode
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import load_flat, norm_over
from fedgradnorm.training.steps import ENCODER_BATCHES, HEAD_BATCHES, order_numbers


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
    task, model = client.task, both(encoder, head)
    on_head = Phase(both(nn.Identity(), head), task, (HEAD,), (features, batch[1]), width)
    return Stack(width, on_head, Phase(model, task, (ENCODER,), batch, width, shared=(ENCODER,)))


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
    clients = _Round(members, workspace, stack, tried)
    initial_losses = clients.initial_losses()
    inputs, targets = (
        torch.cat([member.data[part] for member in members]).to(device) for part in (0, 1)
    )
    of_heads, of_encoders = (places.to(device) for places in order)
    with record_function("head steps"):
        features = _features(workspace.encoder, inputs, of_heads)
        if tried is not None:
            row, step = tried % count, tried % len(features)
            hold_features(workspace.encoder, inputs[of_heads[step, row]], features[step, row])
        velocity = clients.train_heads(features, targets[of_heads])
    exact_losses = clients.mean_losses() if clients.training.loss_estimate == "exact" else None
    head_seconds = (perf_counter() - start) / count
    with record_function("encoder steps"):
        gradients, losses = clients.train_encoders(inputs[of_encoders], targets[of_encoders])
    norms = norm_over(gradients, workspace.norm_layer).tolist()
    lengths = torch.linalg.vector_norm(gradients, dim=1).tolist()
    losses, seconds = exact_losses or losses, ((perf_counter() - start) / count, head_seconds)
    heads = clients.heads
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
            known_length=trained.lengths[index],
        )
        state = ClientState(heads[index], report.initial_loss, {}, velocity[index], report.round)
        pairs.append((report, state))
    return pairs


class _Round:
    """A round of a stack's clients, whose heads are stacked."""

    def __init__(
        self, members: Sequence[Member], workspace: Workspace, stack: Stack, tried: int | None
    ) -> None:
        self.members, self.stack, self.tried = members, stack, tried
        self.rows, self.device = _rows(members, stack.width), workspace.device
        self.client, sent = members[0].client, members[0].instruction
        self.training = sent.training
        load_flat(workspace.encoder, sent.encoder)
        self.encoder, self.head = workspace.encoder.train(), workspace.head(self.client).train()
        names = members[0].state.head
        self.heads = {name: self._stacked([m.state.head[name] for m in members]) for name in names}

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensors[row] for row in self.rows]).to(self.device)

    def train_heads(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The SGD steps with step size α, on the heads in place. Returns their momentum."""
        phase, momentum, velocity = self.stack.head, self.training.head_momentum, {}
        names = [name.removeprefix(HEAD) for name in phase.trained]
        trained = [self.heads[name] for name in names]
        fixed = [self.heads[name.removeprefix(HEAD)] for name in phase.fixed]
        self._hold(phase, both(nn.Identity(), self.head), (trained, fixed), features, targets)
        if momentum:
            for name, has_gradient in zip(names, phase.program.has_gradient, strict=True):
                if has_gradient:
                    zero = torch.zeros_like(self.members[0].state.head[name])
                    known = [member.state.head_velocity.get(name, zero) for member in self.members]
                    velocity[name] = self._stacked(known)
        phase.program.run(
            trained,
            fixed,
            features.unbind(),
            targets.unbind(),
            [self.training.head_lr] * len(names),  # α
            momentum=momentum,
            velocity=[velocity.get(name) for name in names] if velocity else (),
        )
        return velocity

    def train_encoders(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[float]]:
        """The SGD steps with step size β.

        Returns the mean gradients g_i, shape ``(width, P)``, and the batches' mean losses.
        """
        phase, model, width = self.stack.encoder, both(self.encoder, self.head), len(self.rows)
        starts, own = phase.of(model)
        trained = [part.expand(width, *part.shape) for part in starts]
        stacked = {HEAD + name: value for name, value in self.heads.items()}
        pairs = zip(phase.fixed, own, strict=True)
        fixed = [stacked.get(name, tensor) for name, tensor in pairs]
        self._hold(phase, model, (trained, fixed), inputs, targets)
        sums = [part.new_zeros(part.shape) for part in trained]
        losses = phase.program.run(
            [part.clone() for part in trained],
            fixed,
            inputs.unbind(),
            targets.unbind(),
            [self.training.encoder_lr] * len(starts),  # β
            starts=starts,
            sums=sums,
        )
        gradients = torch.cat([total.view(width, -1) for total in sums], dim=1)
        return gradients.div_(self.training.encoder_steps), losses.double().mean(dim=0).tolist()

    def _hold(
        self,
        phase: Phase,
        model: nn.Module,
        tensors: tuple[Tensors, Tensors],
        inputs: Tensor,
        targets: Tensor,
    ) -> None:
        """Compare a step of the client that is tried with autograd. Raises WrongProgram."""
        if self.tried is not None:
            row, step = self.tried % len(self.members), self.tried % len(inputs)
            load_head(self.head, {name: value[row] for name, value in self.heads.items()})
            batch, given = (inputs[step, row], targets[step, row]), (inputs[step], targets[step])
            phase.hold_against_autograd(model, self.client.task, batch, (*tensors, *given), row)

    def initial_losses(self) -> list[float]:
        """F(0) of each client: known from its first round, or as `local_update` computes it."""
        known = [member.state.initial_loss for member in self.members]
        if None not in known:
            return [loss for loss in known if loss is not None]
        if self.training.initial_loss == "measured":
            starting = self.mean_losses()
        else:
            starting = [
                guess_loss(member.client, self.encoder, self.head, self.training)
                for member in self.members
            ]
        return [new if loss is None else loss for new, loss in zip(starting, known, strict=True)]

    @torch.no_grad()
    def mean_losses(self) -> list[float]:
        """The mean training losses as in `client.mean_loss`, all batches of all clients at once."""
        orders = [loss_batches(member.client, self.training) for member in self.members]
        pairs = zip(self.members, orders, strict=True)
        examples = [take(member.data, order.reshape(-1)) for member, order in pairs]
        inputs, targets = (
            torch.cat(parts).to(self.device) for parts in zip(*examples, strict=True)
        )
        features = encode(self.encoder, inputs)
        batch, counts = orders[0].shape[1], [len(order) for order in orders]

        def loss(parameters: dict[str, Tensor], features: Tensor, targets: Tensor) -> Tensor:
            outputs = functional_call(self.head, parameters, (features,))
            return self.client.task.loss(outputs, targets).reshape(())

        of_clients = vmap(vmap(loss, in_dims=(None, 0, 0)))
        losses: list[float] = []
        done = 0
        for count, alike in groupby(range(len(self.members)), key=counts.__getitem__):
            rows = list(alike)
            end = done + count * len(rows)
            parts = (
                part.view(-1, batch, *part.shape[1:])[done:end].unflatten(0, (len(rows), count))
                for part in (features, targets)
            )
            heads = {name: value[rows[0] : rows[-1] + 1] for name, value in self.heads.items()}
            losses += of_clients(heads, *parts).double().mean(dim=1).tolist()
            done = end
        return losses


@torch.no_grad()
def _features(encoder: nn.Module, inputs: Tensor, order: Tensor) -> Tensor:
    """The features of the batches, shape ``(steps, width, batch, ...)``.

    No example is encoded more often than necessary.
    """
    if order.numel() >= len(inputs):
        return encode(encoder, inputs)[order]
    features = encode(encoder, inputs[order.view(-1)])
    return features.view(*order.shape, *features.shape[1:])


def _apart(stacked: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The tensors of the first clients of a stack, as separate copies."""
    parts = {
        name: [part.clone() for part in value[:count].cpu().unbind()]
        for name, value in stacked.items()
    }
    return [{name: values[index] for name, values in parts.items()} for index in range(count)]
