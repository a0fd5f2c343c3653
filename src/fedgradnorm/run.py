"""The training loop over `run_round`, from Python (`train`) or from a configuration (`run`)."""

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile, schedule, tensorboard_trace_handler

from fedgradnorm import client as client_side
from fedgradnorm import registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.build import IN_PYTHON, build_federation, default_weighting, resolve_config, resolve_training, versions
from fedgradnorm.checkpoint import Checkpoint, load_newest, set_aside
from fedgradnorm.client import ClientState, Evaluation, constant_guess
from fedgradnorm.config import EngineConfig, FederationConfig, RunConfig, RunSettings, TrainConfig, WeightingConfig, dotted, validated
from fedgradnorm.costs import Costs, TimedEngine
from fedgradnorm.engines.base import Engine
from fedgradnorm.errors import ConfigError, RunError, StoppedError
from fedgradnorm.faults import FaultyEngine
from fedgradnorm.federation import Federation, Members
from fedgradnorm.history import CHECKPOINTS, PROFILE, Run, RunWriter, check_free, create_run, how_to_go_on, write_config
from fedgradnorm.parameters import load_buffers, load_flat
from fedgradnorm.records import Row, Summary
from fedgradnorm.report import write_report
from fedgradnorm.saved import joined
from fedgradnorm.server import RoundRecord, ServerState, initial_state, run_round
from fedgradnorm.summary import check_targets, summarise
from fedgradnorm.training import method_of
from fedgradnorm.weighting.base import Weighting

__all__ = [
    "Result",
    "begin",
    "changes",
    "check_settings",
    "go_on",
    "refuse_lockstep",
    "resume",
    "run",
    "train",
    "weighting_of",
    "with_faults",
]

OnRound = Callable[[Sequence[Row]], None]
ShouldStop = Callable[[], bool]
OnState = Callable[[ServerState], None]
Layout = Sequence[tuple[str, tuple[int, ...]]]
MakeEngine = Callable[[RunConfig], Engine]


@dataclasses.dataclass(frozen=True)
class Result:
    """What training gives.

    Attributes:
        federation: what was trained.
        state: the server's last state.
        client_states: every client's last state, by id.
        rows: a mapping per round and client, as in metrics.jsonl.
        summary: per task and client, as in summary.json.
        seed: the seed of the run.
    """

    federation: Members
    state: ServerState
    client_states: Mapping[str, ClientState]
    rows: Sequence[Row]
    summary: Summary
    seed: int

    @property
    def weights(self) -> dict[str, float]:
        """The last weights, by client id."""
        return dict(self.state.weighting.weights)

    def encoder(self) -> nn.Module:
        """The shared encoder after the last round; as initialised where every client has its own."""
        encoder = self.federation.make_encoder(self.seed)
        load_flat(encoder, self.state.encoder)
        load_buffers(encoder, self.state.buffers.items())
        return encoder.eval()

    def model(self, client: str) -> nn.Module:
        """The whole model of a client: the shared or its own encoder, with its own buffers, and its head."""
        if not isinstance(self.federation, Federation):
            raise RunError(f"the head of client '{client}' is with the client, on another machine")
        encoder, state = self.encoder(), self.client_states[self.federation.client(client).id]
        head = self.federation.make_head(self.federation.client(client), self.seed)
        client_side.load_model(encoder, head, state, self.state.encoder, self.state.buffers)
        return joined(encoder, head)


