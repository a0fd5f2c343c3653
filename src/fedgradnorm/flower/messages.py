"""Instructions, reports and evaluations as Flower records, and back.

What comes back is checked: it may come from anyone. A message to a client has the records
``arrays`` (the encoder's trainable parameters by name), ``buffers``, ``config`` (what the user
sends along) and ``fedgradnorm`` (who and when). A reply has ``arrays`` (the mean gradient, by the
same names), ``buffers``, ``metrics`` and ``fedgradnorm``; or the record ``refusal`` alone. Neither
holds anything of a head or of the data.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
    "REFUSAL",
    "VERSIONS",
    "Control",
    "Greeting",
    "Layout",
    "Refusal",
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
    "refusal_in",
    "refusal_reply",
    "reply_of",
    "report_reply",
    "tensors_of",
    "training_of",
]

Checked = TypeVar("Checked", bound=BaseModel)
ARRAYS, BUFFERS, CONFIG, METRICS, CONTROL = "arrays", "buffers", "config", "metrics", "fedgradnorm"
REFUSAL = "refusal"
LONGEST, LARGEST = 1e9, 1e100
"""Maximum seconds of work, and maximum figure of a test: above them, sums could overflow."""
EXAMPLES = "num-examples"
NUMBERS = ("loss", "initial-loss", "grad-norm", EXAMPLES, "seconds", "head-seconds", "loss-floor")
"""What the metrics of a report hold."""
HEADER = 4096
"""Bytes that an array in a message may have beyond its numbers: the header of its format."""
ROUNDING = 1.01
"""The factor by which rounding in half precision may increase a norm."""
VERSION = r"^[A-Za-z0-9.+!_-]{1,50}$"
VERSIONS: dict[str, Any] = {
    "version": __version__,
    "torch_version": ".".join(torch.__version__.split(".")[:2]),
}
"""The versions that this process runs."""
Code = Literal[
    "wrong-client",
    "unknown-client",
    "other-task",
    "other-metric",
    "key-in-use",
    "key-claimed",
    "no-answer",
    "no-greeting",
]


class Control(BaseModel):
    """What a message to a client says beside its arrays.

    Attributes:
        kind: ``hello`` asks who the node is; ``train`` and ``evaluate`` ask it to do so.
        experiment: whose states the client uses; a run and its resumptions are one experiment.
        client: the key of the client that the message is for; empty in a hello.
        round: the round k, from 1.
        attempt: 0, and one more each time that the round is repeated.
        base: the round whose state the client begins with: the last one that the server has
            taken. 0: the client's initial state.
        keep: the rounds whose states the server may go back to; with 0 among them, all.
        training: how to train, as JSON; empty for a user's own app, and before the first round.
        settings: the server's overrides for the federation and the model, such as
            ``federation.alpha=0.2``. They take precedence over the client's file.
        initial_loss: the client's F(0) as the server knows it; a client that has lost its state
            may continue with it.
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
        """As a record, without the fields that are None."""
        fields = self.model_dump(exclude_none=True)
        return ConfigRecord({**fields, "keep": list(self.keep)})


class Greeting(BaseModel):
    """The client that answers a hello.

    Attributes:
        client: its key.
        task: the name of its task.
        num_examples: how many training examples it has; 0 where it does not say.
        tests: whether it has test data.
        metric: the name of its main metric, where the server cannot know it; empty for none.
        higher_is_better: whether higher values of that metric are better.
        version: the version of fedgradnorm that it runs.
        torch_version: the version of torch that it runs, such as 2.13.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    client: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")
    task: str = Field(min_length=1, max_length=200)
    num_examples: int = Field(0, ge=0)
    tests: bool = True
    metric: str = Field("", max_length=200)
    higher_is_better: bool = True
    version: str = Field(pattern=VERSION)
    torch_version: str = Field(pattern=VERSION)

    @field_validator("task", "metric")
    @classmethod
    def _printable(cls, text: str) -> str:
        if not text.isprintable():
            raise ValueError("expected printable characters")
        return text


class Refusal(BaseModel):
    """Why a node does not take part, or does not answer a message.

    Attributes:
        code: the kind of refusal. Code reads this and never the words.
        words: the reason in words.
        client: the client that has no node for this reason; None where no client is known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    code: Code
    words: str
    client: str | None = None


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


