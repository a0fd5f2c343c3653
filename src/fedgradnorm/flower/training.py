"""A run on a Grid: the simulation's loop, files and checkpoints, with the clients elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from fedgradnorm.checkpoint import load_newest
from fedgradnorm.config import RunConfig
from fedgradnorm.engines.base import Engine
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.flower.engine import GridEngine
from fedgradnorm.history import CHECKPOINTS, Run
from fedgradnorm.records import Row
from fedgradnorm.run import OnRound, OnState, Result, begin, changes, go_on, with_faults
from fedgradnorm.weighting.base import Weighting

__all__ = ["new_experiment", "train_on_grid"]

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

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
    on_round: OnRound | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_state: OnState | None = None,
) -> Result:
    """Train the clients of an engine's roster: from the first round on, or from the checkpoint in the run's folder.

    Args:
        config: the resolved settings; ``run.dir`` says where the run is written, with a checkpoint for every round.
        engine: how to reach the clients.
        weighting: their weights.
        start_round: 1 begins, and replaces a run that is there; one more than its checkpoint has goes on; None goes on where there is a
            checkpoint, and begins where there is none.
        on_round: called after every round with its rows.
        should_stop: asked after every round; True ends the run there, with a checkpoint.
        on_state: called before ``on_round`` with the server's state.

    Raises:
        ConfigError: a ``start_round`` that is neither, or settings that are not those of the run that it goes on with.
        RunError: checkpoints that are all damaged, a folder to which another run is writing, or one that cannot be written.
        StoppedError: too few clients, too few sound reports, or ``should_stop``; what is done is in the run's folder.
    """
    _show_log()

    def note(rows: Sequence[Row]) -> None:
        log.info(round_line(rows, config.train.num_rounds))
        if on_round is not None:
            on_round(rows)

    folder = None if config.run.dir is None else Path(config.run.dir).expanduser()
    with _alone_in(folder):
        return _train(config, engine, weighting, folder, start_round, note, should_stop, on_state)


def round_line(rows: Sequence[Row], num_rounds: int) -> str:
    """A round as a line of a log."""
    heard = [f"{row['client']} loss {row['loss']:.4g} p {row['weight']:.3f}" for row in rows if row["loss"] is not None]
    dropped = [f"{row['client']}: {row['dropped']}" for row in rows if row["dropped"] is not None]
    parts = [f"round {rows[0]['round']}/{num_rounds}", *heard[:10], *([f"and {len(heard) - 10} more"] if len(heard) > 10 else [])]
    return "  ".join(parts) + (f"  dropped: {'; '.join(dropped)}" if dropped else "")


def _train(
    config: RunConfig,
    engine: GridEngine,
    weighting: Weighting,
    folder: Path | None,
    start_round: int | None,
    on_round: OnRound,
    should_stop: Callable[[], bool],
    on_state: OnState | None,
) -> Result:
    done, checkpoint = 0, None
    if folder is not None and (folder / "config.toml").is_file():
        checkpoint, _, faults = load_newest(folder / CHECKPOINTS)
        done = 0 if checkpoint is None else checkpoint.server.round
        if faults and not done and start_round != 1:
            raise RunError(f"{next(iter(faults.values()))}; no sound checkpoint is left to go on from: start_round = 1 begins anew")
    if start_round not in (None, 1, done + 1):
        expected = f"1 or {done + 1}" if done else "1"
        raise ConfigError(f"start_round: expected {expected}, as {done} rounds are done in {folder}, found {start_round}")

    def made(settings: RunConfig) -> Engine:
        engine.experiment = settings.run.experiment or new_experiment()
        return with_faults(engine, settings)

    if folder is not None and checkpoint is not None and done and start_round != 1:
        opened = Run(folder)
        changed = changes(opened.config.model_dump(mode="json"), config.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"{folder}: a run goes on with the settings that it began with (start_round = 1 begins anew); changed: {changed}"
            )
        if checkpoint.members is not None:
            engine.roster.recall(checkpoint.members)
        return go_on(opened, engine.roster, weighting, made, config.train.num_rounds, on_round, should_stop, log.info, on_state)
    settings = config.run.model_copy(update={"experiment": new_experiment(), "checkpoint_every": 1})  # clients keep only their last states
    config = config.model_copy(update={"run": settings})
    return begin(config, engine.roster, weighting, made, folder is not None, on_round, should_stop, on_state=on_state)


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Keep two runs from writing to one folder, and from driving the same clients' states: the second waits a little, and is refused."""
    if folder is None or fcntl is None:
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f".{folder.name}.lock").open("a")
    except OSError as error:
        raise RunError(f"run folder {folder}: cannot be written: {error.strerror or error}") from error
    end = time.monotonic() + LOCK_TIMEOUT
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise RunError(f"run folder {folder}: another run is writing to it: wait for it, or stop it with `flwr stop`") from None
                time.sleep(0.2)
        yield


def _show_log() -> None:
    """Let this package's log be seen where nobody has set up logging, as in the processes that Flower starts."""
    logger = logging.getLogger("fedgradnorm")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
