"""The command line: ``fedgradnorm run``, ``evaluate``, ``report`` and ``list``."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedgradnorm.errors import FedGradNormError

__all__ = ["app", "main"]

BAD_INPUT = 2

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Federated multi-task learning with FedGradNorm."
)
console = Console()


def main() -> None:
    """Run the command line; an error of ours is a line on standard error and exit code 2."""
    sys.path.insert(0, "")  # so that a user's own `module:attribute` is found in the current folder
    try:
        app()
    except FedGradNormError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(BAD_INPUT)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as configs/demo.toml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the run's folder.")] = False,
) -> None:
    """Train a federation and write a run's folder."""
    from fedgradnorm.config import load_config
    from fedgradnorm.progress import Progress
    from fedgradnorm.run import run as run_config

    settings = load_config(config, overrides or [])
    folder = settings.run.dir or f"runs/{config.stem}"
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": folder})})
    with Progress(console, settings.train.num_rounds, settings.train.eval_every) as progress:
        run_config(settings, overwrite=overwrite, on_round=progress.show)
    _show_report([Path(folder)], Path(folder) / "report.html")


@app.command()
def evaluate(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Test the saved models of a run on their clients' test data."""
    from fedgradnorm.history import Run
    from fedgradnorm.run import build_federation, evaluate_run

    federation = build_federation(Run(folder).config)
    table = Table("client", "task", "test loss", "metrics", title=f"{folder}")
    for id, evaluation in evaluate_run(folder, federation).items():
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        table.add_row(id, federation.client(id).task.name, f"{evaluation.loss:.4f}", metrics)
    console.print(table)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders; several are overlaid.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; by default report.html in the run, or beside the runs.")] = None,
) -> None:
    """Compare runs: a table here, and one self-contained HTML page."""
    if output is None:
        output = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    _show_report(folders, output)


@app.command("list")
def list_parts() -> None:
    """List the federations, models, weightings and engines, with their options and defaults."""
    from fedgradnorm.registry import BUILT_INS, describe

    for kind, names in BUILT_INS.items():
        table = Table("name", "what it is", "options", title=kind, title_justify="left", expand=True)
        for name in sorted(names):
            summary, options = describe(kind, name)
            table.add_row(name, summary, "\n".join(f"{key} = {value!r}" for key, value in options.items()))
        console.print(table)


def _show_report(folders: list[Path], output: Path) -> None:
    from fedgradnorm.history import Run
    from fedgradnorm.report import comparison_table, write_report

    runs = [Run(folder) for folder in folders]
    console.print(comparison_table(runs))
    console.print(f"report: {write_report(runs, output)}", soft_wrap=True, highlight=False, markup=False)
