"""A round as the lines of metrics.jsonl."""

import math
from collections.abc import Mapping

from fedgradnorm.evaluation import Evaluation
from fedgradnorm.federation import Client, Members
from fedgradnorm.messages import Report
from fedgradnorm.runs.records import Row
from fedgradnorm.server import RoundRecord, ServerState
from fedgradnorm.training import method_of


def rows_of(
    federation: Members,
    state: ServerState,
    record: RoundRecord,
    evaluations: Mapping[str, Evaluation],
    notes: Mapping[str, list[str]] = {},
) -> list[Row]:
    """The lines of a round, one for each client, in the order of the federation.

    Args:
        federation: the clients.
        state: the server's state after the round.
        record: what happened in the round.
        evaluations: the tests after the round, by client id; empty in a round without tests.
        notes: what the engine noticed about clients, by client id.
    """
    reports = {report.client: report for report in record.reports}
    instructed = {instruction.client for instruction in record.instructions}
    method = method_of(record.instructions[0].training)
    sends = not (method.own_encoder or method.lockstep)
    bytes_down = record.instructions[0].num_bytes if sends else 0  # equal for all clients
    rows: list[Row] = []
    for client in federation.clients:
        row = _row(client, state, record, reports.get(client.id), evaluations.get(client.id))
        row["participated"] = client.id in instructed
        row["bytes_down"] = bytes_down if client.id in instructed else 0
        if client.id not in reports:
            row["examples"] = federation.num_examples(client.id)
        elif not sends:
            row["bytes_up"] = 0
        if client.id in notes:
            row["notes"] = notes[client.id]
        rows.append(row)
    return rows


def _row(
    client: Client,
    state: ServerState,
    record: RoundRecord,
    report: Report | None,
    evaluation: Evaluation | None,
) -> Row:
    weights, main = record.weights, client.task.main_metric
    applied = {} if weights is None else weights.values
    row: Row = {
        "round": state.round,
        "client": client.id,
        "task": client.task.name,
        "participated": False,
        "dropped": record.dropped.get(client.id),
        "retries": record.retries,
        "loss": report.loss if report else None,
        "initial_loss": report.initial_loss if report else None,
        "inverse_training_rate": _finite(report.inverse_training_rate) if report else None,
        "grad_norm": report.grad_norm if report else None,
        "weight": applied.get(client.id, state.weighting.weights.get(client.id, 1.0)),
        "target": None if weights is None else weights.targets.get(client.id),
        "test_loss": _finite(evaluation.loss) if evaluation else None,
        "metric": _finite(evaluation.metrics[main.name]) if evaluation and main else None,
        "metrics": {},
        "examples": report.num_examples if report else 0,
        "bytes_up": report.num_bytes if report else 0,
        "bytes_down": 0,
        "seconds": report.seconds if report else 0.0,
    }
    if evaluation:
        row["metrics"] = {name: _finite(value) for name, value in evaluation.metrics.items()}
        if evaluation.failed:
            row["missing"] = dict(evaluation.failed)
    return row


def _finite(value: float) -> float | None:
    """The value, or None if it is not finite: a diverged model has a gap in its curve."""
    return value if math.isfinite(value) else None