def train(
    federation: Federation,
    weighting: str | Weighting | None = None,
    *,
    engine: str = "vectorized",
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    on_round: OnRound | None = None,
    should_stop: ShouldStop = lambda: False,
    **training: Any,
) -> Result:
    """Train a federation.

    Args:
        federation: what to train.
        weighting: a weighting, or the name of one with its default options; by default that of the method, `fedgradnorm` but for FedAvg.
        engine: the name of the engine that runs the clients.
        run_dir: a folder to write the run to; None writes nothing.
        overwrite: whether a run that is in this folder already is replaced.
        on_round: called after every round with its rows.
        should_stop: asked after every round; True ends the run there.
        **training: the settings of `TrainConfig`, such as ``num_rounds=20``, ``method="fedper"`` or
            ``method={"name": "fedprox", "mu": 0.1}``.

    Raises:
        ConfigError: a setting that is unknown or out of range.
        FederationError: data that do not fit the models.
        RunError: a run folder that exists or cannot be written.
        StoppedError: the run ended early; its folder holds a checkpoint.
    """
    settings = resolve_training(validated(TrainConfig, training, prefix="train"))
    method, component = weighting_of(weighting if weighting is not None else default_weighting(settings))
    config = RunConfig(
        federation=FederationConfig(name=IN_PYTHON),
        train=settings,
        weighting=component,
        engine=EngineConfig(name=engine),
        run=RunSettings(dir=None if run_dir is None else str(run_dir)),
    )
    return begin(config, federation, method, partial(_engine_here, federation), overwrite, on_round, should_stop)


def weighting_of(weighting: str | Weighting) -> tuple[Weighting, WeightingConfig]:
    """A weighting, or that of a name with its default options, and its settings. Raises ConfigError for what is neither."""
    if isinstance(weighting, str):
        settings = registry.resolved("weighting", WeightingConfig(name=weighting))
        return registry.build("weighting", settings), settings
    if isinstance(weighting, type) or not (hasattr(weighting, "init") and hasattr(weighting, "update")):
        raise ConfigError(f"weighting: expected a name or a weighting such as FedGradNorm(), found {weighting!r}")
    options: dict[str, Any] = dataclasses.asdict(weighting) if dataclasses.is_dataclass(weighting) else {}
    return weighting, WeightingConfig(name=registry.name_of("weighting", type(weighting)), **options)


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    on_round: OnRound | None = None,
    should_stop: ShouldStop = lambda: False,
    profiled: bool = False,
) -> Result:
    """Do the run that a configuration describes. Everything is checked before a run folder is touched.

    Args:
        config: the settings.
        overwrite: whether a run that is in this folder already is replaced.
        on_round: called after every round with its rows.
        should_stop: asked after every round; True ends the run there, with a checkpoint.
        profiled: whether a trace of two rounds is written to the run's folder, for TensorBoard or Perfetto.

    Raises:
        FedGradNormError: whatever is wrong with the settings, the data or the folder.
    """
    resolved = resolve_config(config)
    federation = build_federation(resolved)
    weighting = registry.build("weighting", resolved.weighting)
    return begin(resolved, federation, weighting, partial(_engine_here, federation), overwrite, on_round, should_stop, profiled)


def resume(
    run: str | Path,
    federation: Federation | None = None,
    *,
    num_rounds: int | None = None,
    on_round: OnRound | None = None,
    should_stop: ShouldStop = lambda: False,
    on_message: Callable[[str], None] = lambda _: None,
) -> Result:
    """Go on with a run from its newest sound checkpoint, or from the start if there is none, and give what it would have given.

    Args:
        run: the run's folder. Lines of metrics.jsonl after the checkpoint are cut off.
        federation: what is trained; needed only where it was given in Python.
        num_rounds: how many rounds there are to be in all, if more than the settings say.
        on_round: called after every round with its rows.
        should_stop: asked after every round; True ends the run there, with a checkpoint.
        on_message: told which checkpoint it goes on from, and of damaged ones.

    Raises:
        RunError: the folder is no run, or cannot be written.
        ConfigError: the settings in config.toml are not those of the checkpoint, or ``num_rounds`` is not more than is done.
        StoppedError: the run was stopped again.
    """
    opened = Run(Path(run))
    _require_clients_here(opened.config)
    federation = federation or build_federation(opened.config)
    return go_on(opened, federation, None, partial(_engine_here, federation), num_rounds, on_round, should_stop, on_message)


