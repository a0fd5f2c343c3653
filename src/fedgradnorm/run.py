"""The training loop over `run_round`, from Python (`train`) or from a configuration (`run`)."""

import dataclasses
import gc
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile, schedule, tensorboard_trace_handler

from fedgradnorm import client as client_side
from fedgradnorm import registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.build import (
    IN_PYTHON,
    build_federation,
    default_weighting,
    resolve_config,
    resolve_training,
    versions,
)
from fedgradnorm.client import ClientState
from fedgradnorm.config import (
    EngineConfig,
    FederationConfig,
    RunConfig,
    RunSettings,
    TrainConfig,
    WeightingConfig,
    dotted,
    validated,
)
from fedgradnorm.engine import Engine
from fedgradnorm.engine_wrappers import Costs, FaultyEngine, TimedEngine
from fedgradnorm.errors import (
    ConfigError,
    FederationError,
    FedGradNormError,
    RunError,
    StoppedError,
    warn,
)
from fedgradnorm.evaluation import Evaluation, constant_guess
from fedgradnorm.federation import Federation, Members
from fedgradnorm.identity import (
    members_record,
    of_clients,
    of_data,
    of_encoder,
    of_fixed_tensors,
    of_models,
    of_training,
)
from fedgradnorm.messages import no_rate
from fedgradnorm.parameters import load_buffers, load_flat
from fedgradnorm.randomness import seeded
from fedgradnorm.report import write_report
from fedgradnorm.runs.checkpoint import Checkpoint, load_newest, set_aside
from fedgradnorm.runs.folder import (
    CHECKPOINTS,
    PROFILE,
    Run,
    RunWriter,
    alone_in,
    check_free,
    create_run,
    how_to_go_on,
    put_back,
    remove_replaced,
    replaced_by,
    set_rounds_aside,
    write_config,
)
from fedgradnorm.runs.models import check_client_id, federation_of, joined
from fedgradnorm.runs.records import MembersRecord, Row, Summary
from fedgradnorm.runs.summary import check_targets, silent_texts, summarise, task_curve
from fedgradnorm.server import RoundRecord, ServerState, initial_state, run_round
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

RISEN, RISEN_ROUNDS = 1.05, 5
"""A task whose loss is above this share of its initial loss for so many rounds on end is said to rise."""
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
        check_client_id(client)
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
    should_stop: ShouldStop | None = None,
    **training: Any,
) -> Result:
    """Train a federation.

    Args:
        federation: what to train.
        weighting: a weighting, or the name of one with its default options; by default that of the method, `fedgradnorm` but for FedAvg.
        engine: the name of the engine that runs the clients.
        run_dir: a folder to write the run to; None writes nothing.
        overwrite: whether a run that is in this folder already is replaced. It is removed after the first round of the new one; when that
            fails, it is put back.
        on_round: called after every round with its rows.
        should_stop: asked after every round; True ends the run there. None: nothing does.
        **training: the settings of `TrainConfig`, such as ``num_rounds=20``, ``method="fedper"`` or
            ``method={"name": "fedprox", "mu": 0.1}``.

    Raises:
        ConfigError: a setting that is unknown or out of range.
        FederationError: data that do not fit the models.
        RunError: a run folder that exists, is being written to, or cannot be written.
        ClientError: a client's own code raised an error after training had begun.
        WeightingError: a weighting or an aggregation raised an error, or gave what it must not.
        StoppedError: the run ended early.

    Where training had begun, the error has the `Result` of the rounds that were done as its attribute ``result``, and the run's folder
    holds their models, and a checkpoint to go on from. That is so too for what ``on_round`` and ``should_stop`` raise.
    """
    check_call(federation, on_round, should_stop)
    if not isinstance(engine, str):
        raise ConfigError(
            f"engine: expected a name, such as 'vectorized' or 'reference', found {engine!r:.100}"
        )
    settings = resolve_training(validated(TrainConfig, training, prefix="train"))
    method, component = weighting_of(
        weighting if weighting is not None else default_weighting(settings)
    )
    config = RunConfig(
        federation=FederationConfig(name=IN_PYTHON),
        train=settings,
        weighting=component,
        engine=EngineConfig(name=engine),
        run=validated(
            RunSettings, {"dir": run_dir if run_dir is None else _path_text(run_dir)}, prefix="run"
        ),
    )
    make_engine = partial(_engine_here, federation, method)
    return begin(config, federation, method, make_engine, overwrite, on_round, should_stop)


