"""What the tasks of the built-in federations share: classification, and losses on another scale."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn import functional

from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.metrics import ACCURACY, BALANCED_ACCURACY
from fedgradnorm.models import linear_head
from fedgradnorm.task import Task

__all__ = ["classification", "with_loss_scale"]


def classification(name: str, num_classes: int) -> Task:
    """A task with a linear head, cross-entropy, accuracy and balanced accuracy."""
    return Task(
        name,
        partial(linear_head, out_features=num_classes),
        functional.cross_entropy,
        (ACCURACY, BALANCED_ACCURACY),
    )


def with_loss_scale(tasks: Mapping[str, Task], loss_scale: Mapping[str, float]) -> dict[str, Task]:
    """The tasks with c · F_i for the loss F_i where ``loss_scale`` names the task: the same optimum, and c times its gradient.

    The head's step grows by c as well. Metrics stay as they are.

    Raises ConfigError for a task that is not there, or a factor that is not finite and above 0.

    >>> import torch
    >>> scaled = with_loss_scale({"smile": classification("smile", 2)}, {"smile": 100})["smile"]
    >>> round(scaled.loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)).item(), 1)
    69.3
    """
    for name, factor in loss_scale.items():
        if name not in tasks:
            raise ConfigError(
                f"loss_scale.{name}: there is no task '{name}'; {nearest(name, tasks)}"
            )
        if not (0 < factor < math.inf):
            raise ConfigError(
                f"loss_scale.{name}: expected a finite number above 0, found {factor}"
            )
    return {
        name: replace(
            task,
            loss=partial(_scaled, task.loss, loss_scale[name]),
            loss_floor=loss_scale[name] * task.loss_floor,
        )
        if name in loss_scale
        else task
        for name, task in tasks.items()
    }


def _scaled(
    loss: Callable[[Tensor, Tensor], Tensor], factor: float, outputs: Tensor, targets: Tensor
) -> Tensor:
    return factor * loss(outputs, targets)
