"""What the peers share: the arguments, where training starts, the mini-batches and the report; so that all train the same numbers."""

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from workloads import WORKLOADS, Workload

__all__ = [
    "ENCODER",
    "HEAD",
    "arguments",
    "batches",
    "first_encoder",
    "first_head",
    "peak_rss_mb",
    "report",
]

HEAD, ENCODER = 0, 1
"""The two phases of a client's round."""


def arguments() -> argparse.ArgumentParser:
    """The arguments of every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument(
        "--rounds",
        type=int,
        required=True,
        help="with the first one, which warms up and is not reported",
    )
    return parser


def first_encoder(workload: Workload) -> nn.Module:
    """The encoder before the first round."""
    torch.manual_seed(0)
    return workload.encoder()


def first_head(workload: Workload, client: int) -> nn.Module:
    """The head of a client before its first round."""
    torch.manual_seed(1 + client)
    return workload.head()


def batches(
    data: Sequence[Tensor], workload: Workload, client: int, round: int, phase: int
) -> Iterator[list[Tensor]]:
    """Mini-batches without end, from shuffled passes over a client's data.

    Seeded by client, round and phase, so that the order does not hang on which process trains which client when: peers which do the same
    arithmetic end with the same loss.
    """
    generator = torch.Generator().manual_seed((client << 32) + 2 * round + phase)
    while True:
        for indices in torch.randperm(workload.examples, generator=generator).split(
            workload.batch_size
        ):
            yield [tensor[indices] for tensor in data]


def peak_rss_mb(process: int) -> float:
    """The peak resident memory of a process and of all its living descendants, each at its own peak, added up.

    Pages that they share count in each. Linux only.
    """
    peaks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/status"):
        try:
            status = file.read_text()
        except OSError:
            continue  # the process has ended since
        fields = dict(line.split(":", maxsplit=1) for line in status.splitlines())
        pid = int(file.parent.name)
        children.setdefault(int(fields["PPid"]), []).append(pid)
        peaks[pid] = int(fields.get("VmHWM", "0 kB").split()[0])  # a zombie has none
    total, waiting = 0, [process]
    while waiting:
        pid = waiting.pop()
        total += peaks.get(pid, 0)
        waiting += children.get(pid, [])
    return total / 1024


def report(
    peer: str,
    distribution: str,
    args: argparse.Namespace,
    ends: Sequence[float],
    final_loss: float,
    peak_rss_mb: float,
) -> None:
    """Print the result as one line of JSON.

    Args:
        peer: name of the peer's folder.
        distribution: its package, for the version.
        args: what the peer was asked for.
        ends: when each round ended, the warm-up included.
        final_loss: mean training loss over clients and encoder steps of the last round.
        peak_rss_mb: memory.
    """
    result = {
        "peer": peer,
        "version": metadata.version(distribution),
        "workload": args.workload,
        "clients": args.clients,
        "seconds": [round(end - start, 4) for start, end in pairwise(ends)],
        "final_loss": final_loss,
        "peak_rss_mb": round(peak_rss_mb, 1),
    }
    print(json.dumps(result), flush=True)
