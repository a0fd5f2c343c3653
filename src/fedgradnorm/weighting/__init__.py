"""Weightings: how the server weights the clients. One method a file."""

from fedgradnorm.weighting.base import Weighting, WeightingState, Weights
from fedgradnorm.weighting.equal import Equal
from fedgradnorm.weighting.fedgradnorm import FedGradNorm

__all__ = ["Equal", "FedGradNorm", "Weighting", "WeightingState", "Weights"]
