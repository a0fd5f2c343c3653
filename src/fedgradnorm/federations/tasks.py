"""Tasks of the built-in federations: classification, and losses on another scale."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn import functional

from fedgradnorm.errors import ConfigError, nearest, require
from fedgradnorm.metrics import ACCURACY, BALANCED_ACCURACY
from fedgradnorm.models import linear_head
from fedgradnorm.task import Task


def classification(name: str, num_classes: int) -> Task:
    """A task with a linear head, cross-entropy, accuracy and balanced accuracy."""
    head = partial(linear_head, out_features=num_classes)
    return Task(name, head, functional.cross_entropy, (ACCURACY, BALANCED_ACCURACY))


def with_loss_scale(tasks: Mapping[str, Task], loss_scale: Mapping[str, float]) -> dict[str, Task]:
    """The tasks, with the loss c · F_i for the tasks in ``loss_scale``.

    The optimum stays the same, the gradient is multiplied by c, and so is the head's step. Metrics
    do not change.

    Raises:
        ConfigError: an unknown task, or a factor that is not finite and above 0.

    >>> import torch
    >>> tasks = {"smile": classification("smile", 2)}
    >>> scaled = with_loss_scale(tasks, {"smile": 100})["smile"]
    >>> round(scaled.loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)).item(), 1)
    69.3
    """
    scaled = dict(tasks)
    for name, factor in loss_scale.items():
        if name not in tasks:
            hint = nearest(name, tasks)
            raise ConfigError(f"loss_scale.{name}: there is no task '{name}'; {hint}")
        valid = 0 < factor < math.inf
        require(valid, f"loss_scale.{name}", "a finite number above 0", factor)
        task = tasks[name]
        loss, floor = partial(_scaled, task.loss, factor), factor * task.loss_floor
        scaled[name] = replace(task, loss=loss, loss_floor=floor)
    return scaled


def _scaled(
    loss: Callable[[Tensor, Tensor], Tensor], factor: float, outputs: Tensor, targets: Tensor
) -> Tensor:
    return factor * loss(outputs, targets)
