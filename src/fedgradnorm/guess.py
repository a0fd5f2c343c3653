"""The constant answer: the best output without looking at inputs, a reference for metrics."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedgradnorm.errors import FederationError
from fedgradnorm.task import Task

SURE = 10.0
"""The score of a class that is certain."""

TRIED = 256
"""The number of targets with which the kind of an answer is found out."""

FLAT = 1e-4
"""A gradient at the targets is 0 if it is below this share of the gradient beside them."""

AnswerKind = Literal["scores", "values"]


def answer_kind(
    task: Task, shape: tuple[int, ...], dtype: torch.dtype, targets: Tensor
) -> AnswerKind | None:
    """What the outputs of a task are, found out by its loss; None if the loss does not tell.

    - ``"scores"``: targets are classes, whole numbers of shape ``(n,)``; outputs have a score for
      each class, shape ``(n, classes)``, and the loss is less if the target's score is the highest.
    - ``"values"``: outputs have the shape of the targets, and the loss has its minimum where the
      two are equal. Logits are not values.

    ``shape`` and ``dtype`` are those of one output, without the batch. One target is enough.
    """
    targets = targets[:TRIED]
    try:
        are_classes = not targets.is_floating_point() and targets.ndim == 1
        if are_classes and len(shape) == 1 and shape[0] > 1:
            return "scores" if _are_scores(task, shape[0], dtype, targets) else None
        if tuple(targets.shape[1:]) == shape and not targets.is_complex():
            return "values" if _are_values(task, dtype, targets) else None
    except Exception:  # noqa: BLE001  # the user's own loss may raise anything
        return None
    return None


def _are_scores(task: Task, classes: int, dtype: torch.dtype, targets: Tensor) -> bool:
    if targets.min() < 0 or targets.max() >= classes:
        return False
    right = SURE * functional.one_hot(targets.long(), classes).to(dtype)
    return _loss(task, right, targets) < _loss(task, -right, targets)


def _are_values(task: Task, dtype: torch.dtype, targets: Tensor) -> bool:
    right = targets.to(dtype)
    wrong = (right + right.mean(dim=0)) / 2  # still a probability, where the targets are
    wrong = torch.where((wrong == right).all(), right + 1, wrong)
    at, beside = (_slopes(task, outputs, targets).abs().max() for outputs in (right, wrong))
    return bool(at <= FLAT * beside) and _loss(task, right, targets) < _loss(task, wrong, targets)


def _is_absolute_error(task: Task, dtype: torch.dtype, targets: Tensor) -> bool:
    """Whether the slope of a loss of values does not depend on the distance, as for L1 or Huber."""
    targets = targets[:TRIED]
    right = targets.to(dtype)
    distance = right.std(correction=0)
    distance = distance if distance > 0 else torch.ones_like(distance)
    try:
        near, far = (_slopes(task, right + times * distance, targets) for times in (1, 2))
    except Exception:  # noqa: BLE001  # the user's own loss may raise anything
        return False
    return bool(near.abs().max() > 0) and bool(torch.allclose(near, far, rtol=FLAT, atol=0.0))


def _loss(task: Task, outputs: Tensor, targets: Tensor) -> float:
    # copies, because the user's own loss may change them in place
    return float(task.loss(outputs.clone(), targets.clone()))


@torch.enable_grad()
def _slopes(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.loss(leaf.clone(), targets.clone()), leaf)
    return gradient


def constant_answer(
    task: Task,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    batches: Iterable[Tensor],
    *,
    even: bool = False,
) -> Tensor | None:
    """The best output without looking at inputs.

    It is the task's own `Task.guess`, the majority class, the mean target, or for an absolute error
    the median target.

    Args:
        task: the task.
        shape: of one output, without the batch.
        dtype: of the outputs.
        batches: all targets, the examples along dimension 0.
        even: whether all classes get the same score in place of the majority, which is the answer
            of a model that has learned nothing.

    Returns:
        A tensor of that shape, or None if it is not known what a constant answer is.

    Raises:
        FederationError: the task's own guess is not one output.
    """
    if task.guess is not None:
        return _own_answer(task, shape, dtype, batches)
    kind, total, count, absolute, kept = None, torch.zeros(()), 0, False, list[Tensor]()
    for targets in batches:
        if count == 0:
            kind = answer_kind(task, shape, dtype, targets)
            if kind is None or (kind == "scores" and even):
                return None if kind is None else torch.zeros(shape, dtype=dtype)
            absolute = kind == "values" and _is_absolute_error(task, dtype, targets)
            total = torch.zeros(shape, dtype=torch.float64)
        if kind == "scores" and (targets.min() < 0 or targets.max() >= shape[0]):
            return None
        count += len(targets)
        if absolute:  # the median needs all of them
            kept.append(targets)
        elif kind == "scores":
            total = total + torch.bincount(targets.long(), minlength=shape[0])
        else:
            total = total + targets.double().sum(dim=0)
    if kind == "scores":
        return functional.one_hot(total.argmax(), shape[0]).to(dtype)
    return (torch.cat(kept).double().median(dim=0).values if absolute else total / count).to(dtype)


def _own_answer(
    task: Task, shape: tuple[int, ...], dtype: torch.dtype, batches: Iterable[Tensor]
) -> Tensor:
    given = task.guess(torch.cat(list(batches))) if callable(task.guess) else task.guess
    if isinstance(given, bool) or (isinstance(given, Tensor) and given.dtype == torch.bool):
        raise FederationError(f"expected numbers, found {given}")
    answer = torch.as_tensor(given, dtype=dtype)
    if answer.shape != shape and (answer.numel() != 1 or math.prod(shape) != 1):
        found = f"the number {answer.item():g}" if answer.ndim == 0 else str(tuple(answer.shape))
        raise FederationError(f"expected one output of shape {shape}, found {found}")
    bad = answer[~torch.isfinite(answer)].flatten()
    if len(bad):
        raise FederationError(f"expected finite numbers, found {bad[0].item()}")
    return answer.reshape(shape)
