"""Training from Python: `train` a federation, `run` a configuration, `resume` a run."""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedgradnorm import checks, registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.build import IN_PYTHON, build_federation, default_weighting, resolve_config
from fedgradnorm.callbacks.base import Callback, Callbacks, Functions, OnRound, ShouldStop
from fedgradnorm.config import (
    FaultsConfig,
    FederationConfig,
    RunConfig,
    RunSettings,
    TrainConfig,
    WeightingConfig,
)
from fedgradnorm.engine import Engine
from fedgradnorm.engine_wrappers import with_faults
from fedgradnorm.errors import ConfigError
from fedgradnorm.federation import Federation
from fedgradnorm.loop import begin, go_on
from fedgradnorm.report.page import write_page
from fedgradnorm.result import Result
from fedgradnorm.runs.models import federation_of
from fedgradnorm.runs.reader import Run
from fedgradnorm.training import Method
from fedgradnorm.validation import validated
from fedgradnorm.weighting.base import Weighting


def train(
    federation: Federation,
    weighting: str | Mapping[str, Any] | Weighting | None = None,
    *,
    method: str | Mapping[str, Any] | Method | None = None,
    aggregation: str | Mapping[str, Any] | Aggregation = "mean",
    engine: str | Mapping[str, Any] = "vectorized",
    faults: Mapping[str, float] | None = None,
    run: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    on_round: OnRound | None = None,
    should_stop: ShouldStop | None = None,
    **training: Any,
) -> Result:
    """Train a federation.

    A part is given as a name, as a mapping with a name and options, such as
    ``{"name": "fedprox", "mu": 0.1}``, or as an object, such as ``FedProx(mu=0.1)``.

    Args:
        federation: what to train.
        weighting: how clients are weighted; None: as the method says, which is ``"fedgradnorm"``
            for all but FedAvg.
        method: how a client trains; None: ``"fedrep"``.
        aggregation: how weighted gradients become one direction.
        engine: what runs the clients; as a name or a mapping, for example
            ``{"name": "vectorized", "threads": 2}``.
        faults: probabilities of faults in reports, with the keys of `FaultsConfig`.
        run: how the run is written, with the keys of `RunSettings`.
        run_dir: the folder to write the run to; None writes nothing. The same as
            ``run={"dir": ...}``.
        overwrite: whether a run that is in this folder already is replaced. It is removed after
            the first round of the new one; if that fails, it is put back.
        progress: whether a bar is shown, in a terminal or in a notebook.
        callbacks: called while the run goes on.
        on_round: called after every round with its lines.
        should_stop: asked after every round; True ends the run there with a StoppedError.
        **training: the settings of `TrainConfig`, such as ``num_rounds=20``.

    Raises:
        ConfigError: a setting that is unknown or out of range.
        FederationError: data that do not fit the models.
        RunError: a run folder that exists, is being written to, or cannot be written.
        ClientError: a client's own code raised an error after training had begun.
        WeightingError: a weighting or an aggregation raised an error, or gave a wrong value.
        StoppedError: the run ended early.

    Where training had begun, the error has the `Result` of the rounds that were done as its
    attribute ``result``, and the run's folder holds their models and a checkpoint to resume from.
    This holds for errors of callbacks and for Ctrl-C as well.
    """
    checks.check_federation(federation)
    checks.check_functions(on_round=on_round, should_stop=should_stop)
    settings = validated(TrainConfig, training, prefix="train")
    method = settings.method.name if method is None else method
    settings = settings.model_copy(update={"method": registry.component_of("method", method)})
    weighting = default_weighting(settings) if weighting is None else weighting
    weights, component = weighting_of(weighting)
    config = RunConfig(
        federation=FederationConfig(name=IN_PYTHON),
        train=settings,
        weighting=component,
        aggregation=registry.component_of("aggregation", aggregation),
        engine=registry.component_of("engine", engine),
        faults=validated(FaultsConfig, faults or {}, prefix="faults"),
        run=_run_settings(run, run_dir),
    )
    called = _callbacks(callbacks, on_round, should_stop, progress=progress)
    make_engine = partial(_engine, federation, weights)
    return _with_page(begin(config, federation, weights, make_engine, called, overwrite=overwrite))


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    on_round: OnRound | None = None,
    should_stop: ShouldStop | None = None,
    profiled: bool = False,
) -> Result:
    """Do the run that a configuration describes.

    Everything is checked before a run folder is touched.

    Args:
        config: the settings, as `load_config` reads them.
        overwrite: whether a run that is in this folder already is replaced.
        progress: whether a bar is shown, in a terminal or in a notebook.
        callbacks: called while the run goes on.
        on_round: called after every round with its lines.
        should_stop: asked after every round; True ends the run there with a StoppedError.
        profiled: whether a trace of two rounds is written to the run's folder, for TensorBoard or
            Perfetto.

    Raises:
        FedGradNormError: as `train`.
    """
    checks.check_functions(on_round=on_round, should_stop=should_stop)
    called = _callbacks(callbacks, on_round, should_stop, progress=progress)
    resolved = resolve_config(config)
    federation = build_federation(resolved)
    weighting = registry.build("weighting", resolved.weighting)
    make_engine = partial(_engine, federation, weighting)
    parts = resolved, federation, weighting, make_engine, called
    return _with_page(begin(*parts, overwrite=overwrite, profiled=profiled))


