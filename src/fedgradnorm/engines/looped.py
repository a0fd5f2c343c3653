"""One client at a time: the steps of its phases as programs, and its examples encoded once for all of the head's steps."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import size, take, tensors
from fedgradnorm.engines.phases import HEAD, Batch, Phase, WrongProgram, both
from fedgradnorm.engines.workspace import same, views
from fedgradnorm.federation import Client
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import concatenated, flatten, load_flat, trainable
from fedgradnorm.training.steps import (
    GATHERED_BYTES,
    HEAD_BATCHES,
    LocalRound,
    PlainSteps,
    batches_of,
    encoder_order,
    order_of,
)

__all__ = ["WITHOUT_PROGRAMS", "ProgramSteps", "Programs", "encoded_once", "hold_features"]

ENCODED_AT_ONCE, CONVOLVED_AT_ONCE = 1024, 128
"""Examples in one pass for features: enough for full speed; of convolutions, whose outputs are large, few enough for the caches."""

FEWEST_DIGITS = 1e-2
"""A gradient that is read off how far the encoder has gone may have an error of about this share of its length."""

SMALLEST_STEP = 0.02
"""With a smaller τ_ω β it is not tried: the encoder would seldom go far enough."""


class Programs(NamedTuple):
    """What a client's phases are for all clients like it: steps on the head, on the encoder, and on both. None: not at hand."""

    head: Phase | None
    encoder: Phase | None
    both: Phase | None


WITHOUT_PROGRAMS = Programs(None, None, None)


@dataclass(frozen=True)
class ProgramSteps:
    """Steps by programs, and in plain torch what these do not have: a proximal term.

    A round's gradient is the mean of the steps' gradients, or how far the encoder has gone, over τ_ω β. The second saves a quarter of what
    goes through memory, and differs by the rounding of the parameters alone; it is taken where the gradient is for the server's step only,
    which is a plain one, no longer than the clients'. The norm layer's gradient is always the mean: its length is all that the weights see.

    Attributes:
        programs: of the client's phases.
        norm_layer: where the norm layer lies in the flat encoder.
        plain: the steps without programs.
        tried: which step of each phase is held against autograd; None: none.
    """

    programs: Programs
    norm_layer: tuple[slice, ...]
    plain: PlainSteps
    tried: int | None = None

    def on_head(self, local: LocalRound) -> None:
        """As `head_steps`."""
        if self.programs.head is None:
            self.plain.on_head(local)
            return
        batches: Iterable[Batch] = self.plain.encoded(
            local.client, local.encoder, local.instruction
        )
        model = both(nn.Identity(), local.head)
        if self.tried is not None:
            batches = list(batches)
            self.programs.head.hold_against_autograd(
                model, local.client.task, batches[self.tried % len(batches)]
            )
        _run(self.programs.head, model, local, batches, local.instruction.training.head_lr)  # α

    def on_encoder(self, local: LocalRound, *, with_head: bool, mu: float) -> tuple[Tensor, float]:
        """As `encoder_steps`."""
        phase = self.programs.both if with_head else self.programs.encoder
        if phase is None or mu:
            return self.plain.on_encoder(local, with_head=with_head, mu=mu)
        training, order, start = (
            local.instruction.training,
            encoder_order(local),
            flatten(local.encoder),
        )
        model = both(local.encoder, local.head)
        if self.tried is not None:
            phase.hold_against_autograd(
                model,
                local.client.task,
                take(local.client.train_data, order[self.tried % len(order)]),
            )
        for_its_step = (
            local.instruction.only_summed
            and training.server_optimizer == "sgd"
            and training.server_lr <= 1
        )
        if for_its_step and not with_head and len(order) * training.encoder_lr >= SMALLEST_STEP:
            gradient, loss = self._read_off(local, phase, order, start)
            if gradient is not None:
                return gradient, loss
            load_flat(local.encoder, start)
        starts = list(views(local.encoder, start).values())
        sums = [torch.zeros_like(parameter) for _, parameter in trainable(local.encoder)]
        loss = _run(
            phase,
            model,
            local,
            batches_of(local.client, order),
            training.head_lr,
            training.encoder_lr,
            starts,
            sums,
        )  # α, β
        return concatenated(sums).div_(len(order)), loss

    def _read_off(
        self, local: LocalRound, phase: Phase, order: np.ndarray, start: Tensor
    ) -> tuple[Tensor | None, float]:
        """The round's gradient as the way that the encoder has gone from its start; None where rounding is too much of it."""
        steps, rate, starts = (
            len(order),
            local.instruction.training.encoder_lr,
            views(local.encoder, start),
        )  # β
        parameters = [parameter.detach() for _, parameter in trainable(local.encoder)]
        ends = np.cumsum([part.numel() for part in parameters]).tolist()
        places = [
            slice(end - part.numel(), end) for end, part in zip(ends, parameters, strict=True)
        ]
        sums = [
            torch.zeros_like(one) if place in self.norm_layer else None
            for one, place in zip(parameters, places, strict=True)
        ]
        model = both(local.encoder, local.head)
        loss = _run(
            phase,
            model,
            local,
            batches_of(local.client, order),
            rate,
            rate,
            list(starts.values()),
            sums,
        )
        gradient = torch.empty_like(start)
        for parameter, before, part in zip(
            parameters, starts.values(), views(local.encoder, gradient).values(), strict=True
        ):
            torch.sub(before, parameter, out=part)
        gradient.mul_(1 / (steps * rate))
        for place, total in zip(places, sums, strict=True):
            if total is not None:
                torch.mul(total.reshape(-1), 1 / steps, out=gradient[place])
        length, size = (
            torch.stack([one[place].norm() for place in self.norm_layer]).norm()
            for one in (gradient, start)
        )
        rounding = torch.finfo(start.dtype).eps * size / (math.sqrt(steps) * rate)
        return gradient if rounding <= FEWEST_DIGITS * length else None, loss


