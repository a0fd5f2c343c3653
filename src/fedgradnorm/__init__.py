"""Federated multi-task learning: one shared encoder, a different task at every client, weights that keep them in balance.

Everything here follows FedGradNorm (Mortaheb, Vahapoglu, Ulukus, SPAWC 2022); docs/algorithm.md says what is ours.
"""

from fedgradnorm.api import Result, resume, run, train
from fedgradnorm.callbacks.base import Callback
from fedgradnorm.callbacks.early_stopping import EarlyStopping
from fedgradnorm.callbacks.tensorboard import TensorBoard
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
from fedgradnorm.federation import Client, Federation
from fedgradnorm.runs.models import evaluate_run, load_model
from fedgradnorm.task import Metric, Task
from fedgradnorm.training.base import Method
from fedgradnorm.weighting import Equal, FedGradNorm, Weighting, WeightingState, Weights

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ClientError",
    "ConfigError",
    "DataError",
    "Equal",
    "FedGradNorm",
    "FedGradNormError",
    "FedGradNormWarning",
    "Federation",
    "FederationError",
    "Metric",
    "Result",
    "RunError",
    "StoppedError",
    "Task",
    "Weighting",
    "WeightingError",
    "WeightingState",
    "Weights",
    "evaluate_run",
    "load_model",
    "resume",
    "run",
    "train",
]
