"""A run on a Grid: the simulation's loop, files and checkpoints, with the clients elsewhere."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from uuid import uuid4

from fedgradnorm.callbacks.base import Callback, Callbacks
from fedgradnorm.checks import changes, check_settings, refuse_lockstep
from fedgradnorm.config import RunConfig
from fedgradnorm.engine import Engine
from fedgradnorm.engine_wrappers import with_faults
from fedgradnorm.errors import ConfigError, RunError, require
from fedgradnorm.flower.engine import GridEngine
from fedgradnorm.flower.roster import Roster
from fedgradnorm.loop import begin, go_on
from fedgradnorm.report.page import write_page
from fedgradnorm.result import Result
from fedgradnorm.runs.checkpoint import Checkpoint, load_newest, sound_rounds
from fedgradnorm.runs.entries import CHECKPOINTS
from fedgradnorm.runs.lock import alone_in
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.records import Row
from fedgradnorm.session import Session
from fedgradnorm.weighting.base import Weighting

log = logging.getLogger(__name__)

ANEW = "start_round = 1 begins anew"
LOCK_TIMEOUT = 60.0
"""Seconds to wait for another run in the folder to end, such as after its SuperLink was killed."""


def new_experiment() -> str:
    """A unique name under which clients keep their states."""
    return uuid4().hex[:12]


def train_on_grid(
    config: RunConfig,
    engine: GridEngine,
    weighting: Weighting,
    start_round: int | None = None,
    callbacks: Sequence[Callback] = (),
    min_nodes: int | None = None,
) -> Result:
    """Train the clients of an engine's roster, from the first round or from a checkpoint.

    All that can be wrong without the clients' data is raised before a node is asked or a folder is
    touched. During the run and at its end, status.json in its folder says where it has got to.

    Args:
        config: the resolved settings; the run is written to ``run.dir``, with a checkpoint for
            every round.
        engine: how to reach the clients.
        weighting: their weights.
        start_round: 1 begins, and replaces a run that is there. One more than the round of a
            checkpoint resumes from it, and moves all that is of later rounds to ``undone/`` in the
            run's folder. None resumes from the newest checkpoint, and begins where there is no run.
        callbacks: called while the run goes on.
        min_nodes: clients that have to be connected before the first of these rounds; None: as
            before every round.

    Raises:
        ConfigError: the settings cannot be trained across machines or differ from those of the run
            that is resumed, or ``start_round`` does not fit.
        RunError: all checkpoints are damaged or gone, the folder holds another kind of run or
            another run is writing to it, or it cannot be written.
        StoppedError: too few clients, too few sound reports, or a callback that stops the run; the
            rounds that are done are in the run's folder.
    """
    _show_log()
    folder, roster, rounds = run_folder(config), engine.roster, config.train.num_rounds
    called = Callbacks([_Log(engine), *callbacks])
    check_deployable(config, roster)
    with nullcontext() if folder is None else alone_in(folder, LOCK_TIMEOUT):
        done, checkpoint, back = (0, None, False) if folder is None else _done(folder, start_round)
        begins = done == 0 or start_round == 1
        trains = begins or done < rounds or not roster.clients
        made = _making(engine, trains, min_nodes)
        if folder is None or begins:
            config = _of_new_run(config)
            with engine.watcher.watching(folder, config):
                parts, replaces = (roster, weighting, made, called), folder is not None
                result = begin(config, *parts, overwrite=replaces, locked=True)
                return _with_page(result, folder)
        opened = Run(folder)
        _check_unchanged(opened, config)
        if checkpoint is not None:
            roster.recall(checkpoint.members)
        config = config.model_copy(update={"run": opened.config.run})
        with engine.watcher.watching(folder, config, done):
            parts, back_to = (roster, weighting, made, called), done if back else None
            result = go_on(opened, *parts, num_rounds=rounds, locked=True, back_to=back_to)
            return _with_page(result, folder)


class _Log(Callback):
    """Writes every round to the log, and to the run's status."""

    def __init__(self, engine: GridEngine) -> None:
        self.engine = engine

    def on_round(self, session: Session) -> None:
        """Write the round."""
        log.info(round_line(session.rows, session.num_rounds))
        self.engine.watcher.round_ends(session.rows, self.engine.failures)

    def on_message(self, message: str) -> None:
        """Write the message."""
        log.info(message)


def _with_page(result: Result, folder: Path | None) -> Result:
    if folder is not None and result.config.run.page:
        write_page(folder)
    return result


def _making(engine: GridEngine, trains: bool, least: int | None) -> Callable[[RunConfig], Engine]:
    """What gives the engine of a run, once its clients are connected where it trains."""

    def made(settings: RunConfig) -> Engine:
        engine.experiment = str(settings.run.experiment)
        if trains:
            engine.wait(least)
        return with_faults(engine, settings.faults)

    return made


