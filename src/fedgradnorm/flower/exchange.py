"""Calls to a SuperLink that end when their time is over, and are made again while they fail: messages out, replies back, who is there.

Flower's own calls wait for as long as a reply is on its way, or a SuperLink hangs, and raise for a database that is busy for a moment.
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

__all__ = ["Exchange", "exchange", "node_ids"]

log = logging.getLogger(__name__)

POLL, POLLS = 0.5, 50.0
"""Seconds between two looks for one reply, and how many looks a second there are at most over all replies."""
AGAIN = 2.0
"""Seconds until a call that failed is made again."""


@dataclass(frozen=True)
class Exchange:
    """What has come back.

    Attributes:
        replies: those that came in time, in the order in which they came.
        seconds: how long was waited.
        early: whether that was less than the time given, as enough had answered.
        failed: by the id of a message, with what error sending it or fetching its reply failed last: no fault of the client.
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
        messages: to whom and what.
        timeout: seconds from now until no reply counts any more.
        enough: when that number has answered without an error, the others have as long again as that took. None: they have all of the time.

    Raises:
        BaseException: what the grid raises that is no `Exception`, such as that the run has been stopped.
    """
    if not messages:
        return Exchange((), 0.0)
    if isinstance(grid, LocalGrid):  # its nodes answer while messages are sent
        return Exchange(grid.send_and_receive(messages), timeout)
    post = _Post(grid, messages, timeout)
    replies: list[Message] = []
    pending, answered, wait = len(messages), 0, timeout
    while pending and (found := post.next(wait)) is not _NOTHING:
        pending -= 1
        if found is None:
            continue
        replies.append(found)
        if not found.has_error():
            answered += 1
            if answered == enough:
                wait = min(timeout, 2 * max(post.seconds(), post.poll))
    failed = dict(list(post.failed.items()))  # threads may still add to it
    if failed:
        log.warning(
            "the SuperLink failed in %d of %d exchanges, the last: %s",
            len(failed),
            len(messages),
            list(failed.values())[-1],
        )
    return Exchange(
        replies, wait if pending else post.seconds(), bool(pending) and wait < timeout, failed
    )


def node_ids(grid: Grid, timeout: float) -> set[int]:
    """The nodes that are connected.

    Args:
        grid: Flower's.
        timeout: seconds until a SuperLink that fails or does not answer ends the run.

    Raises:
        StoppedError: it has not answered in this time.
    """
    if isinstance(grid, LocalGrid):
        return set(grid.get_node_ids())
    found: SimpleQueue[Any] = SimpleQueue()
    end, errors = time.monotonic() + timeout, list[str]()

    def ask() -> None:
        while True:
            try:
                found.put(set(grid.get_node_ids()))
                return
            except Exception as error:  # noqa: BLE001  # such as a SuperLink's database that is busy
                errors.append(described(error))
            if time.monotonic() >= end:
                return
            time.sleep(AGAIN)

    _begin(ask, found)
    try:
        return _raised(found.get(timeout=timeout + AGAIN))  # type: ignore[no-any-return]
    except Empty:
        why = f": {errors[-1]}" if errors else ""
        raise StoppedError(
            f"the SuperLink has not said within {timeout:g} s which nodes are connected{why}"
        ) from None


_NOTHING: Any = object()


class _Post:
    """Messages on their way: one thread sends them, and one for each fetches its reply and is left alone when the time is over."""

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
        """The next reply; None for a message that has none to wait for; `_NOTHING` when this number of seconds is over, from the start."""
        try:
            return _raised(self._came.get(timeout=max(0.0, self.start + wait - time.monotonic())))
        except Empty:
            return _NOTHING

    def _send(self) -> None:
        while True:
            try:
                ids = list(self.grid.push_messages(self.messages)) or [""] * len(self.messages)
                break
            except Exception as error:  # noqa: BLE001  # such as a SuperLink's database that is busy
                self.failed |= dict.fromkeys(
                    (message.metadata.message_id for message in self.messages), described(error)
                )
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
        while (
            time.monotonic() < self.end
        ):  # a reply that nobody waits for is fetched as well, for the SuperLink keeps it until then
            try:
                for reply in self.grid.pull_messages([id]):
                    self._came.put(reply)
                    return
            except Exception as error:  # noqa: BLE001
                self.failed[id] = described(error)
            time.sleep(self.poll)


def _begin(work: Callable[[], None], came: "SimpleQueue[Any]") -> None:
    """Do some work in a thread; what it raises is put where its results are."""

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            came.put(error)

    Thread(target=copy_context().run, args=(guarded,), daemon=True).start()


def _raised(found: Any) -> Any:
    if isinstance(found, BaseException):
        raise found
    return found
