"""Instructions, reports and evaluations as Flower records, and back. What comes back is checked: it may come from anyone.

A message to a client has the records ``arrays`` (the encoder's trainable parameters by name), ``buffers``, ``config`` (what the user sends
along) and ``fedgradnorm`` (who and when). A reply has ``arrays`` (the mean gradient, by the same names), ``buffers``, ``metrics`` and
``fedgradnorm``. Nothing of a head or of the data is in either.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from fedgradnorm import __version__
from fedgradnorm.config import TrainConfig, validated
from fedgradnorm.errors import ConfigError, FederationError, MessageError, printable
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.messages import LARGEST as BOUND
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import trainable

__all__ = [
    "ARRAYS",
    "BUFFERS",
    "CONFIG",
    "CONTROL",
    "METRICS",
    "VERSIONS",
    "Control",
    "Greeting",
    "Layout",
    "Reply",
    "arrays_of",
    "buffers_in",
    "control_of",
    "encoder_of",
    "evaluation_reply",
    "greeting_of",
    "greeting_reply",
    "one_line",
    "read_evaluation",
    "read_instruction",
    "read_report",
    "reply_of",
    "report_reply",
    "tensors_of",
    "training_of",
]

Checked = TypeVar("Checked", bound=BaseModel)
ARRAYS, BUFFERS, CONFIG, METRICS, CONTROL = "arrays", "buffers", "config", "metrics", "fedgradnorm"
LONGEST, LARGEST = 1e9, 1e100
"""No client works for more seconds, and no finite figure of a test is larger: beyond them, sums and means could overflow."""
EXAMPLES = "num-examples"
NUMBERS = ("loss", "initial-loss", "grad-norm", EXAMPLES, "seconds", "head-seconds", "loss-floor")
"""What the metrics of a report hold."""
HEADER = 4096
"""Bytes that an array in a message may have beyond its numbers: the header of its format."""
ROUNDING = 1.01
"""What a norm in half precision may be larger by than it is."""
VERSION = r"^[A-Za-z0-9.+!_-]{0,50}$"
VERSIONS: dict[str, Any] = {
    "version": __version__,
    "torch_version": ".".join(torch.__version__.split(".")[:2]),
}
"""What this process runs."""


class Control(BaseModel):
    """What a message to a client says beside its arrays.

    Attributes:
        kind: ``hello`` asks who the node is; ``train`` and ``evaluate`` are what they say.
        experiment: whose states the client is to use; a run and its resumptions are one experiment.
        client: the key of the client that it is for; empty in a hello.
        round: the round k, from 1.
        attempt: 0, and one more each time that the round is repeated.
        base: the round whose state the client begins with: its last one that the server has taken. 0: its initial state.
        keep: the rounds whose states the server may come back to; with 0 among them, all.
        training: how to train, as JSON; empty for a user's own app, and before the first round.
        settings: the server's words on the federation and the model, such as ``federation.alpha=0.2``, which win over the client's file.
        initial_loss: the client's F(0), as the server knows it; a client that has lost its state may go on with it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: str = Field(pattern="^(hello|train|evaluate)$")
    experiment: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    client: str = ""
    round: int = Field(0, ge=0)
    attempt: int = Field(0, ge=0)
    base: int = Field(0, ge=0)
    keep: tuple[int, ...] = Field((0,), strict=False)
    training: str = ""
    settings: str = ""
    initial_loss: float | None = Field(None, ge=-BOUND, le=BOUND)

    def record(self) -> ConfigRecord:
        """As a record, without what is None."""
        return ConfigRecord(
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self
                if value is not None
            }
        )


