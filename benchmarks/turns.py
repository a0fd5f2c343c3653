"""One variant in a process of its own, that trains for a second for each line on standard input and answers with a line of JSON.

So several variants, or several revisions of the code, take turns in one run of a benchmark, and each has its own peak of memory. A turn is
one round where that takes a second, and else the median of as many as a second holds: after the others' turns a process finds its memory
cold, and in no real run do rounds wait for one another.
"""

import argparse
import json
import resource
import sys
from collections.abc import Iterator
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import case
from benchmarks.products import product_rounds, shares
from fedgradnorm import Client, Federation
from fedgradnorm.aggregation import Mean
from fedgradnorm.config import EngineConfig, TrainConfig
from fedgradnorm.parameters import norm_layer_slices, norm_over
from fedgradnorm.registry import BUILT_INS, build
from fedgradnorm.runs.rows import rows_of
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.weighting import Equal, FedGradNorm

__all__ = ["main"]

TURN_SECONDS = 1.0
"""A turn takes no less."""


def bare_rounds(federation: Federation, training: TrainConfig) -> Iterator[None]:
    """FedRep in plain torch, one client after another, on torch's own threads: what the others are held against."""
    encoder = federation.make_encoder(0)
    heads = {client.id: federation.make_head(client, 0) for client in federation.clients}
    shared = {name: value.clone() for name, value in encoder.state_dict().items()}
    while True:
        total = {name: torch.zeros_like(value) for name, value in shared.items()}
        for client in federation.clients:
            (inputs, targets), head, loss = tensors_of(client), heads[client.id], client.task.loss
            encoder.load_state_dict(shared)
            optimizer = torch.optim.SGD(head.parameters(), lr=training.head_lr)
            for batch in shuffled(len(inputs), training.batch_size, training.head_steps):
                with torch.no_grad():
                    features = encoder(inputs[batch])
                optimizer.zero_grad()
                loss(head(features), targets[batch]).backward()
                optimizer.step()
            optimizer = torch.optim.SGD(encoder.parameters(), lr=training.encoder_lr)
            head.requires_grad_(False)
            for batch in shuffled(len(inputs), training.batch_size, training.encoder_steps):
                optimizer.zero_grad()
                loss(head(encoder(inputs[batch])), targets[batch]).backward()
                optimizer.step()
            head.requires_grad_(True)
            for name, value in encoder.state_dict().items():
                total[name] += value
        shared = {
            name: value / len(federation.clients)
            if value.is_floating_point()
            else value // len(federation.clients)
            for name, value in total.items()
        }
        yield


def tensors_of(client: Client) -> tuple[Tensor, Tensor]:
    """The training data of a client whose data are tensors."""
    assert isinstance(client.train_data, tuple)
    return client.train_data


