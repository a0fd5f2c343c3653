"""What a deployment on this machine takes: a round's time, CPU seconds and memory by process, the SuperLink's database.

    python -m benchmarks.deployment --rounds 5
    python -m benchmarks.deployment --rounds 3 --width 5000     # an encoder of 100 MB in place of the one of 'digits'

Three clients, without a test before the last round. CPU seconds are those of the rounds after the first, and are divided by the messages to
clients in them. Seconds differ between machines, and memory little.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import nn
from torch.nn import functional

from fedgradnorm import Client, Federation, Task
from tests.deployment.processes import Deployment, wait_until

KINDS = {
    "superlink": "SuperLink",
    "serverapp": "ServerApp",
    "supernode": "SuperNodes",
    "clientapp": "ClientApps",
    "caddy": "front",
}


def make(seed: int, width: int) -> Federation:
    """Three small tasks under an encoder of about ``width``² numbers."""
    clients = []
    for place, id in enumerate("abc"):
        inputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed + place))
        task = Task(id, partial(nn.Linear, out_features=1), functional.mse_loss)
        clients.append(
            Client(
                id,
                task,
                (inputs, inputs[:, :1] * (place + 1)),
                (inputs, inputs[:, :1] * (place + 1)),
            )
        )
    return Federation(
        clients,
        lambda: nn.Sequential(
            nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
        ),
    )


class Meter:
    """Peak memory and CPU seconds of a deployment's processes, by kind."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment, self.peaks, self.seconds = (
            deployment,
            Counter[str](),
            dict[tuple[int, float], tuple[str, float]](),
        )

    def look(self) -> None:
        """Look at every process that runs now."""
        for process in self.deployment.left_over():
            try:
                kind = next(
                    (
                        name
                        for word, name in KINDS.items()
                        if word in " ".join(process.cmdline()[:2])
                    ),
                    "",
                )
                times = process.cpu_times()
                self.seconds[process.pid, process.create_time()] = kind, times.user + times.system
                self.peaks[kind] = max(self.peaks[kind], process.memory_info().rss)
            except psutil.Error:
                continue

    def by_kind(self) -> dict[str, float]:
        """CPU seconds so far; of a process that has ended, those up to the last look."""
        return {
            kind: sum(seconds for other, seconds in self.seconds.values() if other == kind)
            for kind in KINDS.values()
        }


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="from 3 on")
    parser.add_argument("--width", type=int, help="of an encoder of about so many numbers squared")
    options = parser.parse_args()
    federation = ["federation.name=digits", 'federation.tasks=["class", "parity", "loop"]']
    if options.width is not None:
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
        federation = [
            "federation.name=benchmarks.deployment:make",
            f"federation.width={options.width}",
        ]
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train.head_steps=1",
            "train.encoder_steps=1",
            f"train.num_rounds={options.rounds}",
            "train.eval_every=1000",
        ]
        deployment = Deployment(Path(folder) / "there", *federation, *words)
        try:
            measure(deployment, options.rounds)
        finally:
            for name in list(deployment.processes):
                deployment.kill(name)


def measure(deployment: Deployment, rounds: int) -> None:
    """Train, and print what it took."""
    deployment.start_superlink()
    deployment.do("server/register.sh")
    deployment.start_nodes()
    meter, running = Meter(deployment), deployment.start_run()

    def after(round: int) -> bool:
        meter.look()
        return deployment.round() >= round or running.poll() is not None

    wait_until(partial(after, 1), "the first round", timeout=3600)
    before = meter.by_kind()
    wait_until(partial(after, rounds - 1), "the last round but one", timeout=3600)
    used = {kind: seconds - before[kind] for kind, seconds in meter.by_kind().items()}
    wait_until(lambda: after(rounds) and running.poll() is not None, "the end", timeout=3600)
    if running.poll() != 0:
        sys.exit(deployment.log("run"))
    lines = re.findall(r"(?m)^(\S+ \S+),\d+ INFO round", deployment.log("run"))
    ends = [datetime.fromisoformat(line) for line in lines]
    between = [(later - earlier).total_seconds() for earlier, later in pairwise(ends[:-1])]
    messages = (rounds - 2) * len(deployment.clients)
    print(
        f"a round: {median(between):.0f} s (median of {len(between)})"
        if between
        else "a round: more are needed to tell"
    )
    for kind, seconds in used.items():
        print(
            f"{kind:12} {seconds / messages:6.1f} CPU s a message   {meter.peaks[kind] / 1e6:8.0f} MB at most"
        )
    print(
        f"state.db     {sum(path.stat().st_size for path in deployment.folder.glob('server/state.db*')) / 1e6:8.1f} MB"
    )


if __name__ == "__main__":
    main()
