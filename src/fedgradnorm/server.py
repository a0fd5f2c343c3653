"""The server's half of the algorithm, as one straight line: instruct, execute, screen, weight, aggregate, advance."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from statistics import median_low
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm import registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.aggregation.mean import Mean
from fedgradnorm.config import TrainConfig
from fedgradnorm.engine import Engine
from fedgradnorm.errors import FedGradNormError, StoppedError, WeightingError, described
from fedgradnorm.federation import Members
from fedgradnorm.messages import LARGEST, Instruction, Report
from fedgradnorm.parameters import buffers_of, flatten
from fedgradnorm.randomness import generator, seeded
from fedgradnorm.threads import kernel_threads
from fedgradnorm.training import method_of
from fedgradnorm.weighting.base import Weighting, WeightingState, Weights

__all__ = [
    "RoundRecord",
    "ServerState",
    "advance",
    "conclude",
    "initial_state",
    "instruct",
    "run_round",
    "screen",
]

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
    """The state before the first round: the encoder as initialised under the seed.

    Raises:
        WeightingError: the weighting raised an error, or gave what is no state.
    """
    encoder = federation.make_encoder(seed)
    buffers = buffers_of(encoder) if federation.buffers == "averaged" else {}
    what = f"{_named(weighting, 'weighting')}: init()"
    try:
        first = weighting.init(sorted(federation.client_ids))
    except FedGradNormError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise WeightingError(f"{what} raised {described(error)}") from error
    return ServerState(0, flatten(encoder), buffers, _plain_state(first, what))


def run_round(
    state: ServerState,
    federation: Members,
    engine: Engine,
    weighting: Weighting,
    aggregate: Aggregation,
    training: TrainConfig,
) -> tuple[ServerState, RoundRecord]:
    """One round. With fewer sound reports than ``min_clients`` it is undone at server and clients, and repeated.

    Where the method keeps all clients in lockstep, all this happens for every encoder step of the round.

    Raises:
        StoppedError: it was repeated ``max_retries`` times. All states are as they were before the round.
        WeightingError: the weighting or the aggregation raised an error, or gave what it must not.
    """
    if not method_of(training).lockstep:
        return _run_step(state, federation, engine, weighting, aggregate, training, None)
    before = engine.client_states
    try:
        after, record = _run_step(state, federation, engine, weighting, aggregate, training, 0)
        for step in range(1, training.encoder_steps):
            after, another = _run_step(
                replace(after, round=state.round),
                federation,
                engine,
                weighting,
                aggregate,
                training,
                step,
            )
            record = joined(record, step, another)
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
    """All of a round, or one step of it where it is in lockstep."""
    before = engine.client_states
    only_summed = isinstance(aggregate, Mean) and not weighting.reads_gradients
    for attempt in range(training.max_retries + 1):
        instructions = instruct(state, federation, training, attempt, step, only_summed=only_summed)
        replies = sorted(
            engine.execute(instructions), key=attrgetter("client")
        )  # so that sums do not depend on the engine
        reports, dropped = screen(replies, instructions, state.norms, training.max_update_ratio)
        failures = engine.failures
        dropped |= {
            client: f"no report: {why}"
            for client, why in failures.items()
            if dropped.get(client) == "no report"
        }
        if len(reports) >= training.min_clients:
            heard = {reply.client for reply in replies if reply.round == state.round + 1}
            undone = {
                client: before[client] for client in dropped if client in heard
            }  # one bad round must not spoil all later ones
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
    named = {
        reason: ", ".join(them[:3]) + (f" and {len(them) - 3} more" if len(them) > 3 else "")
        for reason, them in clients.items()
    }
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
        return replace(state, round=state.round + 1), RoundRecord(
            instructions, reports, dropped, None, attempt
        )
    with seeded(training.seed, state.round + 1, "", f"weighting {instructions[0].step}"):
        weights, weighting_state = _weigh(weighting, state.weighting, reports)
        with kernel_threads(1):
            direction = _aggregated(aggregate, reports, weights, state.encoder)
    after = advance(state, reports, direction, weighting_state, training)
    if not _is_finite(after.encoder):
        dropped |= {report.client: "the step with it is not finite" for report in reports}
        return replace(state, round=state.round + 1), RoundRecord(
            instructions, [], dropped, None, attempt
        )
    return after, RoundRecord(instructions, reports, dropped, weights, attempt)


def _weigh(
    weighting: Weighting, state: WeightingState, reports: Sequence[Report]
) -> tuple[Weights, WeightingState]:
    """What a weighting gives for these reports, in plain numbers. Raises WeightingError where it is not what it has to be."""
    what = f"{_named(weighting, 'weighting')}: update()"
    try:
        given = weighting.update(state, reports)
    except FedGradNormError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise WeightingError(f"{what} raised {described(error)}") from error
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Weights)):
        raise WeightingError(
            f"{what}: expected a pair (Weights, WeightingState), found {_kind(given)}"
        )
    weights, clients = given[0], [report.client for report in reports]
    values = _finite_numbers(weights.values, clients, f"{what}: weights.values")
    if not sum(values.values()) > 0:
        raise WeightingError(
            f"{what}: weights.values: expected a sum above 0, found {sum(values.values()):g}"
        )
    targets = _finite_numbers(weights.targets, (), f"{what}: weights.targets")
    scale = _finite_numbers({"scale": weights.scale}, (), f"{what}: weights")["scale"]
    return Weights({client: values[client] for client in clients}, targets, scale), _plain_state(
        given[1], what
    )


def _plain_state(state: object, what: str) -> WeightingState:
    """A weighting's state in plain numbers, as a checkpoint can have it. Raises WeightingError where there is none."""
    if not isinstance(state, WeightingState):
        raise WeightingError(f"{what}: expected a WeightingState, found {_kind(state)}")
    weights = _finite_numbers(state.weights, (), f"{what}: state.weights")
    if not isinstance(state.memory, Mapping):
        raise WeightingError(
            f"{what}: state.memory: expected a dictionary, found {_kind(state.memory)}"
        )
    return WeightingState(weights, _plain(state.memory, f"{what}: state.memory"))


