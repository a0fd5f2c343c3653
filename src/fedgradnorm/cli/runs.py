"""The commands for runs: train, resume, evaluate and report."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

import fedgradnorm.cli.terminal as terminal
from fedgradnorm.errors import ClientError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that take precedence over the file, such as train.num_rounds=5.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]


def run(
    config: Annotated[
        Path, typer.Argument(help="The configuration, a TOML file such as configs/demo.toml.")
    ],
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the same folder.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Explain how the engine trains each client.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Record a trace of two rounds, for TensorBoard or Perfetto."
        ),
    ] = False,
) -> None:
    """Train the federation that a configuration describes, and write the run's folder."""
    from fedgradnorm.config import load_config

    settings = load_config(config, overrides or [])

    from fedgradnorm.build import resolve_config

    resolve_config(settings)  # here, because most errors in names and options come without torch
    folder = Path(settings.run.dir or f"runs/{config.stem}").expanduser()
    table = settings.run.model_copy(update={"dir": str(folder)})
    settings = settings.model_copy(update={"run": table})
    if verbose:
        _show_log()

    from fedgradnorm import api
    from fedgradnorm.callbacks.progress_bar import ProgressBar

    with terminal.stop_on_signals() as should_stop:
        api.run(
            settings,
            overwrite=overwrite,
            callbacks=[ProgressBar(terminal.console)],
            should_stop=should_stop,
            profiled=profile,
        )
    _show_run(folder)


def resume(
    folder: RunFolder,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Total number of rounds, to extend the run beyond its settings."),
    ] = None,
) -> None:
    """Resume a run that was stopped or killed, from its newest intact checkpoint."""
    from fedgradnorm import api
    from fedgradnorm.callbacks.progress_bar import ProgressBar

    with terminal.stop_on_signals() as should_stop:
        api.resume(
            folder,
            num_rounds=rounds,
            callbacks=[ProgressBar(terminal.console)],
            should_stop=should_stop,
            on_message=terminal.say,
        )
    _show_run(folder)


def evaluate(folder: RunFolder) -> None:
    """Test the saved models of a run on the clients' test data."""
    from fedgradnorm.build import build_federation
    from fedgradnorm.runs.models import evaluate_run
    from fedgradnorm.runs.reader import Run

    federation = build_federation(Run(folder).config)
    table = Table("client", "task", "test loss", "metrics", title=Text(str(folder)))
    evaluations = evaluate_run(folder, federation)
    for id, evaluation in evaluations.items():
        task = federation.client(id).task.name
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        table.add_row(id, Text(task), f"{evaluation.loss:.4f}", Text(metrics))
    terminal.console.print(table)
    reasons = {id: evaluation.failed for id, evaluation in evaluations.items()}
    _raise_for_missing("the models are tested", reasons)


def export(
    folder: RunFolder,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="The client's id.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write; by default models/CLIENT.pt2 in the run's folder."),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX.")] = False,
) -> None:
    """Write a client's model as a torch.export program that needs only torch, or as ONNX."""
    from fedgradnorm.export import export_model

    terminal.say(f"model: {export_model(folder, client, output, onnx=onnx)}")


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The folders of one or more runs.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write; by default report.html in the run, or beside the runs."
        ),
    ] = None,
) -> None:
    """Compare runs in a table, and write a self-contained HTML page."""
    from fedgradnorm.report import comparison_table, write_report
    from fedgradnorm.report.findings import silent_lines, state_lines
    from fedgradnorm.report.loading import load
    from fedgradnorm.runs.reader import Run

    if output is None:
        output = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    runs = [Run(folder) for folder in folders]
    table, page = comparison_table(runs), write_report(runs, output)
    terminal.console.print(table)
    loaded = load(runs)
    for line in state_lines(loaded):
        terminal.say(line)
    for line in silent_lines([run.label for run in loaded], [run.summary for run in loaded]):
        terminal.warn(line)
    terminal.say(f"report: {page}")


def _show_log() -> None:
    """Print the package's log messages of level INFO and above."""
    from rich.logging import RichHandler

    console = terminal.console
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logger = logging.getLogger("fedgradnorm")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]


def _show_run(folder: Path) -> None:
    """Print the figures and costs of a run that has ended, and where its report is."""
    from fedgradnorm.report import comparison_table
    from fedgradnorm.runs.reader import Run
    from fedgradnorm.runs.summary import costs_text

    run = Run(folder)
    summary = run.summary()
    terminal.console.print(comparison_table([run]))
    terminal.say(costs_text(summary))
    page = folder / "report.html"
    if page.exists():
        terminal.say(f"report: {page}")
    elif run.config.run.page and find_spec("plotly") is None:
        terminal.say('no report page: pip install "fedgradnorm[report]"')
    else:
        terminal.say(f"run: {folder}")
    reasons = {id: client["missing"] for id, client in summary["clients"].items()}
    _raise_for_missing("the run has ended", reasons)


def _raise_for_missing(ended: str, reasons: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ClientError if there are reasons, by client and metric, why metrics are missing."""
    missing = [
        f"client '{id}': metric '{metric}': {why}"
        for id, metrics in reasons.items()
        for metric, why in metrics.items()
    ]
    if missing:
        raise ClientError(f"{ended}, and figures are missing: {'; '.join(missing)}")
