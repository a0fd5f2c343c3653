"""The server's half of a round: instruct, execute, screen, weigh, aggregate, advance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.config import TrainConfig
from fedgradnorm.engine import Engine
from fedgradnorm.errors import StoppedError, WeightingError
from fedgradnorm.members import Members
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of, flatten
from fedgradnorm.participants import participants
from fedgradnorm.randomness import seeded
from fedgradnorm.screening import LAST_NORMS, by_reason, screen
from fedgradnorm.threads import kernel_threads
from fedgradnorm.training import method_of
from fedgradnorm.weighing import aggregated, first_state, weigh
from fedgradnorm.weighting.base import Weighting, WeightingState, Weights


@dataclass(frozen=True)
class ServerState:
    """What the server keeps between rounds.

    Attributes:
        round: the number of completed rounds.
        encoder: the trainable encoder parameters ω, flat, shape ``(P,)``.
        buffers: the averaged encoder buffers, by name; empty if they are local.
        weighting: the state of the weighting.
        optimizer: the state of the server's optimiser, by name.
        norms: by client, the lengths of its last sound gradients, the newest last.
    """

    round: int
    encoder: Tensor
    buffers: Mapping[str, Tensor]
    weighting: WeightingState
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round, for files and plots. No later round depends on it.

    Attributes:
        instructions: what was sent, in the last attempt.
        reports: the sound reports.
        dropped: by client, why its report did not count.
        weights: the clients' weights; None if no report counted.
        retries: how often the round was repeated.
    """

    instructions: Sequence[Instruction]
    reports: Sequence[Report]
    dropped: Mapping[str, str]
    weights: Weights | None
    retries: int = 0


def initial_state(federation: Members, weighting: Weighting, seed: int) -> ServerState:
    """The state before the first round, with the encoder as initialised under the seed.

    Raises:
        WeightingError: the weighting raised an error, or gave something else than a state.
    """
    encoder = federation.make_encoder(seed)
    buffers = buffers_of(encoder) if federation.buffers == "averaged" else {}
    first = first_state(weighting, federation.client_ids)
    return ServerState(0, flatten(encoder), buffers, first)


def run_round(
    state: ServerState,
    federation: Members,
    engine: Engine,
    weighting: Weighting,
    aggregate: Aggregation,
    training: TrainConfig,
) -> tuple[ServerState, RoundRecord]:
    """One round.

    With fewer than ``min_clients`` sound reports, it is undone at server and clients, and repeated.
    If the method keeps all clients in lockstep, all of this is done for every encoder step.

    Raises:
        StoppedError: the round was repeated ``max_retries`` times. All states are as before it.
        WeightingError: the weighting or the aggregation raised an error, or gave something wrong.
    """
    parts = federation, engine, weighting, aggregate, training
    if not method_of(training).lockstep:
        return _run_step(state, *parts, None)
    before = engine.client_states
    try:
        after, record = _run_step(state, *parts, 0)
        for step in range(1, training.encoder_steps):
            after, step_record = _run_step(replace(after, round=state.round), *parts, step)
            record = joined(record, step, step_record)
    except (StoppedError, WeightingError):
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
    """A whole round, or in lockstep one step of it."""
    before = engine.client_states
    for attempt in range(training.max_retries + 1):
        instructions = instruct(state, federation, training, attempt, step)
        # sorted, so that sums do not depend on the engine
        replies = sorted(engine.execute(instructions), key=attrgetter("client"))
        reports, dropped = screen(
            replies, instructions, state.norms, training.max_update_ratio, engine.failures
        )
        if len(reports) >= training.min_clients:
            # a client whose report is dropped starts the next round as it started this one
            heard = {reply.client for reply in replies if reply.round == state.round + 1}
            undone = {client: before[client] for client in dropped if client in heard}
            engine.restore({**engine.client_states, **undone})
            break
        engine.restore(before)
    else:
        counts = f"{len(reports)} sound reports, expected at least {training.min_clients}"
        raise StoppedError(f"round {state.round + 1}: {counts}: {by_reason(dropped)}")
    return conclude(state, instructions, reports, dropped, weighting, aggregate, training)


def conclude(
    state: ServerState,
    instructions: Sequence[Instruction],
    reports: Sequence[Report],
    dropped: dict[str, str],
    weighting: Weighting,
    aggregate: Aggregation,
    training: TrainConfig,
) -> tuple[ServerState, RoundRecord]:
    """The end of a round, after its reports are screened: weigh, aggregate, advance."""
    attempt = max((instruction.attempt for instruction in instructions), default=0)
    skipped = replace(state, round=state.round + 1)
    if not reports:
        return skipped, RoundRecord(instructions, reports, dropped, None, attempt)
    with seeded(training.seed, state.round + 1, "", f"weighting {instructions[0].step}"):
        weights, weighting_state = weigh(weighting, state.weighting, reports)
        with kernel_threads(1):
            direction = aggregated(aggregate, reports, weights, state.encoder)
    after = advance(state, reports, direction, weighting_state, training)
    if not _is_finite(after.encoder):
        dropped |= {report.client: "the step with it is not finite" for report in reports}
        return skipped, RoundRecord(instructions, [], dropped, None, attempt)
    return after, RoundRecord(instructions, reports, dropped, weights, attempt)