def go_on(
    opened: Run,
    federation: Members,
    weighting: Weighting | None,
    make_engine: MakeEngine,
    num_rounds: int | None,
    on_round: OnRound | None,
    should_stop: ShouldStop,
    on_message: Callable[[str], None],
    on_state: OnState | None = None,
) -> Result:
    """As `resume`, with its parts made; without a weighting, that of the settings. ``make_engine`` and ``on_state`` as in `begin`."""
    checkpoint, path, faults = load_newest(opened.folder / CHECKPOINTS)
    for fault in faults.values():
        on_message(f"warning: {fault}; it is skipped")
    done = 0 if checkpoint is None else checkpoint.server.round
    config = _config_to_resume(opened, checkpoint, done, num_rounds)
    if checkpoint is not None and checkpoint.members is not None:
        _check_layout(path, checkpoint.members["encoder"], federation.layout)
    engine = make_engine(config)
    weighting = weighting or registry.build("weighting", config.weighting)
    state = initial_state(federation, weighting, config.train.seed)
    if checkpoint is not None:
        same_clients = config.run.experiment is not None or checkpoint.clients.keys() == set(federation.client_ids)
        if not same_clients or checkpoint.server.encoder.shape != state.encoder.shape:
            raise RunError(f"{path}: it belongs to other clients or another encoder than {opened.folder / 'config.toml'}")
        state = checkpoint.server
        engine.restore(checkpoint.clients)
    on_message(f"going on after round {done} of {config.train.num_rounds}" + (f", from {path}" if path else ": no checkpoint is there"))
    write_config(opened.folder, config)
    for damaged in faults:
        with suppress(OSError):
            set_aside(damaged)
    with RunWriter(opened.folder, config, done) as writer:
        aggregate = registry.build("aggregation", config.aggregation)
        job = _Job(config, federation, engine, weighting, aggregate, state, opened.rows(), on_state)
        result = job.go_on(writer, on_round, should_stop)
    if config.run.page:
        write_page(opened.folder)
    return result


def _config_to_resume(opened: Run, checkpoint: Checkpoint | None, done: int, num_rounds: int | None) -> RunConfig:
    """The settings of a run with ``num_rounds`` raised. Raises ConfigError where they are not those of the checkpoint."""
    config = opened.config.model_copy(update={"run": opened.config.run.model_copy(update={"dir": str(opened.folder)})})
    if checkpoint is not None:
        changed = changes(checkpoint.settings, config.model_dump(mode="json"))
        if changed:
            raise ConfigError(f"{opened.folder / 'config.toml'}: a run goes on with the settings that it began with; changed: {changed}")
    wanted = config.train.num_rounds if num_rounds is None else num_rounds
    if wanted < max(done, 1):
        raise ConfigError(f"train.num_rounds: expected at least the {done} rounds that are done, found {wanted}")
    return config.model_copy(update={"train": config.train.model_copy(update={"num_rounds": wanted})})


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """In words, which settings differ that a run has to go on with: all but those of its folder, and the number of rounds."""
    then, now = (dotted({**settings, "run": {}, "versions": {}}) for settings in (before, after))
    differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key) and key != "train.num_rounds")
    return ", ".join(f"{key} = {now.get(key)} (was {then.get(key)})" for key in differing)


def _check_layout(path: Path | None, before: Layout, now: Layout) -> None:
    """Raise RunError where the encoder's parameters are others, or in another order: the vector of before would be cut up wrongly."""
    for then, found in zip_longest(before, now):
        if then != found:
            raise RunError(f"{path}: the encoder has other parameters, or in another order, than when the run began: {found}, was {then}")


def check_settings(config: RunConfig, federation: Members) -> None:
    """Raise ConfigError or FederationError where the settings do not fit the clients."""
    check_targets(config.run, federation)
    for listed in config.train.participants:
        for client in listed:
            federation.client(client)
    if config.train.min_clients > len(federation.clients):
        raise ConfigError(f"train.min_clients: expected at most the {len(federation.clients)} clients, found {config.train.min_clients}")
    _check_method(config, federation)


def _check_method(config: RunConfig, federation: Members) -> None:
    """Raise ConfigError where the settings ask for what the method cannot do."""
    method, name = method_of(config.train), config.train.method.name
    if method.own_encoder and federation.buffers == "averaged":
        raise ConfigError(f'train.method: {name} exchanges nothing: expected model.buffers = "local", found "averaged"')
    if method.lockstep and (config.train.fraction_train < 1 or config.train.participants):
        raise ConfigError(f"train.method: {name} trains on all data at every step: expected no fraction_train below 1 and no participants")
    if method.lockstep and any(config.faults.model_dump().values()):
        raise ConfigError(f"train.method: {name} sends no reports that could meet faults: expected no [faults]")