def _path_text(run_dir: object) -> str:
    if not isinstance(run_dir, str | os.PathLike):
        raise ConfigError(f"run_dir: expected a path, found {run_dir!r:.100}")
    return os.fspath(run_dir) if isinstance(os.fspath(run_dir), str) else os.fsdecode(run_dir)


def check_call(federation: object, on_round: object, should_stop: object) -> None:
    """Raise FederationError or ConfigError for arguments of other kinds."""
    if not isinstance(federation, Federation):
        raise FederationError(
            f"federation: expected a Federation, found {type(federation).__name__}"
        )
    check_functions(on_round=on_round, should_stop=should_stop)


def check_functions(**functions: object) -> None:
    """Raise ConfigError for what is neither None nor a function that can be called as the argument of this name is."""
    for name, function in functions.items():
        if function is None:
            continue
        given = {"on_round": ("rows",), "on_message": ("message",)}.get(name, ())
        expected = f"{name}({', '.join(given)})"
        if not callable(function):
            raise ConfigError(f"{name}: expected a function {expected}, found {function!r:.100}")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some built-in functions have none
            continue
        try:
            signature.bind(*given)
        except TypeError as error:
            raise ConfigError(
                f"{name}: expected a function that can be called as {expected}: {error}"
            ) from error


def weighting_of(weighting: str | Weighting) -> tuple[Weighting, WeightingConfig]:
    """A weighting, or that of a name with its default options, and its settings. Raises ConfigError for what is neither."""
    if isinstance(weighting, str):
        settings = registry.resolved("weighting", WeightingConfig(name=weighting))
        return registry.build("weighting", settings), settings
    if isinstance(weighting, type) or not (
        hasattr(weighting, "init") and hasattr(weighting, "update")
    ):
        raise ConfigError(
            f"weighting: expected a name or a weighting such as FedGradNorm(), found {weighting!r}"
        )
    options: dict[str, Any] = (
        dataclasses.asdict(weighting) if dataclasses.is_dataclass(weighting) else {}
    )
    return weighting, WeightingConfig(
        name=registry.name_of("weighting", type(weighting)), **options
    )


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    on_round: OnRound | None = None,
    should_stop: ShouldStop | None = None,
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
    check_functions(on_round=on_round, should_stop=should_stop)
    resolved = resolve_config(config)
    federation = build_federation(resolved)
    weighting = registry.build("weighting", resolved.weighting)
    make_engine = partial(_engine_here, federation, weighting)
    return begin(
        resolved, federation, weighting, make_engine, overwrite, on_round, should_stop, profiled
    )


