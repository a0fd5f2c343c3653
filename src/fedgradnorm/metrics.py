"""Metrics that the built-in tasks share."""

from sklearn.metrics import recall_score
from torch import Tensor

from fedgradnorm.task import Metric


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of correct classes. Outputs have shape ``(n, classes)``, targets ``(n,)``."""
    return float((outputs.argmax(dim=1) == targets).double().mean())


def balanced_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The mean recall over the classes that are present, which a majority class does not raise."""
    labels = targets.unique().tolist()
    predicted = outputs.argmax(dim=1).tolist()
    return float(recall_score(targets.tolist(), predicted, labels=labels, average="macro"))


def mean_absolute_error(outputs: Tensor, targets: Tensor) -> float:
    """The mean of the absolute differences, in the unit of the targets."""
    return float((outputs.double() - targets.double()).abs().mean())


ACCURACY = Metric("accuracy", accuracy, higher_is_better=True, percent=True)
BALANCED_ACCURACY = Metric("balanced accuracy", balanced_accuracy, True, percent=True)
MEAN_ABSOLUTE_ERROR = Metric("mean absolute error", mean_absolute_error, higher_is_better=False)
