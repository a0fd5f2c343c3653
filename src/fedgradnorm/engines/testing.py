"""Tests clients beside each other where that gives the same numbers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedgradnorm.client import ClientState, evaluate_client, load_head, load_model
from fedgradnorm.data import size, tensors
from fedgradnorm.engines.failures import Attempt
from fedgradnorm.engines.jobs import chunks, each
from fedgradnorm.engines.shortcuts import Shortcuts
from fedgradnorm.engines.workspace import Workspace, encode
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation, evaluate, evaluation_of
from fedgradnorm.federation import Client
from fedgradnorm.parameters import load_flat
from fedgradnorm.randomness import Generators
from fedgradnorm.threads import kernel_threads

TESTED_TOGETHER = 200
"""Number of small clients whose test data pass through the encoder at once."""


class Tested(NamedTuple):
    """What is tested.

    Attributes:
        states: each client's state, by id.
        encoder: ω, shape ``(P,)``.
        buffers: the averaged buffers of the encoder, by name.
        batch_size: the number of examples in one pass.
    """

    states: Mapping[str, ClientState]
    encoder: Tensor
    buffers: Mapping[str, Tensor]
    batch_size: int

    def load(self, workspace: Workspace, head: nn.Module, client: Client) -> None:
        """Load a client's model."""
        load_model(workspace.encoder, head, self.states[client.id], self.encoder, self.buffers)


class Tests:
    """Tests of a federation's clients.

    Args:
        shortcuts: which clients bear that others are tested beside them.
    """

    def __init__(self, shortcuts: Shortcuts) -> None:
        self.shortcuts, self._draw = shortcuts, False

    def run(self, tested: Tested, threads: int) -> dict[str, Evaluation]:
        """Test every client that has test data."""
        device, everyone = self.shortcuts.device, self.shortcuts.federation.clients
        with_tests = [client.id for client in everyone if client.test_data is not None]
        clients = [self.shortcuts.client(id) for id in with_tests]
        at_once, in_turn = self._groups(clients, tested.batch_size)
        before, test = Generators.now(device), partial(self._together, tested)
        evaluations: dict[str, Evaluation] = {}
        for group, results in zip(at_once, each(test, threads, 1, at_once), strict=True):
            evaluations |= results
            in_turn += [] if results else group
        if Generators.now(device) != before:
            # A metric may draw: then clients are tested one after another, each with its own seed.
            before.put_back(device)
            self._draw, in_turn = True, clients
        with kernel_threads(1):
            for client in in_turn:
                head, own = self.shortcuts.head_alone(client), self.shortcuts.own
                tested.load(own, head, client)
                evaluations[client.id] = evaluate_client(
                    client, own.encoder, head, own.seed, tested.batch_size
                )
        return {client.id: evaluations[client.id] for client in clients}

    def _groups(
        self, clients: Sequence[Client], batch_size: int
    ) -> tuple[list[list[Client]], list[Client]]:
        """Which clients are tested together, and which only while no other is tested."""
        small: dict[object, list[Client]] = {}
        in_turn: list[Client] = []
        at_once: list[list[Client]] = []
        for client in clients:
            if self._is_small(client, batch_size) and isinstance(client.test_data, tuple):
                inputs, _ = client.test_data
                small.setdefault((inputs.shape[1:], inputs.dtype), []).append(client)
            elif self._is_alone(client):
                in_turn.append(client)
            else:
                at_once.append([client])
        at_once += [chunk for alike in small.values() for chunk in chunks(alike, TESTED_TOGETHER)]
        return at_once, in_turn

    def _is_alone(self, client: Client) -> bool:
        """Whether a client is tested while no other is: it may draw, or have a data set."""
        plan = self.shortcuts.plan_of.get(client.id)
        planned = plan is not None and plan.way != "alone"
        return self._draw or not planned or not isinstance(client.test_data, tuple)

    def _is_small(self, client: Client, batch_size: int) -> bool:
        """Whether a client's test data may pass through the encoder together with others'."""
        plan, data = self.shortcuts.plan_of.get(client.id), client.test_data
        small = isinstance(data, tuple) and size(data) <= min(EVALUATION_BATCH, batch_size)
        return small and plan is not None and plan.way == "stacked" and not self._draw

    def _together(self, tested: Tested, clients: Sequence[Client]) -> dict[str, Evaluation]:
        """The evaluations of some clients. None where that fails: then each is tested alone."""
        with Attempt("clients are tested one at a time"), self.shortcuts.workspace() as workspace:
            if self._is_small(clients[0], tested.batch_size):
                return _evaluations(clients, tested.states, tested.encoder, workspace)
            evaluations = {}
            for client in clients:
                head = workspace.head(client)
                tested.load(workspace, head, client)
                if client.test_data is not None:
                    evaluations[client.id] = evaluate(
                        client.task, workspace.encoder, head, client.test_data, tested.batch_size
                    )
            return evaluations
        return {}


@torch.no_grad()
def _evaluations(
    clients: Sequence[Client],
    states: Mapping[str, ClientState],
    encoder: Tensor,
    workspace: Workspace,
) -> dict[str, Evaluation]:
    """`client.evaluate_client` for many clients, whose test data are tensors.

    All inputs pass through the encoder at once.
    """
    load_flat(workspace.encoder, encoder)
    data = [tensors(client.test_data) for client in clients if client.test_data is not None]
    features = encode(
        workspace.encoder.eval(), torch.cat([inputs for inputs, _ in data]).to(workspace.device)
    )
    evaluations = {}
    parts = features.split([len(inputs) for inputs, _ in data])
    for client, part, (_, targets) in zip(clients, parts, data, strict=True):
        head = workspace.head(client).eval()
        load_head(head, states[client.id].head)
        outputs, expected = head(part), targets.to(workspace.device)
        loss = client.task.loss(outputs.clone(), expected.clone())  # it may work in place
        evaluations[client.id] = evaluation_of(client.task, loss.item(), outputs, expected)
    return evaluations
