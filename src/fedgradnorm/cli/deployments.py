"""The commands for training across machines: ``flower init``, ``status`` and ``metrics``."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fedgradnorm.cli.terminal as terminal
from fedgradnorm.cli.runs import Overrides
from fedgradnorm.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fedgradnorm.flower.overview import Overview
    from fedgradnorm.flower.status import RunStatus

app = typer.Typer(no_args_is_help=True, help="Train across machines with Flower.")

DeploymentFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A deployment's folder, its server/, or a run's folder."),
]
RunOfDeployment = Annotated[
    str | None,
    typer.Option("--run", help="The run's folder under server/; by default the latest run."),
]


@contextmanager
def _extra() -> Iterator[None]:
    """Turn the ImportError of a missing extra, which says how to install it, into ConfigError."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(str(error)) from error


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the deployment.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The configuration, a TOML file such as configs/digits.toml."),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name or address of the server; repeat it for several. Nodes use the first."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The server's port.")] = 8000,
) -> None:
    """Write a deployment's folder: the Flower app, keys, scripts and services."""
    with _extra():
        from fedgradnorm.flower.init import write_deployment
    clients = write_deployment(folder, config, overrides or [], host or ["127.0.0.1"], port)
    terminal.say(f"{folder}: a deployment of {len(clients)} clients: {', '.join(clients)}")
    terminal.say(
        f"on this machine: python {folder}/local.py, then in another terminal"
        f" {folder}/server/run.sh; on several: {folder}/README.md"
    )


@app.command()
def status(
    folder: DeploymentFolder,
    run: RunOfDeployment = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the progress of a deployment's run, its clients, and when its certificates expire.

    Exit status:
    0: the run continues or has completed;
    1: it was stopped, its process is gone, or a certificate has expired;
    2: there is no run, or its status cannot be read.
    """
    with _extra():
        from fedgradnorm.flower.overview import GONE, facts, look
    overview, now = look(folder, run), time.time()
    if as_json:
        typer.echo(json.dumps(facts(overview, now), indent=2))
    if overview.status is None:
        raise RunError(overview.faults[0])
    if not as_json:
        _show(overview, overview.status, now)
    expired = any(expires <= now for expires in overview.certificates.values())
    if overview.state in ("stopped", GONE) or expired:
        raise typer.Exit(1)


@app.command()
def metrics(
    folder: DeploymentFolder,
    run: RunOfDeployment = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; whoever reaches it can read the metrics.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 9464,
) -> None:
    """Serve a deployment's metrics for Prometheus until Ctrl-C.

    The run's files are read at each scrape, also when no run is in progress.
    """
    with _extra():
        from fedgradnorm.flower.exporter import serve
    with terminal.stop_on_signals() as should_stop:
        stop = serve(folder, run, host, port)
        shown = f"[{host}]" if ":" in host else host
        terminal.say(f"metrics of {folder}: http://{shown}:{port}/metrics")
        while not should_stop():
            time.sleep(0.2)
        stop()


def _show(overview: "Overview", status: "RunStatus", now: float) -> None:
    """Print a run's state, its clients, remarks, certificates and warnings."""
    from fedgradnorm.flower.overview import clients_table, remarks, state_line, warnings_on

    terminal.say(f"{overview.folder}: {state_line(status, now)}")
    terminal.console.print(clients_table(overview, now))
    for line in remarks(overview, now):
        terminal.say(line)
    for name, expires in overview.certificates.items():
        terminal.say(f"{name}: good until {datetime.fromtimestamp(expires, UTC):%Y-%m-%d}")
    for line in warnings_on(overview, now):
        terminal.warn(line)
