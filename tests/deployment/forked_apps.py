"""Flower's processes of apps, forked from a process that has imported everything.

Flower starts a process for every message to a node and for every run, and most of its CPU time, four
seconds or more, goes into importing torch. With `started`'s folder before all else on the PATH, a small
program starts instead. It hands its words, environment and outputs to this process, which forks one that
runs Flower's own code. When the small program is killed, so is the forked process.

    python forked_apps.py FOLDER
"""

import json
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

CLIENT = """#!{python} -ISE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    order = {{"words": sys.argv, "environment": dict(os.environ), "folder": os.getcwd()}}
    socket.send_fds(server, [json.dumps(order).encode() + b"\\n"], [1, 2])
    answer = server.recv(16)
sys.exit(int(answer or b"1"))
"""
NO_CALLS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@contextmanager
def started(folder: Path) -> Iterator[Path]:
    """Gives a folder with programs whose processes are forked, as long as the block lasts."""
    folder.mkdir()
    environment = {**os.environ, **NO_CALLS, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(folder)]
    with Popen(words, stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "it has ended"
        try:
            yield folder
        finally:
            process.kill()


def handle(connection: socket.socket) -> None:
    """Run an order in this process, which was forked for it."""
    content, descriptors, _, _ = socket.recv_fds(connection, 2**20, 2)
    while not content.endswith(b"\n"):
        content += connection.recv(2**20)
    order = json.loads(content)
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv = order["words"]
    threading.Thread(target=die_with, args=(connection,), daemon=True).start()
    code = 1
    try:
        programs()[Path(sys.argv[0]).name]()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(str(code).encode())
        os._exit(code)


def die_with(connection: socket.socket) -> None:
    """End this process when the program that it runs for has ended."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def programs() -> dict[str, Callable[[], None]]:
    """Flower's commands."""
    from flwr.superlink.cli import flwr_serverapp
    from flwr.supernode.cli import flwr_clientapp

    return {"flwr-clientapp": flwr_clientapp, "flwr-serverapp": flwr_serverapp}


def main(folder: Path) -> None:
    """Fork a process for every order, until this one is killed."""
    import torch

    from fedgradnorm.federations import digits

    torch.set_num_threads(1)
    digits.make(seed=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    address = folder / "socket"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen(16)
    for name in programs():
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=str(address)))
        (folder / name).chmod(stat.S_IRWXU)
    print("ready", flush=True)  # noqa: T201
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            handle(connection)
        connection.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
