"""An engine that sends Flower messages within this process."""

from collections.abc import Callable, Mapping

from flwr.app import Context, Message

from fedgradnorm.client import ClientState
from fedgradnorm.errors import require
from fedgradnorm.federation import Client, Federation
from fedgradnorm.flower.client import Node
from fedgradnorm.flower.engine import GridEngine
from fedgradnorm.flower.local_grid import LocalGrid
from fedgradnorm.flower.roster import roster_of
from fedgradnorm.flower.states import MemoryStates
from fedgradnorm.messages import Report
from fedgradnorm.threads import kernel_threads


class FlowerLocalEngine(GridEngine):
    """Flower messages in this process, without Ray: the same messages as between machines.

    The clients' states stay in memory.

    Args:
        federation: the clients.
        seed: for the initialisation of the models.
        threads: kernel threads, as in `ReferenceEngine`.
    """

    def __init__(self, federation: Federation, seed: int, threads: int = 1) -> None:
        require(1 <= threads <= 1024, "threads", "a number from 1 to 1024", threads)
        self._stores = {client.id: MemoryStates() for client in federation.clients}

        def node_of(client: Client) -> Node:
            return Node(federation, client, seed, lambda _: self._stores[client.id])

        nodes = [node_of(client) for client in federation.clients]

        def answering(node: Node) -> Callable[[Message, Context], Message]:
            def answer(message: Message, _: Context) -> Message:
                with kernel_threads(threads):
                    return node.answer(message)

            return answer

        grid = LocalGrid({number: answering(node) for number, node in enumerate(nodes, start=2)})
        super().__init__(grid, roster_of(federation), nodes[0].layout)
        self.experiment = "local"
        self.rounds.states = {node.client.id: node.initial for node in nodes}

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back."""
        for id, state in states.items():
            if state.round:
                self._stores[id].by_round[state.round] = state
        super().restore(states)

    def _took(self, id: str, report: Report) -> None:
        self.rounds.states[id] = self._stores[id].load(report.round)
