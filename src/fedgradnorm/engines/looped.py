"""One client at a time: its steps as programs, its examples encoded once for all head steps."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedgradnorm.data import size, take, tensors
from fedgradnorm.engines.phases import HEAD, Batch, Phase, WrongProgram, both
from fedgradnorm.engines.workspace import same, views
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import concatenated, flatten, trainable
from fedgradnorm.training.round import LocalRound
from fedgradnorm.training.steps import (
    GATHERED_BYTES,
    HEAD_BATCHES,
    PlainSteps,
    batches_of,
    encoder_order,
    order_of,
)

ENCODED_AT_ONCE, CONVOLVED_AT_ONCE = 1024, 128
"""Examples in one pass through the encoder: enough for full speed. Convolutions, whose outputs are
large, get few enough for the caches."""


class Programs(NamedTuple):
    """The programs that a kind of clients has: of steps on the head, on the encoder, on both."""

    head: Phase | None
    encoder: Phase | None
    both: Phase | None


WITHOUT_PROGRAMS = Programs(None, None, None)


@dataclass(frozen=True)
class ProgramSteps:
    """Steps by programs. What these do not have, such as a proximal term, is taken in plain torch.

    A round's gradient is the mean of the steps' gradients, or (start - end) / (τ_ω β) of the
    encoder. The second saves a quarter of the memory traffic, and differs by the rounding of the
    parameters alone. It is used where the gradient only enters the server's step, and that step is
    plain and not longer than the clients'. The norm layer's gradient is always the mean, since the
    weights see its length alone.

    Attributes:
        programs: of the client's phases.
        plain: the steps without programs.
        tried: chooses the step of each phase that is compared with autograd; None: no step is.
    """

    programs: Programs
    plain: PlainSteps
    tried: int | None = None

    def on_head(self, local: LocalRound) -> None:
        """As `head_steps`."""
        phase = self.programs.head
        if phase is None:
            self.plain.on_head(local)
            return
        client, sent = local.client, local.instruction
        batches: Iterable[Batch] = self.plain.encoded(client, local.encoder, sent)
        model = both(nn.Identity(), local.head)
        if self.tried is not None:
            batches = list(batches)
            batch = batches[self.tried % len(batches)]
            phase.hold_against_autograd(model, client.task, batch)
        _run(phase, model, local, batches, sent.training.head_lr)  # α

    def on_encoder(self, local: LocalRound, *, with_head: bool, mu: float) -> tuple[Tensor, float]:
        """As `encoder_steps`."""
        phase = self.programs.both if with_head else self.programs.encoder
        if phase is None or mu:
            return self.plain.on_encoder(local, with_head=with_head, mu=mu)
        client, training, order = local.client, local.instruction.training, encoder_order(local)
        start, model = flatten(local.encoder), both(local.encoder, local.head)
        if self.tried is not None:
            batch = take(client.train_data, order[self.tried % len(order)])
            phase.hold_against_autograd(model, client.task, batch)
        starts = list(views(local.encoder, start).values())
        sums = [torch.zeros_like(parameter) for _, parameter in trainable(local.encoder)]
        rates, batches = (training.head_lr, training.encoder_lr), batches_of(client, order)  # α, β
        loss = _run(phase, model, local, batches, *rates, starts, sums)
        return concatenated(sums).div_(len(order)), loss


@torch.no_grad()
def hold_features(encoder: nn.Module, inputs: Tensor, features: Tensor) -> None:
    """Compare a batch's features with those that its examples have among others.

    Raises:
        WrongProgram: they differ.
    """
    if not same(encoder(inputs), features):
        raise WrongProgram("an example has other features among other examples")


def _run(
    phase: Phase,
    model: nn.Module,
    local: LocalRound,
    batches: Iterable[Batch],
    head_rate: float,
    encoder_rate: float = 0.0,
    starts: Sequence[Tensor] = (),
    sums: Sequence[Tensor | None] = (),
) -> float:
    """Run a program on a model, some batches at a time, and return their mean loss.

    Starts and sums are the encoder's.
    """
    (trained, fixed), momentum = phase.of(model), local.instruction.training.head_momentum
    others, velocity = len(trained) - len(sums), dict[str, Tensor]()
    if momentum:  # copies of that of the head's parameters
        moving = zip(phase.trained, trained, phase.program.has_gradient, strict=True)
        velocity = {
            name: local.velocity.get(name.removeprefix(HEAD), torch.zeros_like(tensor)).clone()
            for name, tensor, has_gradient in islice(moving, len(sums), None)
            if has_gradient
        }
    losses = []
    for piece in _pieces(batches):
        inputs, targets = zip(*piece, strict=True)
        loss = phase.program.run(
            trained,
            fixed,
            inputs,
            targets,
            [*[encoder_rate] * len(sums), *[head_rate] * others],
            momentum=momentum,
            velocity=[velocity.get(name) for name in phase.trained] if velocity else (),
            starts=[*starts, *trained[len(sums) :]] if sums else (),
            sums=[*sums, *[None] * others] if sums else (),
        )
        losses.append(loss)
    local.velocity.update({name.removeprefix(HEAD): v for name, v in velocity.items()})
    return float(torch.cat(losses).double().mean()) if losses else math.nan


def _pieces(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Neighbouring batches together, up to `GATHERED_BYTES`."""
    piece: list[Batch] = []
    for batch in batches:
        if piece and sum(part.nbytes for part, _ in piece) + batch[0].nbytes > GATHERED_BYTES:
            yield piece
            piece = []
        piece.append(batch)
    if piece:
        yield piece


def encoded_once(
    client: Client, encoder: nn.Module, instruction: Instruction, tried: int | None = None
) -> Iterator[Batch]:
    """The batches of the head's steps as features, each example encoded once.

    For encoders that treat every example by itself.

    Args:
        client: whose examples.
        encoder: the encoder as received.
        instruction: what the server sent.
        tried: chooses a batch that is also encoded by itself; None: none is.

    Raises:
        WrongProgram: that batch has other features by itself.
    """
    data = client.train_data
    order = order_of(client, instruction, HEAD_BATCHES, instruction.training.head_steps)
    once = order.size <= size(data)  # else every example is drawn, and some are drawn again
    inputs, targets = take(data, order.reshape(-1)) if once else tensors(data)
    inputs = inputs if once else inputs.clone()  # the encoder may work in place
    convolves = any(parameter.ndim > 2 for parameter in encoder.parameters())
    with torch.no_grad():
        at_once = CONVOLVED_AT_ONCE if convolves else ENCODED_AT_ONCE
        parts = [encoder(part) for part in inputs.split(at_once)]
    features = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not once:
        features, targets = take((features, targets), order.reshape(-1))
    batch = order.shape[1]
    if tried is not None:
        index = tried % len(order)
        among_others = features[index * batch :][:batch]
        hold_features(encoder, take(data, order[index])[0], among_others)
    yield from zip(features.split(batch), targets.split(batch), strict=True)
