"""The kind of task that the built-in federations share."""

from functools import partial

from torch.nn import functional

from fedgradnorm.metrics import ACCURACY, BALANCED_ACCURACY
from fedgradnorm.models import linear_head
from fedgradnorm.task import Task

__all__ = ["classification"]


def classification(name: str, num_classes: int) -> Task:
    """A task with a linear head, cross-entropy, accuracy and balanced accuracy."""
    return Task(name, partial(linear_head, out_features=num_classes), functional.cross_entropy, (ACCURACY, BALANCED_ACCURACY))
