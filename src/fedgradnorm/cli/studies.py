"""The command that compares methods over seeds."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fedgradnorm.cli.terminal as terminal
from fedgradnorm.errors import StoppedError

if TYPE_CHECKING:
    from fedgradnorm.compare.results import Results
    from fedgradnorm.compare.spec import Study


def compare(
    study: Annotated[
        Path, typer.Argument(help="The study's TOML file, such as studies/radcom.toml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the study, or settings of its runs, that take precedence over the file.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs trained at once; by default, and at most, one per core."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The study's folder; by default runs/studies/ and the file's name."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Train the larger study that the table 'full' of the file describes."
        ),
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(help="Compare only these methods (comma-separated) and the baseline."),
    ] = None,
) -> None:
    """Tune and train every method of a study, and write tables and a page that compare them.

    Runs that are already trained are kept. A stopped study reports on the runs that it has.
    """
    from fedgradnorm.compare.spec import load_study  # first: its errors come without torch

    settings = load_study(study, overrides or [], full=full)
    if methods is not None:
        settings = settings.with_methods([name.strip() for name in methods.split(",")])
    folder = out or Path("runs/studies") / f"{study.stem}{'-full' if full else ''}"
    cores = terminal.available_cores()
    if jobs is not None and jobs > cores:
        terminal.say(f"--jobs {jobs}: {cores} at once, as many as there are cores")
    results, stopped = _train(settings, folder, min(jobs or cores, cores))
    _write(results, folder)
    if stopped is not None:
        raise stopped


def _train(study: "Study", folder: Path, jobs: int) -> "tuple[Results, StoppedError | None]":
    """Train the missing runs of a study. Return its results, and the error if it was stopped."""
    from fedgradnorm.compare import study as studies
    from fedgradnorm.compare.progress import StudyProgress

    with terminal.stop_on_signals() as should_stop, StudyProgress(terminal.console) as progress:
        try:
            results = studies.compare(
                study, folder, jobs=jobs, listener=progress, should_stop=should_stop
            )
        except StoppedError as error:
            return studies.found_in(study, folder), error
    return results, None


def _write(results: "Results", folder: Path) -> None:
    """Write the tables, the page and the figure of a study, and print its answers."""
    from fedgradnorm.compare.findings import answers
    from fedgradnorm.compare.page import write_page
    from fedgradnorm.compare.tables import terminal_table, write_tables

    write_tables(results, folder)
    terminal.console.print(terminal_table(results))
    for answer in answers(results):
        terminal.say(answer)
    if bad := sum(cell.ended.state in ("diverged", "failed") for cell in results.cells):
        terminal.say(f"{bad} of {len(results.cells)} runs diverged or failed: see the page")
    if find_spec("plotly") is None:
        tables = folder / "results.md"
        terminal.say(f'results: {tables}; no page: pip install "fedgradnorm[report]"')
    else:
        terminal.say(f"page: {write_page(results, folder / 'index.html')}")
    if find_spec("matplotlib") is not None and any(cell.measured for cell in results.cells):
        from fedgradnorm.compare.figure import write_figure

        write_figure(results, folder / "results.svg")
