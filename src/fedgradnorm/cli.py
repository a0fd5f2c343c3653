"""The command line: ``fedgradnorm run``, ``resume``, ``evaluate``, ``report``, ``compare``, ``list`` and ``flower``."""

import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from fedgradnorm.errors import (
    ClientError,
    ConfigError,
    FedGradNormError,
    FedGradNormWarning,
    RunError,
    StoppedError,
)

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated multi-task learning with FedGradNorm.",
)
flower = typer.Typer(no_args_is_help=True, help="Training across machines, with Flower.")
app.add_typer(flower, name="flower")
console = Console()

DeploymentFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A deployment's folder, its server/, or a run's folder."),
]
RunOfDeployment = Annotated[
    str | None,
    typer.Option(
        "--run",
        help="The run's folder seen from server/, or its name; by default the one that was written last.",
    ),
]


def main() -> None:
    """Run the command line; an error of ours is a line on standard error and an exit code that is not 0."""
    sys.path.insert(0, "")  # so that a user's own `module:attribute` is found in the current folder
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a page of codes without these letters must not end a run
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", FedGradNormWarning)
    try:
        app()
    except FedGradNormError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(error.exit_code)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as configs/demo.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in the run's folder.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Say which way the engine trains which clients, and why."),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Write a trace of two rounds to the run's folder, for TensorBoard or Perfetto.",
        ),
    ] = False,
) -> None:
    """Train a federation and write a run's folder."""
    from fedgradnorm.api import run as run_config
    from fedgradnorm.config import load_config
    from fedgradnorm.progress import Progress

    if verbose:
        logger = logging.getLogger("fedgradnorm")
        logger.setLevel(logging.INFO)
        logger.handlers = [
            RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        ]
    settings = load_config(config, overrides or [])
    folder = str(Path(settings.run.dir or f"runs/{config.stem}").expanduser())
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": folder})})
    with (
        stop_on_signals() as should_stop,
        Progress(console, settings.train.num_rounds, settings.train.eval_every) as progress,
    ):
        run_config(
            settings,
            overwrite=overwrite,
            on_round=progress.show,
            should_stop=should_stop,
            profiled=profile,
        )
    _show_run(Path(folder))


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many rounds there are to be in all, if more than the settings say."
        ),
    ] = None,
) -> None:
    """Go on with a run that was stopped or killed, from its newest sound checkpoint."""
    from fedgradnorm.api import resume as resume_run
    from fedgradnorm.progress import Progress
    from fedgradnorm.runs.folder import Run

    training = Run(folder).config.train
    with (
        stop_on_signals() as should_stop,
        Progress(console, rounds or training.num_rounds, training.eval_every) as progress,
    ):
        resume_run(
            folder,
            num_rounds=rounds,
            on_round=progress.show,
            should_stop=should_stop,
            on_message=_say,
        )
    _show_run(folder)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
) -> None:
    """Test the saved models of a run on their clients' test data."""
    from fedgradnorm.build import build_federation
    from fedgradnorm.runs.folder import Run
    from fedgradnorm.runs.models import evaluate_run

    federation = build_federation(Run(folder).config)
    table = Table("client", "task", "test loss", "metrics", title=Text(str(folder)))
    evaluations = evaluate_run(folder, federation)
    for id, evaluation in evaluations.items():
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        table.add_row(
            id, Text(federation.client(id).task.name), f"{evaluation.loss:.4f}", Text(metrics)
        )
    console.print(table)
    _raise_for_missing(
        "the models are tested", {id: evaluation.failed for id, evaluation in evaluations.items()}
    )


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs' folders; several are overlaid.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write; by default report.html in the run, or beside the runs."
        ),
    ] = None,
) -> None:
    """Compare runs: a table here, and one self-contained HTML page."""
    from fedgradnorm.report import comparison_table, write_report
    from fedgradnorm.report.findings import silent_lines, state_lines
    from fedgradnorm.report.loading import load
    from fedgradnorm.runs.folder import Run

    if output is None:
        output = (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    runs = [Run(folder) for folder in folders]
    table, page = comparison_table(runs), write_report(runs, output)
    console.print(table)
    loaded = load(runs)
    for line in state_lines(loaded):
        _say(line)
    for line in silent_lines([one.label for one in loaded], [one.summary for one in loaded]):
        _warn(line)
    _say(f"report: {page}")


@app.command()
def compare(
    study: Annotated[
        Path, typer.Argument(help="A study's TOML file, such as studies/radcom.toml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the study, or settings of its runs, that win over the file.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at once, each in one thread; by default, and at most, as many as there are cores.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The study's folder; by default `runs/studies/` and the name of the file."
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="The study's size for a larger machine: its table [full]."),
    ] = False,
    methods: Annotated[
        str | None, typer.Option(help="Only these methods, with commas between, and the baseline.")
    ] = None,
) -> None:
    """Compare methods over seeds: tune every one, train what is not trained yet, and write tables and a page.

    One that is stopped writes them of what there is.
    """
    from fedgradnorm.compare.findings import answers
    from fedgradnorm.compare.page import write_page
    from fedgradnorm.compare.progress import StudyProgress
    from fedgradnorm.compare.spec import load_study
    from fedgradnorm.compare.study import compare as compare_methods
    from fedgradnorm.compare.study import found_in
    from fedgradnorm.compare.tables import terminal_table, write_tables

    settings = load_study(study, overrides or [], full=full)
    if methods is not None:
        settings = settings.with_methods([name.strip() for name in methods.split(",")])
    folder = (
        out if out is not None else Path("runs/studies") / f"{study.stem}{'-full' if full else ''}"
    )
    cores, stopped = available_cores(), None
    if jobs is not None and jobs > cores:
        _say(f"--jobs {jobs}: {cores} at once, as many as there are cores")
    with stop_on_signals() as should_stop, StudyProgress(console) as progress:
        try:
            results = compare_methods(
                settings,
                folder,
                jobs=min(jobs or cores, cores),
                listener=progress,
                should_stop=should_stop,
            )
        except StoppedError as error:
            results, stopped = found_in(settings, folder), error
    write_tables(results, folder)
    console.print(terminal_table(results))
    for answer in answers(results):
        _say(answer)
    if bad := sum(one.ended.state in ("diverged", "failed") for one in results.cells):
        _say(f"{bad} of {len(results.cells)} runs diverged or failed: see the page")
    if find_spec("plotly") is None:
        _say(f'results: {folder / "results.md"}; no page: pip install "fedgradnorm[report]"')
    else:
        _say(f"page: {write_page(results, folder / 'index.html')}")
    if find_spec("matplotlib") is not None and any(one.measured for one in results.cells):
        from fedgradnorm.compare.figure import write_figure

        write_figure(results, folder / "results.svg")
    if stopped is not None:
        raise stopped


@app.command("list")
def list_parts() -> None:
    """List the federations, models, methods, weightings, aggregations and engines, with their options and defaults."""
    from fedgradnorm.registry import BUILT_INS, describe

    for kind, names in BUILT_INS.items():
        table = Table(
            "name", "what it is", "options", title=kind, title_justify="left", expand=True
        )
        for name in sorted(names):
            try:
                summary, options = describe(kind, name)
            except ConfigError as error:
                if not isinstance(error.__cause__, ImportError):
                    raise
                table.add_row(
                    name, Text(str(error.__cause__)), ""
                )  # it says which extra is missing
                continue
            table.add_row(
                name, summary, "\n".join(f"{key} = {value!r}" for key, value in options.items())
            )
        console.print(table)


@flower.command("init")
def flower_init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the deployment.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The federation's TOML file, such as configs/digits.toml.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name or an address under which nodes reach the server; several are possible, nodes use the first."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The server's port.")] = 8000,
) -> None:
    """Write a folder to deploy a federation from: the Flower app, keys, scripts, services."""
    try:
        from fedgradnorm.flower.init import write_deployment
    except ImportError as error:
        raise ConfigError(str(error)) from error
    clients = write_deployment(folder, config, overrides or [], host or ["127.0.0.1"], port)
    _say(f"{folder}: a deployment of {len(clients)} clients: {', '.join(clients)}")
    _say(
        f"on this machine: python {folder}/local.py, then in another terminal {folder}/server/run.sh; on several: {folder}/README.md"
    )