def resume(
    run: str | Path,
    federation: Federation | None = None,
    *,
    num_rounds: int | None = None,
    on_round: OnRound | None = None,
    should_stop: ShouldStop | None = None,
    on_message: Callable[[str], None] | None = None,
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
        RunError: the folder is no run, is being written to, or cannot be written; or the clients, their tasks, heads or data are not those
            that the run began with.
        ConfigError: the settings in config.toml are not those of the checkpoint, or ``num_rounds`` is not more than is done.
        ClientError: a client's own code raised an error.
        StoppedError: the run was stopped again.
    """
    opened = Run(run)
    check_functions(on_round=on_round, should_stop=should_stop, on_message=on_message)
    rounds = None if num_rounds is None else _rounds(num_rounds)
    _require_clients_here(opened.config)
    federation = federation_of(opened, federation)
    weighting = registry.build("weighting", opened.config.weighting)
    make_engine = partial(_engine_here, federation, weighting)
    return go_on(
        opened,
        federation,
        weighting,
        make_engine,
        rounds,
        on_round,
        should_stop,
        on_message or (lambda _: None),
    )


def _rounds(number: object) -> int:
    """A number of rounds. Raises ConfigError for anything else."""
    try:
        rounds = 0 if isinstance(number, bool) else operator.index(number)  # type: ignore[arg-type]  # NumPy's numbers have one
    except TypeError:
        rounds = 0
    if rounds < 1:
        raise ConfigError(
            f"num_rounds: expected a whole number of at least 1, found {number!r:.100}"
        )
    return rounds


def go_on(
    opened: Run,
    federation: Members,
    weighting: Weighting | None,
    make_engine: MakeEngine,
    num_rounds: int | None,
    on_round: OnRound | None,
    should_stop: ShouldStop | None,
    on_message: Callable[[str], None],
    on_state: OnState | None = None,
    *,
    locked: bool = False,
    back_to: int | None = None,
) -> Result:
    """Like `resume`, but takes parts that are already built. ``make_engine``, ``on_state`` and ``locked`` are as in `begin`.

    If ``weighting`` is None, it is built from the settings. With ``back_to`` it goes on from that round's checkpoint; what there is of
    later rounds is set aside, as `set_rounds_aside` does.
    """
    with (
        nullcontext()
        if locked
        else alone_in(opened.folder, hint=how_to_go_on(opened.folder, opened.config))
    ):
        checkpoint, path, faults = load_newest(opened.folder / CHECKPOINTS, back_to)
        for fault in faults.values():
            on_message(f"warning: {fault}; it is skipped")
        done = 0 if checkpoint is None else checkpoint.server.round
        config = _config_to_resume(opened, checkpoint, done, num_rounds)
        before = opened.members() if checkpoint is None else checkpoint.members
        if before is not None:
            _check_same(opened.folder if path is None else path, before, federation, config)
        engine = make_engine(config)
        weighting = weighting or registry.build("weighting", config.weighting)
        state = initial_state(federation, weighting, config.train.seed)
        if checkpoint is not None:
            state = checkpoint.server
            engine.restore(checkpoint.clients)
        on_message(
            f"going on after round {done} of {config.train.num_rounds}"
            + (f", from {path}" if path else ": no checkpoint is there")
        )
        if back_to is not None and (aside := set_rounds_aside(opened.folder, done)) is not None:
            on_message(
                f"warning: the rounds after round {done} are undone: their lines and checkpoints are in {aside}"
            )
        write_config(opened.folder, config)
        for damaged in faults:
            with suppress(OSError):
                set_aside(damaged)
        with RunWriter(opened.folder, config, done) as writer:
            aggregate = registry.build("aggregation", config.aggregation)
            job = _Job(
                config, federation, engine, weighting, aggregate, state, opened.rows(), on_state
            )
            if checkpoint is not None:
                job.seconds, job.costs = checkpoint.seconds, Costs(checkpoint.costs)
            result = job.go_on(writer, on_round, should_stop)
        if config.run.page:
            write_page(opened.folder)
        return result


def _check_same(path: Path, before: MembersRecord, federation: Members, config: RunConfig) -> None:
    """Raise RunError where clients, tasks, models or data are not those that the run began with."""
    now = members_record(federation, config.train.seed)
    why = of_encoder(before, now) or of_fixed_tensors(before, now)
    why = why or of_training(before, now)
    if config.run.experiment is None:
        why = why or of_clients(before, now) or of_data(before, now) or of_models(before, now)
    if why is not None:
        raise RunError(f"{path}: {why}")


def _config_to_resume(
    opened: Run, checkpoint: Checkpoint | None, done: int, num_rounds: int | None
) -> RunConfig:
    """The settings of a run with ``num_rounds`` raised. Raises ConfigError where they are not those of the checkpoint."""
    config = opened.config.model_copy(
        update={"run": opened.config.run.model_copy(update={"dir": str(opened.folder)})}
    )
    if checkpoint is not None:
        changed = changes(checkpoint.settings, config.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"{opened.folder / 'config.toml'}: a run goes on with the settings that it began with; changed: {changed}"
            )
    wanted = config.train.num_rounds if num_rounds is None else num_rounds
    if wanted < max(done, 1):
        raise ConfigError(
            f"train.num_rounds: expected at least the {done} rounds that are done, found {wanted}"
        )
    return config.model_copy(
        update={"train": config.train.model_copy(update={"num_rounds": wanted})}
    )


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """In words, which settings differ that a run has to go on with: all but those of its folder, and the number of rounds."""
    then, now = (dotted({**settings, "run": {}, "versions": {}}) for settings in (before, after))
    differing = sorted(
        key
        for key in then.keys() | now.keys()
        if then.get(key) != now.get(key) and key != "train.num_rounds"
    )
    return ", ".join(f"{key} = {now.get(key)} (was {then.get(key)})" for key in differing)


def check_settings(config: RunConfig, federation: Members) -> None:
    """Raise ConfigError or FederationError where the settings do not fit the clients."""
    check_targets(config.run, federation)
    for listed in config.train.participants:
        for client in listed:
            federation.client(client)
    if config.train.min_clients > len(federation.clients):
        raise ConfigError(
            f"train.min_clients: expected at most the {len(federation.clients)} clients, found {config.train.min_clients}"
        )
    _check_method(config, federation)


def _check_method(config: RunConfig, federation: Members) -> None:
    """Raise ConfigError where the settings ask for what the method cannot do."""
    method, name = method_of(config.train), config.train.method.name
    if method.own_encoder and federation.buffers == "averaged":
        raise ConfigError(
            f'train.method: {name} exchanges nothing: expected model.buffers = "local", found "averaged"'
        )
    if method.lockstep and (config.train.fraction_train < 1 or config.train.participants):
        raise ConfigError(
            f"train.method: {name} trains on all data at every step: expected no fraction_train below 1 and no participants"
        )
    if method.lockstep and any(config.faults.model_dump().values()):
        raise ConfigError(
            f"train.method: {name} sends no reports that could meet faults: expected no [faults]"
        )


def refuse_lockstep(config: RunConfig) -> None:
    """Raise ConfigError for a method that an engine of messages cannot run: one whose server steps after each of the clients' steps."""
    if method_of(config.train).lockstep:
        raise ConfigError(
            f"train.method: {config.train.method.name} keeps all clients in lockstep, which is for the simulation alone"
        )


def _require_clients_here(config: RunConfig) -> None:
    if config.run.experiment is not None:
        raise ConfigError(
            f"run.experiment: '{config.run.experiment}' is a run whose clients are on other machines: it goes on when its Flower app "
            "is started again"
        )


def _engine_here(federation: Federation, weighting: Weighting, config: RunConfig) -> Engine:
    """An engine for clients in this process, after all that could be wrong with them is raised."""
    _require_clients_here(config)
    check_settings(config, federation)
    federation.check_data(
        config.train.batch_size,
        config.train.eval_batch_size,
        positive_losses=getattr(weighting, "needs_positive_losses", False),
        initial_guess=config.train.initial_loss == "guess",
        seed=config.train.seed,
    )
    engine: Engine = registry.build(
        "engine", config.engine, federation=federation, seed=config.train.seed
    )
    if not engine.lockstep:
        refuse_lockstep(config)
    return with_faults(engine, config)


def with_faults(engine: Engine, config: RunConfig) -> Engine:
    """The engine, with the faults of the settings where there are any."""
    return (
        FaultyEngine(engine, config.faults) if any(config.faults.model_dump().values()) else engine
    )


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
    seconds: float = 0.0
    costs: Costs = dataclasses.field(default_factory=Costs)

    def __post_init__(self) -> None:
        self._start, self._states = perf_counter(), self.engine.client_states
        self._guesses: dict[str, dict[str, float]] = {}
        self._members: MembersRecord | None = None
        self._warned: set[object] = set()
        self._failed: dict[str, Mapping[str, str]] = {}
        self.begun = False

    @_unwatched()
    def go_on(
        self,
        writer: RunWriter | None,
        on_round: OnRound | None,
        should_stop: ShouldStop | None,
        profiler: profile | None = None,
    ) -> Result:
        """Train the rounds that are left, and write what is to be written. Whatever is raised, the rounds that are done are kept."""
        try:
            self._guesses = _guesses(self.federation, self.config.train.eval_batch_size)
            if writer is not None and self.config.run.experiment is None:
                writer.write_members(self._record())
            self._train(writer, on_round, should_stop, profiler)
        except RunError:  # the folder cannot be written: its last checkpoint is what there is
            raise
        except FedGradNormError as error:
            result, hint = self._keep(writer)
            again = type(error)(f"{error}; {hint}" if hint else str(error))
            again.result = result
            raise again from error.__cause__
        except (
            BaseException
        ) as error:  # Ctrl-C, or what a callback raises, which may be what someone waits for
            result, hint = self._keep(writer)
            with suppress(AttributeError):  # it may have no room for it
                error.result = result  # type: ignore[attr-defined]
            error.add_note(f"{self.state.round} rounds are done" + (f"; {hint}" if hint else ""))
            raise
        result = self._result()
        if writer is not None:
            writer.write_models(result.encoder(), result.client_states)
            writer.write_summary(result.summary)
        self._say_who_was_silent(result.summary)
        return result

    def _train(
        self,
        writer: RunWriter | None,
        on_round: OnRound | None,
        should_stop: ShouldStop | None,
        profiler: profile | None,
    ) -> None:
        training, settings = self.config.train, self.config.run
        engine = TimedEngine(self.engine, self.costs)
        while self.state.round < training.num_rounds:
            rows = self._round(engine)
            ended = self.state.round == training.num_rounds
            if writer is not None:
                with self.costs.of("writing"):
                    writer.write_round(rows)
                    if ended or self.state.round % settings.checkpoint_every == 0:
                        self._checkpoint(writer)
            if profiler is not None:
                profiler.step()
            self._say_what_rises(rows)
            if self.on_state is not None:
                self.on_state(self.state)
            if on_round is not None:
                on_round(rows)
            if not self.begun and writer is not None:
                remove_replaced(writer.folder)
            self.begun = True
            if should_stop is not None and should_stop() and not ended:
                raise StoppedError(
                    f"stopped after round {self.state.round} of {training.num_rounds}"
                )

    def _round(self, engine: Engine) -> list[Row]:
        """One round: it counts with its rows and the states of all clients, or not at all."""
        training = self.config.train
        try:
            with self.costs.of("aggregation"):
                state, record = run_round(
                    self.state, self.federation, engine, self.weighting, self.aggregate, training
                )
            evaluations = _evaluations(engine, state, training)
            rows = rows_of(self.federation, state, record, evaluations)
            _add_notes(rows, self.engine)
        except BaseException:
            self.engine.restore(self._states)
            raise
        self.state, self._states = state, self.engine.client_states
        self.rows += rows
        self._say_what_is_missing(evaluations)
        self._say_who_has_no_rate(record)
        return rows

    def _result(self) -> Result:
        summary = summarise(
            self.federation.clients,
            self.rows,
            self._guesses,
            self.config.run,
            self._seconds(),
            self.costs.seconds,
            self._failed,
        )
        return Result(
            self.federation, self.state, self._states, self.rows, summary, self.config.train.seed
        )

    def _seconds(self) -> float:
        """How long the run has taken, over all of its starts."""
        return self.seconds + perf_counter() - self._start

    def _record(self) -> MembersRecord:
        if (
            self._members is None or self.config.run.experiment is not None
        ):  # elsewhere, clients may come later
            self._members = members_record(self.federation, self.config.train.seed)
        return self._members

    def _checkpoint(self, writer: RunWriter) -> None:
        writer.write_checkpoint(
            self.state, self._states, self._record(), self._seconds(), self.costs.seconds
        )

    def _keep(self, writer: RunWriter | None) -> tuple[Result | None, str]:
        """Write what is done to the run's folder. The result, None before the first round, and how to go on.

        Raises:
            RunError: the folder cannot be written.
        """
        result = self._result() if self.rows else None
        if writer is None:
            return result, ""
        if not self.begun and replaced_by(writer.folder).exists():
            return result, f"the run that was in {writer.folder} before is there again"
        self._checkpoint(writer)
        if result is not None:
            writer.write_models(result.encoder(), result.client_states)
        return result, f"to go on: {how_to_go_on(writer.folder, self.config)}"

    def _say_what_is_missing(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Warn of metrics that could not be taken, each once."""
        for id, evaluation in evaluations.items():
            self._failed[id] = evaluation.failed
            for metric, why in evaluation.failed.items():
                if (id, metric) not in self._warned:
                    self._warned.add((id, metric))
                    warn(
                        f"client '{id}': metric '{metric}' is missing from round {self.state.round} on: {why}"
                    )

    def _say_who_has_no_rate(self, record: RoundRecord) -> None:
        """Warn of clients whose losses are not what the weighting needs, each once."""
        if not getattr(self.weighting, "needs_positive_losses", False):
            return
        for report in record.reports:
            if math.isnan(report.inverse_training_rate) and report.client not in self._warned:
                self._warned.add(report.client)
                why = no_rate(report.initial_loss, report.loss, report.loss_floor, report.task)
                warn(
                    f"client '{report.client}': from round {self.state.round} on its weight stays as it is where {why}"
                )

    def _say_what_rises(self, rows: Sequence[Row]) -> None:
        """Warn of tasks whose loss has been above the initial one for some rounds, each once."""
        training = self.config.train
        for task in dict.fromkeys(row["task"] for row in rows):
            last = list(
                task_curve(
                    self.rows[-RISEN_ROUNDS * len(rows) :], task, "inverse_training_rate"
                ).values()
            )
            if len(last) == RISEN_ROUNDS and min(last) > RISEN and task not in self._warned:
                self._warned.add(task)
                warn(
                    f"task '{task}': its loss has been above its initial loss for {RISEN_ROUNDS} rounds, and is {last[-1]:.3g} times that "
                    f"after round {self.state.round}: the step sizes train.encoder_lr = {training.encoder_lr:g} and train.head_lr = "
                    f"{training.head_lr:g} may be too large, or other tasks pull the encoder away from it"
                )

    def _say_who_was_silent(self, summary: Summary) -> None:
        for text in silent_texts(summary):
            warn(text)


def begin(
    config: RunConfig,
    federation: Members,
    weighting: Weighting,
    make_engine: MakeEngine,
    overwrite: bool,
    on_round: OnRound | None,
    should_stop: ShouldStop | None,
    profiled: bool = False,
    on_state: OnState | None = None,
    *,
    locked: bool = False,
) -> Result:
    """Train a federation from the first round on. As `run`, with its parts made.

    ``make_engine`` raises what is wrong with clients and data, before a folder is touched. ``on_state`` is called after every round, before
    ``on_round``, with the server's state. ``locked``: whether the caller has the folder for itself already, by `alone_in`.
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
    with nullcontext() if locked else alone_in(folder):
        create_run(folder, config, overwrite=overwrite)
        try:
            with (
                RunWriter(folder, config) as writer,
                profiler_of(folder, config) if profiled else nullcontext() as profiler,
            ):
                result = job.go_on(writer, on_round, should_stop, profiler)
        except BaseException:
            if not job.begun and replaced_by(folder).exists():
                put_back(folder)
            raise
        if config.run.page:
            write_page(folder)
    return result


def profiler_of(folder: Path, config: RunConfig) -> profile:
    """A profiler that writes a trace of two rounds, after one that warms up if there are so many, to ``profile/`` in a run's folder."""
    return profile(
        schedule=schedule(wait=0, warmup=min(1, config.train.num_rounds - 1), active=2, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder / PROFILE), use_gzip=True),
        experimental_config=_ExperimentalConfig(
            profile_all_threads=True
        ),  # the workers' threads too
    )


def write_page(folder: Path) -> None:
    """Write a run's report.html, where plotly is installed."""
    if find_spec("plotly") is not None:
        write_report([Run(folder)], folder / "report.html")


def _evaluations(
    engine: Engine, state: ServerState, training: TrainConfig
) -> Mapping[str, Evaluation]:
    if state.round in (1, training.num_rounds) or state.round % training.eval_every == 0:
        return engine.evaluate(state.encoder, state.buffers, training.eval_batch_size)
    return {}


def _guesses(federation: Members, batch_size: int) -> dict[str, dict[str, float]]:
    """By client, the metrics of the constant answer; of clients on other machines there are none."""
    if not isinstance(federation, Federation):
        return {}
    guesses = {}
    for client in federation.clients:
        if client.test_data is not None:
            with (
                client_side.naming(client.id, "the constant answer to its test data"),
                seeded(0, 0, client.id, "guess"),
            ):
                guesses[client.id] = constant_guess(
                    client.task, client.test_data, *federation.outputs[client.id], batch_size
                )
    return guesses


def rows_of(
    federation: Members,
    state: ServerState,
    record: RoundRecord,
    evaluations: Mapping[str, Evaluation],
) -> list[Row]:
    """A round as lines for metrics.jsonl: one a client, in the federation's order. What a client did not do is None."""
    reports = {report.client: report for report in record.reports}
    instructed = {instruction.client for instruction in record.instructions}
    method = method_of(record.instructions[0].training)
    sends = not (method.own_encoder or method.lockstep)
    bytes_down = record.instructions[0].num_bytes if sends else 0  # to each the same
    targets, applied = (
        (record.weights.targets, record.weights.values) if record.weights is not None else ({}, {})
    )
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
                "inverse_training_rate": _finite(report.inverse_training_rate) if report else None,
                "grad_norm": report.grad_norm if report else None,
                "weight": applied[id] if id in applied else state.weighting.weights.get(id, 1.0),
                "target": targets.get(id),
                "test_loss": _finite(evaluation.loss) if evaluation else None,
                "metric": _finite(evaluation.metrics[main.name]) if evaluation and main else None,
                "metrics": {name: _finite(value) for name, value in evaluation.metrics.items()}
                if evaluation
                else {},
                "examples": report.num_examples if report else federation.num_examples(id),
                "bytes_up": report.num_bytes if report and sends else 0,
                "bytes_down": bytes_down if id in instructed else 0,
                "seconds": report.seconds if report else 0.0,
            }
        )
        if evaluation and evaluation.failed:
            rows[-1]["missing"] = dict(evaluation.failed)
    return rows


def _add_notes(rows: Sequence[Row], engine: Engine) -> None:
    """Put what the engine has noted of a client since the last round into the client's line."""
    notes = engine.take_notes()
    for row in rows:
        if row["client"] in notes:
            row["notes"] = notes[row["client"]]


def _finite(value: float) -> float | None:
    """None in place of what JSON has no number for: a diverged model's NaN is a gap in its curve."""
    return value if math.isfinite(value) else None
