"""Engines: how the clients are run. One engine a file."""

from fedgradnorm.engines.base import Engine
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.engines.vectorized import VectorizedEngine

__all__ = ["Engine", "ReferenceEngine", "VectorizedEngine"]
