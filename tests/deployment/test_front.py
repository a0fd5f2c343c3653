"""What the server's machine answers to those outside: a node's requests, and nothing else."""

import contextlib
import re
import shutil
import socket
import ssl
from collections.abc import Iterator

import psutil
import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.superlink.main import create_app

pytestmark = [pytest.mark.deployment, pytest.mark.xdist_group("deployment")]

MIB = 1024 * 1024
LIMIT = 16 * MIB
TRICKS = (
    "/",
    "/health",
    "/docs",
    "/openapi.json",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/../../v1/control/list-runs",
    "/v1/fleet/./../control/list-runs",
    "/./v1/control/list-runs",
    "/v1/control/../fleet/get-run",
    "//v1/control/list-runs",
    "/v1//control/list-runs",
    "//v1/fleet/get-run",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/%252e%252e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "/v1/fleet%2f..%2fcontrol%2flist-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/control%2flist-runs",
    "/%76%31/control/list-runs",
    "/V1/CONTROL/LIST-RUNS",
    "/V1/FLEET/get-run",
    "/v1/fleet/get-run?/../../control/list-runs",
    "/v1/fleet/get-run#/../../control/list-runs",
    "/v1/fleet/get-run/",
    "https://localhost/v1/control/list-runs",
    "https://localhost/v1/fleet/../control/list-runs",
    "http://127.0.0.1/v1/runtime/acquire-task",
)
METHODS = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "post")


def routes() -> dict[str, set[str]]:
    """All paths that Flower's SuperLink has, and their methods."""
    found: dict[str, set[str]] = {}
    for context in iter_route_contexts(create_app().routes):
        if isinstance(context.route, APIRoute):
            found.setdefault(context.path, set()).update(context.route.methods)
    return found


class Outside:
    """Whoever reaches the public port: it writes requests as they are, so that nothing tidies them up."""

    def __init__(self, deployment):
        self.deployment, self.context = (
            deployment,
            ssl.create_default_context(cafile=str(deployment.folder / "server/ca.crt")),
        )

    def status(self, method, target, body=b"", headers=("Content-Type: application/protobuf",)):
        """The status of an answer."""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
        if "Transfer-Encoding: chunked" not in headers:
            lines.append(f"Content-Length: {len(body)}")
        request = "\r\n".join([*lines, "", ""]).encode() + body
        with self.connection() as connection:
            with contextlib.suppress(
                BrokenPipeError, ConnectionResetError
            ):  # it has heard enough, and has answered
                connection.sendall(request)
            return int(connection.recv(4096).split()[1])

    def connection(self, context=None):
        plain = socket.create_connection(("127.0.0.1", self.deployment.port), timeout=60)
        return (context or self.context).wrap_socket(plain, server_hostname="127.0.0.1")


