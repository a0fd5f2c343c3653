"""Runs commands and code in processes that are forked from this one, which has imported everything.

A cold start takes seconds, most of them for importing torch. `tests.launcher` starts this script and
sends an order a line. Each answer is a line: the process's number, and when asked again its exit code.
"""

import json
import os
import re
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.utils.tensorboard

import fedgradnorm.callbacks.progress_bar
import fedgradnorm.cli
import fedgradnorm.loop
import fedgradnorm.report
from fedgradnorm.federations import digits

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {"open": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1}
"""The events of a changed file, and which argument has its path."""


class Killer:
    """Kills this process at the first point of writing in a folder at which none was killed before.

    A point is an event and a file's name, such as ``os.rename run/summary.json``. Before it reaches the
    disk, what was written is a point too, whole and torn: the torn one has lost its last bytes.

    Args:
        folder: the folder, all of whose files count.
        points: a file, with a line for every point at which a process was killed; it gets one more.
    """

    def __init__(self, folder: Path, points: Path) -> None:
        self.folder, self.points = folder, points
        self.seen = set(points.read_text().splitlines()) if points.exists() else set()
        self._fsync = os.fsync
        os.fsync = self.fsync
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A file is about to be opened to be written, made, renamed or removed."""
        if event not in PATHS or (event == "open" and not arguments[2] & WRITING):
            return
        path = arguments[PATHS[event]]
        if isinstance(path, str | bytes | os.PathLike):
            self.reach(event, Path(os.fsdecode(path)))

    def fsync(self, descriptor: int) -> None:
        """In the place of `os.fsync`: what was written to a file is about to reach the disk."""
        path, lines = Path(f"/proc/self/fd/{descriptor}").readlink(), ""
        if path.suffix == ".jsonl":
            lines = f" of {len(path.read_bytes().splitlines())} lines"
        if path.is_file():
            self.reach(f"torn{lines}", path, path.stat().st_size)
        self.reach(f"fsync{lines}", path)
        self._fsync(descriptor)

    def reach(self, event: str, path: Path, size: int | None = None) -> None:
        """Die here, unless a process has died here before or the file is another folder's."""
        if not path.is_absolute() or not path.is_relative_to(self.folder):
            return
        name = re.sub(r"-[0-9a-f]{16}|\.tfevents.*", "", str(path.relative_to(self.folder)))
        point = f"{event} {name}"
        if point in self.seen:
            return
        if size is not None:
            os.truncate(path, max(size - 40, size // 2))
        descriptor = os.open(self.points, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{point}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


def run(order: dict[str, Any]) -> None:
    """Do what an order says, in a process that does nothing else."""
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115  # for as long as the process lives
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["largest_file"] is not None:
        limits = (order["largest_file"], resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if order["kill_in"] is not None:
        Killer(*map(Path, order["kill_in"]))
    for module in order["missing"]:
        sys.modules[module] = None  # type: ignore[assignment]
    sys.argv = order["words"]
    if order["code"] is None:
        fedgradnorm.cli.main()
    else:
        warnings.simplefilter("error")
        exec(compile(order["code"], "<code>", "exec"), {"__name__": "__main__"})


def main() -> None:
    """Take orders until there are no more."""
    torch.set_num_threads(1)
    digits.make(seed=0)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(order)
            sys.exit(0)
        print(pid, flush=True)  # noqa: T201
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
