"""Calls to a SuperLink with a time limit, which are repeated while they fail.

They send messages, fetch replies and ask which nodes are connected. Flower's own calls wait as long
as a reply is on its way or a SuperLink hangs, and raise where a database is busy for a moment.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedgradnorm.errors import StoppedError, described
from fedgradnorm.flower.local_grid import LocalGrid
from fedgradnorm.flower.records import REFUSAL

log = logging.getLogger(__name__)

POLL, POLLS = 0.5, 50.0
"""Seconds between two looks for one reply, and the maximum number of looks a second for all."""
AGAIN = 2.0
"""Seconds until a failed call is repeated."""


@dataclass(frozen=True)
class Exchange:
    """The replies that have come back.

    Attributes:
        replies: the replies that came in time, in that order.
        seconds: how long the exchange waited.
        early: whether it waited less than the time given, as enough clients had answered.
        failed: by message id, the last error in sending it or in fetching its reply. The client is
            not at fault.
    """

    replies: Sequence[Message]
    seconds: float
    early: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float, enough: int | None = None
) -> Exchange:
    """Send messages, and wait for the replies.

    Args:
        grid: Flower's.
        messages: the messages.
        timeout: seconds from now after which no reply counts.
        enough: when this number of nodes has answered without an error or a refusal, the others get
            the same time again. None: they get all the time.

    Raises:
        BaseException: the grid raised an error that is not an `Exception`, such as when the run has
            been stopped.
    """
    if not messages:
        return Exchange((), 0.0)
    if isinstance(grid, LocalGrid):  # its nodes answer while messages are sent
        return Exchange(grid.send_and_receive(messages), timeout)
    post = _Post(grid, messages, timeout)
    replies: list[Message] = []
    pending, answered, wait = len(messages), 0, timeout
    while pending and (reply := post.next(wait)) is not _NOTHING:
        pending -= 1
        if reply is None:
            continue
        replies.append(reply)
        if not reply.has_error() and REFUSAL not in reply.content:
            answered += 1
            if answered == enough:
                wait = min(timeout, 2 * max(post.seconds(), post.poll))
    failed = dict(list(post.failed.items()))  # threads may still add to it
    if failed:
        text = "the SuperLink failed in %d of %d exchanges, the last: %s"
        log.warning(text, len(failed), len(messages), list(failed.values())[-1])
    seconds, early = wait if pending else post.seconds(), bool(pending) and wait < timeout
    return Exchange(replies, seconds, early, failed)


def node_ids(grid: Grid, timeout: float) -> set[int]:
    """The nodes that are connected.

    Args:
        grid: Flower's.
        timeout: seconds after which a SuperLink that fails or does not answer ends the run.

    Raises:
        StoppedError: it has not answered in this time.
    """
    if isinstance(grid, LocalGrid):
        return set(grid.get_node_ids())
    answers: SimpleQueue[Any] = SimpleQueue()
    end, errors = time.monotonic() + timeout, list[str]()

    def ask() -> None:
        while True:
            try:
                answers.put(set(grid.get_node_ids()))
                return
            except Exception as error:  # noqa: BLE001  # such as a busy database
                errors.append(described(error))
            if time.monotonic() >= end:
                return
            time.sleep(AGAIN)

    _begin(ask, answers)
    try:
        return _raised(answers.get(timeout=timeout + AGAIN))  # type: ignore[no-any-return]
    except Empty:
        why = f": {errors[-1]}" if errors else ""
        missing = f"within {timeout:g} s which nodes are connected{why}"
        raise StoppedError(f"the SuperLink has not said {missing}") from None


_NOTHING: Any = object()


class _Post:
    """Messages on their way: one thread sends them, and one for each message fetches the reply."""

    def __init__(self, grid: Grid, messages: Sequence[Message], timeout: float) -> None:
        self.grid, self.messages = grid, messages
        self.start, self.end = time.monotonic(), time.monotonic() + timeout
        self.poll = max(POLL, len(messages) / POLLS)
        self.failed: dict[str, str] = {}
        self._came: SimpleQueue[Any] = SimpleQueue()
        _begin(self._send, self._came)

    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.start

    def next(self, wait: float) -> Any:
        """The next reply; None: a message was not sent; `_NOTHING`: ``wait`` seconds are over."""
        try:
            return _raised(self._came.get(timeout=max(0.0, self.start + wait - time.monotonic())))
        except Empty:
            return _NOTHING

    def _send(self) -> None:
        while True:
            try:
                ids = list(self.grid.push_messages(self.messages)) or [""] * len(self.messages)
                break
            except Exception as error:  # noqa: BLE001  # such as a busy database
                ids = [message.metadata.message_id for message in self.messages]
                self.failed |= dict.fromkeys(ids, described(error))
            if time.monotonic() >= self.end:
                return
            time.sleep(AGAIN)
        for id in ids:
            if id:
                self.failed.pop(id, None)
                _begin(partial(self._fetch, id), self._came)
            else:
                self._came.put(None)  # it could not be sent

    def _fetch(self, id: str) -> None:
        # a reply that nobody waits for is fetched too: the SuperLink keeps it until then
        while time.monotonic() < self.end:
            try:
                for reply in self.grid.pull_messages([id]):
                    self._came.put(reply)
                    return
            except Exception as error:  # noqa: BLE001
                self.failed[id] = described(error)
            time.sleep(self.poll)


def _begin(work: Callable[[], None], came: "SimpleQueue[Any]") -> None:
    """Do work in a thread. An error that it raises is put into the queue of its results."""

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised again where the result is taken
            came.put(error)

    Thread(target=copy_context().run, args=(guarded,), daemon=True).start()


def _raised(result: Any) -> Any:
    if isinstance(result, BaseException):
        raise result
    return result
