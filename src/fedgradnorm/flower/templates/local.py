"""Runs the whole deployment on this machine: the SuperLink, the front and all nodes, until Ctrl-C.

    python local.py

Their logs are in logs/. In another terminal: server/run.sh
"""

import contextlib
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import psutil

FOLDER = Path(__file__).resolve().parent
LOGS = FOLDER / "logs"
Process = subprocess.Popen[bytes]
PATIENCE = 10.0
"""Seconds to wait for a process to end by itself."""
READY = 180.0
"""Seconds to wait for the SuperLink to answer, and then for the front."""
AGAIN = 15.0
"""Seconds between checks of the front and the nodes; one that has ended is started again."""


def main() -> None:
    """Start everything, and end everything."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log may hold any letter
    LOGS.mkdir(exist_ok=True, mode=0o700)
    LOGS.chmod(0o700)  # it may be there already
    if subprocess.run([sys.executable, FOLDER / "keys.py"], check=False).returncode:
        sys.exit("keys.py has made no keys")
    point_to_certificate()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())
    server: dict[str, Process] = {}
    try:
        server["superlink"] = start("superlink", "server/superlink.sh")
        register(server["superlink"])
        server["front"] = start("front", "server/front.sh")
        wait_for_front(server["front"])
        folders = sorted(path for path in (FOLDER / "nodes").iterdir() if path.is_dir())
        nodes = {folder.name: start_node(folder.name) for folder in folders}
        print("ready: server/run.sh starts the run; Ctrl-C here stops all", flush=True)
        watch(server, nodes)
    finally:
        stop(list(server.values()))


def point_to_certificate() -> None:
    """Tell `flwr` the absolute path of the CA's certificate: this folder may have been moved."""
    config, certificate = FOLDER / "server/flwr/config.toml", str(FOLDER / "server" / "ca.crt")
    quoted = json.dumps(certificate, ensure_ascii=False)
    line = f"root-certificates = {quoted} # absolute"
    config.write_text(re.sub(r"(?m)^root-certificates = .*$", lambda _: line, config.read_text()))


def start(name: str, script: str, *, fresh: bool = True) -> Process:
    """Start a script in a new session, so that Ctrl-C reaches this process alone."""
    with log_file(name, fresh=fresh) as log:
        command, none = [FOLDER / script], subprocess.DEVNULL
        return subprocess.Popen(command, stdin=none, stdout=log, stderr=log, start_new_session=True)


def log_file(name: str, *, fresh: bool = True) -> BinaryIO:
    """A log that only its owner may read; it is emptied, or continued where not ``fresh``."""
    path = LOGS / f"{name}.log"
    path.touch(mode=0o600)
    path.chmod(0o600)  # it may be there already
    return path.open("wb" if fresh else "ab")


def start_node(client: str, *, fresh: bool = True) -> Process:
    """Start the node of a client."""
    return start(f"node-{client}", f"nodes/{client}/supernode.sh", fresh=fresh)


def register(superlink: Process) -> None:
    """Wait until the SuperLink answers, and register the nodes that are not registered yet."""
    end = time.monotonic() + READY
    with log_file("register") as log:
        command = [str(FOLDER / "server/flwr.sh"), "supernode", "list"]
        while subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
            if superlink.poll() is not None:
                sys.exit(f"the SuperLink has ended:\n{tail('superlink')}")
            if time.monotonic() >= end:
                sys.exit(f"the SuperLink does not answer after {READY:g} s:\n{tail('register')}")
            time.sleep(1)
        subprocess.run([FOLDER / "server/register.sh"], stdout=log, stderr=log, check=False)


def wait_for_front(front: Process) -> None:
    """Wait until the front takes connections."""
    words = shlex.split((FOLDER / "server/superlink.env").read_text(), comments=True)
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    every = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # it may listen to all networks
    host = every.get(settings["HOST"], settings["HOST"])
    end = time.monotonic() + READY
    while True:
        if front.poll() is not None:
            sys.exit(f"the front has ended:\n{tail('front')}")
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(settings["PORT"])), timeout=5),
        ):
            return
        if time.monotonic() >= end:
            place = f"on {host}, port {settings['PORT']}, after {READY:g} s"
            sys.exit(f"the front does not answer {place}:\n{tail('front')}")
        time.sleep(0.2)


def watch(server: dict[str, Process], nodes: dict[str, Process]) -> None:
    """Restart the front and nodes that have ended.

    The SuperLink refuses a restarted node until it has missed the old one; then the node ends.
    """
    told = False
    while True:
        time.sleep(AGAIN)
        if server["superlink"].poll() is not None and not told:
            again = "to start it again, stop all with Ctrl-C"
            print(f"the SuperLink has ended; {again}:\n{tail('superlink')}", flush=True)
            told = True
        if server["front"].poll() is not None:
            print("the front has ended, and is started again: logs/front.log", flush=True)
            server["front"] = start("front", "server/front.sh", fresh=False)
        for client, node in nodes.items():
            if node.poll() is not None:
                log = f"logs/node-{client}.log"
                print(f"node {client} has ended, and is started again: {log}", flush=True)
                nodes[client] = start_node(client, fresh=False)


def tail(name: str) -> str:
    """The end of a log."""
    return "\n".join((LOGS / f"{name}.log").read_text(errors="replace").splitlines()[-20:])


def stop(server: list[Process]) -> None:
    """End all processes that were started, and their descendants.

    Nodes end first, then the front, then the SuperLink, so that nodes can still sign off.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # now: a process that outlives its parent cannot be found later
    started = psutil.Process().children(recursive=True)
    own = {process.pid: process for process in psutil.Process().children()}
    last = [own.pop(process.pid) for process in reversed(server) if process.pid in own]
    end(list(own.values()))
    for process in last:
        end([process])
    end(started)


def end(processes: list[psutil.Process]) -> None:
    """End processes, by force where they do not end by themselves."""
    for how in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                how(process)
        _, processes = psutil.wait_procs(processes, timeout=PATIENCE)


if __name__ == "__main__":
    main()