def chunks(size: int) -> bytes:
    """A body of unsaid length."""
    return (b"%x\r\n" % MIB + bytes(MIB) + b"\r\n") * (size // MIB) + b"0\r\n\r\n"


def listening(process: psutil.Process) -> Iterator[str]:
    """The addresses at which a process and all that it started listen."""
    for one in [process, *process.children(recursive=True)]:
        for connection in one.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                yield f"{connection.laddr.ip}:{connection.laddr.port}"


@pytest.fixture(params=["caddy", "nginx"])
def server(request, deploy):
    """A SuperLink and its front, and the statuses with which that refuses: nginx has others for what it takes for malformed."""
    if request.param == "nginx" and shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    deployment = deploy("front", "federation.name=digits", 'federation.tasks=["class", "parity"]')
    deployment.start_listener("superlink", deployment.superlink_port)
    if request.param == "caddy":
        deployment.start_front()
        return deployment, (403,)
    conf = deployment.folder / "server/nginx.conf"
    conf.write_text(
        re.sub(
            r"server 127\.0\.0\.1:\d+ ",
            f"server 127.0.0.1:{deployment.superlink_port} ",
            conf.read_text(),
        )
    )
    tools = deployment.folder / "tools"  # without caddy
    tools.mkdir()
    for name in ("env", "bash", "dirname", "mkdir", "grep", "id", "nginx"):
        (tools / name).symlink_to(shutil.which(name))
    before, deployment.env["PATH"] = deployment.env["PATH"], str(tools)
    deployment.start_front()
    deployment.env["PATH"] = before
    return deployment, (403, 400, 405)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_nobody_outside_reaches_more_than_the_nodes_requests(server, deploy):
    deployment, refusals = server
    outside = Outside(deployment)

    own, front = (
        set(listening(psutil.Process(deployment.processes[name].pid)))
        for name in ("superlink", "front")
    )
    assert f"127.0.0.1:{deployment.superlink_port}" in own
    assert all(address.startswith("127.0.0.1:") for address in own)
    assert front == {f"127.0.0.1:{deployment.port}"}  # no port of an administrator, and none of UDP
    assert {
        path.relative_to(deployment.folder / "home").parts[0]
        for path in (deployment.folder / "home").rglob("*")
    } <= {".flwr"}

    paths = routes()
    fleet = {path for path in paths if path.startswith("/v1/fleet/")}
    other = paths.keys() - fleet
    assert len(fleet) == 12
    assert {
        "/health",
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/runtime/responses",
    } <= other
    for path in other:
        for method in {"POST", "GET", *paths[path]}:
            assert outside.status(method, path) == 403, (method, path)
    for target in TRICKS:
        assert outside.status("POST", target) in refusals, target
    for method in METHODS:
        assert outside.status(method, "/v1/fleet/get-run") in refusals, method
        assert outside.status(method, "/v1/control/list-runs") in refusals, method
    for header in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix"):
        assert outside.status("GET", "/", headers=[f"{header}: /v1/control/list-runs"]) == 403
    assert outside.status("POST", "*") in (400, 403)

    for path in fleet:  # it is the SuperLink that answers, and asks for the node's signature
        assert outside.status("POST", path) == 401, path
    assert outside.status("POST", "https://localhost/v1/fleet/get-run") == 401

    push = "/v1/fleet/push-object"
    assert outside.status("POST", push, bytes(2 * FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)) in (400, 401)
    assert outside.status("POST", push, bytes(LIMIT + 1)) == 413
    chunked = ["Content-Type: application/protobuf", "Transfer-Encoding: chunked"]
    assert outside.status("POST", push, chunks(LIMIT - MIB), chunked) in (400, 401)
    assert outside.status("POST", push, chunks(LIMIT + MIB), chunked) == 413

    old = ssl.create_default_context(cafile=str(deployment.folder / "server/ca.crt"))
    old.minimum_version, old.maximum_version = (
        ssl.TLSVersion.MINIMUM_SUPPORTED,
        ssl.TLSVersion.TLSv1_1,
    )
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        outside.connection(old)

    deployment.do("server/flwr.sh", "supernode", "list")  # whoever is on this machine
    deployment.kill("superlink")
    assert outside.status("POST", "/v1/fleet/get-run") == 502
    assert outside.status("POST", "/v1/control/list-runs") == 403
    log = deployment.log("front")
    assert "connection refused" in log.lower()
    assert "protobuf" not in log  # no header is logged: a node's signature is one

    other = deploy(
        "other", "federation.name=digits", 'federation.tasks=["class", "parity"]'
    )  # with a CA of its own
    other.use_superlink_port(deployment.superlink_port)
    other.start_listener("superlink", other.superlink_port)
    context = ssl.create_default_context(cafile=str(other.folder / "server/ca.crt"))
    with context.wrap_socket(
        socket.create_connection(("127.0.0.1", other.superlink_port), timeout=60),
        server_hostname="localhost",
    ):
        assert (
            outside.status("POST", "/v1/fleet/get-run") == 502
        )  # in the SuperLink's place, and not passed anything
