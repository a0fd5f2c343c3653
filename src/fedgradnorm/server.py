"""The server's half of the algorithm, as one straight line: instruct, execute, screen, weight, aggregate, advance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn

from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.base import Engine
from fedgradnorm.federation import Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of, flatten
from fedgradnorm.randomness import generator
from fedgradnorm.weighting.base import Weighting, WeightingState, Weights

__all__ = ["RoundRecord", "ServerState", "advance", "initial_state", "instruct", "run_round", "screen"]

LARGEST = 1e100
"""No sound norm, loss or training rate is above this; beyond it, products of them would overflow."""


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds.

    Attributes:
        round: rounds done.
        encoder: the trainable encoder parameters ω, flat, shape ``(P,)``.
        buffers: the averaged encoder buffers, by name; empty when they are local.
        weighting: the state of the weighting.
        optimizer: the state of the server's optimiser, by name.
    """

    round: int
    encoder: Tensor
    buffers: Mapping[str, Tensor]
    weighting: WeightingState
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round: for files and plots, never for the next round."""

    instructions: Sequence[Instruction]
    reports: Sequence[Report]
    dropped: Mapping[str, str]
    weights: Weights | None


Aggregate = Callable[[Sequence[Report], Weights], Tensor]


def initial_state(federation: Federation, weighting: Weighting, seed: int) -> ServerState:
    """The state before the first round: the encoder as initialised under the seed."""
    encoder = federation.make_encoder(seed)
    buffers = buffers_of(encoder) if federation.buffers == "averaged" else {}
    return ServerState(0, flatten(encoder), buffers, weighting.init(sorted(federation.client_ids)))


def run_round(
    state: ServerState, federation: Federation, engine: Engine, weighting: Weighting, aggregate: Aggregate, training: TrainConfig
) -> tuple[ServerState, RoundRecord]:
    """One round. A round without a sound report leaves everything but the round's number as it was."""
    instructions = instruct(state, federation, training)
    replies = sorted(engine.execute(instructions), key=attrgetter("client"))  # so that sums do not depend on the engine
    reports, dropped = screen(replies, instructions)
    if not reports:
        return ServerState(state.round + 1, state.encoder, state.buffers, state.weighting, state.optimizer), RoundRecord(
            instructions, reports, dropped, None
        )
    weights, weighting_state = weighting.update(state.weighting, reports)
    direction = aggregate(reports, weights)
    return advance(state, reports, direction, weighting_state, training), RoundRecord(instructions, reports, dropped, weights)


def instruct(state: ServerState, federation: Federation, training: TrainConfig) -> list[Instruction]:
    """One instruction for each client that takes part in the next round, sorted by client id."""
    round = state.round + 1
    return [Instruction(round, client, state.encoder, state.buffers, training) for client in participants(federation, training, round)]


def participants(federation: Federation, training: TrainConfig, round: int) -> list[str]:
    """Who takes part in a round, sorted: as listed, or a share of all drawn without replacement (at least one)."""
    if training.participants:
        listed = training.participants[min(round, len(training.participants)) - 1]
        return sorted({federation.client(id).id for id in listed})
    ids = sorted(federation.client_ids)
    count = max(1, round_half_up(training.fraction_train * len(ids)))
    if count == len(ids):
        return ids
    return sorted(generator(training.seed, round, "", "participants").choice(ids, size=count, replace=False).tolist())


def round_half_up(number: float) -> int:
    """The nearest whole number, halves upwards."""
    return math.floor(number + 0.5)


def screen(replies: Sequence[Report], instructions: Sequence[Instruction]) -> tuple[list[Report], dict[str, str]]:
    """The sound reports, and for every instructed client without one the reason."""
    by_client = {reply.client: reply for reply in replies}
    reports, dropped = [], {}
    for instruction in instructions:
        reply = by_client.get(instruction.client)
        reason = "no report" if reply is None else _fault(reply, instruction)
        if reply is not None and reason is None:
            reports.append(reply)
        else:
            dropped[instruction.client] = str(reason)
    return reports, dropped


def _fault(report: Report, instruction: Instruction) -> str | None:
    """What is wrong with a report, or None."""
    gradient, encoder = report.gradient, instruction.encoder
    if gradient.shape != encoder.shape or gradient.dtype != encoder.dtype:
        return f"gradient: expected {encoder.dtype} of shape {tuple(encoder.shape)}, found {gradient.dtype} of {tuple(gradient.shape)}"
    if not torch.isfinite(gradient).all():
        return "gradient: not finite"
    if report.buffers.keys() != instruction.buffers.keys():
        return "buffers: not those that were sent"
    for name, buffer in report.buffers.items():
        if buffer.shape != instruction.buffers[name].shape or not torch.isfinite(buffer).all():
            return f"buffer {name}: wrong shape or not finite"
    if not 0 <= report.loss <= LARGEST:
        return f"loss: expected a number of at least 0, found {report.loss}"
    for name, number in (("initial_loss", report.initial_loss), ("grad_norm", report.grad_norm)):
        if not 0 < number <= LARGEST:
            return f"{name}: expected a number above 0, found {number}"
    if report.inverse_training_rate > LARGEST:
        return f"inverse_training_rate: out of range, {report.inverse_training_rate}"
    return None


def advance(
    state: ServerState, reports: Sequence[Report], direction: Tensor, weighting: WeightingState, training: TrainConfig
) -> ServerState:
    """The next state: a step of the server's optimiser along the direction, and the mean of the clients' buffers.

    With plain SGD, ω ← ω - η · direction, where η = τ_ω · β · server_lr.
    """
    step_size = training.encoder_steps * training.encoder_lr * training.server_lr  # η
    parameter = nn.Parameter(state.encoder.clone())
    parameter.grad = direction
    optimizer: torch.optim.Optimizer
    if training.server_optimizer == "adam":
        optimizer = torch.optim.Adam([parameter], lr=step_size)
    else:
        optimizer = torch.optim.SGD([parameter], lr=step_size, momentum=training.server_momentum)
    optimizer.state[parameter].update({name: value.clone() for name, value in state.optimizer.items()})
    optimizer.step()
    memory = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    buffers = {name: _mean([report.buffers[name] for report in reports]) for name in state.buffers}
    return ServerState(state.round + 1, parameter.detach(), buffers, weighting, memory)


def _mean(buffers: Sequence[Tensor]) -> Tensor:
    """The mean of one buffer over clients; of whole numbers, such as BatchNorm's count of batches, the mean rounded."""
    mean = torch.stack([buffer.double() for buffer in buffers]).mean(dim=0)
    return (mean if buffers[0].is_floating_point() else mean.round()).to(buffers[0].dtype)
