"""Which replies are sound, and why the others are missing: Flower's errors in words and kinds."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from fedgradnorm.errors import MessageError
from fedgradnorm.flower.exchange import Exchange
from fedgradnorm.flower.messages import Greeting, Refusal, greeting_of, refusal_in
from fedgradnorm.flower.records import one_line
from fedgradnorm.flower.status import Failure, Kind

log = logging.getLogger(__name__)

EXPIRED = 3
CODES = {
    0: "an unknown error",
    1: "its app could not be loaded",
    2: "its app raised an error",
    EXPIRED: "the message expired before it was answered",
    4: "the reply expired",
    5: "its node is gone",
    6: "a mod refused",
    7: "its app bundle is invalid",
    8: "its app crashed or was killed",
}
"""Flower's error codes in words."""
CODE_KINDS: dict[int, Kind] = {1: "error", 2: "error", EXPIRED: "late", 4: "late", 5: "gone"}
CODE_KINDS |= {6: "error", 7: "error", 8: "crashed"}
"""The kind of failure by Flower's error code; every other code is of the kind ``other``."""


@dataclass(frozen=True)
class Answers:
    """The replies to a set of named messages.

    Attributes:
        sound: by name, the replies without an error.
        failures: by name, why there is no sound reply.
        late: the names of the messages that were not answered in time.
        misdirected: the names of the messages that came to a node of another client.
    """

    sound: dict[str, Message] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    misdirected: set[str] = field(default_factory=set)

    def greeting(self, name: str) -> Greeting | Refusal:
        """Who the node is that was asked by the message of this name."""
        if name not in self.sound:
            return Refusal(code="no-answer", words=str(self.failures[name]))
        try:
            return greeting_of(self.sound[name])
        except MessageError as error:
            return Refusal(code="no-greeting", words=one_line(error))


def sort_replies(
    messages: Mapping[str, Message],
    replies: Iterable[Message],
    timeout: float,
    came: Exchange | None = None,
) -> Answers:
    """Match replies with the messages that they answer.

    Args:
        messages: what was sent, by name.
        replies: what came back; a reply to none of the messages is left out.
        timeout: seconds that were waited for replies, where ``came`` does not say so.
        came: how the messages were exchanged, where this package has done so.
    """
    answers, unfetched = Answers(), {} if came is None else came.failed
    # a message without an id was not sent
    asked = {message.metadata.message_id or name: name for name, message in messages.items()}
    for reply in replies:
        id = reply.metadata.reply_to_message_id
        if id not in asked:
            log.warning("a reply to no message of this round is left alone")
        elif not reply.has_error():
            _add(answers, asked.pop(id), reply)
        elif reply.error.code != EXPIRED or id not in unfetched:
            _add_error(answers, asked.pop(id), reply)
    if came is not None and came.early:
        waited = "no answer within twice the time of enough others"
        log.info("enough have answered: the others had %.1f s in all", came.seconds)
    else:
        waited = f"no answer within {came.seconds if came else timeout:g} s"
    for id, name in asked.items():
        if not messages[name].metadata.message_id:
            why = one_line(unfetched.get("", "no reason is known"))
            answers.failures[name] = Failure(f"its message could not be sent: {why}", "other")
        elif id in unfetched:
            why = one_line(unfetched[id])
            answers.failures[name] = Failure(f"its reply could not be fetched: {why}", "other")
        else:
            answers.late.add(name)
            answers.failures[name] = Failure(waited, "late")
    return answers


def _add(answers: Answers, name: str, reply: Message) -> None:
    try:
        refusal = refusal_in(reply)
    except MessageError as error:
        answers.failures[name] = Failure(one_line(error), "error")
        return
    if refusal is None:
        answers.sound[name] = reply
        return
    answers.failures[name] = Failure(one_line(refusal.words), "error")
    if refusal.code == "wrong-client":
        answers.misdirected.add(name)


def _add_error(answers: Answers, name: str, reply: Message) -> None:
    code, said = reply.error.code, one_line(reply.error.reason or "")
    words = CODES.get(code, f"error code {code}") + (f": {said}" if said else "")
    answers.failures[name] = Failure(words, CODE_KINDS.get(code, "other"))
    if code == EXPIRED:
        answers.late.add(name)
