"""One client after another, in plain torch: every other engine is compared with this one."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedgradnorm.client import ClientState, evaluate_client, initial_state, load_model, local_update
from fedgradnorm.engine import Engine
from fedgradnorm.errors import require
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.federation import Federation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.parameters import buffers_of, norm_layer_slices
from fedgradnorm.threads import kernel_threads


class ReferenceEngine(Engine):
    """A plain loop over the clients, on the CPU.

    Args:
        federation: the clients.
        seed: of the heads' initialisation.
        threads: kernel threads while it works. With one, sums do not depend on the number of
            cores, and kernels do not wait for other processes. More threads help where kernels
            are large and cores are free.

    Raises:
        ConfigError: ``threads`` is out of range.
    """

    def __init__(self, federation: Federation, seed: int, threads: int = 1) -> None:
        require(1 <= threads <= 1024, "threads", "a number from 1 to 1024", threads)
        self.federation, self.seed, self.threads = federation, seed, threads
        self.encoder = federation.make_encoder(seed)  # scratch space, as the heads are
        clients = federation.clients
        self.heads = {client.id: federation.make_head(client, seed) for client in clients}
        self.norm_layer = norm_layer_slices(self.encoder, federation.norm_layer)
        buffers = buffers_of(self.encoder)
        self._states = {own.id: initial_state(federation, own, seed, buffers) for own in clients}

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """The state of every client, by id."""
        return dict(self._states)

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back."""
        self._states = dict(states)

    def execute(self, instructions: Sequence[Instruction]) -> list[Report]:
        """Let the instructed clients train, one after another."""
        reports = []
        with kernel_threads(self.threads):
            for instruction in instructions:
                id = instruction.client
                client, models = self.federation.client(id), (self.encoder, self.heads[id])
                report, self._states[id] = local_update(
                    client, *models, self.norm_layer, self._states[id], instruction
                )
                reports.append(report)
        return reports

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> dict[str, Evaluation]:
        """Test every client that has test data."""
        evaluations = {}
        with kernel_threads(self.threads):
            for client in self.federation.clients:
                if client.test_data is not None:
                    models = self.encoder, self.heads[client.id]
                    load_model(*models, self._states[client.id], encoder, buffers)
                    evaluation = evaluate_client(client, *models, self.seed, batch_size)
                    evaluations[client.id] = evaluation
        return evaluations
