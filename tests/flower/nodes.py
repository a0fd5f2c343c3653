"""Nodes in this process that fail as told, a grid that records messages, and their twists."""

from collections.abc import Callable

import numpy as np
from flwr.app import Array, Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from fedgradnorm.callbacks.base import Functions
from fedgradnorm.config import RunConfig, RunSettings, TrainConfig
from fedgradnorm.flower import GridEngine, LocalGrid
from fedgradnorm.flower.client import Node
from fedgradnorm.flower.layout import Layout
from fedgradnorm.flower.limits import Limits
from fedgradnorm.flower.messages import control_of
from fedgradnorm.flower.roster import roster_of
from fedgradnorm.flower.states import MemoryStates
from fedgradnorm.flower.training import train_on_grid
from fedgradnorm.registry import build

Answer = Callable[[Message], Message]
Twist = Callable[[Message, Answer], Message | None]

QUICK = {"head_steps": 2, "encoder_steps": 2, "batch_size": 8, "eval_every": 2}
AT_ONCE = {"node_timeout": 0, "poll": 0.001, "ask_again": 0}


class Wire(LocalGrid):
    """A grid that sends messages as bytes, as between machines.

    A twist stands between the grid and a node's training.
    """

    def __init__(self, nodes=(), contexts=None):
        super().__init__(dict(nodes), contexts)
        self.twists: dict[int, Twist] = {}
        self.sent: list[bytes] = []
        self.messages: list[Message] = []

    def join(self, number, answer, **node_config):
        self.contexts[number] = Context(1, number, node_config, RecordDict(), {})
        self.nodes[number] = answer

    def copied(self, message):
        proto = message_to_proto(message)
        self.sent.append(proto.SerializeToString())
        self.messages.append(message_from_proto(proto))
        return message_from_proto(proto)

    def pull_messages(self, message_ids):
        return [
            self.copied(reply) for reply in super().pull_messages(message_ids) if reply is not None
        ]

    def answer(self, message):
        node, message = message.metadata.dst_node_id, self.copied(message)
        twist = self.twists.get(node)
        if twist is None or control_of(message).kind != "train":
            return super().answer(message)
        sound = self.nodes.get(node)
        reply = []

        def twisted(message, context):
            reply.append(twist(message, lambda one: sound(one, context)))
            return reply[0] if reply[0] is not None else sound(message, context)

        self.nodes[node] = twisted
        try:
            answered = super().answer(message)
        finally:
            self.nodes[node] = sound
        return None if reply == [None] else answered


class Site:
    """A federation on a wire: nodes 2, 3, ... stand for its clients."""

    def __init__(self, federation, seed=0, states=None):
        self.federation, self.seed, self.wire = federation, seed, Wire()
        self.stores = {client.id: MemoryStates() for client in federation.clients}
        self.states = states or (lambda client: lambda _: self.stores[client])
        for number, client in enumerate(federation.clients, start=2):
            self.join(number, client.id)

    def node(self, client):
        return Node(self.federation, self.federation.client(client), self.seed, self.states(client))

    def join(self, number, client):
        node = self.node(client)
        self.wire.join(number, lambda message, _: node.answer(message))

    def leave(self, number):
        del self.wire.nodes[number]

    def engine(self, keep=3, **limits):
        layout = Layout.of(self.federation.make_encoder(self.seed))
        engine = GridEngine(
            self.wire, roster_of(self.federation), layout, Limits(**{**AT_ONCE, **limits}), keep
        )
        engine.experiment = "experiment"
        return engine

    def train(
        self,
        run_dir=None,
        on_round=None,
        engine=None,
        start_round=None,
        should_stop=lambda: False,
        limits=None,
        **training,
    ):
        config = RunConfig(
            train=TrainConfig(**{**QUICK, "seed": self.seed, **training}),
            run=RunSettings(dir=None if run_dir is None else str(run_dir)),
        )
        weighting = build("weighting", config.weighting)
        return train_on_grid(
            config,
            engine or self.engine(**limits or {}),
            weighting,
            start_round,
            [Functions(on_round, should_stop)],
        )

    def heads(self, result):
        """Every client's head as the server counts it, by client and name."""
        return {
            client: {
                name: value.tolist()
                for name, value in self.states(client)("experiment").load(state.round).head.items()
            }
            for client, state in result.client_states.items()
            if state.round
        }


def dropped(rows, client):
    """By round, why a client was dropped."""
    return {
        row["round"]: row["dropped"] for row in rows if row["client"] == client and row["dropped"]
    }


def in_round(number, twist):
    """A twist in one round, or in the first attempt at it."""

    def twisted(message, answer):
        control = control_of(message)
        return (
            twist(message, answer)
            if (control.round, control.attempt) == (number, 0)
            else answer(message)
        )

    return twisted


def raising(_message, _answer):
    raise RuntimeError("no\nluck")


def lost(message, answer):
    """It trains, and its reply is lost."""
    answer(message)


def untouched(_message, _answer):
    """It never gets the message."""


def changed(change):
    """A twist that changes what a client answers."""

    def twist(message, answer):
        reply = answer(message)
        change(reply.content)
        return reply

    return twist


def with_nan(content):
    content["arrays"]["2.bias"] = Array(np.full(4, np.nan, np.float32))


def without_arrays(content):
    del content["arrays"]


def evaluating(site, number, change):
    """Let a node's evaluations be changed."""
    node = site.wire.nodes[number]

    def answer(message, context):
        reply = node(message, context)
        if message.metadata.message_type == "evaluate":
            change(reply.content)
        return reply

    site.wire.nodes[number] = answer


def with_loss(loss):
    def change(content):
        content["metrics"]["loss"] = loss

    return change


def notes_of(during):
    """The notes of every round, by round and client; `during` is an ``on_round`` that is called too."""
    seen = {}

    def note(rows):
        seen[rows[0]["round"]] = {row["client"]: row["notes"] for row in rows if "notes" in row}
        during(rows)

    return seen, note
