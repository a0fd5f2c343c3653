"""Aggregations: how weighted gradients become one direction. One method per file."""

from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.aggregation.clipped_mean import ClippedMean
from fedgradnorm.aggregation.mean import Mean
from fedgradnorm.aggregation.median import Median
from fedgradnorm.aggregation.trimmed_mean import TrimmedMean

__all__ = ["Aggregation", "ClippedMean", "Mean", "Median", "TrimmedMean"]
