"""The server's half of the algorithm, as one straight line: instruct, execute, screen, weight, aggregate, advance."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from statistics import median_low

import torch
from torch import Tensor, nn

from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.aggregation.mean import Mean
from fedgradnorm.config import TrainConfig
from fedgradnorm.engines.base import Engine
from fedgradnorm.errors import StoppedError
from fedgradnorm.federation import Members
from fedgradnorm.messages import LARGEST, Instruction, Report
from fedgradnorm.parameters import buffers_of, flatten
from fedgradnorm.randomness import generator
from fedgradnorm.threads import kernel_threads
from fedgradnorm.training import method_of
from fedgradnorm.weighting.base import Weighting, WeightingState, Weights

__all__ = ["RoundRecord", "ServerState", "advance", "conclude", "initial_state", "instruct", "run_round", "screen"]

LAST_NORMS, FEWEST_NORMS = 10, 3
"""How many lengths of a client's gradients are remembered, and how many it takes to know what is usual for it."""


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds.

    Attributes:
        round: rounds done.
        encoder: the trainable encoder parameters ω, flat, shape ``(P,)``.
        buffers: the averaged encoder buffers, by name; empty when they are local.
        weighting: the state of the weighting.
        optimizer: the state of the server's optimiser, by name.
        norms: the lengths of each client's last sound gradients, by id, the newest last.
    """

    round: int
    encoder: Tensor
    buffers: Mapping[str, Tensor]
    weighting: WeightingState
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round: for files and plots, never for the next round."""

    instructions: Sequence[Instruction]
    reports: Sequence[Report]
    dropped: Mapping[str, str]
    weights: Weights | None
    retries: int = 0


def initial_state(federation: Members, weighting: Weighting, seed: int) -> ServerState:
    """The state before the first round: the encoder as initialised under the seed."""
    encoder = federation.make_encoder(seed)
    buffers = buffers_of(encoder) if federation.buffers == "averaged" else {}
    return ServerState(0, flatten(encoder), buffers, weighting.init(sorted(federation.client_ids)))


def run_round(
    state: ServerState, federation: Members, engine: Engine, weighting: Weighting, aggregate: Aggregation, training: TrainConfig
) -> tuple[ServerState, RoundRecord]:
    """One round. With fewer sound reports than ``min_clients`` it is undone at server and clients, and repeated.

    Where the method keeps all clients in lockstep, all this happens for every encoder step of the round.

    Raises:
        StoppedError: it was repeated ``max_retries`` times. All states are as they were before the round.
    """
    if not method_of(training).lockstep:
        return _run_step(state, federation, engine, weighting, aggregate, training, None)
    before = engine.client_states
    try:
        after, record = _run_step(state, federation, engine, weighting, aggregate, training, 0)
        for step in range(1, training.encoder_steps):
            after, another = _run_step(replace(after, round=state.round), federation, engine, weighting, aggregate, training, step)
            record = joined(record, step, another)
    except StoppedError:
        engine.restore(before)
        raise
    return after, record


def _run_step(
    state: ServerState,
    federation: Members,
    engine: Engine,
    weighting: Weighting,
    aggregate: Aggregation,
    training: TrainConfig,
    step: int | None,
) -> tuple[ServerState, RoundRecord]:
    """All of a round, or one step of it where it is in lockstep."""
    before = engine.client_states
    only_summed = isinstance(aggregate, Mean) and not getattr(weighting, "reads_gradients", True)
    for attempt in range(training.max_retries + 1):
        instructions = instruct(state, federation, training, attempt, step, only_summed=only_summed)
        replies = sorted(engine.execute(instructions), key=attrgetter("client"))  # so that sums do not depend on the engine
        reports, dropped = screen(replies, instructions, state.norms, training.max_update_ratio)
        failures: Mapping[str, str] = getattr(engine, "failures", {})
        dropped |= {client: f"no report: {why}" for client, why in failures.items() if dropped.get(client) == "no report"}
        if len(reports) >= training.min_clients:
            heard = {reply.client for reply in replies if reply.round == state.round + 1}
            undone = {client: before[client] for client in dropped if client in heard}  # one bad round must not spoil all later ones
            engine.restore({**engine.client_states, **undone})
            break
        engine.restore(before)
    else:
        heard_of = f"{len(reports)} sound reports, expected at least {training.min_clients}"
        raise StoppedError(f"round {state.round + 1}: {heard_of}: {_by_reason(dropped)}")
    return conclude(state, instructions, reports, dropped, weighting, aggregate, training)


