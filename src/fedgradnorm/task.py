"""A task: what one client wants of the shared encoder."""

import math
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
        batched: whether the function is given one batch of test examples after another, so that no outputs have to be kept. The metric is
            then the mean over the batches, each counted by its examples, which has to be what is meant.

    Raises:
        FederationError: a name that is empty, a function that cannot be called, or another argument that is not a bool.
    """

    name: str
    function: Callable[[Tensor, Tensor], float]
    higher_is_better: bool
    percent: bool = False
    batched: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise FederationError(f"metric: expected a name, found {self.name!r}")
        if not callable(self.function):
            raise FederationError(
                f"metric '{self.name}': expected a function (outputs, targets) -> float, found {self.function!r:.100}"
            )
        for name in ("higher_is_better", "percent", "batched"):
            if not isinstance(getattr(self, name), bool):
                raise FederationError(
                    f"metric '{self.name}': {name}: expected True or False, found {getattr(self, name)!r:.100}"
                )


@dataclass(frozen=True)
class Task:
    """A task: its head, its loss and its metrics.

    Args:
        name: what it is called; several clients may have the same task.
        head: ``(in_features) -> nn.Module``. Given the size of the encoder's output (its dimension 1), makes the head.
        loss: ``(outputs, targets) -> scalar``, the mean over a batch, as torch's losses give it.
        metrics: what is measured on test data. The first is the main one: ``metric`` in a run's files.
        loss_floor: a number that no loss of the task is below, such as -1 for a negative cosine. The inverse training rate is
            (F(k) - loss_floor) / (F(0) - loss_floor), which asks for losses above it.
        guess: the best output without looking at an input, or a function that makes it of all targets; a tensor of the shape of one output,
            or a number where an output is one number. None: the majority class, or the mean target (for an absolute error the median),
            where the loss tells which of these it is, and else none.

    Raises:
        FederationError: a part that is not of these kinds.

    >>> from functools import partial
    >>> import torch
    >>> Task("parity", partial(nn.Linear, out_features=2), nn.functional.cross_entropy).main_metric is None
    True
    """

    name: str
    head: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...] = ()
    loss_floor: float = 0.0
    guess: Callable[[Tensor], Tensor] | Tensor | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise FederationError(f"task: expected a name, found {self.name!r}")
        for part, value, expected in (
            ("head", self.head, "(in_features) -> nn.Module"),
            ("loss", self.loss, "(outputs, targets) -> scalar"),
        ):
            if isinstance(value, nn.Module) and part == "head":
                raise FederationError(
                    f"task '{self.name}': head: expected a function {expected}, found a module: lambda features: module"
                )
            if not callable(value):
                raise FederationError(
                    f"task '{self.name}': {part}: expected a function {expected}, found {value!r:.100}"
                )
        if isinstance(self.loss, type):
            raise FederationError(
                f"task '{self.name}': loss: expected a function, found the class {self.loss.__name__}: {self.loss.__name__}()"
            )
        if isinstance(self.loss, nn.Module) and any(
            parameter.requires_grad for parameter in self.loss.parameters()
        ):
            raise FederationError(
                f"task '{self.name}': loss: it has parameters, which nothing would train: expected them in the head"
            )
        if isinstance(self.metrics, list):
            object.__setattr__(self, "metrics", tuple(self.metrics))
        if not isinstance(self.metrics, tuple) or not all(
            isinstance(metric, Metric) for metric in self.metrics
        ):
            raise FederationError(
                f"task '{self.name}': metrics: expected a tuple of Metric, found {self.metrics!r:.100}"
            )
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise FederationError(
                f"task '{self.name}': its metrics need different names, found {names}"
            )
        floor = self.loss_floor
        if (
            isinstance(floor, bool)
            or not isinstance(floor, int | float)
            or not math.isfinite(floor)
        ):
            raise FederationError(
                f"task '{self.name}': loss_floor: expected a finite number, found {floor!r:.100}"
            )
        guess = self.guess
        if (
            guess is not None
            and not callable(guess)
            and (isinstance(guess, bool) or not isinstance(guess, Tensor | int | float))
        ):
            raise FederationError(
                f"task '{self.name}': guess: expected a tensor, a number or a function of the targets, found {guess!r:.100}"
            )
        if isinstance(guess, int | float) and not math.isfinite(guess):
            raise FederationError(
                f"task '{self.name}': guess: expected a finite number, found {guess}"
            )

    @property
    def main_metric(self) -> Metric | None:
        """The first metric, or None when the task has none."""
        return self.metrics[0] if self.metrics else None
