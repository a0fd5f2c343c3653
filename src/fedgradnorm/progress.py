"""A run's progress: a bar with every task's loss and weight, or plain lines without a terminal."""

from collections.abc import Sequence
from typing import Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from fedgradnorm.runs.records import Row
from fedgradnorm.runs.summary import task_curve

__all__ = ["Progress"]

SHOWN: tuple[Literal["loss", "inverse_training_rate", "weight"], ...] = (
    "loss",
    "inverse_training_rate",
    "weight",
)


class Progress:
    """A context manager that shows rounds as they end.

    Args:
        console: the terminal or file to print to.
        num_rounds: the number of rounds of the run.
        line_every: without a terminal, a line is printed for the first round, for the last round,
            and for every round whose number is a multiple of this.
    """

    def __init__(self, console: Console, num_rounds: int, line_every: int) -> None:
        self.console, self.num_rounds, self.line_every = console, num_rounds, line_every
        self.bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
        )
        self.job = self.bar.add_task("rounds", total=num_rounds)
        self.dropped: list[str] = []
        self.live = (
            Live(Group(self.bar, ""), console=console, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
        elif self.dropped:
            self._print(self._dropped_text())

    def show(self, rows: Sequence[Row]) -> None:
        """Show a round, given its rows: one per client."""
        round = rows[0]["round"]
        self.dropped += [
            f"{row['client']} in round {round}: {row['dropped']}"
            for row in rows
            if row["dropped"] is not None
        ]
        tasks = dict.fromkeys(row["task"] for row in rows)
        figures = {
            task: [_text(task_curve(rows, task, key).get(round)) for key in SHOWN] for task in tasks
        }
        if self.live is not None:
            self.bar.update(self.job, completed=round)
            table = Table("task", "loss", "share of initial loss", "weight", box=None)
            for task, texts in figures.items():
                table.add_row(Text(task), *texts)
            self.live.update(Group(self.bar, table, Text(self._dropped_text())))
        elif round in (1, self.num_rounds) or round % self.line_every == 0:
            texts = [
                f"{task}: loss {loss} ({ratio} of F(0)), p {p}"
                for task, (loss, ratio, p) in figures.items()
            ]
            self._print("  ".join([f"round {round}/{self.num_rounds}", *texts]))

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _dropped_text(self) -> str:
        return (
            f"reports dropped: {len(self.dropped)}; the last, {self.dropped[-1]}"
            if self.dropped
            else ""
        )


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
