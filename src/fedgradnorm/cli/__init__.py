"""The command line: ``fedgradnorm run``, ``resume``, ``evaluate``, ``report`` and more.

The commands import what they need when they are called, so that ``--help`` and an error in a
configuration come without loading torch.
"""

import sys
from typing import Annotated

import typer

from fedgradnorm import __version__
from fedgradnorm.cli import deployments, parts, runs, studies, terminal
from fedgradnorm.errors import FedGradNormError

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (runs.run, runs.resume, runs.evaluate, runs.export, runs.report, studies.compare):
    app.command()(command)
app.command("list")(parts.list_parts)
app.add_typer(deployments.app, name="flower")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedgradnorm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Federated multi-task learning with FedGradNorm."""


def main() -> None:
    """Run the command line. A `FedGradNormError` becomes one line on standard error.

    Raises:
        SystemExit: at the end of a command, with its exit code.
    """
    sys.path.insert(0, "")  # to find a user's own `module:attribute` in the current folder
    terminal.prepare()
    try:
        app()
    except FedGradNormError as error:
        terminal.show_error(error)
        sys.exit(error.exit_code)