def refuse_lockstep(config: RunConfig) -> None:
    """Raise ConfigError for a method that an engine of messages cannot run: one whose server steps after each of the clients' steps."""
    if method_of(config.train).lockstep:
        raise ConfigError(f"train.method: {config.train.method.name} keeps all clients in lockstep, which is for the simulation alone")


def _require_clients_here(config: RunConfig) -> None:
    if config.run.experiment is not None:
        raise ConfigError(
            f"run.experiment: '{config.run.experiment}' is a run whose clients are on other machines: it goes on when its Flower app "
            "is started again"
        )


def _engine_here(federation: Federation, config: RunConfig) -> Engine:
    """An engine for clients in this process, after all that could be wrong with them is raised."""
    _require_clients_here(config)
    check_settings(config, federation)
    federation.check_data(config.train.batch_size)
    engine: Engine = registry.build("engine", config.engine, federation=federation, seed=config.train.seed)
    if not getattr(engine, "lockstep", True):
        refuse_lockstep(config)
    return with_faults(engine, config)


def with_faults(engine: Engine, config: RunConfig) -> Engine:
    """The engine, with the faults of the settings where there are any."""
    return FaultyEngine(engine, config.faults) if any(config.faults.model_dump().values()) else engine


@contextmanager
def _unwatched() -> Iterator[None]:
    """Let the garbage collector pass over what is there already, torch's modules above all: small clients make it look every few rounds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclasses.dataclass
class _Job:
    """A run on its way: its parts, and where it has got to."""

    config: RunConfig
    federation: Members
    engine: Engine
    weighting: Weighting
    aggregate: Aggregation
    state: ServerState
    rows: list[Row]
    on_state: OnState | None = None

    @_unwatched()
    def go_on(self, writer: RunWriter | None, on_round: OnRound | None, should_stop: ShouldStop, profiler: profile | None = None) -> Result:
        """Train the rounds that are left, and write what is to be written."""
        start, training, settings = perf_counter(), self.config.train, self.config.run
        guesses, costs = _guesses(self.federation), Costs()
        engine = TimedEngine(self.engine, costs)
        while self.state.round < training.num_rounds:
            try:
                with costs.of("aggregation"):
                    self.state, record = run_round(self.state, self.federation, engine, self.weighting, self.aggregate, training)
            except StoppedError as error:
                raise self._stopped(writer, str(error)) from error
            rows = rows_of(self.federation, self.state, record, _evaluations(engine, self.state, training))
            del record  # its gradients are not to lie beside the next ones
            self.rows += rows
            ended = self.state.round == training.num_rounds
            if writer is not None:
                with costs.of("writing"):
                    writer.write_round(rows)
                    if ended or self.state.round % settings.checkpoint_every == 0:
                        self._checkpoint(writer)
            if profiler is not None:
                profiler.step()
            if self.on_state is not None:
                self.on_state(self.state)
            if on_round is not None:
                on_round(rows)
            if should_stop() and not ended:
                raise self._stopped(writer, f"stopped after round {self.state.round} of {training.num_rounds}")
        summary = summarise(self.federation, self.rows, guesses, settings, perf_counter() - start, costs.seconds)
        result = Result(self.federation, self.state, self.engine.client_states, self.rows, summary, training.seed)
        if writer is not None:
            writer.write_models(result.encoder(), result.client_states)
            writer.write_summary(summary)
        return result

    def _checkpoint(self, writer: RunWriter) -> None:
        writer.write_checkpoint(self.state, self.engine.client_states, self.federation.record())

    def _stopped(self, writer: RunWriter | None, reason: str) -> StoppedError:
        if writer is None:
            return StoppedError(reason)
        self._checkpoint(writer)
        return StoppedError(f"{reason}; to go on: {how_to_go_on(writer.folder, self.config)}")


def begin(
    config: RunConfig,
    federation: Members,
    weighting: Weighting,
    make_engine: MakeEngine,
    overwrite: bool,
    on_round: OnRound | None,
    should_stop: ShouldStop,
    profiled: bool = False,
    on_state: OnState | None = None,
) -> Result:
    """Train a federation from the first round on. As `run`, with its parts made.

    ``make_engine`` raises what is wrong with clients and data, before a folder is touched. ``on_state`` is called after every round, before
    ``on_round``, with the server's state.
    """
    folder = None if config.run.dir is None else Path(config.run.dir).expanduser()
    if folder is not None:
        check_free(folder, overwrite=overwrite)
    aggregate = registry.build("aggregation", config.aggregation)
    engine = make_engine(config)
    state = initial_state(federation, weighting, config.train.seed)
    job = _Job(config, federation, engine, weighting, aggregate, state, [], on_state)
    if folder is None:
        return job.go_on(None, on_round, should_stop)
    config = job.config = config.model_copy(update={"versions": versions()})
    create_run(folder, config, overwrite=overwrite)
    with RunWriter(folder, config) as writer, profiler_of(folder, config) if profiled else nullcontext() as profiler:
        result = job.go_on(writer, on_round, should_stop, profiler)
    if config.run.page:
        write_page(folder)
    return result


def profiler_of(folder: Path, config: RunConfig) -> profile:
    """A profiler that writes a trace of two rounds, after one that warms up if there are so many, to ``profile/`` in a run's folder."""
    return profile(
        schedule=schedule(wait=0, warmup=min(1, config.train.num_rounds - 1), active=2, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder / PROFILE), use_gzip=True),
        experimental_config=_ExperimentalConfig(profile_all_threads=True),  # the workers' threads too
    )


