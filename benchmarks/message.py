"""Where the CPU time of one message to a node goes: a process starts for each, loads Flower, PyTorch and this package, then the data.

    python -m benchmarks.message --turns 7

Prints, for each step of that process, the CPU seconds (user and system, of one kernel thread) that it adds: the median over turns in which
all steps take turns, and the middle half. Seconds differ between machines; the shares differ little.
"""

import argparse
import os
import resource
import subprocess
import sys
from statistics import median, quantiles

STEPS = {
    "Python": "",
    "Flower's clientapp": "import flwr.supernode.cli.flwr_clientapp",
    "PyTorch": "import torch",
    "fedgradnorm.flower": "import fedgradnorm.flower",
    "the federation 'digits'": "from fedgradnorm.federations import digits; federation = digits.make(0)",
    "one round of a client": (
        "from fedgradnorm.client import local_update; from fedgradnorm.config import TrainConfig; "
        "from fedgradnorm.flower.client import Node; from fedgradnorm.messages import Instruction; "
        "from fedgradnorm.parameters import flatten; node = Node(federation, federation.client('class'), 0, None); "
        "instruction = Instruction(1, 'class', flatten(node.encoder), {}, TrainConfig(), 0); "
        "local_update(node.client, node.encoder, node.head, node.norm_layer, node.initial, instruction)"
    ),
}


def cpu_seconds(code: str) -> float:
    """What a new process takes to run some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Take turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="how often each step is measured")
    turns = parser.parse_args().turns
    codes = ["\n".join(list(STEPS.values())[: place + 1]) for place in range(len(STEPS))]
    seconds = [[cpu_seconds(code) for code in codes] for _ in range(turns)]
    for place, step in enumerate(STEPS):
        added = [turn[place] - (turn[place - 1] if place else 0.0) for turn in seconds]
        low, _, high = quantiles(added, n=4) if turns > 1 else (added[0],) * 3
        print(f"{step:26} {median(added):6.2f} s  ({low:.2f} to {high:.2f})")
    print(f"{'in all':26} {median(turn[-1] for turn in seconds):6.2f} s")


if __name__ == "__main__":
    main()
