"""The training loop over `run_round`, from Python (`train`) or from a configuration (`run`)."""

import dataclasses
import math
import platform
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from fedgradnorm import client as client_side
from fedgradnorm import registry
from fedgradnorm.aggregation.mean import mean
from fedgradnorm.client import ClientState, Evaluation, constant_guess
from fedgradnorm.config import EngineConfig, FederationConfig, RunConfig, RunSettings, TrainConfig, WeightingConfig, validated
from fedgradnorm.data import size
from fedgradnorm.engines.base import Engine
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.federation import Federation
from fedgradnorm.history import Row, Run, RunWriter, check_free
from fedgradnorm.parameters import load_buffers, load_flat
from fedgradnorm.server import RoundRecord, ServerState, initial_state, run_round
from fedgradnorm.summary import check_targets, summarise
from fedgradnorm.weighting.base import Weighting

__all__ = ["Result", "build_federation", "evaluate_run", "load_model", "run", "train"]

IN_PYTHON = "given in Python"
DEFAULT_MODEL = "default"

OnRound = Callable[[Sequence[Row]], None]


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

    federation: Federation
    state: ServerState
    client_states: Mapping[str, ClientState]
    rows: Sequence[Row]
    summary: Mapping[str, Any]
    seed: int

    @property
    def weights(self) -> dict[str, float]:
        """The last weights, by client id."""
        return dict(self.state.weighting.weights)

    def encoder(self) -> nn.Module:
        """The shared encoder after the last round."""
        encoder = self.federation.make_encoder(self.seed)
        load_flat(encoder, self.state.encoder)
        load_buffers(encoder, self.state.buffers.items())
        return encoder.eval()

    def model(self, client: str) -> nn.Module:
        """The whole model of a client: the encoder, with its own buffers, and its head."""
        encoder, state = self.encoder(), self.client_states[self.federation.client(client).id]
        head = self.federation.make_head(self.federation.client(client), self.seed)
        client_side.load_model(encoder, head, state, self.state.encoder, self.state.buffers)
        return _joined(encoder, head)


def train(
    federation: Federation,
    weighting: str | Weighting = "fedgradnorm",
    *,
    engine: str = "reference",
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    on_round: OnRound | None = None,
    **training: Any,
) -> Result:
    """Train a federation.

    Args:
        federation: what to train.
        weighting: a weighting, or the name of one with its default options.
        engine: the name of the engine that runs the clients.
        run_dir: a folder to write the run to; None writes nothing.
        overwrite: whether a run that is in this folder already is replaced.
        on_round: called after every round with its rows.
        **training: the settings of `TrainConfig`, such as ``num_rounds=20``.

    Raises:
        ConfigError: a setting that is unknown or out of range.
        FederationError: data that do not fit the models.
        RunError: a run folder that exists or cannot be written.
    """
    if isinstance(weighting, str):
        component = registry.resolved("weighting", WeightingConfig(name=weighting))
        method: Weighting = registry.build("weighting", component)
    else:
        options: dict[str, Any] = dataclasses.asdict(weighting) if dataclasses.is_dataclass(weighting) else {}
        component, method = WeightingConfig(name=registry.name_of("weighting", type(weighting)), **options), weighting
    config = RunConfig(
        federation=FederationConfig(name=IN_PYTHON),
        train=validated(TrainConfig, training, prefix="train"),
        weighting=component,
        engine=EngineConfig(name=engine),
        run=RunSettings(dir=None if run_dir is None else str(run_dir)),
    )
    return _fit(config, federation, method, overwrite, on_round)


def run(config: RunConfig, *, overwrite: bool = False, on_round: OnRound | None = None) -> Result:
    """Do the run that a configuration describes. Everything is checked before a run folder is touched.

    Raises:
        FedGradNormError: whatever is wrong with the settings, the data or the folder.
    """
    resolved = resolve_config(config)
    federation = build_federation(resolved)
    weighting = registry.build("weighting", resolved.weighting)
    return _fit(resolved, federation, weighting, overwrite, on_round)


def resolve_config(config: RunConfig) -> RunConfig:
    """The configuration with the defaults of every part's options filled in."""
    parts = {kind: registry.resolved(kind, getattr(config, kind)) for kind in ("federation", "weighting", "engine")}
    if config.model.name != DEFAULT_MODEL:
        parts["model"] = registry.resolved("model", config.model)
    return config.model_copy(update=parts)


def build_federation(config: RunConfig) -> Federation:
    """The federation that a configuration describes, with the encoder of its table ``[model]``.

    Raises:
        ConfigError: a setting that is unknown or out of range.
        FederationError: parts that do not fit together.
        RunError: a run whose federation was given in Python.
    """
    if config.federation.name == IN_PYTHON:
        raise RunError("this run's federation was given in Python: pass it as federation=...")
    federation: Federation = registry.build("federation", config.federation, seed=config.train.seed)
    model = config.model
    if model.name == DEFAULT_MODEL and model.options:
        raise ConfigError(f"model.{next(iter(model.options))}: the default model has no options; name one, such as model.name=mlp")
    changes: dict[str, Any] = {}
    if model.name != DEFAULT_MODEL:
        changes["encoder"] = partial(registry.build, "model", model, input_shape=federation.input_shape)
    if model.norm_layer is not None:
        changes["norm_layer"] = model.norm_layer
    if model.buffers is not None:
        changes["buffers"] = model.buffers
    return dataclasses.replace(federation, **changes)


