"""Reports and evaluations as replies, and back; replies are checked: they may come from anyone."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import fedgradnorm.flower.records as records
from fedgradnorm.errors import MessageError
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.flower.layout import Layout, arrays_of, buffers_in, encoder_of
from fedgradnorm.flower.records import ARRAYS, BUFFERS, CONTROL, METRICS
from fedgradnorm.messages import Report

LONGEST, LARGEST = 1e9, 1e100
"""Maximum seconds of work, and maximum figure of a test: above them, sums could overflow."""
EXAMPLES = "num-examples"
FIGURES = {
    name: name.replace("_", "-")
    for name in ("loss", "initial_loss", "grad_norm", "seconds", "head_seconds", "loss_floor")
}
"""What the metrics of a report hold beside the number of examples: by field, its name there."""
ROUNDING = 1.01
"""The factor by which rounding in half precision may increase a norm."""


class Reply(BaseModel):
    """What a reply to a message for training or for testing says beside its arrays and figures.

    Attributes:
        client: the key of the client that answers.
        task: the name of its task.
        round: the round that it answers for.
        metrics: the metrics of a test, as JSON.
        failed: why some of them could not be measured, as JSON.
        began: the round of the state that the client began with, where the state that it was told
            to begin with is lost; 0: a fresh head.
        data_since: the round after which its training data changed, if they differ from those of
            the state that it began with.
        data_before: how many training examples it had in that round.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    client: str = Field(max_length=100)
    task: str = Field(max_length=200)
    round: int
    metrics: str = Field("{}", max_length=100_000)
    failed: str = Field("{}", max_length=100_000)
    began: int | None = Field(None, ge=0)
    data_since: int | None = Field(None, ge=1)
    data_before: int = Field(0, ge=0)


def reply_of(reply: Message) -> Reply:
    """What a reply says beside its arrays and figures. Raises MessageError."""
    return records.checked(Reply, reply, CONTROL)


def report_reply(
    report: Report, arrays: ArrayRecord, message: Message, aside: Mapping[str, int] | None = None
) -> Message:
    """A report as a reply.

    Args:
        report: the report.
        arrays: its gradient.
        message: the message that it answers.
        aside: more fields of a `Reply`, such as ``began``.
    """
    metrics: dict[str, Any] = {key: getattr(report, name) for name, key in FIGURES.items()}
    metrics[EXAMPLES] = report.num_examples
    who: dict[str, Any] = {"client": report.client, "task": report.task, "round": report.round}
    control = ConfigRecord({**who, **(aside or {})})
    content = RecordDict({ARRAYS: arrays, METRICS: MetricRecord(metrics), CONTROL: control})
    if report.buffers:
        content[BUFFERS] = arrays_of(report.buffers)
    return Message(content, reply_to=message)


def read_report(reply: Message, layout: Layout, sent: Mapping[str, Tensor] | None = None) -> Report:
    """The report in a reply. `server.screen` judges its numbers.

    Args:
        reply: the reply.
        layout: the encoder's.
        sent: the buffers that were sent, by name. Those in the reply must not be larger. None: the
            sizes are not checked.

    Raises:
        MessageError: a number is missing or does not fit the gradient, or the reply holds more
            than a report does.
    """
    who, metrics = reply_of(reply), _metrics(reply, [*FIGURES.values(), EXAMPLES])
    records.check_records(reply, (ARRAYS, BUFFERS, METRICS, CONTROL))
    if sent is not None:
        for name, buffer in reply.content.array_records.get(BUFFERS, ArrayRecord()).items():
            size = sent[name].nbytes if name in sent else 0
            records.check_size(f"buffer {name!r:.100}", len(buffer.data), size)
    numbers = {name: _number(metrics, key) for name, key in FIGURES.items()}
    for name in ("seconds", "head_seconds"):
        if not 0 <= numbers[name] <= LONGEST:
            expected = f"expected seconds, from 0 to {LONGEST:g}"
            raise MessageError(f"metrics.{FIGURES[name]}: {expected}, found {numbers[name]}")
    report = Report(
        client=who.client,
        task=who.task,
        gradient=layout.vector(encoder_of(reply.content)),
        num_examples=_count(metrics),
        buffers=buffers_in(reply.content),
        round=who.round,
        **numbers,
    )
    # The norm layer is a part of the gradient. A client must not move weights by a false norm.
    if report.grad_norm > report.length * ROUNDING:
        expected = f"expected at most the length of the gradient, {report.length:g}"
        raise MessageError(f"metrics.grad-norm: {expected}, found {report.grad_norm:g}")
    return report


def evaluation_reply(
    client: str,
    task: str,
    round: int,
    evaluation: Evaluation,
    message: Message,
    aside: Mapping[str, int] | None = None,
) -> Message:
    """An evaluation as a reply.

    An error of a metric is sent with its type alone: its words may quote data.
    """
    failed = {name: why.partition(":")[0] for name, why in evaluation.failed.items()}
    control: dict[str, Any] = {"client": client, "task": task, "round": round, **(aside or {})}
    control["metrics"] = json.dumps(dict(evaluation.metrics))
    control["failed"] = json.dumps(failed)
    metrics = MetricRecord({"loss": evaluation.loss, EXAMPLES: evaluation.num_examples})
    return Message(RecordDict({METRICS: metrics, CONTROL: ConfigRecord(control)}), reply_to=message)


def read_evaluation(reply: Message) -> tuple[str, Evaluation]:
    """The client's key and its evaluation. Raises MessageError."""
    who, numbers = reply_of(reply), _metrics(reply, ("loss", EXAMPLES))
    records.check_records(reply, (METRICS, CONTROL))
    sent = records.read_json(who.metrics, "metrics").items()
    metrics = {name: _figure(f"metrics.{name!r:.100}", value) for name, value in sent}
    if not all(name.isprintable() and len(name) <= 200 for name in metrics):
        expected = "expected names of up to 200 printable characters"
        raise MessageError(f"metrics: {expected}, found {sorted(metrics)!r:.100}")
    reasons = records.read_json(who.failed, "failed").items()
    failed = {name: records.one_line(why) for name, why in reasons if name in metrics}
    loss = _figure("metrics.loss", _number(numbers, "loss"))
    return who.client, Evaluation(loss, metrics, _count(numbers), failed)


def _figure(name: str, value: Any) -> float:
    """A figure of a test. NaN and infinity are gaps in a curve, as for clients in this process."""
    gap = isinstance(value, float) and not math.isfinite(value)
    if not gap and (not isinstance(value, int | float) or abs(value) > LARGEST):
        expected = f"expected a number from {-LARGEST:g} to {LARGEST:g}"
        raise MessageError(f"{name}: {expected}, found {value!r:.100}")
    return float(value)


def _metrics(reply: Message, known: Collection[str]) -> MetricRecord:
    metrics = reply.content.metric_records.get(METRICS)
    if metrics is None:
        raise MessageError(f"expected a record '{METRICS}', found {sorted(reply.content)}")
    records.check_known("metrics", metrics.keys(), known)
    return metrics


def _number(record: MetricRecord, name: str) -> float:
    number = record.get(name)
    if isinstance(number, Sequence) or number is None:
        found = type(number).__name__ if isinstance(number, list) else repr(number)
        raise MessageError(f"metrics.{name}: expected a number, found {found}")
    return float(number)


def _count(record: MetricRecord) -> int:
    count = record.get(EXAMPLES)
    if not isinstance(count, int) or count < 0:
        found = type(count).__name__ if isinstance(count, list) else repr(count)
        raise MessageError(f"metrics.{EXAMPLES}: expected a whole number from 0, found {found}")
    return count
