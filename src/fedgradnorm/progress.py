"""How a run shows itself: a progress bar with every task's loss and weight, or plain lines where there is no terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fedgradnorm.summary import task_curve

__all__ = ["Progress"]

Row = Mapping[str, Any]


class Progress:
    """Shows rounds as they end. A context manager.

    Args:
        console: where to.
        num_rounds: how many rounds there will be.
        line_every: without a terminal, a line is printed after the first and the last round and after every so many.
    """

    def __init__(self, console: Console, num_rounds: int, line_every: int) -> None:
        self.console, self.num_rounds, self.line_every = console, num_rounds, line_every
        self.bar = Bar(TextColumn("round"), MofNCompleteColumn(), BarColumn(), TextColumn("time left"), TimeRemainingColumn())
        self.job = self.bar.add_task("rounds", total=num_rounds)
        self.live = Live(Group(self.bar, ""), console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, rows: Sequence[Row]) -> None:
        """Show one round, given its rows."""
        round = rows[0]["round"]
        figures = [
            (task, *(task_curve(rows, task, key).get(round) for key in ("loss", "inverse_training_rate", "weight")))
            for task in dict.fromkeys(row["task"] for row in rows)
        ]
        if self.live is not None:
            self.bar.update(self.job, completed=round)
            table = Table("task", "loss", "share of initial loss", "weight", box=None)
            for task, *numbers in figures:
                table.add_row(str(task), *(_text(number) for number in numbers))
            self.live.update(Group(self.bar, table))
        elif round in (1, self.num_rounds) or round % self.line_every == 0:
            tasks = "  ".join(f"{task}: loss {_text(loss)} ({_text(ratio)} of F(0)), p {_text(p)}" for task, loss, ratio, p in figures)
            self.console.print(f"round {round}/{self.num_rounds}  {tasks}", soft_wrap=True, highlight=False, markup=False)


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
