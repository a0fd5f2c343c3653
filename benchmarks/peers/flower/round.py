"""FedRep in Flower: FedAvg over the encoders in its simulation on Ray, the heads in the clients' state.

    python benchmarks/peers/flower/round.py --workload W1 --clients 10 --rounds 9

As many clients train at once as this process may use cores, each on one.
"""

import os
import sys
import time
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read on import
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # Flower hands this path on to Ray's workers
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import client_app
from common import arguments, first_encoder, peak_rss_mb, report
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workloads import WORKLOADS


def mean_loss(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:  # noqa: ARG001 (Flower's signature)
    """The mean loss of a round; and how many clients answered, since Flower goes on without those that failed."""
    return MetricRecord(
        {
            "loss": sum(float(reply["metrics"]["loss"]) for reply in replies) / len(replies),
            "replies": len(replies),
        }
    )


def main() -> None:
    """Run the rounds and print the report."""
    args = arguments().parse_args()
    ends: list[float] = []
    finals: list[float] = []
    server_app = ServerApp()

    def end_of_round(round: int, arrays: ArrayRecord) -> None:  # noqa: ARG001 (Flower's signature)
        # Flower calls its central evaluation right after the aggregation of every round, and once before the first one.
        if round > 0:
            ends.append(time.perf_counter())

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:  # noqa: ARG001 (Flower's signature)
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=args.clients,
            min_available_nodes=args.clients,
            train_metrics_aggr_fn=mean_loss,
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(first_encoder(WORKLOADS[args.workload]).state_dict()),
            num_rounds=args.rounds,
            train_config=ConfigRecord({"workload": args.workload}),
            evaluate_fn=end_of_round,
        )
        metrics = result.train_metrics_clientapp
        if [metrics[round]["replies"] for round in sorted(metrics)] != [args.clients] * args.rounds:
            raise RuntimeError("a client failed: see the log above")
        finals.extend(
            [float(metrics[args.rounds]["loss"]), peak_rss_mb(os.getpid())]
        )  # here, while Ray's workers still live

    cores = len(os.sched_getaffinity(0))  # Ray would count all that the machine has
    run_simulation(
        server_app=server_app,
        client_app=client_app.app,
        num_supernodes=args.clients,
        backend_config={
            "init_args": {"num_cpus": cores},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    report("flower", "flwr", args, ends, *finals)


if __name__ == "__main__":
    main()
