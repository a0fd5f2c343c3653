"""What runs a program's steps, and what it gives: TorchScript, Python, and no programs at all.

python -m benchmarks.executors

Each executor is a process of its own, and they take turns in one run, see `benchmarks.turns`.
"""

import subprocess
import sys
from contextlib import ExitStack
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import turns
from benchmarks.speed import Turn, spread, words_of
from fedgradnorm.engines.failures import Untraceable
from fedgradnorm.engines.programs import Program

EXECUTORS = ("TorchScript", "Python", "none")


def refuse(*_: Any, **__: Any) -> None:
    """Stand for TorchScript, or for programs, where these are not to be had."""
    raise Untraceable("not in this turn of the benchmark")


class ExecutorTurn(Turn):
    """An executor that waits in its own process for its turn."""

    def __init__(self, executor: str, case: str) -> None:
        words = [sys.executable, "-W", "ignore", "-m", "benchmarks.executors", "--turns", executor]
        self.process = subprocess.Popen(
            [*words, case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


def take_turns(executor: str, case: str) -> None:
    """Train with this executor, a turn for each line on standard input."""
    with ExitStack() as stack:
        if executor == "Python":
            stack.enter_context(patch.object(torch.jit, "CompilationUnit", refuse))
        if executor == "none":
            stack.enter_context(patch.object(Program, "__init__", refuse))
        stack.enter_context(patch.object(sys, "argv", ["", "vectorized", *words_of(case)]))
        turns.main()


def measured(case: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a round of each executor, turn by turn, after two turns that warm up."""
    seconds: dict[str, list[float]] = {executor: [] for executor in EXECUTORS}
    waiting = {executor: ExecutorTurn(executor, case) for executor in EXECUTORS}
    for number in range(rounds + 2):
        for executor, turn in waiting.items():
            answer = turn.take()
            if number >= 2:
                seconds[executor].append(answer["seconds"])
    for turn in waiting.values():
        turn.end()
    return seconds


def main(
    cases: Annotated[str, typer.Option(help="Which, separated by commas.")] = "W1 10,W2 10,W5 1000",
    rounds: Annotated[int, typer.Option(min=3, help="Turns after two that warm up.")] = 7,
) -> None:
    """Print a table of seconds, and of the ratios of the turns to those without programs."""
    table = Table("case", "executor", "seconds a round", "no programs / this", "TorchScript / this")
    for case in cases.split(","):
        seconds = measured(case, rounds)
        for executor, own in seconds.items():
            ratios = [
                spread([other / this for other, this in zip(seconds[base], own, strict=True)])
                for base in ("none", "TorchScript")
            ]
            table.add_row(case, executor, f"{median(own):.3f}", *ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turns"]:
        take_turns(*sys.argv[2:])
    else:
        typer.run(main)
