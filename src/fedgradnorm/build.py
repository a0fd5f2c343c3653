"""From settings to what they describe."""

import dataclasses
import platform
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fedgradnorm import registry
from fedgradnorm.config import Component, RunConfig, TrainConfig, WeightingConfig
from fedgradnorm.errors import ConfigError, RunError

if TYPE_CHECKING:  # so that settings are checked without torch
    from fedgradnorm.federation import Federation
    from fedgradnorm.training.base import Method

IN_PYTHON = "given in Python"
DEFAULT_MODEL = "default"


def resolve_config(config: RunConfig) -> RunConfig:
    """The configuration with the defaults of every part's options filled in.

    If it names no weighting, the method's own one is filled in too. All names are checked before a
    part is imported, and the parts that need torch come last, so that errors come early.

    Raises:
        ConfigError: an unknown name or option, or a value of the wrong type.
    """
    kinds = ("weighting", "aggregation", "federation", "engine", "model")
    parts: dict[str, Component] = {kind: getattr(config, kind) for kind in kinds}
    if config.model.name == DEFAULT_MODEL:
        del parts["model"]
    for kind, part in {"method": config.train.method, **parts}.items():
        registry.check_name(kind, part.name)
    training = resolve_training(config.train)
    if "name" not in config.weighting.model_fields_set:
        options = config.weighting.options
        parts["weighting"] = WeightingConfig(name=default_weighting(training), **options)
    resolved = {kind: registry.resolved(kind, part) for kind, part in parts.items()}
    return config.model_copy(update={**resolved, "train": training})


def default_weighting(training: TrainConfig) -> str:
    """The name of the weighting that belongs to the method in the settings, or of the default one.

    >>> default_weighting(TrainConfig(method="fedavg")), default_weighting(TrainConfig())
    ('examples', 'fedgradnorm')
    """
    method: type[Method] = registry.resolve("method", training.method.name)
    return method.weighting or WeightingConfig().name


def resolve_training(training: TrainConfig) -> TrainConfig:
    """The settings with the defaults of the method's options filled in."""
    return training.model_copy(update={"method": registry.resolved("method", training.method)})


def build_federation(config: RunConfig) -> "Federation":
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
        hint = "the default model has no options; name one, such as model.name=mlp"
        raise ConfigError(f"model.{next(iter(model.options))}: {hint}")
    changes: dict[str, Any] = {}
    if model.name != DEFAULT_MODEL:
        shape = federation.input_shape
        changes["encoder"] = partial(registry.build, "model", model, input_shape=shape)
    if model.norm_layer is not None:
        changes["norm_layer"] = model.norm_layer
    if model.buffers is not None:
        changes["buffers"] = model.buffers
    # replacing checks all heads again
    return dataclasses.replace(federation, **changes) if changes else federation


def versions() -> dict[str, str]:
    """The versions that a run's figures depend on."""
    packages = ("fedgradnorm", "numpy", "scikit-learn", "scipy", "torch")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
