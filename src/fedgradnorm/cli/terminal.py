"""What every command needs of the terminal: messages, warnings, signals and the available cores."""

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from fedgradnorm.errors import FedGradNormWarning

console = Console()


def prepare() -> None:
    """Make printing safe in every encoding, and show warnings as one line each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that it lacks must not end a run
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", FedGradNormWarning)


def say(message: str) -> None:
    """Print a message as it is, on one line."""
    console.print(message, soft_wrap=True, highlight=False, markup=False, emoji=False)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    _to_stderr(f"warning: {message}", "yellow")


def show_error(error: Exception) -> None:
    """Print an error on standard error."""
    _to_stderr(f"error: {error}", "red")


def _to_stderr(text: str, style: str) -> None:
    stderr = Console(stderr=True, soft_wrap=True)
    stderr.print(text, style=style, markup=False, highlight=False, emoji=False)


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM instead of ending; a second one ends the process at once.

    Yields:
        A function that says whether a signal has come.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,  # noqa: ARG001
    line: object = None,  # noqa: ARG001
) -> None:
    """Print a warning; the place in the code is left out for the package's own warnings."""
    place = f"{filename}:{lineno}: {category.__name__}: "
    warn(f"{'' if issubclass(category, FedGradNormWarning) else place}{message}")
