"""End a run when no task improves any more."""

from typing import Literal

from fedgradnorm.callbacks.base import Callback
from fedgradnorm.errors import require
from fedgradnorm.runs.summary import task_curve
from fedgradnorm.session import Session


class EarlyStopping(Callback):
    """End a run when none of its tasks has improved for some rounds.

    A task's figure is the mean over its clients. A run ends as one that did all its rounds: with
    its models, its summary and a checkpoint; `Result.stopped` says why.

    Args:
        patience: after this many rounds without an improvement the run ends. Rounds without the
            figure (a metric is taken in every `TrainConfig.eval_every`-th round) count as well.
        figure: ``"loss"``: the training loss as a share of the initial loss; ``"metric"``: the main
            metric on the test data. Choosing by test data makes the test figures optimistic.
        min_delta: a change by no more than this is no improvement.

    Raises:
        ConfigError: an argument that is out of range.
    """

    def __init__(
        self, patience: int = 10, figure: Literal["loss", "metric"] = "loss", min_delta: float = 0.0
    ) -> None:
        whole = isinstance(patience, int) and not isinstance(patience, bool)
        require(whole and patience >= 1, "patience", "a whole number of at least 1", patience)
        require(figure in ("loss", "metric"), "figure", "'loss' or 'metric'", figure)
        require(min_delta >= 0, "min_delta", "a number of at least 0", min_delta)
        self.patience, self.figure, self.min_delta = patience, figure, min_delta
        self._best: dict[str, float] = {}
        self._improved = 0

    def on_start(self, session: Session) -> None:
        """Forget an earlier run."""
        self._best, self._improved = {}, session.round

    def on_round(self, session: Session) -> None:
        """Compare the round with the best so far."""
        for client in session.federation.clients:
            task, metric = client.task.name, client.task.main_metric
            key: Literal["inverse_training_rate", "metric"] = (
                "metric" if self.figure == "metric" else "inverse_training_rate"
            )
            value = task_curve(session.rows, task, key).get(session.round)
            if value is None:
                continue
            if self.figure == "metric" and metric is not None and metric.higher_is_better:
                value = -value
            if task not in self._best or value < self._best[task] - self.min_delta:
                self._best[task], self._improved = value, session.round
        if session.round - self._improved >= self.patience:
            session.stop(f"no task has improved for {self.patience} rounds ({self.figure})")