class Greeting(BaseModel):
    """Who answers to a hello.

    Attributes:
        client: its key.
        task: the name of its task.
        num_examples: of its training data; 0 where it does not say.
        tests: whether it has test data.
        metric: the name of its main metric, where the server cannot know it; empty for none.
        higher_is_better: of that metric.
        version: the version of fedgradnorm that it runs; empty where that is too old to say so.
        torch_version: the version of torch, such as 2.13; empty likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    client: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")
    task: str = Field(min_length=1, max_length=200)
    num_examples: int = Field(0, ge=0)
    tests: bool = True
    metric: str = Field("", max_length=200)
    higher_is_better: bool = True
    version: str = Field("", pattern=VERSION)
    torch_version: str = Field("", pattern=VERSION)

    @field_validator("task", "metric")
    @classmethod
    def _printable(cls, text: str) -> str:
        if not text.isprintable():
            raise ValueError("expected printable characters")
        return text


class Reply(BaseModel):
    """What a reply to a message for training or for testing says beside its arrays and figures.

    Attributes:
        client: the key of the client that answers.
        task: the name of its task.
        round: the round that it answers for.
        metrics: the metrics of a test, as JSON.
        failed: why some of them could not be taken, as JSON.
        began: where the state that it was to begin with is lost, the round of the one that it began with; 0: it has a fresh head.
        data_since: the round after which its training data changed, if they are not those of the state that it began with.
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


@dataclass(frozen=True)
class Layout:
    """The encoder's trainable parameters: their names and shapes in the order of the flat vector, and their type."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, encoder: nn.Module) -> "Layout":
        """The layout of an encoder."""
        parameters = trainable(encoder)
        return cls(
            {name: tuple(parameter.shape) for name, parameter in parameters}, parameters[0][1].dtype
        )

    def arrays(self, vector: Tensor) -> ArrayRecord:
        """A flat vector as arrays by name."""
        parts = vector.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return arrays_of(
            {
                name: part.view(shape)
                for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
            }
        )

    def vector(self, record: ArrayRecord) -> Tensor:
        """The flat vector of arrays.

        Raises:
            MessageError: other names, shapes or types than the encoder's.
        """
        if record.keys() != self.shapes.keys():
            odd = sorted(record.keys() ^ self.shapes.keys())[0]
            raise MessageError(
                f"arrays: expected those of the encoder, found {len(record)}; '{odd}' is in one alone"
            )
        for name, shape in self.shapes.items():
            _check_size(
                f"array '{name}'", len(record[name].data), math.prod(shape) * self.dtype.itemsize
            )
        tensors = tensors_of(record)
        for name, shape in self.shapes.items():
            found = tensors[name]
            if tuple(found.shape) != shape or found.dtype != self.dtype:
                raise MessageError(
                    f"array '{name}': expected {self.dtype} of {shape}, found {found.dtype} of {tuple(found.shape)}"
                )
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as arrays. Raises FederationError for a type of numbers that NumPy does not have, such as bfloat16."""
    try:
        return ArrayRecord(
            {
                name: Array(tensor.detach().cpu().contiguous().numpy())
                for name, tensor in tensors.items()
            }
        )
    except TypeError as error:
        types = sorted({str(tensor.dtype) for tensor in tensors.values()})
        raise FederationError(
            f"encoder: expected numbers of a type that a message can hold, such as float32, found {types}"
        ) from error


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Arrays as tensors of their own memory. Raises MessageError for what is no array of numbers."""
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except Exception as error:  # NumPy meets bytes of any kind here
        raise MessageError(f"arrays: expected arrays of numbers; {one_line(error)}") from error


def encoder_of(records: RecordDict) -> ArrayRecord:
    """The encoder's arrays. Raises MessageError where there are none."""
    found = records.array_records.get(ARRAYS)
    if found is None:
        raise MessageError(f"expected a record '{ARRAYS}', found {sorted(records)}")
    return found


def buffers_in(records: RecordDict) -> dict[str, Tensor]:
    """The encoder's buffers by name; empty where they are not sent. Raises MessageError for what is no array of numbers."""
    found = records.array_records.get(BUFFERS)
    return {} if found is None else tensors_of(found)


def control_of(message: Message) -> Control:
    """What a message to a client says. Raises MessageError for a message of someone else."""
    return _checked(Control, message, CONTROL)


def read_instruction(message: Message, control: Control, layout: Layout) -> Instruction:
    """The instruction in a message to a client that runs a Federation. Raises MessageError."""
    records, training = message.content, training_of(control)
    return Instruction(
        control.round,
        control.client,
        layout.vector(encoder_of(records)),
        buffers_in(records),
        training,
        control.attempt,
    )


