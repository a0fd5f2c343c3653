"""A task: what one client wants of the shared encoder."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fedgradnorm.errors import FederationError

__all__ = ["Metric", "Task"]


@dataclass(frozen=True)
class Metric:
    """A figure of merit over a whole test set.

    Args:
        name: what it is called in tables and plots.
        function: ``(outputs, targets) -> float``, over all test examples at once.
        higher_is_better: its direction.
        percent: whether people read it as a percentage (0.81 is shown as 81.0 %).
    """

    name: str
    function: Callable[[Tensor, Tensor], float]
    higher_is_better: bool
    percent: bool = False


@dataclass(frozen=True)
class Task:
    """A task: its head, its loss and its metrics.

    Args:
        name: what it is called; several clients may have the same task.
        head: ``(in_features) -> nn.Module``. Given the size of the encoder's output (its dimension 1), makes the head.
        loss: ``(outputs, targets) -> scalar``, the mean over a batch, as torch's losses give it.
        metrics: what is measured on test data. The first is the main one: ``metric`` in a run's files.

    >>> from functools import partial
    >>> import torch
    >>> Task("parity", partial(nn.Linear, out_features=2), nn.functional.cross_entropy).main_metric is None
    True
    """

    name: str
    head: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, tuple) or not all(isinstance(metric, Metric) for metric in self.metrics):
            raise FederationError(f"task '{self.name}': metrics: expected a tuple of Metric, found {self.metrics!r}")
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise FederationError(f"task '{self.name}': its metrics need different names, found {names}")

    @property
    def main_metric(self) -> Metric | None:
        """The first metric, or None when the task has none."""
        return self.metrics[0] if self.metrics else None
