"""Messages out and replies back within a time that holds, whatever Flower's own calls wait for."""

import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread

from flwr.app import Message
from flwr.serverapp import Grid

from fedgradnorm.flower.local_grid import LocalGrid

__all__ = ["Exchange", "exchange"]

POLL, POLLS = 0.5, 50.0
"""Seconds between two looks for one reply, and how many looks a second there are at most over all replies."""


@dataclass(frozen=True)
class Exchange:
    """What has come back.

    Attributes:
        replies: those that came in time, in the order in which they came.
        seconds: how long was waited.
        early: whether that was less than the time given, as enough had answered.
    """

    replies: Sequence[Message]
    seconds: float
    early: bool = False


def exchange(grid: Grid, messages: Sequence[Message], timeout: float, enough: int | None = None) -> Exchange:
    """Send messages, and wait for the replies.

    Flower's own ``send_and_receive`` waits in one call until a reply that is on its way is whole, however long its node takes for it. Here
    every reply is fetched in a thread of its own, which is left alone when the time is over.

    Args:
        grid: Flower's.
        messages: to whom and what.
        timeout: seconds from now until no reply counts any more.
        enough: when so many have answered without an error, the others have as long again as that took. None: they have all of the time.

    Raises:
        Exception: what the grid raises while messages are sent or fetched.
    """
    if not messages:
        return Exchange((), 0.0)
    if isinstance(grid, LocalGrid):  # its nodes answer while messages are sent
        return Exchange(grid.send_and_receive(messages), timeout)
    came: SimpleQueue[Message | Exception | None] = SimpleQueue()
    over, poll = Event(), max(POLL, len(messages) / POLLS)
    start = time.monotonic()

    def send() -> None:
        ids = [id for id in grid.push_messages(messages) if id]
        for id in ids:
            begin(partial(fetch, id))
        for _ in range(len(messages) - len(ids)):
            came.put(None)  # it could not be sent

    def fetch(id: str) -> None:
        while not over.is_set():
            replies = list(grid.pull_messages([id]))
            if replies:
                came.put(replies[0])
                return
            over.wait(poll)

    def begin(work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
                came.put(error)

        Thread(target=copy_context().run, args=(guarded,), daemon=True).start()

    begin(send)
    replies: list[Message] = []
    pending, answered, wait = len(messages), 0, timeout
    try:
        while pending:
            try:
                found = came.get(timeout=max(0.0, start + wait - time.monotonic()))
            except Empty:
                break
            if isinstance(found, Exception):
                raise found
            pending -= 1
            if found is None:
                continue
            replies.append(found)
            answered += not found.has_error()
            if answered == enough:
                wait = min(timeout, max(2 * (time.monotonic() - start), 2 * poll))
    finally:
        over.set()
    return Exchange(replies, wait if pending else time.monotonic() - start, bool(pending) and wait < timeout)
