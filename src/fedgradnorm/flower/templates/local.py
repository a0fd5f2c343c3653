"""The whole deployment on this machine: the SuperLink and all nodes, until Ctrl-C. Their logs are in logs/.

    python local.py

In another terminal: server/run.sh
"""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

FOLDER = Path(__file__).resolve().parent
LOGS = FOLDER / "logs"
PATIENCE = 10.0
"""Seconds that a process has to end by itself."""


def main() -> None:
    """Start everything, and end everything."""
    LOGS.mkdir(exist_ok=True)
    if not (FOLDER / "server" / "server.key").exists():
        subprocess.run([sys.executable, FOLDER / "keys.py"], check=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    try:
        superlink = start("superlink", "server/superlink.sh")
        register(superlink)
        nodes = [start(folder.name, f"nodes/{folder.name}/supernode.sh") for folder in sorted((FOLDER / "nodes").iterdir())]
        print("ready: server/run.sh starts the run; Ctrl-C here stops all", flush=True)
        for process in (superlink, *nodes):
            process.wait()
    finally:
        stop()


def start(name: str, script: str) -> subprocess.Popen[bytes]:
    """Start a script in a session of its own, so that Ctrl-C reaches this process alone."""
    with (LOGS / f"{name}.log").open("wb") as log:
        return subprocess.Popen([FOLDER / script], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def register(superlink: subprocess.Popen[bytes]) -> None:
    """Wait until the SuperLink answers, and register the nodes. Those of an earlier start are registered already."""
    with (LOGS / "register.log").open("wb") as log:
        while subprocess.run([FOLDER / "server/flwr.sh", "supernode", "list"], stdout=log, stderr=log, check=False).returncode:
            if superlink.poll() is not None:
                sys.exit((LOGS / "superlink.log").read_text(errors="replace"))
            time.sleep(1)
        subprocess.run([FOLDER / "server/register.sh"], stdout=log, stderr=log, check=False)


def stop() -> None:
    """End all that was started and whatever that has started, by force if need be."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    left = psutil.Process().children(recursive=True)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, left = psutil.wait_procs(left, timeout=PATIENCE)


if __name__ == "__main__":
    main()
