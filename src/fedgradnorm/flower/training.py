"""A run on a Grid: the simulation's loop, files and checkpoints, with the clients elsewhere."""

import logging
from collections.abc import Sequence
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
from fedgradnorm.runs.folder import CHECKPOINTS, Run, alone_in
from fedgradnorm.runs.records import Row
from fedgradnorm.session import Session
from fedgradnorm.weighting.base import Weighting

__all__ = ["check_deployable", "new_experiment", "run_folder", "train_on_grid"]

log = logging.getLogger(__name__)

ANEW = "start_round = 1 begins anew"

LOCK_TIMEOUT = 60.0
"""Seconds that a run waits for another one in its folder to end, such as one whose SuperLink was killed."""


def new_experiment() -> str:
    """A name under which clients keep their states, and that no other experiment has."""
    return uuid4().hex[:12]


def train_on_grid(
    config: RunConfig,
    engine: GridEngine,
    weighting: Weighting,
    start_round: int | None = None,
    callbacks: Sequence[Callback] = (),
    min_nodes: int | None = None,
) -> Result:
    """Train the clients of an engine's roster: from the first round on, or from the checkpoint in the run's folder.

    Whatever can be wrong without the clients' data is raised before a node is asked or a folder is touched. While the run goes on, and when
    it ends, its folder's status.json says where it has got to.

    Args:
        config: the resolved settings; ``run.dir`` says where the run is written, with a checkpoint for every round.
        engine: how to reach the clients.
        weighting: their weights.
        start_round: 1 begins, and replaces a run that is there; one more than the round of one of its checkpoints goes on from that
            checkpoint, and sets what is of later rounds aside, in ``undone/`` of the run's folder; None goes on from the newest
            checkpoint, and begins where there is no run.
        callbacks: called while the run goes on.
        min_nodes: clients that have to be connected before the first of these rounds; None: as before every round.

    Raises:
        ConfigError: settings that cannot be trained across machines or are not those of the run that it goes on with, or a ``start_round``
            that does not fit.
        RunError: checkpoints that are all damaged or gone, a folder with another kind of run or to which another run is writing, or one
            that cannot be written.
        StoppedError: too few clients, too few sound reports, or a callback that stops it; what is done is in the run's folder.
    """
    _show_log()

    called = Callbacks([_Log(engine), *callbacks])
    folder = run_folder(config)
    check_deployable(config, engine.roster)
    with nullcontext() if folder is None else alone_in(folder, LOCK_TIMEOUT):
        done, checkpoint, goes_back = (
            (0, None, False) if folder is None else _done(folder, start_round)
        )
        begins = done == 0 or start_round == 1

        def made(settings: RunConfig) -> Engine:
            engine.experiment = str(settings.run.experiment)
            if begins or done < settings.train.num_rounds or not engine.roster.clients:
                engine.wait(min_nodes)
            return with_faults(engine, settings.faults)

        if folder is None or begins:
            # every round has a checkpoint, for clients keep only their last states
            run = config.run.model_copy(
                update={"experiment": new_experiment(), "checkpoint_every": 1}
            )
            config = config.model_copy(update={"run": run})
            with engine.watcher.watching(folder, config):
                result = begin(
                    config,
                    engine.roster,
                    weighting,
                    made,
                    called,
                    overwrite=folder is not None,
                    locked=True,
                )
                return _with_page(result, folder)
        opened = Run(folder)
        _check_unchanged(opened, config)
        if checkpoint is not None:
            engine.roster.recall(checkpoint.members)
        config = config.model_copy(update={"run": opened.config.run})
        rounds, back_to = config.train.num_rounds, done if goes_back else None
        with engine.watcher.watching(folder, config, done):
            result = go_on(
                opened,
                engine.roster,
                weighting,
                made,
                called,
                num_rounds=rounds,
                locked=True,
                back_to=back_to,
            )
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