def training_of(control: Control) -> TrainConfig:
    """How to train. Raises MessageError."""
    try:
        return validated(TrainConfig, _json(control.training, "training"), prefix="training")
    except ConfigError as error:
        raise MessageError(str(error)) from error


def greeting_reply(greeting: Greeting, message: Message) -> Message:
    """The answer to a hello."""
    return Message(RecordDict({CONTROL: ConfigRecord(greeting.model_dump())}), reply_to=message)


def greeting_of(reply: Message) -> Greeting:
    """Who answered to a hello. Raises MessageError."""
    greeting = _checked(Greeting, reply, CONTROL)
    _check_records(reply, (CONTROL,))
    return greeting


def reply_of(reply: Message) -> Reply:
    """What a reply says beside its arrays and figures. Raises MessageError."""
    return _checked(Reply, reply, CONTROL)


def report_reply(
    report: Report, arrays: ArrayRecord, message: Message, aside: Mapping[str, int] | None = None
) -> Message:
    """A report as a reply, its gradient as these arrays; ``aside`` are ``began`` and the like of a `Reply`."""
    metrics: dict[str, Any] = {
        "loss": report.loss,
        "initial-loss": report.initial_loss,
        "grad-norm": report.grad_norm,
        "num-examples": report.num_examples,
        "seconds": report.seconds,
        "head-seconds": report.head_seconds,
        "loss-floor": report.loss_floor,
    }
    content = RecordDict(
        {
            ARRAYS: arrays,
            METRICS: MetricRecord(metrics),
            CONTROL: ConfigRecord(
                {
                    "client": report.client,
                    "task": report.task,
                    "round": report.round,
                    **(aside or {}),
                }
            ),
        }
    )
    if report.buffers:
        content[BUFFERS] = arrays_of(report.buffers)
    return Message(content, reply_to=message)


def read_report(reply: Message, layout: Layout, sent: Mapping[str, Tensor] | None = None) -> Report:
    """The report in a reply. Its numbers are for `server.screen` to judge.

    Args:
        reply: the reply.
        layout: of the encoder.
        sent: the buffers that went out, by name, against which the sizes of those in the reply are held; None: they are not.

    Raises:
        MessageError: a number is missing or cannot be that of this gradient, or there is more in it than a report has.
    """
    who, metrics = reply_of(reply), _metrics(reply, NUMBERS)
    _check_records(reply, (ARRAYS, BUFFERS, METRICS, CONTROL))
    if sent is not None:
        for name, buffer in reply.content.array_records.get(BUFFERS, ArrayRecord()).items():
            _check_size(
                f"buffer {name!r:.100}", len(buffer.data), sent[name].nbytes if name in sent else 0
            )
    numbers = {name: _number(metrics, name) for name in NUMBERS if name != EXAMPLES}
    for name in ("seconds", "head-seconds"):
        if not 0 <= numbers[name] <= LONGEST:
            raise MessageError(
                f"metrics.{name}: expected seconds, from 0 to {LONGEST:g}, found {numbers[name]}"
            )
    report = Report(
        client=who.client,
        task=who.task,
        gradient=layout.vector(encoder_of(reply.content)),
        loss=numbers["loss"],
        initial_loss=numbers["initial-loss"],
        grad_norm=numbers["grad-norm"],
        num_examples=_count(metrics),
        buffers=buffers_in(reply.content),
        seconds=numbers["seconds"],
        round=who.round,
        head_seconds=numbers["head-seconds"],
        loss_floor=numbers["loss-floor"],
    )
    if (
        report.grad_norm > report.length * ROUNDING
    ):  # the norm layer is a part of the gradient: else weights could be moved by a word
        raise MessageError(
            f"metrics.grad-norm: expected at most the length of the gradient, {report.length:g}, found {report.grad_norm:g}"
        )
    return report


def evaluation_reply(
    client: str,
    task: str,
    round: int,
    evaluation: Evaluation,
    message: Message,
    aside: Mapping[str, int] | None = None,
) -> Message:
    """An evaluation as a reply. Of an error of a metric only the type is told: what it says may quote data."""
    failed = {name: why.partition(":")[0] for name, why in evaluation.failed.items()}
    metrics_text = json.dumps(dict(evaluation.metrics))
    control: dict[str, Any] = {
        "client": client,
        "task": task,
        "round": round,
        "metrics": metrics_text,
        "failed": json.dumps(failed),
    }
    control |= aside or {}
    metrics = MetricRecord({"loss": evaluation.loss, "num-examples": evaluation.num_examples})
    return Message(RecordDict({METRICS: metrics, CONTROL: ConfigRecord(control)}), reply_to=message)


