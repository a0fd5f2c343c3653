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
from fedgradnorm.compare.workers import Listener


class StudyProgress(Listener):
    """Shows the cells of a study's stages, one stage after another.

    It is a context manager, and the listener that `compare` takes.

    Args:
        console: what to write to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        """Leave the last state on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __call__(self, stage: str, orders: Sequence[Order]) -> Self:
        """Begin a stage, and return the listener for its cells."""
        self._close()
        self.stage, self.count, self.finished = stage, len(orders), 0
        self.running: dict[str, tuple[int, int, float]] = {}
        time_left = (TextColumn("time left"), TimeRemainingColumn())
        self.bar = Bar(TextColumn(stage), MofNCompleteColumn(), BarColumn(), *time_left)
        self.job = self.bar.add_task(stage, total=self.count)
        if self.console.is_terminal and self.count:
            self.live = Live(Group(self.bar), console=self.console, refresh_per_second=4)
            self.live.start()
        return self

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
            how = f"{ended.state}: {ended.reason}"
            if ended.state == "trained":
                how = f"{monotonic() - start:.1f} s"
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
