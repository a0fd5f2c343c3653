"""clock.py of a node's folder, against a small TLS server that says another time."""

import http.server
import os
import re
import shlex
import ssl
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest
from flwr.common.constant import (
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_TOLERANCE,
)  # the limits are Flower's own

from fedgradnorm.flower.init import write_deployment
from tests.deployment.processes import free_ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock") / "here"
    write_deployment(folder, None, ["federation.name=digits", 'federation.tasks=["class", "loop"]'])
    subprocess.run([sys.executable, "keys.py"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def serve(folder):
    """Starts a server whose clock is so many seconds ahead of this one, and gives its address."""
    servers = []

    def start(ahead):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response_only(403)
                if ahead is not None:
                    self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
                self.send_header("Content-Length", "0")
                self.end_headers()

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server/server.crt", folder / "server/server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def compare(folder, server):
    done = subprocess.run(
        [sys.executable, folder / "nodes/loop/clock.py", server],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    return done.returncode, done.stderr


def seconds(message):
    return float(re.search(r"is (\d+) s", message)[1])


def test_a_clock_that_is_ahead_is_refused(folder, serve):
    code, message = compare(folder, serve(-60))
    assert code == 3
    assert seconds(message) == pytest.approx(60, abs=20)  # an answer may take a while
    allowed = (
        f"{SYSTEM_TIME_TOLERANCE} s ahead or {TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE} s behind"
    )
    assert re.fullmatch(
        r"the clock of this machine is \d+ s ahead of the SuperLink's: Flower refuses a node that is "
        + allowed
        + r"\. Set it by NTP \(chrony or systemd-timesyncd\)\n",
        message,
    )


def test_a_clock_that_is_behind_is_refused_later(folder, serve):
    code, message = compare(folder, serve(3600))
    assert code == 3
    assert "s behind the SuperLink's: Flower refuses" in message
    assert seconds(message) == pytest.approx(3600, abs=20)
    code, message = compare(folder, serve(120))
    assert code == 0
    assert message.startswith("warning: the clock of this machine is ")
    assert "s behind the SuperLink's" in message


def test_a_clock_that_is_right_is_not_spoken_of(folder, serve):
    assert compare(folder, serve(0)) == (0, "")


def test_a_server_that_is_not_reached_is_left_to_flower(folder, serve):
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    code, message = compare(folder, nobody)
    assert code == 0
    assert message.startswith(
        f"the SuperLink's time is not known, so no clocks are compared: {nobody}: [Errno"
    )
    assert compare(folder, serve(None))[1].endswith(": its answer has no Date\n")


def test_the_time_of_a_server_with_another_ca_is_not_believed(serve, tmp_path):
    other = tmp_path / "other"
    write_deployment(other, None, ["federation.name=digits", 'federation.tasks=["class", "loop"]'])
    subprocess.run([sys.executable, "keys.py"], cwd=other, check=True, capture_output=True)
    code, message = compare(other, serve(-30))
    assert code == 0
    assert "certificate verify failed" in message


def test_a_node_with_a_wrong_clock_does_not_start(folder, serve, tmp_path):
    stub = tmp_path / "bin/flower-supernode"
    stub.parent.mkdir()
    stub.write_text("#!/bin/bash\necho started\n")
    stub.chmod(0o755)
    env = folder / "nodes/loop/node.env"
    before = env.read_text()
    for ahead, code, output in ((-30, 3, ""), (0, 0, "started\n")):
        env.write_text(f"{before}SUPERLINK={shlex.quote(serve(ahead))}\n")
        environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            [folder / "nodes/loop/supernode.sh"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert (done.returncode, done.stdout) == (code, output), done.stderr
