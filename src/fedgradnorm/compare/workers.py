"""Cells in parallel, in processes of one thread. A process that dies is replaced."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import torch

from fedgradnorm.compare.cells import Ended, Order, end_of, note_end
from fedgradnorm.threads import kernel_threads

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PATIENCE = 0.2
"""Seconds until `should_stop` is asked again."""


class Listener:
    """Receives the progress of the cells. This one ignores it."""

    def began(self, order: Order) -> None:
        """A cell begins, or is resumed."""

    def round(self, order: Order, round: int) -> None:
        """A cell's round has ended."""

    def ended(self, order: Order, ended: Ended | None) -> None:
        """A cell has ended. None: it was stopped."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    order: Order | None = None


class Workers:
    """Trains cells in parallel. A context manager, which ends the processes.

    Args:
        jobs: the number of cells at a time. With 1 they are trained in this process, otherwise in
            worker processes, which are started when they are needed.

    Attributes:
        finished: the number of cells of the last call of `train` that were trained or failed.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.workers: list[_Worker] = []
        self.waiting: deque[Order] = deque()
        self.listener = Listener()
        self.finished, self.stopping = 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.connection.close()  # the worker ends after its round
        for worker in self.workers:
            worker.process.join(timeout=60)
            if worker.process.is_alive():
                worker.process.kill()

    def train(
        self, orders: Sequence[Order], listener: Listener, should_stop: Callable[[], bool]
    ) -> bool:
        """Train these cells, and note how each ended.

        If a cell fails or its process is killed, the others go on.

        Returns:
            Whether every cell was trained or failed. False: they were stopped before.
        """
        self.waiting, self.listener, self.finished = deque(orders), listener, 0
        if self.jobs == 1:
            return self._train_here(should_stop)
        while True:
            if not self.stopping and should_stop():
                self._stop()
            self._hand_out()
            busy = [worker for worker in self.workers if worker.order is not None]
            if not busy:
                return not self.waiting and not self.stopping
            for connection in wait([worker.connection for worker in busy], timeout=PATIENCE):
                self._hear(next(worker for worker in busy if worker.connection is connection))

    def _train_here(self, should_stop: Callable[[], bool]) -> bool:
        with kernel_threads(1):
            for order in self.waiting:
                if should_stop():
                    return False
                self.listener.began(order)
                ended = end_of(order, partial(self.listener.round, order), should_stop)
                self._end(order, ended)
                if ended is None:
                    return False
        return True

    def _hand_out(self) -> None:
        while self.waiting and not self.stopping:
            worker = next((worker for worker in self.workers if worker.order is None), None)
            if worker is None:
                if len(self.workers) == self.jobs:
                    return
                worker = _started()
                self.workers.append(worker)
            worker.order = self.waiting.popleft()
            self.listener.began(worker.order)
            try:
                worker.connection.send(worker.order)
            except OSError:
                self._bury(worker)

    def _hear(self, worker: _Worker) -> None:
        assert worker.order is not None  # noqa: S101  # only busy workers are listened to
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if isinstance(message, int):
            self.listener.round(worker.order, message)
            return
        order, worker.order = worker.order, None
        self._end(order, message)

    def _end(self, order: Order, ended: Ended | None) -> None:
        if ended is not None:
            self.finished += 1
            note_end(Path(order.folder), ended)
        self.listener.ended(order, ended)

    def _bury(self, worker: _Worker) -> None:
        """Remove a process that died, by a signal or without memory. Its cell has failed."""
        worker.process.join(timeout=5)
        self.workers.remove(worker)
        worker.connection.close()
        if worker.order is not None:
            code = worker.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            self._end(worker.order, Ended("failed", f"its process ended early: {how}"))

    def _stop(self) -> None:
        self.stopping = True
        for worker in self.workers:
            if worker.order is not None:
                with suppress(OSError):  # its process died, which `_hear` notices
                    worker.connection.send(None)


def _started() -> _Worker:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    with _one_thread_each():
        process.start()
    there.close()
    return _Worker(process, here)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Set the variables that libraries read when a new process loads them."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(connection: Connection) -> None:
    """Train cells until the parent closes the connection. Only the parent handles signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while (order := connection.recv()) is not None:
            # Any message meanwhile, and a closed connection, mean to stop.
            connection.send(end_of(order, connection.send, connection.poll))
    except (EOFError, OSError):
        return
