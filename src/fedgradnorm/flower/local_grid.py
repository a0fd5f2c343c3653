"""A Grid in one process, without Ray: a message to a node is a call."""

import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import DEFAULT_TTL, Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

SERVER_NODE = 1
RAISED = 2  # Flower's code for a ClientApp that raised


class LocalGrid(Grid):
    """Nodes in this process, for tests and for trying an app on one machine.

    Args:
        nodes: by node id, what answers messages: a ClientApp.
        contexts: by node id, the context for its app; by default one with ``partition-id``.
    """

    def __init__(
        self,
        nodes: Mapping[int, Callable[[Message, Context], Message]],
        contexts: Mapping[int, Context] | None = None,
    ) -> None:
        self.nodes = dict(nodes)
        self.contexts = dict(contexts or {})
        for place, node in enumerate(self.nodes):
            context = Context(1, node, {"partition-id": place}, RecordDict(), {})
            self.contexts.setdefault(node, context)
        self._run: Any = None
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node, made without a Flower process."""
        now, ttl = time.time(), ttl or DEFAULT_TTL
        metadata = Metadata(1, "", SERVER_NODE, dst_node_id, "", group_id, now, ttl, message_type)
        make: Any = Message  # as Flower itself does in its own process
        message: Message = make(content=content, metadata=metadata)
        return message

    def get_node_ids(self) -> list[int]:
        """The ids of the nodes."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Let the nodes answer, one after another."""
        ids = []
        for message in messages:
            id = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = id
            self._replies[id] = self.answer(message)
            ids.append(id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, each once."""
        return [self._replies.pop(id) for id in message_ids if id in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The replies to these messages; they take no time to wait for."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def answer(self, message: Message) -> Message:
        """A node's reply to a message; an error message where its app raises or it is gone."""
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return Message(Error(5, "the node is gone"), reply_to=message)
        try:
            reply = self.nodes[node](message, self.contexts[node])
            if not isinstance(reply, Message):
                found = type(reply).__name__
                raise TypeError(f"expected the app to answer with a Message, found {found}")
        except Exception as error:  # noqa: BLE001  # as a SuperNode does
            reason = "".join(traceback.format_exception_only(error)).strip()
            return Message(Error(RAISED, reason), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(next(self._numbers))
        return reply
