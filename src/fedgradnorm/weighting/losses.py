"""The losses that a weighting compares: as reported, or as a share of the initial ones."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedgradnorm.errors import require
from fedgradnorm.messages import Report

__all__ = ["LossKind", "check_loss", "has_a_rate", "losses_of"]

LossKind = Literal["absolute", "relative"]

LEAST_SHARE = 1e-6
"""A loss below this share of the initial one counts as that share, where one divides by it."""


def check_loss(loss: str) -> None:
    """Raise a ConfigError unless it is one of the two."""
    require(loss in ("absolute", "relative"), "loss", "'absolute' or 'relative'", loss)


def losses_of(
    reports: Sequence[Report], loss: LossKind = "absolute", *, positive: bool = False
) -> np.ndarray:
    """F_i for ``"absolute"``, F̃_i = F_i / F_i(0) for ``"relative"``, shape ``(n,)``, both from the task's floor on.

    ``positive`` raises both to 10⁻⁶ F_i(0), and asks for reports that have a training rate (`has_a_rate`).
    """
    least = LEAST_SHARE if positive else 0.0
    if loss == "relative":
        return np.array([max(report.inverse_training_rate, least) for report in reports])
    if positive:
        return np.array(
            [
                max(
                    report.loss - report.loss_floor,
                    least * (report.initial_loss - report.loss_floor),
                )
                for report in reports
            ]
        )
    return np.array([report.loss - report.loss_floor for report in reports])


def has_a_rate(report: Report) -> bool:
    """Whether both losses of a report lie where a training rate can be taken: F(0) above the task's floor, F(k) not below it."""
    return not math.isnan(report.inverse_training_rate)
