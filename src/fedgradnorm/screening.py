"""The screening of reports: the sound ones, and for every other the reason why it is dropped."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import median_low

import torch

from fedgradnorm.messages import LARGEST, Instruction, Report
from fedgradnorm.threads import kernel_threads

LAST_NORMS, FEWEST_NORMS = 10, 3
"""How many gradient lengths of a client are remembered, and how many show what is usual for it."""


@kernel_threads(1)  # waiting for busy cores can take far longer than the work
def screen(
    replies: Sequence[Report],
    instructions: Sequence[Instruction],
    norms: Mapping[str, Sequence[float]],
    max_update_ratio: float | None = None,
    failures: Mapping[str, str] = {},
) -> tuple[list[Report], dict[str, str]]:
    """The sound reports of this round, and for every other instructed client the reason.

    Args:
        replies: what came back. Reports of other rounds, and of clients that were not asked, are
            ignored.
        instructions: what was sent.
        norms: the lengths of the last sound gradients, by client.
        max_update_ratio: the longest gradient that is sound, as a multiple of the median of its
            client's last ones. As long as the client has fewer than three, the median is over all
            last ones and the others' of this round. Gradients of length 0 do not count. None: no
            gradient is too long.
        failures: why clients sent no report, as far as the engine knows.
    """
    reports, dropped = {}, {}
    by_sender: dict[tuple[str, int], list[Report]] = {}
    for reply in replies:
        by_sender.setdefault((reply.client, reply.round), []).append(reply)
    for instruction in instructions:
        own = by_sender.get((instruction.client, instruction.round), [])
        reason = _fault(own, instruction, failures.get(instruction.client))
        if reason is None:
            reports[instruction.client] = own[0]
        else:
            dropped[instruction.client] = reason
    if max_update_ratio is not None:
        for client, reason in _too_long(reports, norms, max_update_ratio).items():
            dropped[client] = reason
            del reports[client]
    return list(reports.values()), dropped


def _fault(own: Sequence[Report], instruction: Instruction, failure: str | None) -> str | None:
    """Why a client's reports of this round do not count, or None."""
    if not own:
        return "no report" if failure is None else f"no report: {failure}"
    if len(own) > 1:
        return f"{len(own)} reports"
    return _misfit(own[0], instruction) or _wrong_number(own[0])


def _too_long(
    reports: Mapping[str, Report], norms: Mapping[str, Sequence[float]], max_update_ratio: float
) -> dict[str, str]:
    """The clients whose gradients are too long, with the reasons."""
    lengths = {client: report.length for client, report in reports.items()}
    pooled = sorted([*chain(*norms.values()), *filter(None, lengths.values())])
    reasons = {}
    for client, length in lengths.items():
        known = norms.get(client, ())
        knows_own = len(known) >= FEWEST_NORMS
        usual = median_low(known) if knows_own else _median_without(pooled, length)
        if length > max_update_ratio * usual > 0:
            than = "usual" if knows_own else "usual for all clients"
            limit = f"expected at most {max_update_ratio:g} times (train.max_update_ratio)"
            reasons[client] = f"gradient: {length / usual:.3g} times as long as {than}, {limit}"
    return reasons


def _median_without(ascending: Sequence[float], number: float) -> float:
    """The lower median of numbers without one of them, which it is if that is 0 or the only one."""
    middle = (len(ascending) - 2) // 2
    if number == 0 or middle < 0:
        return number
    return ascending[middle if middle < bisect_left(ascending, number) else middle + 1]


def _misfit(report: Report, instruction: Instruction) -> str | None:
    """Which tensor of a report does not have the shape or type that was sent, or None."""
    gradient, encoder = report.gradient, instruction.encoder
    if gradient.shape != encoder.shape or gradient.dtype != encoder.dtype:
        expected = f"expected {encoder.dtype} of shape {tuple(encoder.shape)}"
        return f"gradient: {expected}, found {gradient.dtype} of {tuple(gradient.shape)}"
    if report.buffers.keys() != instruction.buffers.keys():
        return "buffers: not those that were sent"
    for name, buffer in report.buffers.items():
        sent = instruction.buffers[name]
        alike = buffer.shape == sent.shape and buffer.dtype == sent.dtype
        if not alike or not torch.isfinite(buffer).all():
            return f"buffer {name}: wrong shape or type, or not finite"
    return None


def _wrong_number(report: Report) -> str | None:
    """Which number of a report is out of range, or None."""
    if not math.isfinite(report.length):
        if not torch.isfinite(report.gradient).all():
            return "gradient: not finite"
        return f"gradient: expected a length of at most {LARGEST:g}, found a longer one"
    for name in ("loss", "initial_loss", "loss_floor"):
        number = getattr(report, name)
        if not abs(number) <= LARGEST:
            expected = f"expected a number from {-LARGEST:g} to {LARGEST:g}"
            return f"{name}: {expected}, found {number}"
    if not 0 <= report.grad_norm <= LARGEST:
        return f"grad_norm: expected a number from 0 to {LARGEST:g}, found {report.grad_norm}"
    if report.inverse_training_rate > LARGEST:
        found = f"found loss {report.loss} with initial_loss {report.initial_loss}"
        return f"inverse_training_rate: expected at most {LARGEST:g}, {found}"
    return None


def by_reason(dropped: Mapping[str, str]) -> str:
    """Every reason once, with the first three of its clients: thousands often share one."""
    clients: dict[str, list[str]] = {}
    for client, reason in dropped.items():
        clients.setdefault(reason, []).append(client)
    texts = []
    for reason, ids in clients.items():
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        texts.append(f"{', '.join(ids[:3])}{more}: {reason}")
    return "; ".join(texts)