def run_folder(config: RunConfig) -> Path | None:
    """The run's folder; None where none is written. Raises ConfigError for one that cannot be a run's own."""
    if config.run.dir is None:
        return None
    try:
        folder = Path(config.run.dir).expanduser()
        current = Path.cwd()
        own = folder.resolve() not in (current, *current.parents)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a home of nobody, or what no path can hold
        raise ConfigError(
            f"run.dir: expected a folder for the run, found {config.run.dir!r}; {error}"
        ) from error
    require(own, "run.dir", "a folder of its own for the run", config.run.dir)
    return folder


def check_deployable(config: RunConfig, roster: Roster) -> None:
    """Raise ConfigError or FederationError for settings that cannot be trained across machines."""
    refuse_lockstep(config)
    if not roster.open:
        check_settings(config, roster)


def round_line(rows: Sequence[Row], num_rounds: int) -> str:
    """A round as a line of a log."""
    heard = [
        f"{row['client']} loss {row['loss']:.4g} p {row['weight']:.3f}"
        for row in rows
        if row["loss"] is not None
    ]
    dropped = [f"{row['client']}: {row['dropped']}" for row in rows if row["dropped"] is not None]
    parts = [
        f"round {rows[0]['round']}/{num_rounds}",
        *heard[:10],
        *([f"and {len(heard) - 10} more"] if len(heard) > 10 else []),
    ]
    return "  ".join(parts) + (f"  dropped: {'; '.join(dropped)}" if dropped else "")


def _done(folder: Path, start_round: int | None) -> tuple[int, Checkpoint | None, bool]:
    """After how many rounds a run in this folder goes on, the checkpoint of that moment, and whether there are newer ones.

    Raises ConfigError for a ``start_round`` that does not fit, and RunError where a run would be replaced unasked, or is none of ours.
    """
    done, checkpoint = 0, None
    if (folder / "config.toml").is_file():
        checkpoint, _, faults = load_newest(folder / CHECKPOINTS)
        done = 0 if checkpoint is None else checkpoint.server.round
        if start_round != 1:
            opened = Run(folder)
            if opened.config.run.experiment is None:
                raise RunError(
                    f"{folder}: its clients are not on other machines: `fedgradnorm resume` goes on with it; {ANEW}"
                )
            if faults and not done:
                raise RunError(
                    f"{next(iter(faults.values()))}; no sound checkpoint is left to go on from: {ANEW}"
                )
            if not done and opened.has_results():
                raise RunError(
                    f"{folder}: there are results of a run, and no checkpoint is left to go on from: {ANEW}"
                )
    if start_round not in (None, 1, done + 1):
        checkpoint = _checkpoint_before(folder, start_round, done)
        return checkpoint.server.round, checkpoint, True
    return done, checkpoint, False


def _checkpoint_before(folder: Path, start_round: int, done: int) -> Checkpoint:
    """The checkpoint of the round before one that is done. Raises ConfigError where there is no sound one."""
    if 1 < start_round <= done:
        checkpoint, _, _ = load_newest(folder / CHECKPOINTS, start_round - 1)
        if checkpoint is not None and checkpoint.server.round == start_round - 1:
            return checkpoint
    kept = sound_rounds(folder / CHECKPOINTS) if done else []
    starts = [str(round) for round in (1, *(round + 1 for round in kept if round))]
    expected = " or ".join([", ".join(starts[:-1]), starts[-1]] if starts[1:] else starts)
    checkpoints = (
        f", and there are checkpoints of round {', '.join(map(str, kept))}" if kept else ""
    )
    raise ConfigError(
        f"start_round: expected {expected}, as {done} rounds are done in {folder}{checkpoints}, found {start_round}"
    )


def _check_unchanged(opened: Run, config: RunConfig) -> None:
    changed = changes(opened.config.model_dump(mode="json"), config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"{opened.folder}: a run goes on with the settings that it began with ({ANEW}); changed: {changed}"
        )


def _show_log() -> None:
    """Let this package's log be seen where nobody has set up logging, as in the processes that Flower starts."""
    logger = logging.getLogger("fedgradnorm")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
