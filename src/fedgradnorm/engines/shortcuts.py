"""The shortcuts that are in use: for each kind of clients a plan, programs and stacks."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TypeAlias

import torch
from torch import nn

from fedgradnorm.config import MethodConfig, TrainConfig
from fedgradnorm.data import size
from fedgradnorm.engines.jobs import FEWEST_STACKED
from fedgradnorm.engines.looped import WITHOUT_PROGRAMS, Programs
from fedgradnorm.engines.placement import client_on
from fedgradnorm.engines.planning import Plan, batch_of, plan_for, programs_for
from fedgradnorm.engines.stacked import Stack, stack_of
from fedgradnorm.engines.workspace import Workspace, can_be_arranged, holds_more_than_its_state
from fedgradnorm.errors import warn
from fedgradnorm.evaluation import EVALUATION_BATCH
from fedgradnorm.federation import Client, Federation
from fedgradnorm.threads import kernel_threads

log = logging.getLogger(__name__)

Kind: TypeAlias = tuple[object, ...]
"""What clients that are trained in the same way have in common."""

WAYS = {
    "alone": "one at a time, while no other is trained",
    "looped": "one at a time",
    "stacked": f"stacked where {FEWEST_STACKED} or more are alike",
}


class Shortcuts:
    """Finds the shortcuts of every kind of clients, keeps them, and drops those that are wrong.

    Args:
        federation: the clients and models.
        seed: of the models' initialisation.
        device: where clients train.

    Attributes:
        own: the scratch models of the main thread, which are never arranged for speed.
        plan_of: each client's plan, by id.
        kind_of: each client's kind, by id.
    """

    def __init__(self, federation: Federation, seed: int, device: torch.device) -> None:
        self.federation, self.seed, self.device = federation, seed, device
        self.own = Workspace(federation, seed, device)
        self.plan_of: dict[str, Plan] = {}
        self.kind_of: dict[str, Kind] = {}
        self._with_own_head: set[str] = set()
        self._clients: dict[str, Client] = {}
        self._planned_for: tuple[int, MethodConfig] | None = None
        self._clear(arranged=False)

    def _clear(self, *, arranged: bool) -> None:
        self._arranged = arranged
        self._workspaces: SimpleQueue[Workspace] = SimpleQueue()
        self._plans: dict[Kind, Plan] = {}
        self._programs: dict[Kind, Programs] = {}
        self._stacks: dict[Kind, Stack] = {}

    def plan(self, training: TrainConfig) -> None:
        """Plan for every client of the federation, once for each batch size and method.

        All clients are planned for at once, so a run that is resumed with other participants
        trains them in the same ways.
        """
        if self._planned_for == (training.batch_size, training.method):
            return
        clients = sorted(self.federation.clients, key=lambda client: client.id)
        with kernel_threads(1):
            self._clear(arranged=self._can_be_arranged(clients, training))
            self.kind_of = {client.id: self._kind(client, training) for client in clients}
            self.plan_of = {client.id: self._plan(client, training) for client in clients}
            for client in clients:
                alone = self.plan_of[client.id].way == "alone"
                if alone or holds_more_than_its_state(self.own.head(client)):
                    self._with_own_head.add(client.id)
                    self.own.own_head(client)
        self._planned_for = training.batch_size, training.method

    def _can_be_arranged(self, clients: Iterable[Client], training: TrainConfig) -> bool:
        for client in clients:
            if isinstance(client.train_data, tuple):  # other data sets are not read twice
                inputs, _ = batch_of(client, training, self.device)
                return can_be_arranged(self.federation, self.seed, self.device, inputs)
        return False

    def _kind(self, client: Client, training: TrainConfig) -> Kind:
        data = client.train_data
        shapes = [(part.shape[1:], part.dtype) for part in data] if isinstance(data, tuple) else []
        batch, many = min(training.batch_size, size(data)), size(data) > EVALUATION_BATCH
        return self.federation.head_kind(client, self.seed), *shapes, batch, many

    def _plan(self, client: Client, training: TrainConfig) -> Plan:
        kind = self.kind_of[client.id]
        if kind not in self._plans:
            self._plans[kind] = plan = plan_for(client, self.own, training)
            often = "once for all head steps" if plan.encode_once else "in every head step"
            alike = f"{client.id}, and clients like it"
            log.info("%s: %s, encoded %s: %s", alike, WAYS[plan.way], often, plan.why)
        return self._plans[kind]

    def programs(self, client: Client, training: TrainConfig) -> Programs:
        """The programs of a single client. Others like it may be in stacks."""
        plan, kind = self.plan_of[client.id], self.kind_of[client.id]
        if not plan.traceable:
            return WITHOUT_PROGRAMS
        if kind not in self._programs:
            with self.workspace() as workspace, kernel_threads(1):
                self._programs[kind] = programs = programs_for(client, workspace, training)
            names = [name for name, phase in programs._asdict().items() if phase is not None]
            steps = " and ".join(names) or "nothing"
            log.info("%s, and clients like it: programs of the steps on %s", client.id, steps)
        return self._programs[kind]

    def stack(self, client: Client, training: TrainConfig, width: int) -> Stack:
        """A stack of clients like this one."""
        key = (*self.kind_of[client.id], width)
        if key not in self._stacks:
            with self.workspace() as workspace, kernel_threads(1):
                batch = batch_of(client, training, self.device)
                self._stacks[key] = stack_of(client, workspace, batch, width)
        return self._stacks[key]

    def client(self, id: str) -> Client:
        """A client, with its data on the device."""
        if id not in self._clients:
            self._clients[id] = client_on(self.device, self.federation.client(id))
        return self._clients[id]

    def head_alone(self, client: Client) -> nn.Module:
        """The head of a client in a model without shortcuts."""
        own = client.id in self._with_own_head
        return self.own.own_head(client) if own else self.own.head(client)

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Scratch models that no other worker is using."""
        try:
            workspace = self._workspaces.get_nowait()
        except Empty:
            workspace = Workspace(self.federation, self.seed, self.device, self._arranged)
        yield workspace
        self._workspaces.put(workspace)

    def changed(self) -> dict[Kind, str]:
        """For each kind whose Python values differ from when it was planned, which value."""
        reasons = {}
        for kind, plan in self._plans.items():
            if plan.watch is not None and (place := plan.watch.changed()) is not None:
                reasons[kind] = f"{place} has another value than when training began"
        return reasons

    def watched(self) -> list[Kind]:
        """The kinds that have shortcuts."""
        return [kind for kind, plan in self._plans.items() if plan.watch is not None]

    def put_back(self, kinds: Iterable[Kind]) -> None:
        """Restore the Python values that calls of the code of these kinds have changed."""
        for kind in kinds:
            if (watch := self._plans[kind].watch) is not None:
                watch.put_back()

    def drop(self, reasons: Mapping[Kind, str]) -> None:
        """Train these kinds without shortcuts from now on."""
        for kind, reason in reasons.items():
            self._plans[kind] = Plan("alone", False, reason)
            self.plan_of |= dict.fromkeys(self._clients_of(kind), self._plans[kind])

    def drop_changed(self) -> None:
        """Drop the shortcuts of the kinds whose Python values have changed, and say so."""
        self.own.follow()
        changed = self.changed()
        self.drop(changed)
        self.say(changed)

    def say(self, reasons: Mapping[Kind, str]) -> None:
        """Warn that these kinds are trained without shortcuts."""
        for kind, reason in reasons.items():
            first, *others = self._clients_of(kind)
            clients = f"client '{first}'" + (f" and {len(others)} like it" if others else "")
            warn(
                f"{clients}: {reason}: from now on trained without shortcuts, which takes longer"
                " and gives the numbers of the code as it is"
            )

    def _clients_of(self, kind: Kind) -> list[str]:
        return [client for client, own in self.kind_of.items() if own == kind]
