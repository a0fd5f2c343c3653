"""Warnings that a run gives while it goes on: each is given once."""

import math
from collections.abc import Mapping

from fedgradnorm.config import TrainConfig
from fedgradnorm.errors import warn
from fedgradnorm.evaluation import Evaluation
from fedgradnorm.messages import no_rate
from fedgradnorm.runs.records import Summary
from fedgradnorm.runs.summary import silent_texts, task_curve
from fedgradnorm.server import RoundRecord
from fedgradnorm.session import Session
from fedgradnorm.weighting.base import Weighting

RISEN, RISEN_ROUNDS = 1.05, 5
"""A task's loss has risen when it is above this share of the initial loss for this many rounds."""


class Notices:
    """Warns of metrics that are missing, clients without a training rate, and rising losses."""

    def __init__(self, weighting: Weighting, training: TrainConfig) -> None:
        self.weighting, self.training = weighting, training
        self._given: set[object] = set()

    def of_round(
        self, session: Session, record: RoundRecord, evaluations: Mapping[str, Evaluation]
    ) -> None:
        """Look at a round that is done."""
        self._missing_metrics(session.round, evaluations)
        if self.weighting.needs_positive_losses:
            self._missing_rates(session.round, record)

    def of_losses(self, session: Session) -> None:
        """Warn of tasks whose loss has been above the initial loss for some rounds."""
        training, recent = self.training, session.history[-RISEN_ROUNDS * len(session.rows) :]
        for task in dict.fromkeys(row["task"] for row in session.rows):
            ratios = list(task_curve(recent, task, "inverse_training_rate").values())
            risen = len(ratios) == RISEN_ROUNDS and min(ratios) > RISEN
            if risen and self._first(("loss", task)):
                warn(
                    f"task '{task}': its loss has been above its initial loss for {RISEN_ROUNDS} "
                    f"rounds, and is {ratios[-1]:.3g} times that after round {session.round}: the "
                    f"step sizes train.encoder_lr = {training.encoder_lr:g} and train.head_lr = "
                    f"{training.head_lr:g} may be too large, or other tasks pull the encoder away"
                )

    def of_summary(self, summary: Summary) -> None:
        """Warn of clients that never or seldom counted."""
        for text in silent_texts(summary):
            warn(text)

    def _missing_metrics(self, round: int, evaluations: Mapping[str, Evaluation]) -> None:
        for client, evaluation in evaluations.items():
            for metric, why in evaluation.failed.items():
                if self._first(("metric", client, metric)):
                    where = f"client '{client}': metric '{metric}'"
                    warn(f"{where} is missing from round {round} on: {why}")

    def _missing_rates(self, round: int, record: RoundRecord) -> None:
        for report in record.reports:
            if math.isnan(report.inverse_training_rate) and self._first(("rate", report.client)):
                why = no_rate(report.initial_loss, report.loss, report.loss_floor, report.task)
                weight = f"from round {round} on its weight stays as it is where {why}"
                warn(f"client '{report.client}': {weight}")

    def _first(self, notice: object) -> bool:
        """Whether this notice has not been given yet."""
        new = notice not in self._given
        self._given.add(notice)
        return new
