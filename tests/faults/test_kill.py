"""Runs that are killed with SIGKILL at random moments, and resumed, end as if they had never been killed."""

import atexit
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedgradnorm.runs.checkpoint import load_checkpoint
from fedgradnorm.runs.folder import Run
from tests.helpers import timeless

PATIENCE = 120
"""Seconds after which a process that neither ends nor gets on is taken for stuck."""

LAUNCHER = """
import json, os, resource, sys
import torch, torch._dynamo, torch.utils.tensorboard
import fedgradnorm.cli, fedgradnorm.run, fedgradnorm.progress, fedgradnorm.report
from fedgradnorm.federations import digits
torch.set_num_threads(1)
digits.make(seed=0)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = open(os.devnull)
        if order["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"], resource.RLIM_INFINITY))
        sys.argv = ["fedgradnorm", *order["words"]]
        fedgradnorm.cli.main()
        sys.exit(0)
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Starts the command line in processes of their own, forked from one that has imported everything: a cold start takes seconds."""


@dataclass
class Process:
    """A process of the command line.

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
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Launcher:
    """See ``LAUNCHER``. One process at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", LAUNCHER]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)

    def start(self, outputs: Path, *words: object, largest_file: int | None = None) -> Process:
        """Start ``fedgradnorm WORDS``, its output in this folder, and no file that it writes larger than this."""
        out, err = outputs / "out.txt", outputs / "err.txt"
        order = {
            "words": [str(word) for word in words],
            "out": str(out),
            "err": str(err),
            "largest_file": largest_file,
        }
        self._tell(json.dumps(order))
        return Process(int(self._answer()), self._end, out, err)

    def call(
        self, outputs: Path, *words: object, largest_file: int | None = None
    ) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        process = self.start(outputs, *words, largest_file=largest_file)
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


def lines(folder: Path) -> int:
    """The whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def changed(folder: Path) -> Callable[[], bool]:
    """Whether anything has been made, renamed or removed in a folder since."""
    before = folder.stat().st_mtime_ns
    return lambda: folder.stat().st_mtime_ns != before


def outcome(folder: Path) -> dict[str, Any]:
    """What a run gave, less the time that it took."""
    summary: Mapping[str, Any] = Run(folder).summary()
    return {
        "metrics": [json.dumps(row) for row in timeless(Run(folder).rows())],
        "models": {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.glob("models/**/*.safetensors"))
        },
        "summary": {
            key: value for key, value in summary.items() if key not in ("seconds", "costs")
        },
    }


ROUNDS, CLIENTS, LIVES, LAST_LIVES = 100, 4, 20, 4
CONFIG = f"""
federation = {{ name = "digits" }}
weighting = {{ name = "fedgradnorm" }}
[train]
num_rounds = {ROUNDS}
head_steps = 1
encoder_steps = 1
encoder_lr = 0.01
head_momentum = 0.5
server_momentum = 0.5
batch_size = 8
loss_examples = 64
eval_every = 20
[run]
checkpoint_every = 1
keep = 2
"""


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path):
    config, whole, killed = tmp_path / "config.toml", tmp_path / "whole", tmp_path / "killed"
    config.write_text('engine = { name = "reference" }' + CONFIG)  # it starts sooner
    code, _, errors = launcher().call(tmp_path, "run", config, f"run.dir={whole}")
    assert code == 0, errors

    chance = random.Random(0)
    kills = {"before the folder": 0, "at the folder": 0, "in training": 0, "at the end": 0}

    def live_and_die(kind: str, moment: Callable[[Process], bool], longest: float) -> None:
        words = ("resume", killed) if killed.exists() else ("run", config, f"run.dir={killed}")
        process = launcher().start(tmp_path, *words)
        if moment(process):
            time.sleep(chance.uniform(0, longest))
        process.signal(signal.SIGKILL)
        code = process.end()
        if code == -signal.SIGKILL:
            kills[kind] += 1
        else:
            assert code == 0, process.err.read_text()

    for _ in range(2):
        live_and_die("before the folder", lambda _: not killed.exists(), 0.05)
    for _ in range(2):
        live_and_die("at the folder", lambda process: wait_until(process, killed.exists), 0.1)
    for life in range(LIVES):
        share = ROUNDS * CLIENTS * (life + 1) // (LIVES + 1)
        goal = max(lines(killed) + 1, share + chance.randint(-8, 8))  # within a round's lines, too
        live_and_die(
            "in training",
            lambda process, goal=goal: wait_until(process, lambda: lines(killed) >= goal),
            0.03,
        )
    for _ in range(LAST_LIVES):
        live_and_die(
            "at the end", lambda process: wait_until(process, changed(killed / "models")), 0.02
        )

    code, _, errors = launcher().call(tmp_path, "resume", killed)
    assert (code, errors) == (0, "")
    assert kills["in training"] >= 15, kills
    assert kills["at the end"] >= 2, kills
    assert sum(kills.values()) >= 20, kills
    assert outcome(killed) == outcome(whole)
    checkpoints = sorted((killed / "checkpoints").glob("round-*"))
    assert [load_checkpoint(path).server.round for path in checkpoints] == [ROUNDS - 1, ROUNDS]
    assert not [
        *killed.rglob("*.writing"),
        *(set(tmp_path.glob(".killed*")) - {tmp_path / ".killed.lock"}),
    ], "what was half written is left"


def test_the_command_itself_is_killed_and_resumed_from_a_cold_start(tmp_path):
    config, whole, killed = tmp_path / "config.toml", tmp_path / "whole", tmp_path / "killed"
    config.write_text(CONFIG.replace(f"num_rounds = {ROUNDS}", "num_rounds = 40"))
    assert launcher().call(tmp_path, "run", config, f"run.dir={whole}")[0] == 0

    def start(*words: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedgradnorm", *map(str, words)], stdout=subprocess.DEVNULL
        )

    with start("run", config, f"run.dir={killed}") as process:
        deadline = time.monotonic() + PATIENCE
        while (
            lines(killed) < 5 * CLIENTS and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 5 * CLIENTS <= lines(killed) < 40 * CLIENTS
    with start("resume", killed) as process:
        assert process.wait(PATIENCE) == 0
    assert outcome(killed) == outcome(whole)
