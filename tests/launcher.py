"""Commands and code in processes of their own, without the seconds of a cold start."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATIENCE = 600.0
"""Seconds after which what never comes true is an error. No test passes or fails by it otherwise."""


@dataclass
class Process:
    """A process that was started.

    Attributes:
        pid: its number, which stays its own until `end` has been called.
        end: waits for it, and gives its exit code; below 0 for a signal.
        out: the file of its standard output.
        err: the file of its standard error.
    """

    pid: int
    end: Callable[[], int]
    out: Path
    err: Path

    @property
    def running(self) -> bool:
        return self._fields()[0] not in "ZX"

    @property
    def cpu_time(self) -> float:
        """Seconds that it has computed for."""
        return sum(map(int, self._fields()[11:13])) / os.sysconf("SC_CLK_TCK")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def _fields(self) -> list[str]:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()


class Launcher:
    """Forks processes from one that has imported everything: see ``forked.py``. One at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forked.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)

    def start(
        self,
        outputs: Path,
        *words: object,
        code: str | None = None,
        missing: Sequence[str] = (),
        largest_file: int | None = None,
        kill_in: tuple[Path, Path] | None = None,
    ) -> Process:
        """Start ``fedgradnorm WORDS`` in this process's folder, with its environment.

        Args:
            outputs: the folder of the files of its output.
            words: the words of the command line.
            code: Python code to run in the place of the command line, with warnings as errors.
            missing: modules that cannot be imported there.
            largest_file: bytes of the largest file that it can write.
            kill_in: see ``forked.Killer``.
        """
        out, err = outputs / "out.txt", outputs / "err.txt"
        order = {
            "words": ["fedgradnorm", *map(str, words)],
            "code": code,
            "folder": os.getcwd(),  # noqa: PTH109
            "out": str(out),
            "err": str(err),
            "missing": list(missing),
            "largest_file": largest_file,
            "kill_in": None if kill_in is None else [str(path) for path in kill_in],
            "environment": dict(os.environ),
        }
        self._tell(json.dumps(order))
        return Process(int(self._answer()), self._end, out, err)

    def call(self, outputs: Path, *words: object, **options: object) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of what `start` starts."""
        process = self.start(outputs, *words, **options)  # type: ignore[arg-type]
        return process.end(), process.out.read_text(), process.err.read_text()

    def close(self) -> None:
        with self._process:
            self._process.stdin.close()

    def _end(self) -> int:
        self._tell("")
        return int(self._answer())

    def _tell(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        return self._process.stdout.readline()


@cache
def launcher() -> Launcher:
    """The launcher of this process."""
    return Launcher()


def wait_until(process: Process, reached: Callable[[], bool]) -> bool:
    """Whether this came true before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if not process.running:
            return False
        assert time.monotonic() < deadline, (
            f"stuck: {process.out.read_text()}{process.err.read_text()}"
        )
        time.sleep(0.001)
    return True