def _by_reason(dropped: Mapping[str, str]) -> str:
    """Every reason once, after the first of its clients: a thousand of them often share one."""
    clients: dict[str, list[str]] = {}
    for client, reason in dropped.items():
        clients.setdefault(reason, []).append(client)
    named = {reason: ", ".join(them[:3]) + (f" and {len(them) - 3} more" if len(them) > 3 else "") for reason, them in clients.items()}
    return "; ".join(f"{them}: {reason}" for reason, them in named.items())


def conclude(
    state: ServerState,
    instructions: Sequence[Instruction],
    reports: Sequence[Report],
    dropped: dict[str, str],
    weighting: Weighting,
    aggregate: Aggregation,
    training: TrainConfig,
) -> tuple[ServerState, RoundRecord]:
    """The end of a round, from its sound reports on: weight, aggregate, advance."""
    attempt = max((instruction.attempt for instruction in instructions), default=0)
    if not reports:
        return replace(state, round=state.round + 1), RoundRecord(instructions, reports, dropped, None, attempt)
    weights, weighting_state = weighting.update(state.weighting, reports)
    with kernel_threads(1):
        direction = aggregate(reports, weights)
    after = advance(state, reports, direction, weighting_state, training)
    if not _is_finite(after.encoder):
        dropped |= {report.client: "the step with it is not finite" for report in reports}
        return replace(state, round=state.round + 1), RoundRecord(instructions, [], dropped, None, attempt)
    return after, RoundRecord(instructions, reports, dropped, weights, attempt)