def _finite_numbers(numbers: object, clients: Iterable[str], what: str) -> dict[str, float]:
    """Numbers by client as floats. Raises WeightingError where one is missing or not finite."""
    if not isinstance(numbers, Mapping):
        raise WeightingError(f"{what}: expected a dictionary by client id, found {_kind(numbers)}")
    if (missing := next((client for client in clients if client not in numbers), None)) is not None:
        raise WeightingError(
            f"{what}: expected a number for every client, found none for '{missing}'"
        )
    if all(type(number) is float for number in numbers.values()) and math.isfinite(
        sum(numbers.values())
    ):
        return dict(numbers)
    plain = {}
    for client, number in numbers.items():
        try:
            plain[client] = float(number)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise WeightingError(
                f"{what}: expected a number for '{client}', found {number!r:.100}"
            ) from error
        if not math.isfinite(plain[client]):
            raise WeightingError(
                f"{what}: expected a finite number for '{client}', found {plain[client]}"
            )
    return plain


def _plain(value: Any, what: str) -> Any:
    """A value as JSON has it, the numbers of NumPy and torch as Python's. Raises WeightingError for anything else."""
    if isinstance(value, np.generic) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    ):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise WeightingError(f"{what}: expected a finite number, found {value}")
    if isinstance(value, Mapping):
        if (odd := next((key for key in value if not isinstance(key, str)), None)) is not None:
            raise WeightingError(f"{what}: expected texts as keys, found {odd!r:.100}")
        return {
            key: held if type(held) is str else _plain(held, f"{what}[{key!r:.100}]")
            for key, held in value.items()
        }
    if isinstance(value, list | tuple):
        return (
            type(value)(_plain(held, what) for held in value)
            if type(value) in (list, tuple)
            else [_plain(held, what) for held in value]
        )
    hint = "; .tolist() makes numbers of it" if isinstance(value, np.ndarray | Tensor) else ""
    raise WeightingError(
        f"{what}: expected what JSON has: texts, finite numbers, lists and dictionaries, found {_kind(value)}{hint}"
    )


