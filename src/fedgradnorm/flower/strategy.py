"""FedGradNorm as a Flower strategy, with the simulation's functions, checkpoints and run folder."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedgradnorm import registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.api import weighting_of
from fedgradnorm.build import IN_PYTHON
from fedgradnorm.callbacks.base import Callback
from fedgradnorm.config import (
    AggregationConfig,
    EngineConfig,
    FederationConfig,
    RunConfig,
    RunSettings,
    TrainConfig,
)
from fedgradnorm.errors import ConfigError, StoppedError, require
from fedgradnorm.flower.engine import GridEngine
from fedgradnorm.flower.layout import Layout, arrays_of, tensors_of
from fedgradnorm.flower.limits import Limits
from fedgradnorm.flower.roster import Roster, module_of
from fedgradnorm.flower.training import new_experiment, train_on_grid
from fedgradnorm.messages import Instruction
from fedgradnorm.parameters import matches
from fedgradnorm.runs.rows import rows_of
from fedgradnorm.screening import screen
from fedgradnorm.server import ServerState, conclude, instruct
from fedgradnorm.session import Session
from fedgradnorm.validation import validated
from fedgradnorm.weighting.base import Weighting

log = logging.getLogger(__name__)

TRAINED = ("loss", "inverse_training_rate", "grad_norm")
TESTED = ("test_loss", "metric")
STATISTICS = ("*running_mean", "*running_var")
"""The names of BatchNorm's buffers: among arrays only the name tells them from parameters."""


