"""What the server sends, and how a node says who it is or refuses, as Flower records, and back.

What comes back is checked: it may come from anyone. A message to a client has the records
``arrays`` (the encoder's trainable parameters by name), ``buffers``, ``config`` (what the user
sends along) and ``fedgradnorm`` (who and when). A reply has ``arrays`` (the mean gradient, by the
same names), ``buffers``, ``metrics`` and ``fedgradnorm``; or the record ``refusal`` alone. Neither
holds anything of a head or of the data.
"""

import logging
from typing import Any, Literal

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedgradnorm import __version__
from fedgradnorm.config import TrainConfig
from fedgradnorm.errors import ConfigError, MessageError
from fedgradnorm.flower.layout import Layout, buffers_in, encoder_of
from fedgradnorm.flower.records import CONTROL, REFUSAL, check_records, checked, one_line, read_json
from fedgradnorm.messages import LARGEST as BOUND
from fedgradnorm.messages import Instruction
from fedgradnorm.validation import validated

log = logging.getLogger(__name__)

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
"""The kinds of refusals: a node sends the first, and the server makes the others."""


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


def control_of(message: Message) -> Control:
    """What a message to a client says. Raises MessageError for a message of another strategy."""
    return checked(Control, message, CONTROL)


def read_instruction(message: Message, control: Control, layout: Layout) -> Instruction:
    """The instruction in a message to a client that runs a Federation. Raises MessageError."""
    training, encoder = training_of(control), layout.vector(encoder_of(message.content))
    buffers = buffers_in(message.content)
    return Instruction(control.round, control.client, encoder, buffers, training, control.attempt)


def training_of(control: Control) -> TrainConfig:
    """How to train. Raises MessageError."""
    try:
        return validated(TrainConfig, read_json(control.training, "training"), prefix="training")
    except ConfigError as error:
        raise MessageError(str(error)) from error


def refusal_reply(refusal: Refusal, message: Message) -> Message:
    """A refusal as a reply."""
    record = ConfigRecord(refusal.model_dump(exclude_none=True))
    return Message(RecordDict({REFUSAL: record}), reply_to=message)


def wrong_client(message: Message, asked: str, client: str) -> Message:
    """The answer of a client's node to a message that is for another client."""
    words = one_line(f"a message for client '{asked}' came to client '{client}'")
    log.warning("%s", words)
    return refusal_reply(Refusal(code="wrong-client", words=words, client=asked), message)


def refusal_in(reply: Message) -> Refusal | None:
    """The refusal in a reply; None where it has none. Raises MessageError for a damaged one."""
    return checked(Refusal, reply, REFUSAL) if REFUSAL in reply.content else None


def greeting_reply(greeting: Greeting, message: Message) -> Message:
    """The answer to a hello."""
    return Message(RecordDict({CONTROL: ConfigRecord(greeting.model_dump())}), reply_to=message)


def greeting_of(reply: Message) -> Greeting:
    """The client that answered a hello. Raises MessageError."""
    greeting = checked(Greeting, reply, CONTROL)
    check_records(reply, (CONTROL,))
    return greeting