def shuffled(num_examples: int, batch_size: int, steps: int) -> Iterator[torch.Tensor]:
    """The indices of mini-batches, drawn without replacement."""
    batch_size = min(batch_size, num_examples)
    order = torch.cat(
        [torch.randperm(num_examples) for _ in range(-(-steps * batch_size // num_examples))]
    )
    yield from order[: steps * batch_size].split(batch_size)


def our_rounds(
    federation: Federation, training: TrainConfig, engine: EngineConfig
) -> Iterator[None]:
    """FedGradNorm on one of our engines, with screening and weights."""
    weighting, built = FedGradNorm(), build("engine", engine, federation=federation, seed=0)
    state = initial_state(federation, weighting, 0)
    while True:
        state = run_round(state, federation, built, weighting, Mean(), training)[0]
        yield


def own_cost(federation: Federation, training: TrainConfig) -> dict[str, float]:
    """Milliseconds a round that FedGradNorm takes beyond FedRep: norms, weights, and the lines of its record. Medians of nine."""
    torch.set_num_threads(1)  # as the engine and the server do
    weighting, equal = FedGradNorm(), Equal()
    built = build("engine", EngineConfig(name="vectorized"), federation=federation, seed=0)
    state, record = run_round(
        initial_state(federation, weighting, 0), federation, built, weighting, Mean(), training
    )
    slices = norm_layer_slices(federation.make_encoder(0), federation.norm_layer)
    gradients = torch.stack([report.gradient for report in record.reports])
    stacked = gradients.shape[1] < 100_000  # as the engine does
    memory = equal.init(sorted(federation.client_ids))
    taken: dict[str, list[float]] = {}
    for _ in range(9):
        start = perf_counter()
        for rows in gradients.split(len(gradients) if stacked else 1):
            norm_over(rows, slices).tolist()
        normed = perf_counter()
        weighting.update(state.weighting, record.reports)
        weighted = perf_counter()
        equal.update(memory, record.reports)
        compared = perf_counter()
        rows_of(federation, state, record, {})
        ended = perf_counter()
        parts = {
            "norms": normed - start,
            "weights": (weighted - normed) - (compared - weighted),
            "records": ended - compared,
        }
        for part, seconds in parts.items():
            taken.setdefault(part, []).append(1000 * seconds)
    return {part: sorted(values)[len(values) // 2] for part, values in taken.items()}


def peak_flops(seconds: float = 0.3) -> float:
    """Floating-point operations a second of single-precision matrix products, on all of torch's threads, for a moment."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    done, start = 0, perf_counter()
    while perf_counter() - start < seconds:
        left @ right
        done += 1
    return done * 2 * 2048**3 / (perf_counter() - start)


def round_flops(federation: Federation, training: TrainConfig) -> float:
    """Floating-point operations of a bare round, counted on one client and scaled by all."""
    total = 0.0
    counted: dict[int, int] = {}
    for client in federation.clients:
        kind = id(client.task)
        if kind not in counted:
            inputs, targets = tensors_of(client)
            encoder, head = federation.make_encoder(0), federation.make_head(client, 0)
            batch = slice(0, min(training.batch_size, len(inputs)))
            with FlopCounterMode(display=False) as of_head:
                with torch.no_grad():
                    features = encoder(inputs[batch])
                client.task.loss(head(features), targets[batch]).backward()
            head.requires_grad_(False)
            with FlopCounterMode(display=False) as of_encoder:
                client.task.loss(head(encoder(inputs[batch])), targets[batch]).backward()
            counted[kind] = (
                training.head_steps * of_head.get_total_flops()
                + training.encoder_steps * of_encoder.get_total_flops()
            )
        total += counted[kind]
    return total


def main() -> None:
    """Answer to lines on standard input until it ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "variant", help="bare, reference, vectorized, products, profile, peak, or about"
    )
    parser.add_argument("workload")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory-limit", type=int)
    args = parser.parse_args()
    rounds: Iterator[None]
    if args.variant == "peak":
        for _ in sys.stdin:
            print(json.dumps({"flops": peak_flops()}), flush=True)
        return
    federation, training = case(args.workload, args.clients)
    if args.variant == "about":
        print(
            json.dumps(
                {
                    "flops": round_flops(federation, training),
                    "clients": len(federation.clients),
                    "own": own_cost(federation, training),
                }
            )
        )
        return
    alone = EngineConfig(name="vectorized", threads=1)
    if args.variant == "profile":
        profiled = our_rounds(federation, training, alone)
        next(profiled)
        for _ in sys.stdin:
            print(json.dumps(shares(profiled)), flush=True)
        return
    if args.variant == "products":
        rounds = product_rounds(our_rounds(federation, training, alone))
    elif args.variant == "bare":
        rounds = bare_rounds(federation, training)
    else:
        name = (
            args.variant if args.variant in BUILT_INS["engine"] else "reference"
        )  # an older revision knows no other
        options = {"threads": args.threads, "memory_limit": args.memory_limit}
        engine = EngineConfig(
            name=name, **{key: value for key, value in options.items() if value is not None}
        )
        rounds = our_rounds(federation, training, engine)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        taken: list[float] = []
        while sum(taken) < TURN_SECONDS:
            start = perf_counter()
            next(rounds)
            taken.append(perf_counter() - start)
        seconds = median(taken)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            json.dumps(
                {"seconds": seconds, "peak_rss_mb": peak / 1024, "grown_mb": (peak - before) / 1024}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