class FedGradNorm(Strategy):
    """FedGradNorm for a Flower ServerApp, with clients that use `FedGradNormMod`.

    It re-weights, screens, aggregates, records and writes checkpoints by the functions of the
    simulation. It takes the place of ``FedAvg`` in a ServerApp::

        strategy = FedGradNorm(head="fc3", min_nodes=3, run_dir="runs/hospitals")
        result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=20)

    A client's update is the difference between the encoder that it was sent and the encoder that it
    sent back. The server's step is ω ← ω - server_lr · Σ p_i g_i / Σ p_i with these differences as
    g_i.

    Args:
        head: the initial arrays that belong to the clients and are in no message: names, layers or
            patterns such as ``"fc3"``. Arrays without floating-point numbers, and BatchNorm's
            statistics, are in no message either.
        weighting: a weighting, or the name of one with its default options.
        aggregation: the name of an aggregation.
        run_dir: the run's folder, with a checkpoint for every round; None writes nothing.
        server_lr: the server's step size.
        fraction_train: the share of the clients that takes part in a round, drawn for each round.
        min_nodes: clients that have to be connected before a round.
        min_clients: a round with fewer sound reports is undone and repeated, up to three times.
        max_update_ratio: an update longer than this number times the usual length is dropped. The
            usual length is the median of the client's last ten updates; until it has three, the
            median of all clients. None: no update is dropped for its length.
        node_timeout: seconds to wait for ``min_nodes`` before the run stops.
        round_timeout: seconds to wait for the replies of a round; a client that has not answered by
            then counts as dropped.
        min_replies: a share of the clients. When this share has answered, the others get the same
            time again.
        max_rest: maximum number of rounds for which a client that is late again and again rests; 0:
            no client ever rests.
        evaluate_every: the clients test after the first and the last round, and after every round
            whose number is a multiple of this.
        seed: for the draws of clients.

    Raises:
        ConfigError: a name is unknown, or a number is out of range.
    """

    def __init__(
        self,
        head: str | Sequence[str] = (),
        weighting: str | Weighting = "fedgradnorm",
        aggregation: str = "mean",
        *,
        run_dir: str | Path | None = None,
        server_lr: float = 1.0,
        fraction_train: float = 1.0,
        min_nodes: int = 2,
        min_clients: int = 1,
        max_update_ratio: float | None = 10.0,
        node_timeout: float = 600.0,
        round_timeout: float = 3600.0,
        min_replies: float = 1.0,
        max_rest: int = Limits.max_rest,
        evaluate_every: int = 1,
        seed: int = 0,
    ) -> None:
        self.head = (head,) if isinstance(head, str) else tuple(head)
        self.weighting, self._weighting = weighting_of(weighting)
        self._aggregation = registry.resolved("aggregation", AggregationConfig(name=aggregation))
        self.aggregation: Aggregation = registry.build("aggregation", self._aggregation)
        self.limits = Limits(
            min_nodes=min_nodes,
            node_timeout=node_timeout,
            round_timeout=round_timeout,
            min_replies=min_replies,
            max_rest=max_rest,
        )
        self.run_dir = None if run_dir is None else str(run_dir)
        self._training: dict[str, Any] = {
            "encoder_steps": 1,
            "encoder_lr": 1.0,  # what clients report are whole updates
            "server_lr": server_lr,
            "fraction_train": fraction_train,
            "min_clients": min_clients,
            "max_update_ratio": max_update_ratio,
            "eval_every": evaluate_every,
            "seed": seed,
        }
        self._settings(1)
        self._engine: GridEngine | None = None
        self._state: ServerState | None = None
        self._instructions: Sequence[Instruction] = ()

    def summary(self) -> None:
        """Log the settings."""
        log.info("weighting %s, aggregation %s, %s", self.weighting, self.aggregation, self.limits)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        start_round: int | None = None,
        should_stop: Callable[[Result], bool] = lambda _: False,
    ) -> Result:
        """Train.

        Args:
            grid: Flower's.
            initial_arrays: the model, with or without a head.
            num_rounds: rounds in all, including those of a run that is resumed.
            timeout: seconds to wait for the replies of a round; None: ``round_timeout``.
            train_config: is sent with messages for training, with ``server-round`` added.
            evaluate_config: is sent with messages for evaluation.
            evaluate_fn: ``(round, encoder arrays) -> metrics``, called after every round.
            start_round: 1 begins, and replaces a run in ``run_dir``. One more than the round of a
                checkpoint resumes from it, and moves all that is of later rounds to ``undone/`` in
                ``run_dir``. None resumes from the newest checkpoint, and begins where there is
                none.
            should_stop: asked after every round with the result so far; True ends the training.

        Returns:
            The encoder, and the metrics of the rounds since this start.

        Raises:
            ConfigError: the arrays hold no encoder, or ``start_round`` does not fit.
            StoppedError: too few clients, or too few sound reports. The run can be resumed from its
                checkpoint.
        """
        self.summary()
        engine = self._engine_for(grid, initial_arrays, timeout)
        configs = {"train": train_config, "evaluate": evaluate_config}
        engine.config = {kind: config or ConfigRecord() for kind, config in configs.items()}
        result = Result(arrays=arrays_of(self._shared(initial_arrays)))
        fit = _Fit(engine, result, evaluate_fn, should_stop)
        try:
            settings, weighting = self._settings(num_rounds), self.weighting
            done = train_on_grid(settings, engine, weighting, start_round, [fit])
            result.arrays = engine.layout.arrays(done.state.encoder)  # also without a round to do
        except StoppedError:
            if not fit.stopped:
                raise
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round, for a loop other than `start`.

        Such a loop has no run folder, no checkpoints and no repeated rounds.
        """
        if self._engine is None or self._engine.grid is not grid or server_round == 1:
            self._engine, self._state = self._engine_for(grid, arrays), None
            self._engine.experiment = new_experiment()
        engine = self._engine
        engine.config = {**engine.config, "train": config}
        engine.wait()
        encoder = engine.layout.vector(arrays_of(self._shared(arrays)))
        if self._state is None:
            self._state = ServerState(0, encoder, {}, self.weighting.init(engine.clients))
        self._state = replace(self._state, round=server_round - 1, encoder=encoder)
        training = self._settings(server_round).train
        self._instructions = instruct(self._state, engine.roster, training)
        return list(engine.messages_for(self._instructions).values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next encoder, and the means of the clients' figures.

        Where too few reports are sound, it is None, None, and the round is undone.
        """
        engine, state = self._begun()
        training, before = self._settings(server_round).train, engine.client_states
        came = sorted(engine.reports(replies), key=attrgetter("client"))
        reports, dropped = screen(came, self._instructions, state.norms, training.max_update_ratio)
        if len(reports) < max(1, training.min_clients):
            engine.restore(before)
            return None, None
        undone = {client: before[client] for client in dropped if client in before}
        engine.restore({**engine.client_states, **undone})
        self._state, record = conclude(
            state, self._instructions, reports, dropped, self.weighting, self.aggregation, training
        )
        rows = rows_of(engine.roster, self._state, record, {})
        return engine.layout.arrays(self._state.encoder), _means(rows, TRAINED)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages for testing."""
        engine, _ = self._begun()
        engine.config = {**engine.config, "evaluate": config}
        encoder = engine.layout.vector(arrays_of(self._shared(arrays)))
        return list(engine.tests_for(encoder, {}).values())

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The mean of the clients' test losses."""
        engine, _ = self._begun()
        losses = [evaluation.loss for evaluation in engine.evaluations(replies).values()]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return MetricRecord({"test_loss": fmean(finite)}) if finite else None

    def _begun(self) -> tuple[GridEngine, ServerState]:
        if self._engine is None or self._state is None:
            raise ConfigError("strategy: expected configure_train to be called before")
        return self._engine, self._state

    def _shared(self, arrays: ArrayRecord) -> dict[str, Tensor]:
        tensors, own = tensors_of(arrays), (*self.head, *STATISTICS)
        shared = {
            name: value
            for name, value in tensors.items()
            if value.is_floating_point() and not matches(name, own)
        }
        expected = f"patterns that leave an encoder of the arrays {sorted(tensors)[:20]}"
        require(bool(shared), "head", expected, self.head)
        types = sorted({str(value.dtype) for value in shared.values()})
        require(len(types) == 1, "initial_arrays", "an encoder of one type of numbers", types)
        return shared

    def _engine_for(
        self, grid: Grid, arrays: ArrayRecord, timeout: float | None = None
    ) -> GridEngine:
        shared = self._shared(arrays)
        limits = self.limits if timeout is None else replace(self.limits, round_timeout=timeout)
        roster = Roster(lambda: module_of(shared))
        return GridEngine(grid, roster, Layout.of(module_of(shared)), limits, federated=False)

    def _settings(self, num_rounds: int) -> RunConfig:
        training = {"num_rounds": num_rounds, **self._training}
        return RunConfig(
            federation=FederationConfig(name=IN_PYTHON),
            train=validated(TrainConfig, training, prefix="strategy"),
            weighting=self._weighting,
            aggregation=self._aggregation,
            engine=EngineConfig(name="flower"),
            run=RunSettings(dir=self.run_dir),
        )


@dataclass(eq=False)
class _Fit(Callback):
    """Fills the result of `FedGradNorm.start` after every round, by the functions given to it."""

    engine: GridEngine
    result: Result
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None
    should_stop: Callable[[Result], bool]
    stopped: bool = False

    def on_round(self, session: Session) -> None:
        """Note the encoder, the clients' means and the server's own test."""
        round, result = session.round, self.result
        result.arrays = self.engine.layout.arrays(session.state.encoder)
        tested = None if self.evaluate_fn is None else self.evaluate_fn(round, result.arrays)
        if tested is not None:
            result.evaluate_metrics_serverapp[round] = tested
        if means := _means(session.rows, TRAINED):
            result.train_metrics_clientapp[round] = means
        if means := _means(session.rows, TESTED):
            result.evaluate_metrics_clientapp[round] = means
        self.stopped = self.should_stop(result)
        if self.stopped:
            session.interrupt()


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> MetricRecord:
    """The mean of each figure over the clients that have it."""
    figures = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return MetricRecord({name: fmean(values) for name, values in figures.items() if values})