def _of_new_run(config: RunConfig) -> RunConfig:
    """The settings with an experiment, and checkpoints: clients keep only their last states."""
    update = {"experiment": new_experiment(), "checkpoint_every": 1}
    return config.model_copy(update={"run": config.run.model_copy(update=update)})


def run_folder(config: RunConfig) -> Path | None:
    """The run's folder; None where none is written. Raises ConfigError if no run can have it."""
    if config.run.dir is None:
        return None
    try:
        folder = Path(config.run.dir).expanduser()
        current = Path.cwd()
        own = folder.resolve() not in (current, *current.parents)
    except (OSError, RuntimeError, ValueError) as error:  # such as an unknown user's home
        found = f"found {config.run.dir!r}; {error}"
        raise ConfigError(f"run.dir: expected a folder for the run, {found}") from error
    require(own, "run.dir", "a folder of its own for the run", config.run.dir)
    return folder


def check_deployable(config: RunConfig, roster: Roster) -> None:
    """Raise ConfigError or FederationError if settings cannot be trained across machines."""
    refuse_lockstep(config)
    if not roster.open:
        check_settings(config, roster)


def round_line(rows: Sequence[Row], num_rounds: int) -> str:
    """A round as a line for a log."""
    heard = [
        f"{row['client']} loss {row['loss']:.4g} p {row['weight']:.3f}"
        for row in rows
        if row["loss"] is not None
    ]
    dropped = [f"{row['client']}: {row['dropped']}" for row in rows if row["dropped"] is not None]
    parts = [f"round {rows[0]['round']}/{num_rounds}", *heard[:10]]
    if heard[10:]:
        parts.append(f"and {len(heard) - 10} more")
    if dropped:
        parts.append(f"dropped: {'; '.join(dropped)}")
    return "  ".join(parts)


def _done(folder: Path, start_round: int | None) -> tuple[int, Checkpoint | None, bool]:
    """The number of rounds that are done, their checkpoint, and whether there are newer ones.

    Raises ConfigError or RunError as `train_on_grid` does.
    """
    done, checkpoint = 0, None
    if (folder / "config.toml").is_file():
        checkpoint, _, faults = load_newest(folder / CHECKPOINTS)
        done = 0 if checkpoint is None else checkpoint.server.round
        if start_round != 1:
            _check_resumable(folder, done, [] if done else list(faults.values()))
    if start_round not in (None, 1, done + 1):
        checkpoint = _checkpoint_before(folder, start_round, done)
        return checkpoint.server.round, checkpoint, True
    return done, checkpoint, False


def _check_resumable(folder: Path, done: int, faults: Sequence[str]) -> None:
    """Raise RunError for a run that no checkpoint resumes, unless nothing of it would be lost."""
    opened = Run(folder)
    if opened.config.run.experiment is None:
        why = "its clients are not on other machines: `fedgradnorm resume` resumes it"
        raise RunError(f"{folder}: {why}; {ANEW}")
    if faults:
        raise RunError(f"{faults[0]}; no sound checkpoint is left to resume from: {ANEW}")
    if not done and opened.has_results():
        why = "there are results of a run, and no checkpoint is left to resume from"
        raise RunError(f"{folder}: {why}: {ANEW}")


def _checkpoint_before(folder: Path, start_round: int, done: int) -> Checkpoint:
    """The checkpoint before a round that is done. Raises ConfigError if there is no sound one."""
    if 1 < start_round <= done:
        checkpoint, _, _ = load_newest(folder / CHECKPOINTS, start_round - 1)
        if checkpoint is not None and checkpoint.server.round == start_round - 1:
            return checkpoint
    kept = sound_rounds(folder / CHECKPOINTS) if done else []
    starts = [str(round) for round in (1, *(round + 1 for round in kept if round))]
    expected = " or ".join([", ".join(starts[:-1]), starts[-1]] if starts[1:] else starts)
    there = f", and there are checkpoints of round {', '.join(map(str, kept))}" if kept else ""
    why = f"as {done} rounds are done in {folder}{there}"
    raise ConfigError(f"start_round: expected {expected}, {why}, found {start_round}")


def _check_unchanged(opened: Run, config: RunConfig) -> None:
    changed = changes(opened.config.model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        rule = f"a run is resumed with the settings that it began with ({ANEW})"
        raise ConfigError(f"{opened.folder}: {rule}; changed: {changed}")


def _show_log() -> None:
    """Show this package's log where nobody has set up logging, as in Flower's processes."""
    logger = logging.getLogger("fedgradnorm")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