@torch.no_grad()
def hold_features(encoder: nn.Module, inputs: Tensor, features: Tensor) -> None:
    """Raise WrongProgram where a batch that is encoded by itself has other features than these, which it has among other examples."""
    if not same(encoder(inputs), features):
        raise WrongProgram("an example has other features among other examples")


def _run(
    phase: Phase,
    model: nn.Module,
    local: LocalRound,
    batches: Iterable[tuple[Tensor, Tensor]],
    head_rate: float,
    encoder_rate: float = 0.0,
    starts: Sequence[Tensor] = (),
    sums: Sequence[Tensor | None] = (),
) -> float:
    """Run a program on a model, a piece of the batches at a time, and give their mean loss. Starts and sums are the encoder's."""
    (trained, fixed), momentum = phase.of(model), local.instruction.training.head_momentum
    others = len(trained) - len(sums)
    velocity: list[Tensor | None] = []
    names = [name.removeprefix(HEAD) for name in phase.trained]
    if momentum and others:
        for place, (name, tensor) in enumerate(zip(names, trained, strict=True)):
            moves = place >= len(sums) and phase.program.has_gradient[place]
            velocity.append(
                (
                    local.velocity[name].clone()
                    if name in local.velocity
                    else torch.zeros_like(tensor)
                )
                if moves
                else None
            )
    losses = [
        phase.program.run(
            trained,
            fixed,
            *piece,
            [*[encoder_rate] * len(sums), *[head_rate] * others],
            momentum=momentum,
            velocity=velocity,
            starts=[*starts, *trained[len(sums) :]] if sums else (),
            sums=[*sums, *[None] * others] if sums else (),
        )
        for piece in _pieces(batches)
    ]
    if velocity:
        local.velocity.update(
            {name: one for name, one in zip(names, velocity, strict=True) if one is not None}
        )
    return float(torch.cat(losses).double().mean()) if losses else math.nan


def _pieces(
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Neighbouring batches together, as inputs and targets, as long as they are no more bytes than may be gathered at once."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for one, other in batches:
        if inputs and sum(part.nbytes for part in inputs) + one.nbytes > GATHERED_BYTES:
            yield inputs, targets
            inputs, targets = [], []
        inputs.append(one)
        targets.append(other)
    if inputs:
        yield inputs, targets


def encoded_once(
    client: Client, encoder: nn.Module, instruction: Instruction, tried: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the head's steps as features, each example encoded once; for encoders that treat each by itself.

    Args:
        client: whose examples.
        encoder: the encoder as received.
        instruction: what the server sent.
        tried: chooses a batch that is also encoded by itself; None: none is.

    Raises:
        WrongProgram: that batch has other features by itself.
    """
    order = order_of(client, instruction, HEAD_BATCHES, instruction.training.head_steps)
    some = order.size <= size(
        client.train_data
    )  # more: then every example is drawn, and some are drawn again
    inputs, targets = (
        take(client.train_data, order.reshape(-1)) if some else tensors(client.train_data)
    )
    inputs = inputs if some else inputs.clone()  # the encoder may work in place
    at_once = (
        CONVOLVED_AT_ONCE
        if any(parameter.ndim > 2 for parameter in encoder.parameters())
        else ENCODED_AT_ONCE
    )
    with torch.no_grad():
        parts = [encoder(part) for part in inputs.split(at_once)]
    features = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not some:
        features, targets = take((features, targets), order.reshape(-1))
    if tried is not None:
        index = tried % len(order)
        hold_features(
            encoder,
            take(client.train_data, order[index])[0],
            features[index * order.shape[1] :][: order.shape[1]],
        )
    yield from zip(features.split(order.shape[1]), targets.split(order.shape[1]), strict=True)
