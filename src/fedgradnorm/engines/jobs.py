"""What a worker is given: one client, or the clients of a stack."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

from fedgradnorm.client import ClientState
from fedgradnorm.engines.looped import WITHOUT_PROGRAMS, Programs
from fedgradnorm.engines.stacked import Stack
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.threads import kernel_threads

FEWEST_STACKED = 5
"""Minimum number of identical clients for which stacking pays."""

WIDE, NARROW, QUARTER = 64, 16, 4
"""Widths of stacks: wide ones, so that calls count for little; narrow ones for the clients that
are left over; and for the last of these a multiple of 4."""

Item = TypeVar("Item")
Done = TypeVar("Done")


class Job(NamedTuple):
    """Clients that are trained together.

    Attributes:
        instructions: of one client, or of as many as fit into a stack.
        programs: for a single client.
        stack: for several clients.
        tried: chooses a step that is compared with autograd; None: no step is.
    """

    instructions: Sequence[Instruction]
    programs: Programs = WITHOUT_PROGRAMS
    stack: Stack | None = None
    tried: int | None = None

    @property
    def client(self) -> str:
        """The id of its first client. All of them are of one kind."""
        return self.instructions[0].client


class Failed(NamedTuple):
    """A job whose shortcut failed, and why."""

    job: Job
    reason: str


Outcome: TypeAlias = tuple[Report, ClientState]
"""A client's report and its next state."""

Result: TypeAlias = Outcome | Failed


def each(
    work: Callable[..., Done], workers: int, kernels: int, items: Sequence[object], *more: Any
) -> Iterator[Done]:
    """The work's result for each item, in order. Each worker has this many kernel threads."""
    threads = min(workers, len(items))
    with kernel_threads(kernels):
        if threads <= 1:
            yield from map(work, items, *more)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="fedgradnorm") as pool:
            yield from pool.map(work, items, *more)


def stack_widths(count: int, most: int, workers: int) -> list[int]:
    """The widths of the stacks for ``count`` identical clients. The last may have empty places.

    >>> stack_widths(1000, most=640, workers=2)[-8:]
    [64, 16, 16, 16, 16, 16, 16, 8]
    """
    wide, narrow = min(WIDE, most), min(NARROW, most)
    wides = [wide] * (count // (wide * workers) * workers)
    left = count - sum(wides)
    narrows = [narrow] * (left // narrow)
    rest = left - sum(narrows)
    last = min(narrow, math.ceil(rest / QUARTER) * QUARTER)
    return [*wides, *narrows, *([last] if rest else [])]


def chunks(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Neighbouring items in lists of about equal length, none longer than ``most``."""
    count = math.ceil(len(items) / most)
    bounds = [len(items) * index // count for index in range(count + 1)] if count else []
    return [list(items[start:end]) for start, end in pairwise(bounds)]
