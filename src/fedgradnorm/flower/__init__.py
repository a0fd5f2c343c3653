"""FedGradNorm on Flower.

It has a strategy, a mod for users' own ClientApps, and ready apps for a federation that a
configuration describes. It needs the extra: ``pip install "fedgradnorm[flower]"``. No other folder
of the package imports ``flwr``.
"""

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ImportError('Flower is not installed: pip install "fedgradnorm[flower]"') from error

from fedgradnorm.flower.client import client_app
from fedgradnorm.flower.engine import GridEngine
from fedgradnorm.flower.local_engine import FlowerLocalEngine
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
