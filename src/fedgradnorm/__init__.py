"""Federated multi-task learning with a shared encoder, one task per client, and adaptive weights.

The method is FedGradNorm (Mortaheb, Vahapoglu, Ulukus, SPAWC 2022). docs/algorithm.md states where
this package differs from the paper.

``import fedgradnorm`` does not load torch. A name's module is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fedgradnorm.errors import (
    ClientError,
    ConfigError,
    DataError,
    FederationError,
    FedGradNormError,
    FedGradNormWarning,
    RunError,
    StoppedError,
    WeightingError,
)

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` does this
    from fedgradnorm.aggregation.base import Aggregation
    from fedgradnorm.api import resume, run, train
    from fedgradnorm.callbacks.base import Callback
    from fedgradnorm.callbacks.early_stopping import EarlyStopping
    from fedgradnorm.callbacks.progress_bar import ProgressBar
    from fedgradnorm.callbacks.tensorboard import TensorBoard
    from fedgradnorm.engine import Engine
    from fedgradnorm.export import export_model
    from fedgradnorm.federation import Client, Federation
    from fedgradnorm.result import Result
    from fedgradnorm.runs.models import evaluate_run, load_model
    from fedgradnorm.session import Session
    from fedgradnorm.task import Metric, Task
    from fedgradnorm.training.base import Method
    from fedgradnorm.weighting.base import Weighting, WeightingState, Weights
    from fedgradnorm.weighting.equal import Equal
    from fedgradnorm.weighting.fedgradnorm import FedGradNorm

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "Callback",
    "Client",
    "ClientError",
    "ConfigError",
    "DataError",
    "EarlyStopping",
    "Engine",
    "Equal",
    "FedGradNorm",
    "FedGradNormError",
    "FedGradNormWarning",
    "Federation",
    "FederationError",
    "Method",
    "Metric",
    "ProgressBar",
    "Result",
    "RunError",
    "Session",
    "StoppedError",
    "Task",
    "TensorBoard",
    "Weighting",
    "WeightingError",
    "WeightingState",
    "Weights",
    "evaluate_run",
    "export_model",
    "load_model",
    "resume",
    "run",
    "train",
]

_MODULES = {
    "Aggregation": "aggregation.base",
    "Callback": "callbacks.base",
    "Client": "federation",
    "EarlyStopping": "callbacks.early_stopping",
    "Engine": "engine",
    "Equal": "weighting.equal",
    "FedGradNorm": "weighting.fedgradnorm",
    "Federation": "federation",
    "Method": "training.base",
    "Metric": "task",
    "ProgressBar": "callbacks.progress_bar",
    "Result": "result",
    "Session": "session",
    "Task": "task",
    "TensorBoard": "callbacks.tensorboard",
    "Weighting": "weighting.base",
    "WeightingState": "weighting.base",
    "Weights": "weighting.base",
    "evaluate_run": "runs.models",
    "export_model": "export",
    "load_model": "runs.models",
    "resume": "api",
    "run": "api",
    "train": "api",
}
"""The module of each name that is imported on first use (PEP 562)."""

if not TYPE_CHECKING:  # a type checker that saw `__getattr__` would accept any name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
