"""A deployment on this machine, from a folder that `fedgradnorm flower init` wrote: started, watched, killed, and always cleaned up."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from fedgradnorm.flower.init import write_deployment
from fedgradnorm.runs.reader import Run

PATIENCE = 600.0
"""Seconds until a condition that never comes true is an error: machines can be slow, so nothing is ever waited for by the clock alone."""

AGAIN = 12.0
"""Seconds between starts of a node that the SuperLink refuses: each costs seconds of CPU time."""


class Deployment:
    """A folder and its processes."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.port, superlink_port, *node_ports = free_ports(5)
        self.clients = write_deployment(folder, None, settings, port=self.port)
        self.logs.mkdir()
        self.use_superlink_port(superlink_port)
        home = folder / "home"
        home.mkdir()
        bin_folder = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        for name in [name for name in self.env if name.startswith(("FLWR_", "PYTEST_"))]:
            del self.env[name]
        for client, port in zip(self.clients, node_ports[: len(self.clients)], strict=True):
            self.set(f"nodes/{client}/node.env", "PORT", str(port))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.do("keys.py")

    def set(self, file: str, key: str, value: str) -> None:
        """Change a line of a settings file."""
        path = self.folder / file
        path.write_text(
            re.sub(
                rf"(?m)^{key} ?=.*$",
                lambda line: line[0].partition("=")[0] + f"={value}",
                path.read_text(),
            )
        )

    def fork_apps(self, programs: Path, *clients: str) -> None:
        """Let apps start with the programs of this folder: those of all, or of the nodes of these clients."""
        for client in clients:
            with (self.folder / f"nodes/{client}/node.env").open("a") as file:
                file.write(f'PATH="{programs}:$PATH"\n')
        if not clients:
            self.env["PATH"] = f"{programs}:{self.env['PATH']}"

    def use_superlink_port(self, port: int) -> None:
        """Let the SuperLink listen elsewhere on 127.0.0.1."""
        self.superlink_port = port
        self.set("server/superlink.env", "SUPERLINK_PORT", str(port))
        self.set("server/flwr/config.toml", "address", f'"127.0.0.1:{port}"')

    def command(self, script: str, *words: str) -> list[str]:
        """The words that run a script of the folder."""
        return [
            *([sys.executable] if script.endswith(".py") else []),
            str(self.folder / script),
            *words,
        ]

    def do(self, script: str, *words: str) -> str:
        """Run a script of the folder to its end, and give what it printed."""
        done = subprocess.run(
            self.command(script, *words),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, script: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a script of the folder; its log is ``logs/NAME.log``."""
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(script, *words),
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def start_superlink(self) -> None:
        """Start the SuperLink, then the front unless it is running, and wait until they answer."""
        self.start_listener("superlink", self.superlink_port)
        if not answers(self.port):
            self.start_front()

    def start_front(self) -> None:
        """Start the front, and wait until it answers."""
        self.start_listener("front", self.port)

    def start_listener(self, name: str, port: int) -> None:
        """Start a script of the server, and wait until it takes connections."""
        process = self.start(name, f"server/{name}.sh")

        def ready() -> bool:
            assert process.poll() is None, self.log(name)
            return answers(port)

        wait_until(ready, f"the {name} answers")

    def start_nodes(self, *clients: str) -> None:
        """Start nodes: all, or those of these clients."""
        for client in clients or self.clients:
            self.start(client, f"nodes/{client}/supernode.sh")

    def restart_node(self, client: str) -> None:
        """Start a node that was killed, as systemd does: it is refused until the SuperLink takes the old one for gone."""
        before = self.log("superlink").count("Activated node_id")
        next_start = 0.0

        def connected() -> bool:
            nonlocal next_start
            ended = client not in self.processes or self.processes[client].poll() is not None
            if ended and time.monotonic() >= next_start:
                self.start(client, f"nodes/{client}/supernode.sh")
                next_start = time.monotonic() + AGAIN
            return self.log("superlink").count("Activated node_id") > before

        wait_until(connected, f"{client} is connected again")

    def start_run(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a run."""
        return self.start("run", "server/run.sh", *words)

    def finish(self, process: subprocess.Popen[bytes]) -> Run:
        """Wait until a run ends, and give what it wrote."""
        process.wait(timeout=PATIENCE)
        return self.run

    @property
    def run(self) -> Run:
        """The run's folder."""
        (folder,) = [
            path.parent for path in (self.folder / "server" / "runs").glob("*/config.toml")
        ]
        return Run(folder)

    def round(self) -> int:
        """How many rounds are done."""
        lines = [
            path.read_text().splitlines()
            for path in (self.folder / "server" / "runs").glob("*/metrics.jsonl")
        ]
        return 0 if not lines or not lines[0] else len(lines[0]) // len(self.clients)

    def saved_round(self) -> int:
        """The round of the newest checkpoint."""
        return max(
            int(path.name.split("-")[1])
            for path in (self.folder / "server" / "runs").glob("*/checkpoints/round-*.safetensors")
        )

    def log(self, name: str) -> str:
        """The log of a process so far."""
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """Kill a process with all that it started, as when its machine fails."""
        process = self.processes.pop(name)
        children = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.kill()
        for one in children:
            send(one, signal.SIGKILL)
        process.wait(timeout=60)

    def kill_superlink_of(self, name: str) -> None:
        """Kill the SuperLink that a process has started, and what that has started, with SIGKILL."""
        for process in psutil.Process(self.processes[name].pid).children():
            if any("flower-superlink" in word for word in process.cmdline()):
                for one in [process, *process.children(recursive=True)]:
                    send(one, signal.SIGKILL)
                psutil.wait_procs([process], timeout=60)
                return
        raise AssertionError(f"no SuperLink under {name}")

    def close(self) -> None:
        """Kill whatever is left, and show the ends of the logs (pytest shows them where a test failed)."""
        for name in list(self.processes):
            self.kill(name)
        for one in self.left_over():
            send(one, signal.SIGKILL)
        for path in sorted(self.logs.glob("*.log")):
            sys.stdout.write(f"--- {path.name}\n{path.read_text(errors='replace')[-5000:]}\n")
        shutil.rmtree(self.folder, ignore_errors=True)

    def left_over(self) -> list[psutil.Process]:
        """Processes that run in this folder, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("HOME", "").startswith(f"{self.folder}/")
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def answers(port: int) -> bool:
    """Whether somebody takes connections at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def send(process: psutil.Process, number: int) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout:g} s: {what}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
