"""Writes a folder with all that a deployment on Flower needs, filled in for a federation."""

import ipaddress
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from string import Template
from typing import Any

import tomli_w

from fedgradnorm import __version__
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.config import RunConfig, load_config
from fedgradnorm.errors import ConfigError, RunError, require
from fedgradnorm.flower.roster import roster_of
from fedgradnorm.flower.training import check_deployable, run_folder

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
FIRST_NODE_PORT, MODES = 9094, {".sh": 0o755, ".env": 0o600}
LONGEST_NAME = 32
"""Maximum number of letters in the name of a Flower app."""
CLIENT = "CLIENT"
"""In the templates' paths: a folder that is written once for every client."""
HEADER = """\
# The federation, its training and its weighting: all settings, also the defaults
# (docs/configuration.md of fedgradnorm). Server and nodes get this file with the app when a run
# begins. Each site's node.env says where its data are.

"""
MAX_UPDATE_RATIO = 10.0
"""The default ``train.max_update_ratio`` of a deployment, where anyone may run a client."""
WHAT_RATIO = """\
# A gradient longer than this number times the usual length is dropped. The usual length is the
# median of the client's last ten gradients; until it has three, the median of all clients (raise
# the number where tasks differ by more from the start). Without this line none is dropped.
"""
SERVICE = (
    '  node-{client}: {{<<: *flower, volumes: ["./nodes/{client}:/node"], '
    'command: ["/node/supernode.sh"]}}'
)


class Filled(Template):
    """A template with places such as ``@@{port}``: ``$`` and ``@`` have a meaning in the files."""

    delimiter = "@@"


def write_deployment(
    folder: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    hosts: Sequence[str] = ("127.0.0.1",),
    port: int = 8000,
) -> list[str]:
    """Write a deployment's folder: the Flower app, scripts for keys and for starting, services.

    Args:
        folder: a new or an empty folder; nothing is ever overwritten.
        config: the federation's configuration file; None for the defaults.
        overrides: settings like ``train.num_rounds=5`` that take precedence over the file.
        hosts: names and addresses under which the nodes reach the server; they use the first.
        port: the server's port.

    Returns:
        The ids of the federation's clients.

    Raises:
        ConfigError: settings that are wrong or cannot be trained across machines, or a wrong host.
        FederationError: the parts of the federation do not fit together.
        RunError: the folder is not empty, or cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     write_deployment(Path(parent) / "here", overrides=["federation.name=digits"])
    ['class', 'parity', 'loop', 'mass']
    """
    require(bool(hosts), "--host", "a name or an address", hosts)
    for host in hosts:
        require(_is_host(host), "--host", "a name or an address, without a port", host)
    require(0 < port < 2**16, "--port", "a number from 1 to 65535", port)
    settings = _screening(resolve_config(load_config(config, overrides)))
    if any(settings.faults.model_dump().values()):
        raise ConfigError("faults: they are for the simulation alone: remove the table [faults]")
    roster = roster_of(build_federation(settings))
    run_folder(settings)
    check_deployable(settings, roster)
    clients, folder = roster.client_ids, folder.expanduser().resolve()
    values = _values(folder, settings, clients, hosts, port)
    _write(folder, _contents(settings, clients, values))
    return clients


