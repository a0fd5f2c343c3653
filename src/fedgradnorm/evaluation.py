"""The loss and the metrics of a model, or of a constant answer, over a data set, in batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedgradnorm.data import Data, in_batches, size
from fedgradnorm.errors import described
from fedgradnorm.guess import constant_answer
from fedgradnorm.task import Metric, Task

SMALL, MOVED = 1e-5, 1e-3
"""If a constant answer moves by the first, its metrics move by no more than the second."""

EVALUATION_BATCH = 512
"""The default number of examples that pass through a model at once where nothing is trained."""

COPIED_BYTES = 64 * 2**20
"""Outputs and targets up to this size are copied for each metric."""


class NotFinite(str):
    """The reason of a metric that raised no error, but gave NaN or infinity."""

    __slots__ = ()


@dataclass(frozen=True)
class Evaluation:
    """The loss and the metrics over a whole set of examples.

    Attributes:
        loss: the mean loss.
        metrics: the metrics by name; NaN for one that raised an error.
        num_examples: the number of examples.
        failed: by metric, the error that it raised, or that its value is not finite.
    """

    loss: float
    metrics: Mapping[str, float]
    num_examples: int
    failed: Mapping[str, str] = field(default_factory=dict)


def evaluate(
    task: Task, encoder: nn.Module, head: nn.Module, data: Data, batch_size: int = EVALUATION_BATCH
) -> Evaluation:
    """The loss and all metrics of a task over a data set. The modules are left in evaluation mode.

    Outputs are only kept for metrics that are not `Metric.batched`.
    """
    encoder.eval()
    head.eval()
    return _scored(task, data, lambda inputs: head(encoder(inputs)), batch_size)


def evaluation_of(task: Task, loss: float, outputs: Tensor, targets: Tensor) -> Evaluation:
    """An evaluation, from the loss, the outputs and the targets of all examples."""
    metrics, failed = _metrics_of(task.metrics, outputs.cpu(), targets.cpu(), shared=True)
    return Evaluation(loss, metrics, len(targets), failed)


@torch.no_grad()
def constant_guess(
    task: Task,
    test: Data,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    batch_size: int = EVALUATION_BATCH,
) -> dict[str, float]:
    """The metrics of the best constant answer to the test data, as `constant_answer` gives it.

    ``shape`` and ``dtype`` are those of one output of the task's model, without the batch.

    Returns:
        By name, the metrics that have a finite value, and keep it when the answer moves a little.
        Metrics that only read the order of outputs, such as an AUC or a correlation, have none.
        Empty if it is not known what a constant answer is.
    """
    batches = (targets for _, targets in in_batches(test, batch_size))
    answer = constant_answer(task, shape, dtype, batches)
    if answer is None:
        return {}
    draws = torch.Generator().manual_seed(0)

    def constant(inputs: Tensor) -> Tensor:
        return answer.expand(len(inputs), *shape)

    def moved(inputs: Tensor) -> Tensor:
        noise = torch.randn((len(inputs), *shape), generator=draws).to(dtype)
        return answer + SMALL * (1 + answer.abs()) * noise

    values = near = _scored(task, test, constant, batch_size, with_loss=False).metrics
    if answer.is_floating_point():
        near = _scored(task, test, moved, batch_size, with_loss=False).metrics
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    limits = {name: MOVED * (1 + abs(value)) for name, value in finite.items()}
    return {name: finite[name] for name in finite if abs(near[name] - finite[name]) <= limits[name]}


@torch.no_grad()
def _scored(
    task: Task,
    data: Data,
    answer: Callable[[Tensor], Tensor],
    batch_size: int,
    *,
    with_loss: bool = True,
) -> Evaluation:
    """The evaluation of what a function answers to inputs."""
    count = size(data)
    whole = [metric for metric in task.metrics if not metric.batched]
    batched = [metric for metric in task.metrics if metric.batched]
    all_outputs, all_targets = _Kept(count), _Kept(count)
    total, failed = 0.0, dict[str, str]()
    sums = dict.fromkeys((metric.name for metric in batched), 0.0)
    for inputs, targets in in_batches(data, batch_size):
        outputs = answer(inputs)
        if whole:
            all_outputs.add(outputs)
            if not isinstance(data, tuple):  # else all targets are one tensor already
                all_targets.add(targets)
        if with_loss:  # which may change its arguments in place
            pair = (outputs.clone(), targets.clone()) if batched else (outputs, targets)
            total += task.loss(*pair).item() * len(targets)
        if batched:
            values, reasons = _metrics_of(batched, outputs.cpu(), targets.cpu())
            sums = {name: sums[name] + values[name] * len(targets) for name in sums}
            failed |= reasons
    metrics = {name: value / count for name, value in sums.items()}
    if whole:
        shared = isinstance(data, tuple)
        expected = data[1].cpu() if isinstance(data, tuple) else all_targets.whole
        values, reasons = _metrics_of(whole, all_outputs.whole, expected, shared=shared)
        metrics, failed = metrics | values, failed | reasons
    metrics = {metric.name: metrics[metric.name] for metric in task.metrics}
    return Evaluation(total / count if with_loss else math.nan, metrics, count, failed)


class _Kept:
    """Batches that become one tensor, without being in memory twice."""

    def __init__(self, count: int) -> None:
        self.count, self.filled, self.whole = count, 0, torch.empty(0)

    def add(self, part: Tensor) -> None:
        if self.filled == 0:
            self.whole = torch.empty(self.count, *part.shape[1:], dtype=part.dtype)
        self.whole[self.filled : self.filled + len(part)] = part
        self.filled += len(part)


def _metrics_of(
    metrics: Sequence[Metric], outputs: Tensor, targets: Tensor, *, shared: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics by name, and by name why some of them have no value.

    A metric may change its arguments in place, so each gets copies. Large tensors are copied once
    at most, if other code shares them; the metrics after one that changes them are not taken.
    """
    values = dict.fromkeys((metric.name for metric in metrics), math.nan)
    failed, spoilt_by = dict[str, str](), ""
    small = outputs.nbytes + targets.nbytes <= COPIED_BYTES
    if shared and not small:
        outputs, targets = outputs.clone(), targets.clone()
    for metric in metrics:
        if spoilt_by:
            failed[metric.name] = f"metric '{spoilt_by}' has changed its arguments in place before"
            continue
        pair = (outputs.clone(), targets.clone()) if small else (outputs, targets)
        versions = [tensor._version for tensor in pair]
        try:
            values[metric.name] = float(metric.function(*pair))
        except Exception as error:  # noqa: BLE001  # the user's own metric may raise anything
            failed[metric.name] = described(error)
        else:
            if not math.isfinite(values[metric.name]):
                failed[metric.name] = NotFinite(f"it gives {values[metric.name]}")
        if not small and versions != [tensor._version for tensor in pair]:
            spoilt_by, values[metric.name] = metric.name, math.nan
            failed[metric.name] = "it changes its arguments in place"
    return values, failed