@kernel_threads(1)
def _is_finite(vector: Tensor) -> bool:
    """Whether all numbers are: a NaN is the least and the largest of them."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(vector))).all())


def joined(record: RoundRecord, steps: int, another: RoundRecord) -> RoundRecord:
    """The record of so many steps of a round, and that of another one, as one.

    Gradients, losses, norms and targets are means over the steps, weights those of the last one, seconds and retries sums. A client that
    was dropped at any step counts as dropped.
    """
    share = 1 / (steps + 1)
    earlier, dropped = {report.client: report for report in record.reports}, {**record.dropped, **another.dropped}
    reports = [
        replace(
            report,
            gradient=torch.lerp(before.gradient, report.gradient, share),
            loss=before.loss + (report.loss - before.loss) * share,
            grad_norm=before.grad_norm + (report.grad_norm - before.grad_norm) * share,
            seconds=before.seconds + report.seconds,
            head_seconds=before.head_seconds + report.head_seconds,
        )
        for report in another.reports
        if report.client not in dropped and (before := earlier.get(report.client)) is not None
    ]
    weights = another.weights
    if weights is not None and record.weights is not None:
        old = record.weights.targets
        targets = {client: old.get(client, new) + (new - old.get(client, new)) * share for client, new in weights.targets.items()}
        weights = replace(weights, targets=targets)
    return RoundRecord(record.instructions, reports, dropped, weights or record.weights, record.retries + another.retries)


def instruct(
    state: ServerState,
    federation: Members,
    training: TrainConfig,
    attempt: int = 0,
    step: int | None = None,
    *,
    only_summed: bool = False,
) -> list[Instruction]:
    """One instruction for each client that takes part in the next round, or in this step of it, sorted by client id."""
    round, ids = state.round + 1, participants(federation, training, state.round + 1)
    return [Instruction(round, client, state.encoder, state.buffers, training, attempt, step, only_summed) for client in ids]


def participants(federation: Members, training: TrainConfig, round: int) -> list[str]:
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


@kernel_threads(1)  # waiting for busy cores can take far longer than the work
def screen(
    replies: Sequence[Report],
    instructions: Sequence[Instruction],
    norms: Mapping[str, Sequence[float]],
    max_update_ratio: float | None = None,
) -> tuple[list[Report], dict[str, str]]:
    """The sound reports of this round, and for every instructed client without one the reason.

    Args:
        replies: what came back. Reports of other rounds, and of clients that were not asked, count for nothing.
        instructions: what was sent.
        norms: the lengths of the last sound gradients, by client.
        max_update_ratio: a gradient is too long beyond this many times the median of its client's last ones; of all last ones and the
            others' of this round, as long as the client has fewer than three. None: none is too long.
    """
    reports, dropped = {}, {}
    by_sender: dict[tuple[str, int], list[Report]] = {}
    for reply in replies:
        by_sender.setdefault((reply.client, reply.round), []).append(reply)
    for instruction in instructions:
        own = by_sender.get((instruction.client, instruction.round), [])
        reason = "no report" if not own else f"{len(own)} reports" if len(own) > 1 else _misfit(own[0], instruction)
        if reason is None:
            reports[instruction.client] = own[0]
        else:
            dropped[instruction.client] = reason
    lengths = {client: report.length for client, report in reports.items()}
    for client, length in list(lengths.items()):
        reason = _wrong_number(reports[client], length)
        if reason is not None:
            dropped[client] = reason
            del reports[client], lengths[client]
    if max_update_ratio is not None:
        pooled = sorted([*chain(*norms.values()), *lengths.values()])
        for client, length in lengths.items():
            known = norms.get(client, ())
            usual = median_low(known) if len(known) >= FEWEST_NORMS else _median_without(pooled, length)
            if length > max_update_ratio * usual:
                times = length / usual if usual else math.inf
                dropped[client] = f"gradient: {times:.3g} times as long as usual, expected at most {max_update_ratio:g} times"
                del reports[client]
    return list(reports.values()), dropped


def _median_without(ascending: Sequence[float], number: float) -> float:
    """The lower median of numbers without one of them; that one itself where there is no other."""
    middle = (len(ascending) - 2) // 2
    return number if middle < 0 else ascending[middle if middle < bisect_left(ascending, number) else middle + 1]


def _misfit(report: Report, instruction: Instruction) -> str | None:
    """What in a report is not such as was sent, or None."""
    gradient, encoder = report.gradient, instruction.encoder
    if gradient.shape != encoder.shape or gradient.dtype != encoder.dtype:
        return f"gradient: expected {encoder.dtype} of shape {tuple(encoder.shape)}, found {gradient.dtype} of {tuple(gradient.shape)}"
    if report.buffers.keys() != instruction.buffers.keys():
        return "buffers: not those that were sent"
    for name, buffer in report.buffers.items():
        sent = instruction.buffers[name]
        if buffer.shape != sent.shape or buffer.dtype != sent.dtype or not torch.isfinite(buffer).all():
            return f"buffer {name}: wrong shape or type, or not finite"
    return None


def _wrong_number(report: Report, length: float) -> str | None:
    """Which number of a report is out of range, or None."""
    if not math.isfinite(length):
        return "gradient: not finite"
    if not 0 <= report.loss <= LARGEST:
        return f"loss: expected a number of at least 0, found {report.loss}"
    for name, number in (("initial_loss", report.initial_loss), ("grad_norm", report.grad_norm)):
        if not 0 < number <= LARGEST:
            return f"{name}: expected a number above 0, found {number}"
    if report.inverse_training_rate > LARGEST:
        return f"inverse_training_rate: out of range, {report.inverse_training_rate}"
    return None


@kernel_threads(1)
def advance(
    state: ServerState, reports: Sequence[Report], direction: Tensor, weighting: WeightingState, training: TrainConfig
) -> ServerState:
    """The next state: a step of the server's optimiser along the direction, and the mean of the clients' buffers.

    With plain SGD, ω ← ω - η · direction, where η = τ_ω · β · server_lr; τ_ω is 1 in lockstep. Where every client has an encoder of its
    own, ω stays.
    """
    encoder, optimizer = (state.encoder, state.optimizer) if method_of(training).own_encoder else _stepped(state, direction, training)
    buffers = {name: _mean([report.buffers[name] for report in reports]) for name in state.buffers}
    norms = dict(state.norms)
    for report in reports:
        norms[report.client] = (*norms.get(report.client, ()), report.length)[-LAST_NORMS:]
    return ServerState(state.round + 1, encoder, buffers, weighting, optimizer, norms)


def _stepped(state: ServerState, direction: Tensor, training: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The encoder and the optimiser's state after its step."""
    steps = 1 if method_of(training).lockstep else training.encoder_steps
    step_size = steps * training.encoder_lr * training.server_lr  # η
    parameter = nn.Parameter(state.encoder.clone())
    parameter.grad = direction
    optimizer: torch.optim.Optimizer
    if training.server_optimizer == "adam":
        optimizer = torch.optim.Adam([parameter], lr=step_size)
    else:
        optimizer = torch.optim.SGD([parameter], lr=step_size, momentum=training.server_momentum)
    optimizer.state[parameter].update({name: value.clone() for name, value in state.optimizer.items()})
    optimizer.step()
    return parameter.detach(), {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}


def _mean(buffers: Sequence[Tensor]) -> Tensor:
    """The mean of one buffer over clients; of whole numbers, such as BatchNorm's count of batches, the mean rounded."""
    mean = torch.stack([buffer.double() for buffer in buffers]).mean(dim=0)
    return (mean if buffers[0].is_floating_point() else mean.round()).to(buffers[0].dtype)