def read_evaluation(reply: Message) -> tuple[str, Evaluation]:
    """Whose evaluation it is, and the evaluation. Raises MessageError."""
    who, numbers = reply_of(reply), _metrics(reply, ("loss", EXAMPLES))
    _check_records(reply, (METRICS, CONTROL))
    metrics = {
        name: _figure(f"metrics.{name!r:.100}", value)
        for name, value in _json(who.metrics, "metrics").items()
    }
    if not all(name.isprintable() and len(name) <= 200 for name in metrics):
        raise MessageError(
            f"metrics: expected names of up to 200 printable characters, found {sorted(metrics)!r:.100}"
        )
    failed = {
        name: one_line(why) for name, why in _json(who.failed, "failed").items() if name in metrics
    }
    return who.client, Evaluation(
        _figure("metrics.loss", _number(numbers, "loss")), metrics, _count(numbers), failed
    )


def one_line(text: object) -> str:
    """The beginning of a text of someone else, as a line for logs and records."""
    return printable(" ".join(str(text)[:10_000].split()))[:300]


def _figure(name: str, value: Any) -> float:
    """A figure of a test; what is no finite number is a gap in a curve, as it is for clients in this process."""
    gap = isinstance(value, float) and not math.isfinite(value)
    if not gap and (not isinstance(value, int | float) or abs(value) > LARGEST):
        raise MessageError(
            f"{name}: expected a number from {-LARGEST:g} to {LARGEST:g}, found {value!r:.100}"
        )
    return float(value)


def _checked(model: type[Checked], message: Message, record: str) -> Checked:
    found = message.content.config_records.get(record)
    if found is None:
        raise MessageError(
            f"expected a record '{record}', found {sorted(message.content)}: both sides have to be FedGradNorm's"
        )
    try:
        return model.model_validate(dict(found))
    except ValidationError as error:
        first = error.errors()[0]
        given = (
            first["input"][:100]
            if isinstance(first["input"], str | bytes | list)
            else first["input"]
        )  # it may be of any length
        raise MessageError(
            f"{record}.{'.'.join(map(str, first['loc']))}: {first['msg']}, found {given!r:.100}"
        ) from error


def _check_records(reply: Message, known: Collection[str]) -> None:
    """Raise MessageError for a record that nobody reads: it may be of any size."""
    unknown = sorted(reply.content.keys() - known)
    if unknown:
        raise MessageError(
            f"records: expected none but {', '.join(known)}, found {unknown[0]!r:.100}"
        )


def _check_size(what: str, found: int, expected: int) -> None:
    if found > expected + HEADER:
        raise MessageError(f"{what}: expected at most {expected + HEADER:,} bytes, found {found:,}")


def _metrics(reply: Message, known: Collection[str]) -> MetricRecord:
    found = reply.content.metric_records.get(METRICS)
    if found is None:
        raise MessageError(f"expected a record '{METRICS}', found {sorted(reply.content)}")
    unknown = sorted(found.keys() - known)
    if unknown:
        raise MessageError(
            f"metrics: expected none but {', '.join(known)}, found {unknown[0]!r:.100}"
        )
    return found


def _number(record: MetricRecord, name: str) -> float:
    found = record.get(name)
    if isinstance(found, Sequence) or found is None:
        raise MessageError(
            f"metrics.{name}: expected a number, found {type(found).__name__ if isinstance(found, list) else found!r}"
        )
    return float(found)


def _count(record: MetricRecord) -> int:
    found = record.get(EXAMPLES)
    if not isinstance(found, int) or found < 0:
        what = type(found).__name__ if isinstance(found, list) else repr(found)
        raise MessageError(f"metrics.{EXAMPLES}: expected a whole number from 0, found {what}")
    return found


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{name}: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise MessageError(f"{name}: expected an object, found {text[:100]!r}")
    return value
