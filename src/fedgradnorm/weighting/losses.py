"""What the weightings share that compare losses: as reported, or as a share of the initial ones."""

import math
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState, Weights

if TYPE_CHECKING:
    from fedgradnorm.messages import Report

LossKind = Literal["absolute", "relative"]

LEAST_SHARE = 1e-6
"""The minimum of a loss that a method divides by, as a share of the initial loss."""


class FromLosses(Weighting):
    """The base of weightings that follow from the losses, measured from the tasks' floors.

    A client without a training rate keeps its weight: one whose F_i(0) is not above the floor, or
    whose F_i is below it.
    """

    reads_gradients: ClassVar[bool] = False

    @property
    def needs_positive_losses(self) -> bool:
        """Whether training rates are needed; by default True."""
        return True

    @abstractmethod
    def weigh(self, state: WeightingState, reports: Reports) -> Update:
        """Like `update`, for reports that all have a training rate; at least one."""

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """Weights by the losses of this round."""
        weighed = [report for report in reports if has_a_rate(report)]
        if len(weighed) == len(reports):
            return self.weigh(state, reports)
        old = {report.client: state.weights.get(report.client, 1.0) for report in reports}
        if not weighed:
            return Weights(old), replace(state, weights={**state.weights, **old})
        weights, after = self.weigh(state, weighed)
        new = {report.client: after.weights[report.client] for report in weighed}
        return (
            replace(weights, values={**old, **weights.values}),
            replace(after, weights={**state.weights, **old, **new}),
        )


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