@kernel_threads(1)
def _is_finite(vector: Tensor) -> bool:
    """Whether all numbers are finite. A NaN is both the least and the largest of them."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(vector))).all())


def joined(record: RoundRecord, steps: int, last: RoundRecord) -> RoundRecord:
    """Join the record of several steps of a round with that of the step after them.

    Gradients, losses, norms and targets are means over the steps, weights are those of the last
    step, seconds and retries are sums. A client that was dropped at any step counts as dropped.
    ``steps`` is the number of steps before the last one.
    """
    share = 1 / (steps + 1)
    earlier = {report.client: report for report in record.reports}
    dropped = {**record.dropped, **last.dropped}
    clients = earlier.keys() - dropped.keys()
    both = [report for report in last.reports if report.client in clients]
    reports = [_mean_report(earlier[report.client], report, share) for report in both]
    weights = last.weights or record.weights
    if last.weights is not None and record.weights is not None:
        targets = dict(last.weights.targets)
        for client, target in targets.items():
            old = record.weights.targets.get(client, target)
            targets[client] = old + (target - old) * share
        weights = replace(last.weights, targets=targets)
    retries = record.retries + last.retries
    return RoundRecord(record.instructions, reports, dropped, weights, retries)


def _mean_report(earlier: Report, last: Report, share: float) -> Report:
    """The means of two reports, in which the last one has this share, and the sums of seconds."""
    return replace(
        last,
        gradient=torch.lerp(earlier.gradient, last.gradient, share),
        loss=earlier.loss + (last.loss - earlier.loss) * share,
        grad_norm=earlier.grad_norm + (last.grad_norm - earlier.grad_norm) * share,
        seconds=earlier.seconds + last.seconds,
        head_seconds=earlier.head_seconds + last.head_seconds,
    )


def instruct(
    state: ServerState,
    federation: Members,
    training: TrainConfig,
    attempt: int = 0,
    step: int | None = None,
) -> list[Instruction]:
    """One `Instruction` for each participant of the next round, sorted by client id."""
    round, encoder, buffers = state.round + 1, state.encoder, state.buffers
    return [
        Instruction(round, client, encoder, buffers, training, attempt, step)
        for client in participants(federation, training, round)
    ]


@kernel_threads(1)
def advance(
    state: ServerState,
    reports: Sequence[Report],
    direction: Tensor,
    weighting: WeightingState,
    training: TrainConfig,
) -> ServerState:
    """The state after a step of the server's optimiser along the direction.

    With plain SGD, ω ← ω - η · direction, where η = τ_ω · β · server_lr; τ_ω is 1 in lockstep. If
    every client has its own encoder, ω stays. The buffers are the means of the clients' buffers.
    """
    encoder, optimizer = state.encoder, state.optimizer
    if not method_of(training).own_encoder:
        encoder, optimizer = _stepped(state, direction, training)
    buffers = {name: _mean([report.buffers[name] for report in reports]) for name in state.buffers}
    norms = dict(state.norms)
    for report in reports:
        if report.length > 0:  # a task with nothing to learn in this round shows no usual length
            norms[report.client] = (*norms.get(report.client, ()), report.length)[-LAST_NORMS:]
    return ServerState(state.round + 1, encoder, buffers, weighting, optimizer, norms)


def _stepped(
    state: ServerState, direction: Tensor, training: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The encoder and the optimiser's state after its step."""
    steps = 1 if method_of(training).lockstep else training.encoder_steps
    step_size = steps * training.encoder_lr * training.server_lr  # η
    if training.server_optimizer == "sgd":  # torch.optim would load torch's compiler for it
        if not training.server_momentum:
            return state.encoder.add(direction, alpha=-step_size), {}
        past = state.optimizer.get("momentum_buffer")
        step = direction.clone() if past is None else past * training.server_momentum + direction
        return state.encoder.add(step, alpha=-step_size), {"momentum_buffer": step}
    parameter = nn.Parameter(state.encoder.clone())
    parameter.grad = direction
    optimizer = torch.optim.Adam([parameter], lr=step_size)
    memory = optimizer.state[parameter]
    memory.update({name: tensor.clone() for name, tensor in state.optimizer.items()})
    optimizer.step()
    tensors = {name: held for name, held in memory.items() if isinstance(held, Tensor)}
    return parameter.detach(), tensors


def _mean(buffers: Sequence[Tensor]) -> Tensor:
    """The mean of a buffer over clients, rounded for whole numbers such as BatchNorm's count."""
    mean = torch.stack([buffer.double() for buffer in buffers]).mean(dim=0)
    return (mean if buffers[0].is_floating_point() else mean.round()).to(buffers[0].dtype)