def _aggregated(
    aggregate: Aggregation, reports: Sequence[Report], weights: Weights, encoder: Tensor
) -> Tensor:
    """The direction that an aggregation gives. Raises WeightingError where it is not what it has to be."""
    what = _named(aggregate, "aggregation")
    try:
        direction = aggregate(reports, weights)
    except FedGradNormError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise WeightingError(f"{what} raised {described(error)}") from error
    expected = f"{what}: expected a tensor of {encoder.dtype} and shape {tuple(encoder.shape)}"
    if not isinstance(direction, Tensor):
        raise WeightingError(f"{expected}, found {_kind(direction)}")
    if direction.shape != encoder.shape or direction.dtype != encoder.dtype:
        raise WeightingError(f"{expected}, found {direction.dtype} and {tuple(direction.shape)}")
    return direction


def _named(part: object, kind: str) -> str:
    """A part in messages: its kind and its name in the settings."""
    return f"{kind} '{registry.name_of(kind, type(part))}'"


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


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
    earlier, dropped = (
        {report.client: report for report in record.reports},
        {**record.dropped, **another.dropped},
    )
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
        targets = {
            client: old.get(client, new) + (new - old.get(client, new)) * share
            for client, new in weights.targets.items()
        }
        weights = replace(weights, targets=targets)
    return RoundRecord(
        record.instructions,
        reports,
        dropped,
        weights or record.weights,
        record.retries + another.retries,
    )


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
    return [
        Instruction(
            round, client, state.encoder, state.buffers, training, attempt, step, only_summed
        )
        for client in ids
    ]


