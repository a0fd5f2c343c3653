"""A folder with all that a deployment on Flower needs, filled in for a federation."""

import ipaddress
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import tomli_w

from fedgradnorm import __version__
from fedgradnorm.build import build_federation, resolve_config
from fedgradnorm.config import RunConfig, load_config
from fedgradnorm.errors import ConfigError, RunError, require
from fedgradnorm.flower.roster import roster_of
from fedgradnorm.flower.training import check_deployable, run_folder

__all__ = ["write_deployment"]

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
FIRST_NODE_PORT = 9094
LONGEST_NAME = 32
"""Letters that the name of a Flower app may have."""
PLACE = re.compile(r"@\{([a-z_]+)\}")
CLIENT = "CLIENT"
"""In the templates' paths: one such folder for every client."""

MODES = {".sh": 0o755, ".env": 0o600}

HEADER = """\
# The federation, how it trains and how it is weighted: all settings, those left out too (docs/configuration.md of fedgradnorm).
# Server and nodes get this file with the app, when a run begins. Where a site's data lie is for its node.env to say.

"""
MAX_UPDATE_RATIO = 10.0
"""The ``train.max_update_ratio`` of a deployment whose user names none: there, a client can be anyone's."""
WHAT_RATIO = """\
# A gradient of more than this number times the usual length is dropped: usual is the median of its client's last ten; until it has three,
# that of all clients (raise it where tasks differ by more from the start). Without this line none is dropped, however long.
"""
SERVICE = '  node-{client}: {{<<: *flower, volumes: ["./nodes/{client}:/node"], command: ["/node/supernode.sh"]}}'


def write_deployment(
    folder: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    hosts: Sequence[str] = ("127.0.0.1",),
    port: int = 8000,
) -> list[str]:
    """Write a deployment's folder: the Flower app, scripts for keys and for starting everything, services.

    Args:
        folder: a new or empty one; nothing is ever overwritten.
        config: the federation's configuration file; None for the defaults.
        overrides: words like ``train.num_rounds=5`` that win over the file.
        hosts: names and addresses under which the nodes reach the server; the first is the one that they use.
        port: the server's.

    Returns:
        The ids of the federation's clients.

    Raises:
        ConfigError: settings that are wrong or cannot be trained across machines, or a name that is none.
        FederationError: a federation that cannot be.
        RunError: the folder is there and not empty, or cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     write_deployment(Path(parent) / "here", overrides=["federation.name=digits"])
    ['class', 'parity', 'loop', 'mass']
    """
    require(bool(hosts), "--host", "a name or an address", hosts)
    for host in hosts:
        require(
            NAME.fullmatch(host) is not None or _is_address(host),
            "--host",
            "a name or an address, without a port",
            host,
        )
    require(0 < port < 2**16, "--port", "a number from 1 to 65535", port)
    settings = _screening(resolve_config(load_config(config, overrides)))
    if any(settings.faults.model_dump().values()):
        raise ConfigError(
            "faults: on purpose they are for the simulation alone: remove the table [faults]"
        )
    roster = roster_of(build_federation(settings))
    run_folder(settings)
    check_deployable(settings, roster)
    clients = roster.client_ids
    folder = folder.expanduser().resolve()
    aside = folder.with_name(f".{folder.name}.writing")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(
                f"{folder} exists and is not empty: expected a new folder, for nothing is overwritten"
            )
        if aside.exists():
            shutil.rmtree(aside)
        for path, content in _contents(folder, settings, clients, hosts, port):
            target = aside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            if target.suffix in MODES:
                target.chmod(MODES[target.suffix])
        aside.replace(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(
            f"deployment folder {folder}: cannot be written: {error.strerror or error}"
        ) from error
    return clients


def _contents(
    folder: Path, settings: RunConfig, clients: Sequence[str], hosts: Sequence[str], port: int
) -> Iterator[tuple[Path, str]]:
    """Every file's path in the folder, and its text."""
    name = re.sub(r"[^a-z0-9]+", "-", settings.federation.name.lower()).strip("-")
    bind = _bind(hosts[0])
    local, run_dir, superlink_port = (
        _is_loopback(bind),
        settings.run.dir or f"runs/{name}",
        str(_superlink_port(port, len(clients))),
    )
    values = {
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
        "superlink_port": superlink_port,
        "threads": "1" if local else "",
        "services": "\n".join(SERVICE.format(client=client) for client in clients),
    }
    with as_file(files("fedgradnorm.flower") / "templates") as templates:
        for template in sorted(
            path for path in templates.rglob("*") if path.is_file() and path.suffix != ".pyc"
        ):
            path, text = template.relative_to(templates), template.read_text(encoding="utf-8")
            path = (
                path.with_name(path.name.replace("dot-", ".", 1))
                if path.name.startswith("dot-")
                else path
            )
            if CLIENT in path.parts:
                for place, client in enumerate(clients):
                    own = {"client": client, "node_port": str(FIRST_NODE_PORT + place)}
                    yield (
                        Path(*(client if part == CLIENT else part for part in path.parts)),
                        _filled(text, {**values, **own}),
                    )
            else:
                yield path, _filled(text, values)
    yield Path("app/fedgradnorm_app/federation.toml"), HEADER + _toml(settings)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return PLACE.sub(lambda place: values[place[1]], text)


def _screening(settings: RunConfig) -> RunConfig:
    """The settings, with a limit for the length of gradients where the user has named none."""
    if "max_update_ratio" in settings.train.model_fields_set:
        return settings
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"max_update_ratio": MAX_UPDATE_RATIO})}
    )


def _toml(settings: RunConfig) -> str:
    """The settings less what is not the deployment's: the engine, faults, and what a run writes."""
    exclude: dict[str, bool | set[str]] = {
        "engine": True,
        "faults": True,
        "versions": True,
        "run": {"dir", "experiment"},
    }
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True, exclude=exclude))
    return text.replace("\nmax_update_ratio = ", f"\n{WHAT_RATIO}max_update_ratio = ", 1)


def _escaped(text: str) -> str:
    """A text as TOML writes it between quotes."""
    return tomli_w.dumps({"text": text}).strip().removeprefix('text = "').removesuffix('"')


def _bind(host: str) -> str:
    """What a server listens on that nodes reach under this name: every network, unless all nodes are on its own machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "127.0.0.1" if host == "localhost" else "0.0.0.0"  # noqa: S104  # nodes are elsewhere
    return host if address.is_loopback else "::" if address.version == 6 else "0.0.0.0"  # noqa: S104


def _superlink_port(port: int, nodes: int) -> int:
    """A port for the SuperLink on the server's machine: the next one that neither the front nor a node of this machine has."""
    taken = {port, *range(FIRST_NODE_PORT, FIRST_NODE_PORT + nodes)}
    return min(set(range(1, 2**16)) - taken, key=lambda other: (other < port, abs(other - port)))


def _bracketed(host: str) -> str:
    """A name or an address as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _is_address(host: str) -> bool:
    try:
        return not getattr(ipaddress.ip_address(host), "scope_id", None)
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
