"""Weightings: how the server weights the clients. One method per file."""

from fedgradnorm.weighting.afl import AFL
from fedgradnorm.weighting.base import Weighting, WeightingState, Weights
from fedgradnorm.weighting.cagrad import CAGrad
from fedgradnorm.weighting.dwa import DWA
from fedgradnorm.weighting.equal import Equal
from fedgradnorm.weighting.examples import Examples
from fedgradnorm.weighting.fedgradnorm import FedGradNorm
from fedgradnorm.weighting.fedhca2 import FedHCA2
from fedgradnorm.weighting.fedmgda_plus import FedMGDAPlus
from fedgradnorm.weighting.fixed import Fixed
from fedgradnorm.weighting.gls import GLS
from fedgradnorm.weighting.imtl_g import IMTLG
from fedgradnorm.weighting.mgda import MGDA
from fedgradnorm.weighting.nash_mtl import NashMTL
from fedgradnorm.weighting.pcgrad import PCGrad
from fedgradnorm.weighting.qffl import QFFL
from fedgradnorm.weighting.rlw import RLW
from fedgradnorm.weighting.uncertainty import Uncertainty

__all__ = [
    "AFL",
    "DWA",
    "GLS",
    "IMTLG",
    "MGDA",
    "QFFL",
    "RLW",
    "CAGrad",
    "Equal",
    "Examples",
    "FedGradNorm",
    "FedHCA2",
    "FedMGDAPlus",
    "Fixed",
    "NashMTL",
    "PCGrad",
    "Uncertainty",
    "Weighting",
    "WeightingState",
    "Weights",
]
