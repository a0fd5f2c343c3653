"""A bar with every task's loss and weight: in a terminal, in a notebook, or as plain lines."""

from collections.abc import Mapping
from html import escape
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedgradnorm.callbacks.base import Callback
from fedgradnorm.runs.summary import task_curve
from fedgradnorm.session import Session

COLUMNS: dict[str, Literal["loss", "inverse_training_rate", "weight"]] = {
    "loss": "loss",
    "share of initial loss": "inverse_training_rate",
    "weight": "weight",
}

Figures = Mapping[str, list[str]]
"""By task, its texts in the order of the columns."""


class ProgressBar(Callback):
    """Shows rounds as they end.

    Args:
        console: where to; None: the standard output, or the output of a notebook's cell.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console() if console is None else console
        self._display: _Lines | _Terminal | _Notebook | None = None
        self._dropped: list[str] = []

    def on_start(self, session: Session) -> None:
        """Show an empty bar."""
        self._dropped = []
        if self.console.is_jupyter:
            self._display = _Notebook(session.num_rounds)
        elif self.console.is_terminal:
            self._display = _Terminal(self.console, session.num_rounds)
        else:
            every = session.config.train.eval_every
            self._display = _Lines(self.console, session.num_rounds, every)

    def on_round(self, session: Session) -> None:
        """Show a round."""
        round, rows = session.round, session.rows
        self._dropped += [
            f"{row['client']} in round {round}: {row['dropped']}"
            for row in rows
            if row["dropped"] is not None
        ]
        figures = {
            task: [_text(task_curve(rows, task, key).get(round)) for key in COLUMNS.values()]
            for task in dict.fromkeys(row["task"] for row in rows)
        }
        if self._display is not None:
            self._display.show(round, figures, self._dropped_text())

    def on_end(self, session: Session) -> None:  # noqa: ARG002
        """Leave the bar as it is."""
        if self._display is not None:
            self._display.close(self._dropped_text())
            self._display = None

    def _dropped_text(self) -> str:
        if not self._dropped:
            return ""
        return f"reports dropped: {len(self._dropped)}; the last, {self._dropped[-1]}"


class _Lines:
    """Plain lines: of the first and the last round, and of every round with a test."""

    def __init__(self, console: Console, num_rounds: int, every: int) -> None:
        self.console, self.num_rounds, self.every = console, num_rounds, every

    def show(self, round: int, figures: Figures, dropped: str) -> None:  # noqa: ARG002
        if round in (1, self.num_rounds) or round % self.every == 0:
            texts = [
                f"{task}: loss {loss} ({ratio} of F(0)), p {weight}"
                for task, (loss, ratio, weight) in figures.items()
            ]
            self._print(f"round {round}/{self.num_rounds}  {'  '.join(texts)}")

    def close(self, dropped: str) -> None:
        if dropped:
            self._print(dropped)

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)


class _Terminal:
    """A live bar with a table under it."""

    def __init__(self, console: Console, num_rounds: int) -> None:
        self.bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
        )
        self.job = self.bar.add_task("rounds", total=num_rounds)
        self.live = Live(Group(self.bar, ""), console=console, refresh_per_second=4)
        self.live.start()

    def show(self, round: int, figures: Figures, dropped: str) -> None:
        self.bar.update(self.job, completed=round)
        table = Table("task", *COLUMNS, box=None)
        for task, texts in figures.items():
            table.add_row(Text(task), *texts)
        self.live.update(Group(self.bar, table, Text(dropped)))

    def close(self, dropped: str) -> None:  # noqa: ARG002
        self.live.stop()


class _Notebook:
    """The same as HTML in the output of a cell. It needs no widgets."""

    def __init__(self, num_rounds: int) -> None:
        from IPython.display import display

        self.num_rounds = num_rounds
        self.handle: Any = display(self._html(0, {}, ""), display_id=True)

    def show(self, round: int, figures: Figures, dropped: str) -> None:
        self.handle.update(self._html(round, figures, dropped))

    def close(self, dropped: str) -> None:
        pass

    def _html(self, round: int, figures: Figures, dropped: str) -> Any:
        from IPython.display import HTML

        bar = f"<progress value={round} max={self.num_rounds}></progress>"
        lines = [("task", *COLUMNS), *((task, *texts) for task, texts in figures.items())]
        table = "".join(
            "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>"
            for line in (lines if figures else [])
        )
        said = f"<p>{escape(dropped)}</p>" if dropped else ""
        return HTML(f"{bar} round {round}/{self.num_rounds}<table>{table}</table>{said}")


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
