"""The whole deployment on this machine: the SuperLink and all nodes, until Ctrl-C. Their logs are in logs/.

    python local.py

In another terminal: server/run.sh
"""

import contextlib
import io
import json
import re
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
READY = 180.0
"""Seconds that the SuperLink has to answer."""
AGAIN = 15.0
"""Seconds between looks for nodes that have ended, and are started again."""


def main() -> None:
    """Start everything, and end everything."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log may hold any letter
    LOGS.mkdir(exist_ok=True)
    if subprocess.run([sys.executable, FOLDER / "keys.py"], check=False).returncode:
        sys.exit("keys.py has made no keys")
    point_to_certificate()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    superlink = None
    try:
        superlink = start("superlink", "server/superlink.sh")
        register(superlink)
        nodes = {folder.name: start_node(folder.name) for folder in sorted((FOLDER / "nodes").iterdir()) if folder.is_dir()}
        print("ready: server/run.sh starts the run; Ctrl-C here stops all", flush=True)
        watch(superlink, nodes)
    finally:
        stop(superlink)


def point_to_certificate() -> None:
    """Let `flwr` know where the CA's certificate is: it wants an absolute path, which is another one when this folder has moved."""
    config = FOLDER / "server" / "flwr" / "config.toml"
    line = f"root-certificates = {json.dumps(str(FOLDER / 'server' / 'ca.crt'), ensure_ascii=False)} # absolute"
    config.write_text(re.sub(r"(?m)^root-certificates = .*$", lambda _: line, config.read_text()))


def start(name: str, script: str, mode: str = "wb") -> subprocess.Popen[bytes]:
    """Start a script in a session of its own, so that Ctrl-C reaches this process alone."""
    with (LOGS / f"{name}.log").open(mode) as log:
        return subprocess.Popen([FOLDER / script], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def start_node(client: str, mode: str = "wb") -> subprocess.Popen[bytes]:
    """Start the node of a client."""
    return start(f"node-{client}", f"nodes/{client}/supernode.sh", mode)


def register(superlink: subprocess.Popen[bytes]) -> None:
    """Wait until the SuperLink answers, and register the nodes. Those of an earlier start are registered already."""
    end = time.monotonic() + READY
    with (LOGS / "register.log").open("wb") as log:
        while subprocess.run([FOLDER / "server/flwr.sh", "supernode", "list"], stdout=log, stderr=log, check=False).returncode:
            if superlink.poll() is not None:
                sys.exit(f"the SuperLink has ended:\n{tail('superlink')}")
            if time.monotonic() >= end:
                sys.exit(f"the SuperLink does not answer after {READY:g} s:\n{tail('register')}")
            time.sleep(1)
        subprocess.run([FOLDER / "server/register.sh"], stdout=log, stderr=log, check=False)


def watch(superlink: subprocess.Popen[bytes], nodes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Start nodes that have ended again, such as one that the SuperLink refuses as long as it has not missed the one before it."""
    told = False
    while True:
        time.sleep(AGAIN)
        if superlink.poll() is not None and not told:
            print(f"the SuperLink has ended; to start it again, stop all with Ctrl-C:\n{tail('superlink')}", flush=True)
            told = True
        for client, node in nodes.items():
            if node.poll() is not None:
                print(f"node {client} has ended, and is started again: logs/node-{client}.log", flush=True)
                nodes[client] = start_node(client, "ab")


def tail(name: str) -> str:
    """The end of a log."""
    return "\n".join((LOGS / f"{name}.log").read_text(errors="replace").splitlines()[-20:])


def stop(superlink: subprocess.Popen[bytes] | None) -> None:
    """End all that was started and whatever that has started: the nodes first, so that they can still tell the SuperLink that they go."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    started = psutil.Process().children(recursive=True)  # now: what outlives its parent is found no more
    own = psutil.Process().children()
    end([process for process in own if superlink is None or process.pid != superlink.pid])
    end([process for process in own if superlink is not None and process.pid == superlink.pid])
    end(started)


def end(processes: list[psutil.Process]) -> None:
    """End processes, by force if need be."""
    for how in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                how(process)
        _, processes = psutil.wait_procs(processes, timeout=PATIENCE)


if __name__ == "__main__":
    main()
