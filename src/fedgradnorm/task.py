"""A task: what one client wants of the shared encoder."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import TypeIs  # in the standard library from Python 3.13 on

from fedgradnorm.errors import FederationError


@dataclass(frozen=True)
class Metric:
    """A measure of quality over a whole test set.

    Args:
        name: its name in tables and plots.
        function: ``(outputs, targets) -> float``, over all test examples at once.
        higher_is_better: its direction.
        percent: whether it is shown as a percentage (0.81 as 81.0 %).
        batched: whether the function gets one batch of test examples after another, so that no
            outputs have to be kept. The metric is then the mean over the batches, weighted by their
            sizes. That must be what the metric means.

    Raises:
        FederationError: the name is empty, the function is not callable, or another argument is
            not a bool.
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
            expected = "expected a function (outputs, targets) -> float"
            raise FederationError(f"metric '{self.name}': {expected}, found {self.function!r:.100}")
        for flag in ("higher_is_better", "percent", "batched"):
            value = getattr(self, flag)
            if not isinstance(value, bool):
                found = f"expected True or False, found {value!r:.100}"
                raise FederationError(f"metric '{self.name}': {flag}: {found}")


@dataclass(frozen=True)
class Task:
    """A task: its head, its loss and its metrics.

    Args:
        name: its name; several clients may have the same task.
        head: ``(in_features) -> nn.Module``. It gets the size of the encoder's output (its
            dimension 1) and makes the head.
        loss: ``(outputs, targets) -> scalar``, the mean over a batch, as torch's losses give it.
        metrics: what is measured on test data. The first is the main one: ``metric`` in files.
        loss_floor: a lower bound of the task's loss, such as -1 for a negative cosine. The inverse
            training rate is (F(k) - loss_floor) / (F(0) - loss_floor), for losses above it.
        guess: the best output without looking at an input, or a function that makes it from all
            targets: a tensor of the shape of one output, or a number if an output is one number.
            None: the majority class, the mean target, or for an absolute error the median target,
            if the loss tells which of these it is.

    Raises:
        FederationError: an argument is of another kind.

    >>> from functools import partial
    >>> import torch
    >>> cross_entropy = nn.functional.cross_entropy
    >>> Task("parity", partial(nn.Linear, out_features=2), cross_entropy).main_metric is None
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
        if isinstance(self.metrics, list):
            object.__setattr__(self, "metrics", tuple(self.metrics))
        if why := self._misfit():
            raise FederationError(f"task '{self.name}': {why}")

    def _misfit(self) -> str | None:
        """What is wrong with an argument, or None."""
        head, loss, metrics = self.head, self.loss, self.metrics
        floor, guess = self.loss_floor, self.guess
        if isinstance(head, nn.Module):
            expected = "expected a function (in_features) -> nn.Module"
            return f"head: {expected}, found a module: lambda features: module"
        if not callable(head):
            return f"head: expected a function (in_features) -> nn.Module, found {head!r:.100}"
        if not callable(loss):
            return f"loss: expected a function (outputs, targets) -> scalar, found {loss!r:.100}"
        if isinstance(loss, type):
            name = loss.__name__
            return f"loss: expected a function, found the class {name}: {name}()"
        if isinstance(loss, nn.Module) and any(part.requires_grad for part in loss.parameters()):
            return "loss: it has parameters, which nothing would train: expected them in the head"
        if not isinstance(metrics, tuple) or not all(isinstance(m, Metric) for m in metrics):
            return f"metrics: expected a tuple of Metric, found {metrics!r:.100}"
        names = [metric.name for metric in metrics]
        if len(set(names)) < len(names):
            return f"its metrics need different names, found {names}"
        if not _is_number(floor) or not math.isfinite(floor):
            return f"loss_floor: expected a finite number, found {floor!r:.100}"
        if _is_number(guess) and not math.isfinite(guess):
            return f"guess: expected a finite number, found {guess}"
        if guess is None or isinstance(guess, Tensor) or callable(guess) or _is_number(guess):
            return None
        expected = "a tensor, a number or a function of the targets"
        return f"guess: expected {expected}, found {guess!r:.100}"

    @property
    def main_metric(self) -> Metric | None:
        """The first metric, or None if the task has none."""
        return self.metrics[0] if self.metrics else None


def _is_number(value: object) -> TypeIs[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
