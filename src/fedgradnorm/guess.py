"""The constant answer: what a model says that looks at no input. Metrics are read against it, and losses can be."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedgradnorm.errors import FederationError
from fedgradnorm.task import Task

__all__ = ["answer_kind", "constant_answer"]

SURE = 10.0
"""A score that says a class with certainty."""

TRIED = 256
"""Targets that tell what kind of answer a task asks for."""

FLAT = 1e-4
"""A gradient at the targets that is below this share of the one beside them is 0 but for rounding."""

AnswerKind = Literal["scores", "values"]


def answer_kind(
    task: Task, shape: tuple[int, ...], dtype: torch.dtype, targets: Tensor
) -> AnswerKind | None:
    """What a task's outputs are, found out by its loss; None where that does not tell.

    - ``"scores"``: targets are classes, whole numbers of shape ``(n,)``; outputs have a score for each, shape
      ``(n, classes)``, and the loss is less where the target's score is the highest.
    - ``"values"``: outputs have the shape of the targets, and the loss has its minimum where they are the targets. So logits are none.

    Args:
        task: whose loss is asked.
        shape: of one output, without the batch.
        dtype: of the outputs.
        targets: some targets, at least one, the examples along dimension 0.
    """
    targets = targets[:TRIED]
    try:
        if (
            not targets.is_floating_point()
            and targets.ndim == 1
            and len(shape) == 1
            and shape[0] > 1
        ):
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
    wrong = (right + right.mean(dim=0)) / 2  # which probabilities bear
    wrong = torch.where((wrong == right).all(), right + 1, wrong)
    at, beside = (_slopes(task, outputs, targets).abs().max() for outputs in (right, wrong))
    return bool(at <= FLAT * beside) and _loss(task, right, targets) < _loss(task, wrong, targets)


def _is_absolute_error(task: Task, dtype: torch.dtype, targets: Tensor) -> bool:
    """Whether a loss of values grows by its distance from the targets alone, as that of L1 does, or Huber's far from them."""
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
    return float(
        task.loss(outputs.clone(), targets.clone())
    )  # copies: the user's own loss may change them in place


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
    """One output that is the best without looking at inputs: the task's own `Task.guess`, the majority class, or the mean target.

    For an absolute error it is the median target.

    Args:
        task: whose answer it is.
        shape: of one output, without the batch.
        dtype: of the outputs.
        batches: all targets, the examples along dimension 0.
        even: whether all classes get the same score, in place of the majority: the answer of a model that has learned nothing.

    Returns:
        A tensor of that shape, or None where it is not known what a constant answer is.
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
        if absolute:  # a median needs them all
            kept.append(targets)
        else:
            total = total + (
                torch.bincount(targets.long(), minlength=shape[0])
                if kind == "scores"
                else targets.double().sum(dim=0)
            )
    if kind == "scores":
        return functional.one_hot(total.argmax(), shape[0]).to(dtype)
    return (torch.cat(kept).double().median(dim=0).values if absolute else total / count).to(dtype)


def _own_answer(
    task: Task, shape: tuple[int, ...], dtype: torch.dtype, batches: Iterable[Tensor]
) -> Tensor:
    """The task's own `Task.guess`. Raises FederationError for what is not one output."""
    given = task.guess(torch.cat(list(batches))) if callable(task.guess) else task.guess
    if isinstance(given, bool) or (isinstance(given, Tensor) and given.dtype == torch.bool):
        raise FederationError(f"expected numbers, found {given}")
    answer = torch.as_tensor(given, dtype=dtype)
    if answer.shape != shape and (answer.numel() != 1 or math.prod(shape) != 1):
        found = f"the number {answer.item():g}" if answer.ndim == 0 else str(tuple(answer.shape))
        raise FederationError(f"expected one output of shape {shape}, found {found}")
    if not torch.isfinite(answer).all():
        raise FederationError(
            f"expected finite numbers, found {answer[~torch.isfinite(answer)].flatten()[0].item()}"
        )
    return answer.reshape(shape)
