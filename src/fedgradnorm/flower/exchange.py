"""Messages out and replies back within a time that holds, whatever Flower's own calls wait for."""

import logging
import time
from collections import Counter
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

log = logging.getLogger(__name__)

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
    every reply is fetched in a thread of its own, which is left alone when the time is over. A fetch that fails is tried again until then.

    Args:
        grid: Flower's.
        messages: to whom and what.
        timeout: seconds from now until no reply counts any more.
        enough: when so many have answered without an error, the others have as long again as that took. None: they have all of the time.

    Raises:
        Exception: what the grid raises while messages are sent.
    """
    if not messages:
        return Exchange((), 0.0)
    if isinstance(grid, LocalGrid):  # its nodes answer while messages are sent
        return Exchange(grid.send_and_receive(messages), timeout)
    came: SimpleQueue[Message | Exception | None] = SimpleQueue()
    over, poll = Event(), max(POLL, len(messages) / POLLS)
    start, failed = time.monotonic(), Counter[str]()

    def send() -> None:
        try:
            ids = list(grid.push_messages(messages))
        except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
            came.put(error)
            return
        for id in ids or [""] * len(messages):
            if id:
                begin(partial(fetch, id))
            else:
                came.put(None)  # it could not be sent

    def fetch(id: str) -> None:
        while not over.is_set():
            try:
                for reply in grid.pull_messages([id]):
                    came.put(reply)
                    return
            except Exception as error:  # noqa: BLE001  # such as a SuperLink's database that is busy
                failed[type(error).__name__] += 1
            over.wait(poll)

    def begin(work: Callable[[], None]) -> None:
        Thread(target=copy_context().run, args=(work,), daemon=True).start()

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
            if not found.has_error():
                answered += 1
                if answered == enough:
                    wait = min(timeout, max(2 * (time.monotonic() - start), 2 * poll))
    finally:
        over.set()
        if failed:
            how_often = ", ".join(f"{name} ({times})" for name, times in failed.items())
            log.warning("fetching replies failed, and was tried again: %s", how_often)
    return Exchange(replies, wait if pending else time.monotonic() - start, bool(pending) and wait < timeout)