@flower.command("status")
def flower_status(
    folder: DeploymentFolder,
    run: RunOfDeployment = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say where a deployment's run has got to, who takes part, and when its certificates expire.

    Exit status: 0 where the run goes on or has completed; 1 where it was stopped, its process is gone, or a certificate has expired; 2
    where there is no run, or its status cannot be read.
    """
    try:
        from fedgradnorm.flower.overview import (
            GONE,
            clients_table,
            facts,
            look,
            remarks,
            state_line,
            warnings_on,
        )
    except ImportError as error:
        raise ConfigError(str(error)) from error
    overview, now = look(folder, run), time.time()
    if as_json:
        typer.echo(json.dumps(facts(overview, now), indent=2))
    if overview.status is None:
        raise RunError(overview.faults[0])
    if not as_json:
        _say(f"{overview.folder}: {state_line(overview.status, now)}")
        console.print(clients_table(overview, now))
        for line in remarks(overview, now):
            _say(line)
        for name, expires in overview.certificates.items():
            _say(f"{name}: good until {datetime.fromtimestamp(expires, UTC):%Y-%m-%d}")
        for line in warnings_on(overview, now):
            _warn(line)
    if overview.state in ("stopped", GONE) or any(
        expires <= now for expires in overview.certificates.values()
    ):
        raise typer.Exit(1)


@flower.command("metrics")
def flower_metrics(
    folder: DeploymentFolder,
    run: RunOfDeployment = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Whoever reaches it can read the metrics.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 9464,
) -> None:
    """Serve a deployment's metrics for Prometheus until Ctrl-C: its files are read at each scrape, whether a run goes on or not."""
    try:
        from fedgradnorm.flower.exporter import serve
    except ImportError as error:
        raise ConfigError(str(error)) from error
    with stop_on_signals() as should_stop:
        stop = serve(folder, run, host, port)
        _say(f"metrics of {folder}: http://{f'[{host}]' if ':' in host else host}:{port}/metrics")
        while not should_stop():
            time.sleep(0.2)
        stop()


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Inside the block the first SIGINT or SIGTERM is kept for whoever asks, and a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,  # noqa: ARG001
    line: object = None,  # noqa: ARG001
) -> None:
    """A warning as a line on standard error; one of ours without the place in the code."""
    _warn(
        str(message)
        if issubclass(category, FedGradNormWarning)
        else f"{filename}:{lineno}: {category.__name__}: {message}"
    )


def _warn(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(
        f"warning: {message}", style="yellow", markup=False, highlight=False, emoji=False
    )


def _say(message: str) -> None:
    console.print(message, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _show_run(folder: Path) -> None:
    from fedgradnorm.report import comparison_table
    from fedgradnorm.runs.folder import Run
    from fedgradnorm.runs.summary import costs_text

    run = Run(folder)
    console.print(comparison_table([run]))
    _say(costs_text(run.summary()))
    page = folder / "report.html"
    if page.exists():
        _say(f"report: {page}")
    elif run.config.run.page and find_spec("plotly") is None:
        _say('no report page: pip install "fedgradnorm[report]"')
    else:
        _say(f"run: {folder}")
    _raise_for_missing(
        "the run has ended",
        {id: client["missing"] for id, client in run.summary()["clients"].items()},
    )


def _raise_for_missing(ended: str, reasons: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ClientError where there are reasons why metrics are missing, by client and metric."""
    missing = [
        f"client '{id}': metric '{metric}': {why}"
        for id, metrics in reasons.items()
        for metric, why in metrics.items()
    ]
    if missing:
        raise ClientError(f"{ended}, and figures are missing: {'; '.join(missing)}")