def _write(folder: Path, contents: Iterator[tuple[Path, str]]) -> None:
    """Write all files to a folder, or none. Raises RunError."""
    aside = folder.with_name(f".{folder.name}.writing")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            expected = "expected a new folder, for nothing is overwritten"
            raise RunError(f"{folder} exists and is not empty: {expected}")
        if aside.exists():
            shutil.rmtree(aside)
        for path, content in contents:
            target = aside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            if target.suffix in MODES:
                target.chmod(MODES[target.suffix])
        aside.replace(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        why = error.strerror or error
        raise RunError(f"deployment folder {folder}: cannot be written: {why}") from error


def _contents(
    settings: RunConfig, clients: Sequence[str], values: Mapping[str, str]
) -> Iterator[tuple[Path, str]]:
    """Every file's path in the folder, and its text."""
    with as_file(files("fedgradnorm.flower") / "templates") as templates:
        for template in sorted(templates.rglob("*")):
            if not template.is_file() or template.suffix == ".pyc":
                continue
            path = template.relative_to(templates)
            path = path.with_name(re.sub(r"^dot-", ".", path.name))
            text = Filled(template.read_text(encoding="utf-8"))
            if CLIENT not in path.parts:
                yield path, text.substitute(values)
                continue
            for port_of, client in enumerate(clients, start=FIRST_NODE_PORT):
                parts = (client if part == CLIENT else part for part in path.parts)
                own = {**values, "client": client, "node_port": str(port_of)}
                yield Path(*parts), text.substitute(own)
    yield Path("app/fedgradnorm_app/federation.toml"), HEADER + _toml(settings)


def _values(
    folder: Path, settings: RunConfig, clients: Sequence[str], hosts: Sequence[str], port: int
) -> dict[str, str]:
    """What stands at the places of all templates, by name."""
    name = re.sub(r"[^a-z0-9]+", "-", settings.federation.name.lower()).strip("-")
    bind, run_dir = _bind(hosts[0]), settings.run.dir or f"runs/{name}"
    return {
        "name": f"fedgradnorm-{name}"[:LONGEST_NAME].rstrip("-"),
        "version": __version__,
        "run_dir": _escaped(run_dir),
        "report": shlex.quote(str(Path("server", run_dir))),
        "clients": ", ".join(clients),
        "certificate": _escaped(str(folder / "server" / "ca.crt")),
        "host": _bracketed(hosts[0]),
        "names": " ".join(hosts),
        "ssh_host": hosts[0],
        "bind": bind,
        "listen": f"{_bracketed(bind)}:{port}",
        "port": str(port),
        "superlink_port": str(_superlink_port(port, len(clients))),
        "threads": "1" if ipaddress.ip_address(bind).is_loopback else "",
        "services": "\n".join(SERVICE.format(client=client) for client in clients),
    }


def _screening(settings: RunConfig) -> RunConfig:
    """The settings, with a limit for the length of gradients where the user has set none."""
    if "max_update_ratio" in settings.train.model_fields_set:
        return settings
    train = settings.train.model_copy(update={"max_update_ratio": MAX_UPDATE_RATIO})
    return settings.model_copy(update={"train": train})


def _toml(settings: RunConfig) -> str:
    """The settings without those of the engine, of faults, and those that a run writes."""
    exclude: dict[str, Any] = dict.fromkeys(("engine", "faults", "versions"), True)
    exclude["run"] = {"dir", "experiment"}
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True, exclude=exclude))
    return text.replace("\nmax_update_ratio = ", f"\n{WHAT_RATIO}max_update_ratio = ", 1)


def _escaped(text: str) -> str:
    """A text as TOML writes it between quotes."""
    return tomli_w.dumps({"text": text}).strip().removeprefix('text = "').removesuffix('"')


def _bind(host: str) -> str:
    """What a server listens on: every network, unless all nodes are on its own machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "127.0.0.1" if host == "localhost" else "0.0.0.0"  # noqa: S104  # nodes are elsewhere
    return host if address.is_loopback else "::" if address.version == 6 else "0.0.0.0"  # noqa: S104


def _superlink_port(port: int, nodes: int) -> int:
    """A port for the SuperLink: the next one that neither the front nor a node here uses."""
    taken = {port, *range(FIRST_NODE_PORT, FIRST_NODE_PORT + nodes)}
    return min(set(range(1, 2**16)) - taken, key=lambda other: (other < port, abs(other - port)))


def _bracketed(host: str) -> str:
    """A name or an address as it is written before a port."""
    return f"[{host}]" if ":" in host else host


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return NAME.fullmatch(host) is not None
    return "%" not in host  # an IPv6 address with a zone is one of this machine alone
