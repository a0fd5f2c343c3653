"""Aggregations: how weighted gradients become one direction. One method a file."""

from fedgradnorm.aggregation.mean import mean

__all__ = ["mean"]
