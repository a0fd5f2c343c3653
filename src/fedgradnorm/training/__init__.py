"""How a client trains in a round. One method per file."""

from fedgradnorm.training.base import Joint, Method, method_of
from fedgradnorm.training.centralized import Centralized
from fedgradnorm.training.fedavg import FedAvg
from fedgradnorm.training.fedper import FedPer
from fedgradnorm.training.fedprox import FedProx
from fedgradnorm.training.fedrep import FedRep
from fedgradnorm.training.local import Local
from fedgradnorm.training.round import LocalRound, encoder_steps, head_steps

__all__ = [
    "Centralized",
    "FedAvg",
    "FedPer",
    "FedProx",
    "FedRep",
    "Joint",
    "Local",
    "LocalRound",
    "Method",
    "encoder_steps",
    "head_steps",
    "method_of",
]
