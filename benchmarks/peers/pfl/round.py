"""FedRep in pfl-research: federated averaging of the encoders in its simulation, the heads in its storage of users' states.

    python benchmarks/peers/pfl/round.py --workload W1 --clients 10 --rounds 9

Each process trains its clients one after another: one process on torch's own threads, or --processes of them on one thread each.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import ENCODER, HEAD, arguments, batches, first_encoder, first_head, peak_rss_mb, report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.context import CentralContext
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.data.user_state import AbstractUserStateStorage, InMemoryUserStateStorage
from pfl.exception import UserNotFoundError
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.bridge import FrameworkBridgeFactory
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.stats import MappedVectorStatistics
from workloads import WORKLOADS, Workload

LOSS = StringMetricName("loss of the encoder's steps")


class Network(nn.Module):
    """An encoder and a head, with the two functions that pfl asks of a model."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.encoder = first_encoder(workload)
        self.head = workload.head()
        self.losses: list[Tensor] = []

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a mini-batch, which is noted."""
        loss = functional.cross_entropy(self.head(self.encoder(inputs)), targets)
        self.losses.append(loss.detach())
        return loss

    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Weighted]:
        """None: nothing is evaluated."""
        return {}


class Shuffled(PyTorchTensorDataset):
    """A client's data in shuffled mini-batches without end, of which pfl takes as many as its steps.

    pfl's own datasets are gone through once, in order.
    """

    def __init__(
        self, workload: Workload, client: int, round: int, phase: int, tensors: tuple[Tensor, ...]
    ) -> None:
        super().__init__(tensors)
        self._batches = batches(tensors, workload, client, round, phase)

    def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
        """The mini-batches."""
        return self._batches


@dataclass(frozen=True)
class FedRepParams(NNAlgorithmParams):
    """What FedRep needs beside the parameters of every algorithm.

    Attributes:
        workload: sets the numbers of steps.
        heads: keeps each client's head.
    """

    workload: Workload
    heads: AbstractUserStateStorage


class FedRep(FederatedAveraging):
    """Federated averaging in which each client first trains a head of its own; only what the model shares, the encoder, is averaged."""

    def train_one_user(
        self,
        initial_model_state: MappedVectorStatistics,
        model: PyTorchModel,
        user_dataset: PyTorchTensorDataset,
        central_context: CentralContext,
    ) -> tuple[MappedVectorStatistics, Metrics]:
        """Train the head with the encoder frozen, then the encoder with the head frozen."""
        params, network = central_context.algorithm_params, model.pytorch_model
        client, workload = user_dataset.user_id, params.workload
        try:
            head = params.heads.load_state(client)
        except UserNotFoundError:
            head = first_head(workload, int(client)).state_dict()
        network.head.load_state_dict(head)
        for phase, steps in ((HEAD, workload.head_steps), (ENCODER, workload.encoder_steps)):
            network.head.requires_grad_(phase == HEAD)
            network.encoder.requires_grad_(phase == ENCODER)
            network.losses.clear()
            FrameworkBridgeFactory.sgd_bridge().do_sgd(
                model,
                Shuffled(
                    workload,
                    int(client),
                    central_context.current_central_iteration + 1,
                    phase,
                    user_dataset.raw_data,
                ),
                central_context.model_train_params.static_clone(local_num_steps=steps),
            )
        params.heads.save_state(
            {name: tensor.clone() for name, tensor in network.head.state_dict().items()}, client
        )
        return model.get_model_difference(initial_model_state), Metrics(
            [(LOSS, Weighted(float(torch.stack(network.losses).sum()), len(network.losses)))]
        )


class Clock(TrainingProcessCallback):
    """Notes when each round ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.loss = float("nan")

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Called by pfl after the model's update."""
        self.ends.append(time.perf_counter())
        self.loss = float(aggregate_metrics[LOSS].overall_value)
        return False, Metrics()


def main() -> None:
    """Run the rounds and print the report."""
    parser = arguments()
    parser.add_argument(
        "--processes", type=int, default=1, help="must divide the number of clients"
    )
    args = parser.parse_args()
    if args.clients % args.processes:
        parser.error("--processes must divide the number of clients")
    if args.processes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={args.processes}",
        ]
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])  # noqa: S606 (no shell wanted)
    workload = WORKLOADS[args.workload]
    network = Network(workload)
    # pfl's model shares the parameters that ask for a gradient when it is made: not the head's, which stay with the clients.
    network.head.requires_grad_(False)
    model = PyTorchModel(
        network, torch.optim.SGD, torch.optim.SGD(network.encoder.parameters(), lr=1.0)
    )
    datasets = {
        str(client): PyTorchTensorDataset(workload.data(client), user_id=str(client))
        for client in range(args.clients)
    }
    # This sampler goes through all clients in turn, so that a cohort of all of them is each once, and pfl deals them out to the processes
    # in turn too: where these divide the clients, each client keeps to one process, and so may its head.
    population = FederatedDataset(
        datasets.__getitem__, get_user_sampler("minimize_reuse", list(datasets))
    )
    clock = Clock()
    FedRep().run(
        FedRepParams(
            central_num_iterations=args.rounds,
            evaluation_frequency=args.rounds,  # pfl does evaluate in the first round, which is not reported
            train_cohort_size=args.clients,
            val_cohort_size=0,
            workload=workload,
            heads=InMemoryUserStateStorage(),
        ),
        SimulatedBackend(training_data=population, val_data=population),
        model,
        NNTrainHyperParams(
            local_batch_size=workload.batch_size,
            local_num_epochs=None,
            local_num_steps=1,
            local_learning_rate=workload.step_size,
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,  # which would print them
    )
    if args.processes == 1:
        report("pfl", "pfl", args, clock.ends, clock.loss, peak_rss_mb(os.getpid()))
        return
    if torch.distributed.get_rank() == 0:
        report(
            "pfl", "pfl", args, clock.ends, clock.loss, peak_rss_mb(os.getppid())
        )  # the launcher and all that it launched
    torch.distributed.barrier()  # so that all live until then
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
