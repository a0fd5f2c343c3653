"""What a model, or an answer that looks at no input, is worth on a whole set of examples, a batch at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedgradnorm.data import Data, in_batches, size
from fedgradnorm.errors import described
from fedgradnorm.guess import constant_answer
from fedgradnorm.task import Metric, Task

__all__ = [
    "EVALUATION_BATCH",
    "NOT_FINITE",
    "Evaluation",
    "constant_guess",
    "evaluate",
    "evaluation_of",
]

SMALL, MOVED = 1e-5, 1e-3
"""A metric of a constant answer is a number if it moves by no more than the second when the answer moves by the first."""

EVALUATION_BATCH = 512
"""Examples that pass through a model at once where nothing is trained, unless settings say otherwise."""

COPIED_BYTES = 64 * 2**20
"""Outputs and targets of up to this size are copied for each metric."""

NOT_FINITE = "it gives"
"""How the reason begins for a metric that gives NaN or infinity."""


@dataclass(frozen=True)
class Evaluation:
    """The loss and the metrics, by name, over a whole set of examples.

    Attributes:
        loss: the mean loss.
        metrics: the metrics; not a number where one could not be taken.
        num_examples: how many examples.
        failed: by metric, what it raised, in words, or that it gives no finite number.
    """

    loss: float
    metrics: Mapping[str, float]
    num_examples: int
    failed: Mapping[str, str] = field(default_factory=dict)


def evaluate(
    task: Task, encoder: nn.Module, head: nn.Module, data: Data, batch_size: int = EVALUATION_BATCH
) -> Evaluation:
    """The loss and all metrics of a task over a whole set of data, in evaluation mode, which the modules are left in.

    No more outputs are kept than metrics need: none where all are `Metric.batched`.
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
    """The metrics of an answer that looks at no input, chosen in hindsight, as `constant_answer` gives it.

    Args:
        task: whose answer it is.
        test: the test data.
        shape: of one output of its model, without the batch.
        dtype: of the outputs.
        batch_size: examples at a time.

    Returns:
        The metrics that have a finite value for it, by name, and keep it when the answer is moved a little: those that only read the order
        of outputs, such as an AUC or a correlation, have none. Empty where it is not known what a constant answer is.
    """
    answer = constant_answer(
        task, shape, dtype, (targets for _, targets in in_batches(test, batch_size))
    )
    if answer is None:
        return {}
    found = _scored(
        task, test, lambda inputs: answer.expand(len(inputs), *shape), batch_size, with_loss=False
    )
    draws = torch.Generator().manual_seed(0)

    def moved(inputs: Tensor) -> Tensor:
        noise = torch.randn((len(inputs), *shape), generator=draws).to(dtype)
        return answer + SMALL * (1 + answer.abs()) * noise

    near = (
        _scored(task, test, moved, batch_size, with_loss=False).metrics
        if answer.is_floating_point()
        else found.metrics
    )
    return {
        name: value
        for name, value in found.metrics.items()
        if math.isfinite(value) and abs(near[name] - value) <= MOVED * (1 + abs(value))
    }


@torch.no_grad()
def _scored(
    task: Task,
    data: Data,
    answer: Callable[[Tensor], Tensor],
    batch_size: int,
    *,
    with_loss: bool = True,
) -> Evaluation:
    count = size(data)
    at_once, by_batch = (
        [one for one in task.metrics if one.batched is batched] for batched in (False, True)
    )
    outputs, targets = _Kept(count), _Kept(count)  # targets that are a tensor are there already
    total, sums, failed = 0.0, dict.fromkeys((one.name for one in by_batch), 0.0), dict[str, str]()
    for inputs, expected in in_batches(data, batch_size):
        found = answer(inputs)
        if at_once:
            outputs.add(found)
            if not isinstance(data, tuple):
                targets.add(expected)
        if with_loss:  # which may change its arguments in place
            total += task.loss(
                *((found.clone(), expected.clone()) if by_batch else (found, expected))
            ).item() * len(expected)
        if by_batch:
            values, raised = _metrics_of(by_batch, found.cpu(), expected.cpu())
            sums = {name: sums[name] + values[name] * len(expected) for name in sums}
            failed |= raised
    metrics = {name: value / count for name, value in sums.items()}
    if at_once:
        whole = data[1].cpu() if isinstance(data, tuple) else targets.whole
        values, raised = _metrics_of(at_once, outputs.whole, whole, shared=isinstance(data, tuple))
        metrics, failed = metrics | values, failed | raised
    metrics = {metric.name: metrics[metric.name] for metric in task.metrics}
    return Evaluation(total / count if with_loss else math.nan, metrics, count, failed)


class _Kept:
    """Batches that become one tensor, without being in memory twice."""

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self.whole = torch.empty(0)

    def add(self, part: Tensor) -> None:
        if self.filled == 0:
            self.whole = torch.empty(self.count, *part.shape[1:], dtype=part.dtype)
        self.whole[self.filled : self.filled + len(part)] = part
        self.filled += len(part)


def _metrics_of(
    metrics: Sequence[Metric], outputs: Tensor, targets: Tensor, *, shared: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics by name, and why some of them have no value.

    A metric may change its arguments in place. Each gets copies, or where these would be large, the next ones are not taken.

    Args:
        metrics: which.
        outputs: of all examples, or of a batch.
        targets: of the same examples.
        shared: whether other code has the same tensors.
    """
    values, failed, spoilt_by = (
        dict.fromkeys((metric.name for metric in metrics), math.nan),
        dict[str, str](),
        "",
    )
    small = outputs.nbytes + targets.nbytes <= COPIED_BYTES
    if shared and not small:
        outputs, targets = outputs.clone(), targets.clone()
    for metric in metrics:
        if spoilt_by:
            failed[metric.name] = f"metric '{spoilt_by}' has changed its arguments in place before"
            continue
        given = (outputs.clone(), targets.clone()) if small else (outputs, targets)
        versions = [tensor._version for tensor in given]
        try:
            values[metric.name] = float(metric.function(*given))
        except Exception as error:  # noqa: BLE001  # the user's own metric may raise anything, and ends no run
            failed[metric.name] = described(error)
        else:
            if not math.isfinite(values[metric.name]):
                failed[metric.name] = f"{NOT_FINITE} {values[metric.name]}"
        if not small and versions != [tensor._version for tensor in given]:
            spoilt_by, values[metric.name] = metric.name, math.nan
            failed[metric.name] = "it changes its arguments in place"
    return values, failed
