"""Runs that are killed with SIGKILL wherever they write, and resumed, end as if they had never been killed."""

import signal
import subprocess
import sys
import time

from fedgradnorm.runs.checkpoint import load_checkpoint
from tests.launcher import PATIENCE, launcher
from tests.runs import QUICK, lines, outcome

ROUNDS, CLIENTS, KEEP = 4, 3, 2
SETTINGS = [
    "engine.name=reference",
    *QUICK,
    f"train.num_rounds={ROUNDS}",
    "train.head_momentum=0.5",
    "train.server_momentum=0.5",
    f"run.keep={KEEP}",
]
WRITTEN = [
    "members.json",
    "summary.json",
    "models/encoder.safetensors",
    *(f"models/heads/{client}.safetensors" for client in "abc"),
    *(f"checkpoints/round-{round:08}.safetensors" for round in range(1, ROUNDS + 1)),
]
"""What is written aside, and renamed."""


def aside(name):
    folder, _, file = name.rpartition("/")
    return f"killed/{folder}/.{file}.writing" if folder else f"killed/.{file}.writing"


POINTS = {
    "open .killed.lock",
    "os.mkdir .killed.starting",
    "torn .killed.starting/.config.toml.writing",
    "fsync .killed.starting/.config.toml.writing",
    "os.rename .killed.starting/config.toml",
    "os.rename killed",
    "open killed/metrics.jsonl",
    "open killed/tensorboard/events.out",
    "open killed/report.html",
    *(f"{event} {aside(name)}" for name in WRITTEN for event in ("open", "torn", "fsync")),
    *(f"os.rename killed/{name}" for name in WRITTEN),
    *(
        f"{event} of {CLIENTS * round} lines killed/metrics.jsonl"
        for round in range(1, ROUNDS + 1)
        for event in ("torn", "fsync")
    ),
    *(
        f"os.remove killed/checkpoints/round-{round:08}.safetensors"
        for round in range(1, ROUNDS - KEEP + 1)
    ),
}
"""Where it is killed, among others, such as where what a killed run left half written is removed."""


def test_a_run_that_is_killed_wherever_it_writes_ends_as_one_that_never_was(tmp_path):
    whole, runs, points = tmp_path / "whole", tmp_path / "runs", tmp_path / "points"
    killed = runs / "killed"
    runs.mkdir()
    (tmp_path / "config.toml").touch()
    words = ["run", tmp_path / "config.toml", *SETTINGS]
    assert launcher().call(tmp_path, *words, f"run.dir={whole}")[0::2] == (0, "")

    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        again = ("resume", killed) if killed.exists() else (*words, f"run.dir={killed}")
        code, _, errors = launcher().call(tmp_path, *again, kill_in=(runs, points))
    assert (code, errors) == (0, "")
    reached = points.read_text().splitlines()
    assert len(set(reached)) == len(reached)
    assert POINTS - set(reached) == set()
    assert outcome(killed) == outcome(whole)

    for folder in (killed, whole):  # the next checkpoint removes the old ones that were left
        assert launcher().call(tmp_path, "resume", folder, "--rounds", ROUNDS + 1)[0] == 0
    assert outcome(killed) == outcome(whole)
    checkpoints = sorted((killed / "checkpoints").glob("round-*"))
    assert [load_checkpoint(path).server.round for path in checkpoints] == [ROUNDS, ROUNDS + 1]
    assert not [
        *killed.rglob("*.writing"),
        *(set(runs.glob(".killed*")) - {runs / ".killed.lock"}),
    ], "what was half written is left"


def test_the_command_itself_is_killed_and_resumed_from_a_cold_start(tmp_path):
    config, whole, killed = tmp_path / "config.toml", tmp_path / "whole", tmp_path / "killed"
    config.touch()
    words = [
        "federation.name=digits",
        "train.num_rounds=40",
        "train.head_steps=1",
        "train.encoder_steps=1",
        "run.checkpoint_every=1",
    ]
    assert launcher().call(tmp_path, "run", config, *words, f"run.dir={whole}")[0] == 0

    def start(*words: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedgradnorm", *map(str, words)], stdout=subprocess.DEVNULL
        )

    with start("run", config, *words, f"run.dir={killed}") as process:
        deadline = time.monotonic() + PATIENCE
        while lines(killed) < 5 * 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 5 * 4 <= lines(killed) < 40 * 4
    with start("resume", killed) as process:
        assert process.wait(PATIENCE) == 0
    assert outcome(killed) == outcome(whole)
