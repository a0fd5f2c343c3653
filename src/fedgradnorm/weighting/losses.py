"""The losses that a weighting compares: as reported, or as a share of the initial ones."""

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedgradnorm.weighting.base import Reports

if TYPE_CHECKING:
    from fedgradnorm.messages import Report

LossKind = Literal["absolute", "relative"]

LEAST_SHARE = 1e-6
"""The minimum of a loss that a method divides by, as a share of the initial loss."""


def losses_of(
    reports: Reports, loss: LossKind = "absolute", *, positive: bool = False
) -> np.ndarray:
    """The losses above the tasks' floors: F_i, or F̃_i = F_i / F_i(0), shape ``(n,)``.

    Args:
        reports: the n reports.
        loss: ``"absolute"`` for F_i, ``"relative"`` for F̃_i.
        positive: whether losses are raised to at least 10⁻⁶ F_i(0). All reports then need a
            training rate (`has_a_rate`).
    """
    least = LEAST_SHARE if positive else 0.0
    if loss == "relative":
        return np.array([max(report.inverse_training_rate, least) for report in reports])
    losses = np.array([report.loss - report.loss_floor for report in reports])
    if not positive:
        return losses
    lower = [least * (report.initial_loss - report.loss_floor) for report in reports]
    raised: np.ndarray = np.maximum(losses, lower)
    return raised


def has_a_rate(report: "Report") -> bool:
    """Whether a report has a training rate: F(0) above the task's floor, F(k) not below it."""
    return not math.isnan(report.inverse_training_rate)
