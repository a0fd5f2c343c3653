"""The speed of the code as it is against a revision of it, turn by turn in one run.

python -m benchmarks.compare main~5
"""

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.speed import ROOT, spread, turn, words_of


def main(
    revision: Annotated[str, typer.Argument(help="A revision of git.")],
    cases: Annotated[str, typer.Option(help="Which, separated by commas.")] = "W1 10,W2 10,W5 1000",
    rounds: Annotated[int, typer.Option(min=3, help="Turns after two that warm up.")] = 7,
) -> None:
    """Print a table of ratios: above 1, the code is faster than the revision."""
    table = Table("case", "revision, seconds", "now, seconds", "revision / now")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        then = Path(folder) / "then"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(then), revision],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        stack.callback(
            subprocess.run,
            ["git", "worktree", "remove", "--force", str(then)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        for case in cases.split(","):
            with (
                turn("vectorized", *words_of(case), source=then) as old,
                turn("vectorized", *words_of(case)) as new,
            ):
                pairs = [(old.take()["seconds"], new.take()["seconds"]) for _ in range(rounds + 2)][
                    2:
                ]
            before, now = zip(*pairs, strict=True)
            table.add_row(
                case,
                f"{median(before):.3f}",
                f"{median(now):.3f}",
                spread([one / other for one, other in pairs]),
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