@dataclass(frozen=True)
class Layout:
    """The encoder's trainable parameters: names and shapes in the flat vector's order, and type."""

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
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return arrays_of({name: part.view(shape) for (name, shape), part in pairs})

    def vector(self, record: ArrayRecord) -> Tensor:
        """The flat vector of arrays.

        Raises:
            MessageError: names, shapes or types differ from the encoder's.
        """
        if record.keys() != self.shapes.keys():
            odd = sorted(record.keys() ^ self.shapes.keys())[0]
            found = f"found {len(record)}; '{odd}' is in one alone"
            raise MessageError(f"arrays: expected those of the encoder, {found}")
        for name, shape in self.shapes.items():
            size = math.prod(shape) * self.dtype.itemsize
            _check_size(f"array '{name}'", len(record[name].data), size)
        tensors = tensors_of(record)
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
                expected = f"expected {self.dtype} of {shape}"
                found = f"found {tensor.dtype} of {tuple(tensor.shape)}"
                raise MessageError(f"array '{name}': {expected}, {found}")
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as arrays. Raises FederationError for types that NumPy lacks, such as bfloat16."""
    numbers = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in numbers.items()})
    except TypeError as error:
        types = sorted({str(tensor.dtype) for tensor in tensors.values()})
        expected = "expected numbers of a type that a message can hold, such as float32"
        raise FederationError(f"encoder: {expected}, found {types}") from error


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Arrays as tensors with their own memory. Raises MessageError if one is not of numbers."""
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except Exception as error:  # NumPy reads bytes of any kind here
        raise MessageError(f"arrays: expected arrays of numbers; {one_line(error)}") from error


def encoder_of(records: RecordDict) -> ArrayRecord:
    """The encoder's arrays. Raises MessageError where there are none."""
    arrays = records.array_records.get(ARRAYS)
    if arrays is None:
        raise MessageError(f"expected a record '{ARRAYS}', found {sorted(records)}")
    return arrays


def buffers_in(records: RecordDict) -> dict[str, Tensor]:
    """The encoder's buffers by name; empty where none are sent.

    Raises MessageError if one is not of numbers.
    """
    buffers = records.array_records.get(BUFFERS)
    return {} if buffers is None else tensors_of(buffers)


def control_of(message: Message) -> Control:
    """What a message to a client says. Raises MessageError for a message of another strategy."""
    return _checked(Control, message, CONTROL)


def read_instruction(message: Message, control: Control, layout: Layout) -> Instruction:
    """The instruction in a message to a client that runs a Federation. Raises MessageError."""
    training, encoder = training_of(control), layout.vector(encoder_of(message.content))
    buffers = buffers_in(message.content)
    return Instruction(control.round, control.client, encoder, buffers, training, control.attempt)


def training_of(control: Control) -> TrainConfig:
    """How to train. Raises MessageError."""
    try:
        return validated(TrainConfig, _json(control.training, "training"), prefix="training")
    except ConfigError as error:
        raise MessageError(str(error)) from error


def refusal_reply(refusal: Refusal, message: Message) -> Message:
    """A refusal as a reply."""
    record = ConfigRecord(refusal.model_dump(exclude_none=True))
    return Message(RecordDict({REFUSAL: record}), reply_to=message)


def refusal_in(reply: Message) -> Refusal | None:
    """The refusal in a reply; None where it has none. Raises MessageError for a damaged one."""
    return _checked(Refusal, reply, REFUSAL) if REFUSAL in reply.content else None


def greeting_reply(greeting: Greeting, message: Message) -> Message:
    """The answer to a hello."""
    return Message(RecordDict({CONTROL: ConfigRecord(greeting.model_dump())}), reply_to=message)


def greeting_of(reply: Message) -> Greeting:
    """The client that answered a hello. Raises MessageError."""
    greeting = _checked(Greeting, reply, CONTROL)
    _check_records(reply, (CONTROL,))
    return greeting


