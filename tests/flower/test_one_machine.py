"""local.py of a deployment's folder, with scripts in the place of Flower's commands."""

import os
import re
import signal
import stat
import subprocess
import sys
import tomllib

import psutil
import pytest

from fedgradnorm.flower.init import write_deployment
from tests.deployment.processes import free_ports, wait_until

QUICK = "import local; local.AGAIN = 0.2; local.READY = {ready}; local.PATIENCE = 5.0; local.main()"
SUPERLINK = "sleep 1000 & wait"
LISTEN = 'import os, socket, time; s = socket.create_server(("127.0.0.1", int(os.environ["PORT"]))); time.sleep(1000)'
FRONT = f"set -a; . ./superlink.env; set +a; python3 -c '{LISTEN}' & wait"
NODE = "setsid sleep 1000 & wait"
SCRIPT = """#!/usr/bin/env bash
cd "$(dirname "${{BASH_SOURCE[0]}}")"
echo start {name} >> {notes}
trap 'echo end {name} >> {notes}; exit' TERM
{rest}
"""


class Machine:
    """A folder whose scripts only note that they are started and ended."""

    def __init__(self, folder):
        self.folder, self.notes = folder, folder.parent / "notes"
        self.process: subprocess.Popen[str] | None = None
        settings = ["federation.name=digits", 'federation.tasks=["class", "loop"]']
        write_deployment(folder, None, settings, port=free_ports(1)[0])
        self.script("server/superlink.sh", SUPERLINK)
        self.script("server/front.sh", FRONT)
        self.script("server/flwr.sh", "exit 0")
        self.script("server/register.sh", "exit 0")
        for client in ("class", "loop"):
            self.script(f"nodes/{client}/supernode.sh", NODE)

    def script(self, path, rest):
        name = "front" if path.endswith("front.sh") else path.split("/")[-2]
        (self.folder / path).write_text(SCRIPT.format(name=name, notes=self.notes, rest=rest))

    def start(self, ready=60.0):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        words, pipe = [sys.executable, "-c", QUICK.format(ready=ready)], subprocess.PIPE
        self.process = subprocess.Popen(
            words,
            cwd=self.folder,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        return self.process

    def noted(self):
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def end(self):
        """Press Ctrl-C, and give what was printed."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, output
        assert not [
            process
            for process in started
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]
        return output


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path / "here")
    yield machine
    if machine.process is not None and machine.process.poll() is None:  # the test has failed
        for process in [
            *psutil.Process(machine.process.pid).children(recursive=True),
            machine.process,
        ]:
            process.kill()


def running(machine):
    wait_until(
        lambda: (
            machine.noted().count("start loop") >= 1 and machine.noted().count("start class") >= 1
        ),
        "the nodes run",
        60,
    )


def test_nodes_end_before_the_front_and_the_superlink_and_nothing_is_left(machine):
    machine.start()
    running(machine)
    machine.end()
    ends = [line for line in machine.noted() if line.startswith("end")]
    assert sorted(ends[:2]) == ["end class", "end loop"]
    assert ends[2:] == ["end front", "end server"]


def test_logs_are_for_their_owner_alone(machine):
    logs = machine.folder / "logs"
    logs.mkdir(mode=0o755)
    (logs / "superlink.log").write_text("of an earlier version")
    machine.start()
    running(machine)
    machine.end()
    assert stat.S_IMODE(logs.stat().st_mode) == 0o700
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in logs.iterdir()}
    assert found == dict.fromkeys(
        ["superlink.log", "register.log", "front.log", "node-class.log", "node-loop.log"], 0o600
    )


def test_a_front_that_ended_is_started_again(machine):
    machine.start()
    running(machine)
    (front,) = [
        process
        for process in psutil.Process(machine.process.pid).children()
        if any("front.sh" in word for word in process.cmdline())
    ]
    for process in [front, *front.children()]:
        process.kill()
    wait_until(lambda: machine.noted().count("start front") == 2, "the front is started again", 60)
    output = machine.end()
    assert "the front has ended, and is started again: logs/front.log" in output
    assert machine.noted()[-2:] == ["end front", "end server"]


def test_a_front_that_cannot_start_is_named_before_any_node_starts(machine):
    machine.script("server/front.sh", "echo neither caddy nor nginx; exit 2")
    output, _ = machine.start().communicate(timeout=60)
    assert machine.process.returncode == 1
    assert "the front has ended:\nneither caddy nor nginx" in output
    assert not [line for line in machine.noted() if line.startswith("start loop")]


def test_a_front_that_does_not_answer_is_not_waited_for_for_ever(machine):
    machine.script("server/front.sh", SUPERLINK)
    output, _ = machine.start(1.5).communicate(timeout=60)
    assert machine.process.returncode == 1
    assert re.search(r"the front does not answer on 127.0.0.1, port \d+, after 1.5 s:", output)


def test_a_node_that_ended_is_started_again(machine):
    machine.script(
        "nodes/loop/supernode.sh",
        f"[ $(grep -c 'start loop' {machine.notes}) -gt 2 ] || exit 1; {NODE}",
    )
    machine.start()
    wait_until(lambda: machine.noted().count("start loop") == 3, "it is started until it stays", 60)
    output = machine.end()
    assert output.count("node loop has ended, and is started again: logs/node-loop.log") == 2
    assert machine.noted().count("start class") == 1


def test_a_superlink_that_ended_is_named(machine):
    machine.script("server/superlink.sh", "sleep 3; echo no room; exit 1")
    machine.start()
    output = "".join(iter(machine.process.stdout.readline, "no room\n"))
    assert "the SuperLink has ended; to start it again, stop all with Ctrl-C:" in output
    machine.end()


@pytest.mark.parametrize(
    ("superlink", "ready", "message"),
    [
        (SUPERLINK, 1.5, "the SuperLink does not answer after 1.5 s:\nno route"),
        ("echo the port is taken; exit 1", 60, "the SuperLink has ended:\nthe port is taken"),
    ],
)
def test_a_superlink_that_does_not_answer_is_not_waited_for_for_ever(
    machine, superlink, ready, message
):
    machine.script("server/superlink.sh", superlink)
    machine.script("server/flwr.sh", "echo no route; exit 1")
    output, _ = machine.start(ready).communicate(timeout=60)
    assert machine.process.returncode == 1
    assert message in output
    assert not [line for line in machine.noted() if line.startswith("start loop")]


def test_a_folder_that_was_moved_finds_its_certificate(machine):
    moved = machine.folder.rename(machine.folder.with_name('moved "here"'))
    machine.folder = moved
    machine.start()
    running(machine)
    machine.end()
    config = tomllib.loads((moved / "server/flwr/config.toml").read_text())
    assert config["superlink"]["deployment"]["root-certificates"] == str(moved / "server/ca.crt")
