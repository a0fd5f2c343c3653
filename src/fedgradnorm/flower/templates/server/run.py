"""Starts a run, or finds the unfinished one, and shows its log. server/run.sh calls it.

Exit status:
    0: the run has completed.
    1: it has failed, was stopped or could not be started, or the SuperLink does not answer.
    2: the arguments are wrong, or they are for a new run while one is unfinished.
    130: after Ctrl-C, which ends this program and not the run.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SERVER = Path(__file__).resolve().parent
FLWR, LAST = str(SERVER / "flwr.sh"), SERVER / "last-run.json"
FINISHED, COMPLETED = "finished", "finished:completed"
LOOK, LAST_LINES, PATIENCE = 60.0, 10.0, 300.0
"""Seconds: between checks whether a run has ended while its log is shown; for the rest of its log
after that; for Flower's commands to answer."""
LOST = "No heartbeat received from the task"
"""Flower's details of a run whose process is gone, up to a minute after a crash of the machine."""


def main() -> None:
    """Start or find the run, show it, and end with its outcome."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = "Start the run, or show the one that is going on."
    parser = argparse.ArgumentParser(prog="run.sh", description=about, allow_abbrev=False)
    what = "settings of this run alone"
    parser.add_argument("-c", "--run-config", action="append", metavar="WORDS", help=what)
    words = parser.parse_args().run_config or []
    try:
        run = going_on()
        if run and words:
            why = f"run {run} is going on, and takes no other settings"
            expected = "expected no words, to show it; or end it first"
            end(2, f"--run-config: {why}: {expected}: {FLWR} stop {run}")
        if run:
            say(f"run {run} is going on: its log from the beginning")
            status, details = show(run)
            if details != LOST:
                finish(run, status, details)
            again = words_of(run)
            if again is None or again:
                which = "the words that it was started with"
                if again is not None:
                    which = shlex.join(["--run-config", *again])
                end(1, f"run {run} was lost with its process: start it again, with {which}")
            say(f"run {run} was lost with its process, and is started again")
        run = start(words)
        finish(run, *show(run))
    except KeyboardInterrupt:
        sys.exit(130)


def going_on() -> str | None:
    """The newest unfinished run; None if there is none."""
    return next((run["run-id"] for run in runs() if not run["status"].startswith(FINISHED)), None)


def runs(*words: str) -> list[dict[str, Any]]:
    """The SuperLink's records of its runs, the newest first."""
    answer = ask("ls", *words)
    if not answer.get("success"):
        end(1, f"the SuperLink does not answer: {reason(answer)}")
    return list(answer["runs"])


def start(words: list[str]) -> str:
    """Start a run, and give its id."""
    options = [part for word in words for part in ("--run-config", word)]
    answer = ask("run", str(SERVER.parent / "app"), *options)
    if not answer.get("success"):
        end(1, f"the run was not started: {reason(answer)}")
    run = str(answer["run-id"])
    LAST.write_text(json.dumps({"run-id": run, "run-config": words}) + "\n")
    say(f"run {run} is started")
    return run


def words_of(run: str) -> list[str] | None:
    """The settings that a run was started with, besides the app's; None where they are unknown."""
    try:
        last = json.loads(LAST.read_text())
        return list(last["run-config"]) if last["run-id"] == run else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def show(run: str) -> tuple[str, str]:
    """Show a run's log until it ends. Returns its status and details.

    A stream that breaks before the run ends is started again.
    """
    while True:
        command, env = [FLWR, "log", run, "--stream"], {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, env=env)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK)
                # the stream may never end, such as in a tunnel that broke
                if process.poll() is None and outcome(run).startswith(FINISHED):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(LAST_LINES)
                    break
        except KeyboardInterrupt:
            end(130, f"run {run} goes on; server/run.sh shows it again")
        finally:
            process.terminate()
        (record,) = runs("--run-id", run)
        if record["status"].startswith(FINISHED):
            return record["status"], record["status-details"]
        say(f"run {run} is going on, but its log has ended: it is shown again")
        time.sleep(1)


def outcome(run: str) -> str:
    """A run's status."""
    return str(runs("--run-id", run)[0]["status"])


def finish(run: str, status: str, details: str) -> NoReturn:
    """Print how a run has ended, and exit with its status."""
    outcome = status.partition(":")[2]
    more = "" if details in ("", "N/A") else f": {details}"
    end(0 if status == COMPLETED else 1, f"run {run}: {outcome}{more}")


def ask(*words: str) -> dict[str, Any]:
    """The JSON answer of a Flower command; empty if it has none. Its messages go to stderr."""
    try:
        command, pipe = [FLWR, *words, "--format", "json"], subprocess.PIPE
        done = subprocess.run(command, stdout=pipe, text=True, check=False, timeout=PATIENCE)
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def reason(answer: dict[str, Any]) -> str:
    """Why a command has failed: the last line of its message, as those before only lead to it."""
    return str(answer.get("error-message") or "no reason is given").strip().splitlines()[-1]


def say(text: str) -> None:
    """Print a line between those of the log."""
    print(text, file=sys.stderr, flush=True)


def end(status: int, text: str) -> NoReturn:
    """Print the reason, and exit."""
    say(text)
    sys.exit(status)


if __name__ == "__main__":
    main()
