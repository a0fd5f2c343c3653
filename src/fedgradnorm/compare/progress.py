"""The progress of a study: a bar over its cells, or a line for each cell without a terminal."""

from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from fedgradnorm.compare.cells import Ended, Order


class StudyProgress:
    """Shows the stages of a study one after another: the listener that `compare` takes.

    It is a context manager.

    Args:
        console: what to write to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.grid: GridProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.grid is not None:
            self.grid.close()

    def __call__(self, stage: str, orders: Sequence[Order]) -> "GridProgress":
        """The listener for a stage's cells."""
        if self.grid is not None:
            self.grid.close()
        self.grid = GridProgress(self.console, stage, len(orders))
        return self.grid


class GridProgress:
    """Shows the cells of a stage.

    Args:
        console: what to write to.
        stage: what the cells are for.
        count: the number of cells.
    """

    def __init__(self, console: Console, stage: str, count: int) -> None:
        self.console, self.stage, self.count = console, stage, count
        self.bar = Bar(
            TextColumn(stage),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
        )
        self.job = self.bar.add_task(stage, total=count)
        self.running: dict[str, tuple[int, int, float]] = {}
        self.finished = 0
        self.live = (
            Live(Group(self.bar), console=console, refresh_per_second=4)
            if console.is_terminal and count
            else None
        )
        if self.live is not None:
            self.live.start()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def began(self, order: Order) -> None:
        """Show a cell that begins."""
        self.running[order.folder] = (0, order.num_rounds, monotonic())
        self._show()

    def round(self, order: Order, round: int) -> None:
        """Show how far a cell is."""
        _, rounds, start = self.running[order.folder]
        self.running[order.folder] = (round, rounds, start)
        self._show()

    def ended(self, order: Order, ended: Ended | None) -> None:
        """Show how a cell ended, or that it was stopped."""
        done, _, start = self.running.pop(order.folder)
        name = Path(order.folder).name
        if ended is None:
            how = f"stopped after round {done}"
        else:
            self.finished += 1
            how = (
                f"{monotonic() - start:.1f} s"
                if ended.state == "trained"
                else f"{ended.state}: {ended.reason}"
            )
        if self.live is None or ended is None or ended.state != "trained":
            line = f"{self.stage} {self.finished}/{self.count}  {name}: {how}"
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)
        self._show()

    def _show(self) -> None:
        if self.live is None:
            return
        self.bar.update(self.job, completed=self.finished)
        table = Table("cell", "round", box=None)
        for folder, (done, rounds, _) in self.running.items():
            table.add_row(Text(Path(folder).name), f"{done}/{rounds}")
        self.live.update(Group(self.bar, table))