def write_page(folder: Path) -> None:
    """Write a run's report.html, where plotly is installed."""
    if find_spec("plotly") is not None:
        write_report([Run(folder)], folder / "report.html")


def _evaluations(engine: Engine, state: ServerState, training: TrainConfig) -> Mapping[str, Evaluation]:
    if state.round in (1, training.num_rounds) or state.round % training.eval_every == 0:
        return engine.evaluate(state.encoder, state.buffers)
    return {}


def _guesses(federation: Members) -> dict[str, dict[str, float]]:
    return {client.id: constant_guess(client.task, client.test_data) for client in federation.clients if client.test_data is not None}


def rows_of(federation: Members, state: ServerState, record: RoundRecord, evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """A round as lines for metrics.jsonl: one a client, in the federation's order. What a client did not do is None."""
    reports = {report.client: report for report in record.reports}
    instructed = {instruction.client for instruction in record.instructions}
    method = method_of(record.instructions[0].training)
    sends = not (method.own_encoder or method.lockstep)
    bytes_down = record.instructions[0].num_bytes if sends else 0  # to each the same
    targets, applied = (record.weights.targets, record.weights.values) if record.weights is not None else ({}, {})
    rows: list[Row] = []
    for client in federation.clients:
        id, report, evaluation = client.id, reports.get(client.id), evaluations.get(client.id)
        main = client.task.main_metric
        rows.append(
            {
                "round": state.round,
                "client": id,
                "task": client.task.name,
                "participated": id in instructed,
                "dropped": record.dropped.get(id),
                "retries": record.retries,
                "loss": report.loss if report else None,
                "initial_loss": report.initial_loss if report else None,
                "inverse_training_rate": report.inverse_training_rate if report else None,
                "grad_norm": report.grad_norm if report else None,
                "weight": applied[id] if id in applied else state.weighting.weights.get(id, 1.0),
                "target": targets.get(id),
                "test_loss": _finite(evaluation.loss) if evaluation else None,
                "metric": _finite(evaluation.metrics[main.name]) if evaluation and main else None,
                "metrics": {name: _finite(value) for name, value in evaluation.metrics.items()} if evaluation else {},
                "examples": report.num_examples if report else federation.num_examples(id),
                "bytes_up": report.num_bytes if report and sends else 0,
                "bytes_down": bytes_down if id in instructed else 0,
                "seconds": report.seconds if report else 0.0,
            }
        )
    return rows


def _finite(value: float) -> float | None:
    """None in place of what JSON has no number for: a diverged model's NaN is a gap in its curve."""
    return value if math.isfinite(value) else None
