"""FedGradNorm on Flower: a strategy, a mod for users' own ClientApps, and ready apps for a federation from a configuration.

Needs the extra: ``pip install "fedgradnorm[flower]"``. No other folder of the package imports ``flwr``.
"""

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ImportError('Flower is not installed: pip install "fedgradnorm[flower]"') from error

from fedgradnorm.flower.client import client_app
from fedgradnorm.flower.engine import FlowerLocalEngine, GridEngine
from fedgradnorm.flower.local_grid import LocalGrid
from fedgradnorm.flower.mod import FedGradNormMod
from fedgradnorm.flower.server import server_app
from fedgradnorm.flower.strategy import FedGradNorm

__all__ = [
    "FedGradNorm",
    "FedGradNormMod",
    "FlowerLocalEngine",
    "GridEngine",
    "LocalGrid",
    "client_app",
    "server_app",
]