def reply_of(reply: Message) -> Reply:
    """What a reply says beside its arrays and figures. Raises MessageError."""
    return _checked(Reply, reply, CONTROL)


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
    metrics: dict[str, Any] = {
        "loss": report.loss,
        "initial-loss": report.initial_loss,
        "grad-norm": report.grad_norm,
        "num-examples": report.num_examples,
        "seconds": report.seconds,
        "head-seconds": report.head_seconds,
        "loss-floor": report.loss_floor,
    }
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
    who, metrics = reply_of(reply), _metrics(reply, NUMBERS)
    _check_records(reply, (ARRAYS, BUFFERS, METRICS, CONTROL))
    if sent is not None:
        for name, buffer in reply.content.array_records.get(BUFFERS, ArrayRecord()).items():
            size = sent[name].nbytes if name in sent else 0
            _check_size(f"buffer {name!r:.100}", len(buffer.data), size)
    numbers = {name: _number(metrics, name) for name in NUMBERS if name != EXAMPLES}
    for name in ("seconds", "head-seconds"):
        if not 0 <= numbers[name] <= LONGEST:
            expected = f"expected seconds, from 0 to {LONGEST:g}"
            raise MessageError(f"metrics.{name}: {expected}, found {numbers[name]}")
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
    """The client's key and its evaluation. Raises MessageError."""
    who, numbers = reply_of(reply), _metrics(reply, ("loss", EXAMPLES))
    _check_records(reply, (METRICS, CONTROL))
    metrics = {
        name: _figure(f"metrics.{name!r:.100}", value)
        for name, value in _json(who.metrics, "metrics").items()
    }
    if not all(name.isprintable() and len(name) <= 200 for name in metrics):
        expected = "expected names of up to 200 printable characters"
        raise MessageError(f"metrics: {expected}, found {sorted(metrics)!r:.100}")
    failed = {
        name: one_line(why) for name, why in _json(who.failed, "failed").items() if name in metrics
    }
    return who.client, Evaluation(
        _figure("metrics.loss", _number(numbers, "loss")), metrics, _count(numbers), failed
    )


def one_line(text: object) -> str:
    """The beginning of a foreign text as one line for logs and records."""
    return printable(" ".join(str(text)[:10_000].split()))[:300]


def _figure(name: str, value: Any) -> float:
    """A figure of a test. NaN and infinity are gaps in a curve, as for clients in this process."""
    gap = isinstance(value, float) and not math.isfinite(value)
    if not gap and (not isinstance(value, int | float) or abs(value) > LARGEST):
        expected = f"expected a number from {-LARGEST:g} to {LARGEST:g}"
        raise MessageError(f"{name}: {expected}, found {value!r:.100}")
    return float(value)


def _checked(model: type[Checked], message: Message, record: str) -> Checked:
    fields = message.content.config_records.get(record)
    if fields is None:
        found = f"found {sorted(message.content)}: both sides have to be FedGradNorm's"
        raise MessageError(f"expected a record '{record}', {found}")
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        found, where = first["input"], ".".join(map(str, first["loc"]))
        if isinstance(found, str | bytes | list):  # it may be of any length
            found = found[:100]
        text = f"{record}.{where}: {first['msg']}, found {found!r:.100}"
        raise MessageError(text) from error


def _check_records(reply: Message, known: Collection[str]) -> None:
    """Raise MessageError for a record that nobody reads: it may be of any size."""
    _check_known("records", reply.content.keys(), known)


def _check_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        expected = f"expected none but {', '.join(known)}"
        raise MessageError(f"{what}: {expected}, found {unknown[0]!r:.100}")


def _check_size(what: str, found: int, expected: int) -> None:
    if found > expected + HEADER:
        raise MessageError(f"{what}: expected at most {expected + HEADER:,} bytes, found {found:,}")


def _metrics(reply: Message, known: Collection[str]) -> MetricRecord:
    metrics = reply.content.metric_records.get(METRICS)
    if metrics is None:
        raise MessageError(f"expected a record '{METRICS}', found {sorted(reply.content)}")
    _check_known("metrics", metrics.keys(), known)
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


def _json(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{name}: expected JSON; {error}") from error
    if not isinstance(value, dict):
        raise MessageError(f"{name}: expected an object, found {text[:100]!r}")
    return value