def load_model(run: str | Path, client: str, federation: Federation | None = None) -> nn.Module:
    """The whole model of a client from a run's folder: the encoder, with the client's own buffers, and its head.

    Args:
        run: the run's folder.
        client: the client's id.
        federation: what was trained; needed only where it was given in Python.

    Returns:
        An ``nn.Module`` in evaluation mode, with the children ``encoder`` and ``head``.

    Raises:
        RunError: the folder is no finished run, or its models do not fit the federation.
        FederationError: there is no such client.
    """
    opened = Run(Path(run))
    federation = federation or build_federation(opened.config)
    member = federation.client(client)
    seed = opened.config.train.seed
    encoder, head = federation.make_encoder(seed), federation.make_head(member, seed)
    saved = opened.tensors(f"heads/{client}.safetensors")
    try:
        encoder.load_state_dict(opened.tensors("encoder.safetensors"))
        head.load_state_dict(_with_prefix(saved, "head."))
        load_buffers(encoder, _with_prefix(saved, "buffer.").items())
    except (RuntimeError, KeyError) as error:
        raise RunError(f"{opened.folder}: the saved models do not fit the federation: {error}") from error
    return _joined(encoder, head)


def evaluate_run(run: str | Path, federation: Federation | None = None) -> dict[str, Evaluation]:
    """Test the saved models of a run on their clients' test data, by client id."""
    federation = federation or build_federation(Run(Path(run)).config)
    evaluations = {}
    for client in federation.clients:
        if client.test_data is not None:
            model = load_model(run, client.id, federation)
            evaluations[client.id] = client_side.evaluate(client.task, model.encoder, model.head, client.test_data)  # type: ignore[arg-type]
    return evaluations


def _fit(config: RunConfig, federation: Federation, weighting: Weighting, overwrite: bool, on_round: OnRound | None) -> Result:
    """The training loop."""
    start, training = perf_counter(), config.train
    folder = None if config.run.dir is None else Path(config.run.dir)
    if folder is not None:
        check_free(folder, overwrite=overwrite)
    check_targets(config.run, federation)
    for listed in training.participants:
        for id in listed:
            federation.client(id)
    federation.check_data()
    engine: Engine = registry.build("engine", config.engine, federation=federation, seed=training.seed)
    state = initial_state(federation, weighting, training.seed)
    rows: list[Row] = []
    config = config.model_copy(update={"versions": versions()})
    with nullcontext() if folder is None else RunWriter(folder, config, overwrite=overwrite) as writer:
        while state.round < training.num_rounds:
            state, record = run_round(state, federation, engine, weighting, mean, training)
            new_rows = rows_of(federation, state, record, _evaluations(engine, state, training))
            rows += new_rows
            if writer is not None:
                writer.write_round(new_rows)
            if on_round is not None:
                on_round(new_rows)
        summary = summarise(federation, rows, _guesses(federation), config.run, perf_counter() - start)
        result = Result(federation, state, dict(engine.client_states), rows, summary, training.seed)
        if writer is not None:
            writer.write_models(result.encoder().state_dict(), result.client_states)
            writer.write_summary(summary)
    return result


def versions() -> dict[str, str]:
    """The versions that a run's figures depend on."""
    packages = ("fedgradnorm", "numpy", "scikit-learn", "scipy", "torch")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _evaluations(engine: Engine, state: ServerState, training: TrainConfig) -> Mapping[str, Evaluation]:
    if state.round in (1, training.num_rounds) or state.round % training.eval_every == 0:
        return engine.evaluate(state.encoder, state.buffers)
    return {}


def _guesses(federation: Federation) -> dict[str, dict[str, float]]:
    return {client.id: constant_guess(client.task, client.test_data) for client in federation.clients if client.test_data is not None}


def rows_of(federation: Federation, state: ServerState, record: RoundRecord, evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """A round as lines for metrics.jsonl: one a client, in the federation's order. What a client did not do is None."""
    reports = {report.client: report for report in record.reports}
    instructions = {instruction.client: instruction for instruction in record.instructions}
    targets = record.weights.targets if record.weights is not None else {}
    rows = []
    for client in federation.clients:
        report, instruction, evaluation = reports.get(client.id), instructions.get(client.id), evaluations.get(client.id)
        main = client.task.main_metric
        rows.append(
            {
                "round": state.round,
                "client": client.id,
                "task": client.task.name,
                "participated": instruction is not None,
                "dropped": record.dropped.get(client.id),
                "loss": report and report.loss,
                "initial_loss": report and report.initial_loss,
                "inverse_training_rate": report and report.inverse_training_rate,
                "grad_norm": report and report.grad_norm,
                "weight": state.weighting.weights[client.id],
                "target": targets.get(client.id),
                "test_loss": _finite(evaluation.loss) if evaluation else None,
                "metric": _finite(evaluation.metrics[main.name]) if evaluation and main else None,
                "metrics": {name: _finite(value) for name, value in evaluation.metrics.items()} if evaluation else {},
                "examples": size(client.train_data),
                "bytes_up": report.num_bytes if report else 0,
                "bytes_down": instruction.num_bytes if instruction else 0,
                "seconds": report.seconds if report else 0.0,
            }
        )
    return rows


def _finite(value: float) -> float | None:
    """None in place of what JSON has no number for: a diverged model's NaN is a gap in its curve."""
    return value if math.isfinite(value) else None


def _joined(encoder: nn.Module, head: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(encoder=encoder, head=head)).eval()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