def resume(
    run: str | Path,
    federation: Federation | None = None,
    *,
    num_rounds: int | None = None,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    on_round: OnRound | None = None,
    should_stop: ShouldStop | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Result:
    """Continue a run from its newest sound checkpoint, or from its start where there is none.

    The result is the one that the run would have had without the interruption.

    Args:
        run: the run's folder. Lines of metrics.jsonl after the checkpoint are cut off.
        federation: what is trained; needed only where it was given in Python.
        num_rounds: how many rounds there are to be in all, if more than the settings say.
        progress: whether a bar is shown, in a terminal or in a notebook.
        callbacks: called while the run goes on.
        on_round: called after every round with its lines.
        should_stop: asked after every round; True ends the run there with a StoppedError.
        on_message: told from which checkpoint the run continues, and which ones are damaged.

    Raises:
        RunError: the folder is not a run, is being written to, or cannot be written; or the
            clients, their tasks, heads or data are not those that the run began with.
        ConfigError: the settings in config.toml are not those of the checkpoint, or ``num_rounds``
            is less than what is done.
        ClientError: a client's own code raised an error.
        StoppedError: the run was stopped again.
    """
    opened = Run(run)
    checks.check_functions(on_round=on_round, should_stop=should_stop, on_message=on_message)
    called = _callbacks(callbacks, on_round, should_stop, on_message, progress=progress)
    rounds = None if num_rounds is None else _rounds(num_rounds)
    checks.check_clients_here(opened.config)
    federation = federation_of(opened, federation)
    weighting = registry.build("weighting", opened.config.weighting)
    make_engine = partial(_engine, federation, weighting)
    return _with_page(go_on(opened, federation, weighting, make_engine, called, num_rounds=rounds))


def weighting_of(weighting: object) -> tuple[Weighting, WeightingConfig]:
    """A weighting and its settings, from a name, a mapping or an object; else a ConfigError."""
    component = registry.component_of("weighting", weighting)
    return registry.build("weighting", component), component


def _run_settings(run: Mapping[str, Any] | None, run_dir: object) -> RunSettings:
    values = dict(run or {})
    if run_dir is not None:
        if "dir" in values:
            raise ConfigError("run_dir: expected a folder once, found run['dir'] as well")
        values["dir"] = run_dir
    folder = values.get("dir")
    if folder is not None:
        if not isinstance(folder, str | os.PathLike):
            raise ConfigError(f"run_dir: expected a path, found {folder!r:.100}")
        values["dir"] = os.fsdecode(folder)
    return validated(RunSettings, values, prefix="run")


def _callbacks(
    callbacks: Sequence[Callback],
    on_round: OnRound | None,
    should_stop: ShouldStop | None,
    on_message: Callable[[str], None] | None = None,
    *,
    progress: bool,
) -> Callbacks:
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks: expected a list of callbacks, found {callbacks!r:.100}")
    called = [*callbacks, Functions(on_round, should_stop, on_message)]
    if progress:
        from fedgradnorm.callbacks.progress_bar import ProgressBar

        called.insert(0, ProgressBar())
    return Callbacks(called)


def _engine(federation: Federation, weighting: Weighting, config: RunConfig) -> Engine:
    """An engine for clients in this process, after all that could be wrong with them is raised."""
    checks.check_clients_here(config)
    checks.check_settings(config, federation)
    train = config.train
    federation.check_data(
        train.batch_size,
        train.eval_batch_size,
        positive_losses=weighting.needs_positive_losses,
        initial_guess=train.initial_loss == "guess",
        seed=train.seed,
    )
    given = {"federation": federation, "seed": train.seed}
    engine: Engine = registry.build("engine", config.engine, **given)
    if not engine.lockstep:
        checks.refuse_lockstep(config)
    return with_faults(engine, config.faults)


def _rounds(number: object) -> int:
    """A number of rounds. Raises ConfigError for anything else."""
    with suppress(TypeError):
        rounds = 0 if isinstance(number, bool) else operator.index(number)  # type: ignore[arg-type]
        if rounds > 0:
            return rounds
    raise ConfigError(f"num_rounds: expected a whole number of at least 1, found {number!r:.100}")


def _with_page(result: Result) -> Result:
    """The result, after its run's page is written where the settings ask for one."""
    settings = result.config.run
    if settings.dir is not None and settings.page:
        write_page(Path(settings.dir).expanduser())
    return result