def participants(federation: Members, training: TrainConfig, round: int) -> list[str]:
    """Who takes part in a round, sorted: as listed, or a share of all drawn without replacement (at least one)."""
    if training.participants:
        listed = training.participants[min(round, len(training.participants)) - 1]
        return sorted({federation.client(id).id for id in listed})
    ids = sorted(federation.client_ids)
    count = max(1, round_half_up(training.fraction_train * len(ids)))
    if count == len(ids):
        return ids
    return sorted(
        generator(training.seed, round, "", "participants")
        .choice(ids, size=count, replace=False)
        .tolist()
    )


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
            others' of this round, as long as the client has fewer than three. Gradients of length 0 do not count. None: none is too long.
    """
    reports, dropped = {}, {}
    by_sender: dict[tuple[str, int], list[Report]] = {}
    for reply in replies:
        by_sender.setdefault((reply.client, reply.round), []).append(reply)
    for instruction in instructions:
        own = by_sender.get((instruction.client, instruction.round), [])
        reason = (
            "no report"
            if not own
            else f"{len(own)} reports"
            if len(own) > 1
            else _misfit(own[0], instruction)
        )
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
        pooled = sorted([*chain(*norms.values()), *filter(None, lengths.values())])
        for client, length in lengths.items():
            known = norms.get(client, ())
            of_its_own = len(known) >= FEWEST_NORMS
            usual = median_low(known) if of_its_own else _median_without(pooled, length)
            if length > max_update_ratio * usual > 0:
                than = "usual" if of_its_own else "usual for all clients"
                limit = f"expected at most {max_update_ratio:g} times (train.max_update_ratio)"
                dropped[client] = f"gradient: {length / usual:.3g} times as long as {than}, {limit}"
                del reports[client]
    return list(reports.values()), dropped


def _median_without(ascending: Sequence[float], number: float) -> float:
    """The lower median of numbers without one of them; that one itself where there is no other, or it is not among them."""
    if number == 0:
        return number
    middle = (len(ascending) - 2) // 2
    return (
        number
        if middle < 0
        else ascending[middle if middle < bisect_left(ascending, number) else middle + 1]
    )


def _misfit(report: Report, instruction: Instruction) -> str | None:
    """What in a report is not such as was sent, or None."""
    gradient, encoder = report.gradient, instruction.encoder
    if gradient.shape != encoder.shape or gradient.dtype != encoder.dtype:
        return f"gradient: expected {encoder.dtype} of shape {tuple(encoder.shape)}, found {gradient.dtype} of {tuple(gradient.shape)}"
    if report.buffers.keys() != instruction.buffers.keys():
        return "buffers: not those that were sent"
    for name, buffer in report.buffers.items():
        sent = instruction.buffers[name]
        if (
            buffer.shape != sent.shape
            or buffer.dtype != sent.dtype
            or not torch.isfinite(buffer).all()
        ):
            return f"buffer {name}: wrong shape or type, or not finite"
    return None


def _wrong_number(report: Report, length: float) -> str | None:
    """Which number of a report is out of range, or None."""
    if not math.isfinite(length):
        finite = bool(torch.isfinite(report.gradient).all())
        return (
            f"gradient: expected a length of at most {LARGEST:g}, found a longer one"
            if finite
            else "gradient: not finite"
        )
    if not (
        abs(report.loss) <= LARGEST
        and abs(report.initial_loss) <= LARGEST
        and abs(report.loss_floor) <= LARGEST
    ):
        numbers = {
            "loss": report.loss,
            "initial_loss": report.initial_loss,
            "loss_floor": report.loss_floor,
        }
        name = next(name for name, number in numbers.items() if not abs(number) <= LARGEST)
        return f"{name}: expected a number from {-LARGEST:g} to {LARGEST:g}, found {numbers[name]}"
    if not 0 <= report.grad_norm <= LARGEST:
        return f"grad_norm: expected a number from 0 to {LARGEST:g}, found {report.grad_norm}"
    if report.inverse_training_rate > LARGEST:
        return f"inverse_training_rate: expected at most {LARGEST:g}, found loss {report.loss} with initial_loss {report.initial_loss}"
    return None


@kernel_threads(1)
def advance(
    state: ServerState,
    reports: Sequence[Report],
    direction: Tensor,
    weighting: WeightingState,
    training: TrainConfig,
) -> ServerState:
    """The next state: a step of the server's optimiser along the direction, and the mean of the clients' buffers.

    With plain SGD, ω ← ω - η · direction, where η = τ_ω · β · server_lr; τ_ω is 1 in lockstep. Where every client has an encoder of its
    own, ω stays.
    """
    encoder, optimizer = (
        (state.encoder, state.optimizer)
        if method_of(training).own_encoder
        else _stepped(state, direction, training)
    )
    buffers = {name: _mean([report.buffers[name] for report in reports]) for name in state.buffers}
    norms = dict(state.norms)
    for report in reports:
        if (
            report.length > 0
        ):  # nothing can be told from a task that had nothing to learn in a round
            norms[report.client] = (*norms.get(report.client, ()), report.length)[-LAST_NORMS:]
    return ServerState(state.round + 1, encoder, buffers, weighting, optimizer, norms)


def _stepped(
    state: ServerState, direction: Tensor, training: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
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
    optimizer.state[parameter].update(
        {name: value.clone() for name, value in state.optimizer.items()}
    )
    optimizer.step()
    return parameter.detach(), {
        name: value
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def _mean(buffers: Sequence[Tensor]) -> Tensor:
    """The mean of one buffer over clients; of whole numbers, such as BatchNorm's count of batches, the mean rounded."""
    mean = torch.stack([buffer.double() for buffer in buffers]).mean(dim=0)
    return (mean if buffers[0].is_floating_point() else mean.round()).to(buffers[0].dtype)
