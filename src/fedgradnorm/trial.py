"""One pass of a client's data through its model, its loss and its metrics, before a run is begun.

What would go wrong without a word, or only after hours, is found here: numbers that are not finite, targets that a loss broadcasts
against the outputs, a loss that is a sum, an output that no loss reads.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import Data, size, take
from fedgradnorm.errors import FederationError, FedGradNormError, described, warn
from fedgradnorm.evaluation import NOT_FINITE, evaluate
from fedgradnorm.guess import constant_answer
from fedgradnorm.messages import has_rate, no_rate
from fedgradnorm.modules import kind_of, reads_tensors_of
from fedgradnorm.parameters import trainable
from fedgradnorm.soundness import (
    NUMBERS,
    SAMPLE,
    Unsound,
    check_loss,
    check_pairs,
    one_number,
    shapes,
)
from fedgradnorm.task import Task

if TYPE_CHECKING:
    from fedgradnorm.federation import Client

__all__ = ["Trial", "check_client"]


@dataclass
class Trial:
    """What came of the pass of one client.

    Attributes:
        reached: the names of the encoder's parameters that its loss has a gradient for.
        failed: by metric, why it could not be taken of the test data.
        notes: what may be wrong, in words.
    """

    reached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_client(
    client: "Client",
    encoder: nn.Module,
    head: nn.Module,
    batch_size: int,
    eval_batch_size: int,
    checked: set[object],
    *,
    positive_losses: bool = False,
    initial_guess: bool = False,
    originals: Sequence[nn.Module] = (),
) -> Trial:
    """Let a client's data pass once through its model, its loss and its metrics.

    Args:
        client: whose data.
        encoder: scratch space.
        head: scratch space; its parameters are changed.
        batch_size: examples in a mini-batch of training.
        eval_batch_size: examples that pass through the model at once where nothing is trained.
        checked: what was found sound of clients like this one, to which this one is added.
        positive_losses: whether the weighting needs losses above the task's floor.
        initial_guess: whether F(0) is to be the loss of the constant answer.
        originals: the user's own encoder and heads, of which training uses copies.

    Raises:
        FederationError: whatever is wrong, with the client's id.
    """
    trial = Trial()
    with _named(client, "training"):
        _try_training(
            client,
            encoder,
            head,
            batch_size,
            checked,
            positive_losses and not initial_guess,
            originals,
            trial,
        )
        _try_all(client.task, encoder, head, client.train_data, eval_batch_size)
    if initial_guess or client.task.guess is not None:
        _try_guess(client, encoder, head, eval_batch_size, initial_guess, positive_losses)
    if client.test_data is not None:
        with _named(client, "test"):
            _try_all(client.task, encoder, head, client.test_data, eval_batch_size)
            trial.notes += _bad_test_rows(
                client.task, encoder, head, client.test_data, eval_batch_size
            )
            _try_metrics(
                client.task, encoder, head, client.test_data, eval_batch_size, checked, trial
            )
    for note in trial.notes:
        warn(f"client '{client.id}': {note}")
    return trial


@contextmanager
def _named(client: "Client", kind: str) -> Iterator[None]:
    try:
        yield
    except FedGradNormError:
        raise
    except Unsound as error:
        raise FederationError(f"client '{client.id}': {error}") from error
    except Exception as error:  # the user's own code may raise anything
        reason = f"its {kind} data do not pass through its model and loss: {described(error)}"
        raise FederationError(f"client '{client.id}': {reason}") from error


def _try_training(
    client: "Client",
    encoder: nn.Module,
    head: nn.Module,
    batch_size: int,
    checked: set[object],
    positive_losses: bool,
    originals: Sequence[nn.Module],
    trial: Trial,
) -> None:
    """One step's loss and gradient, in training mode, and how the loss behaves."""
    task, data = client.task, client.train_data
    inputs, targets = take(data, np.arange(min(batch_size, size(data))))
    with _batch_norm_named(size(data), batch_size):
        outputs = _outputs_of(head.train()(encoder.train()(inputs.clone())))
    with _no_broadcasting(outputs, targets, "the loss"):
        loss = one_number(task.loss(outputs.clone(), targets.clone()))
    key = (
        "loss",
        kind_of(task.head),
        kind_of(task.loss),
        outputs.shape[1:],
        targets.shape[1:],
        targets.dtype,
    )
    if key not in checked:
        _check_reads(task, outputs.detach(), targets, originals)
    if not loss.requires_grad:
        if outputs.requires_grad:
            raise Unsound(
                f"the loss does not depend on the outputs: it is {loss.item():.4g} without a gradient"
            )
        raise ValueError("the outputs do not depend on a parameter that is trained")
    names, parameters = zip(*trainable(encoder), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    _check_finite_rows(task, encoder, head, data, batch_size)
    if not torch.isfinite(loss):
        raise Unsound(f"the loss of its first batch is {loss.item()}")
    reached = {
        name for name, gradient in zip(names, gradients, strict=True) if gradient is not None
    }
    if len(reached) < len(names):  # a layer that is dropped at random is there in evaluation mode
        in_evaluation = task.loss(head.eval()(encoder.eval()(inputs.clone())), targets.clone())
        others = (
            torch.autograd.grad(in_evaluation, parameters, allow_unused=True)
            if in_evaluation.requires_grad
            else ()
        )
        reached |= {
            name for name, gradient in zip(names, others, strict=False) if gradient is not None
        }
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None and not _is_finite(gradient):
            raise Unsound(
                f"the gradient of its first batch is not finite, at the encoder's '{name}'"
            )
    if positive_losses and not has_rate(
        loss.item(), task.loss_floor
    ):  # of the first examples: perhaps none has a target
        inputs, expected = take(data, _spread(size(data), outputs[0].numel()))
        with torch.no_grad():
            check_positive(
                one_number(task.loss(head(encoder.train()(inputs)), expected)).item(), task
            )
    if key not in checked:
        features, expected = _moved(
            encoder, head, take(data, _spread(size(data), outputs[0].numel()))
        )
        note = check_loss(task, head, features, expected)
        trial.notes += [] if note is None else [note]
        checked.add(key)
    trial.reached = sorted(reached)


@contextmanager
def _batch_norm_named(num_examples: int, batch_size: int) -> Iterator[None]:
    """Say what to do where BatchNorm cannot take a batch of one example."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error) or min(num_examples, batch_size) > 1:
            raise
        found = (
            "it has one training example"
            if num_examples == 1
            else f"train.batch_size is {batch_size}"
        )
        raise Unsound(f"{found}, and BatchNorm needs at least 2 in a batch: {error}") from error


def _check_reads(
    task: Task, outputs: Tensor, targets: Tensor, originals: Sequence[nn.Module]
) -> None:
    """Raise for a loss that reads a tensor of a module of which training uses a copy."""
    for original in originals:
        with torch.no_grad():
            reads = reads_tensors_of(original, lambda: task.loss(outputs.clone(), targets.clone()))
        if reads:
            raise Unsound(
                "the loss reads a tensor of the encoder or a head, of which training uses copies: expected it to use its arguments alone"
            )


def check_positive(loss: float, task: Task) -> None:
    """Raise for a first loss of which no training rate can be taken."""
    if not has_rate(loss, task.loss_floor):
        raise Unsound(no_rate(loss, loss, task.loss_floor, task.name))


def _outputs_of(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected the head to give a tensor, found {type(value).__name__}")
    return value


@contextmanager
def _no_broadcasting(outputs: Tensor, targets: Tensor, what: str) -> Iterator[None]:
    """Raise where torch itself warns that targets are broadcast; other warnings come after the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "different to the input size" in str(warning.message):
            raise Unsound(shapes(f"{what} broadcasts targets against outputs", outputs, targets))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _check_finite_rows(
    task: Task, encoder: nn.Module, head: nn.Module, data: Data, batch_size: int
) -> None:
    """Raise for an example that is not finite, unless a batch with it has a finite loss and gradient (masked gaps)."""
    if not isinstance(data, tuple):
        return
    for name, tensor in zip(("input", "target"), data, strict=True):
        row = _first_bad_row(tensor)
        if row is not None:
            others = [index for index in range(min(batch_size, size(data))) if index != row]
            inputs, targets = take(data, np.array([row, *others][:batch_size]))
            loss = one_number(task.loss(head(encoder(inputs)), targets))
            parameters = [
                parameter for module in (encoder, head) for _, parameter in trainable(module)
            ]
            gradients = (
                torch.autograd.grad(loss, parameters, allow_unused=True)
                if loss.requires_grad
                else ()
            )
            part = tensor[row].flatten()
            found = f"example {row} of its training data: the {name} holds {part[~torch.isfinite(part)][0].item()}, and"
            if not torch.isfinite(loss):
                raise Unsound(f"{found} the loss of a batch with it is {loss.item()}")
            if not all(gradient is None or _is_finite(gradient) for gradient in gradients):
                raise Unsound(f"{found} the gradient of a batch with it is not finite")


def _bad_test_rows(
    task: Task, encoder: nn.Module, head: nn.Module, data: Data, batch_size: int
) -> list[str]:
    """What to say of test data that are not finite, unless a batch with them has a finite loss (masked gaps)."""
    notes = []
    for name, tensor in (
        zip(("input", "target"), data, strict=True) if isinstance(data, tuple) else ()
    ):
        row = _first_bad_row(tensor)
        if row is not None:
            others = [index for index in range(min(batch_size, SAMPLE, size(data))) if index != row]
            inputs, targets = take(data, np.array([row, *others][:SAMPLE]))
            with torch.no_grad():
                loss = one_number(task.loss(head.eval()(encoder.eval()(inputs)), targets)).item()
            if not math.isfinite(loss):
                part = tensor[row].flatten()
                found = part[~torch.isfinite(part)][0].item()
                notes.append(
                    f"example {row} of its test data: the {name} holds {found}, and the loss of a batch with it is {loss}"
                )
    return notes


def _is_finite(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient.to_dense() if gradient.is_sparse else gradient).all())


def _first_bad_row(tensor: Tensor) -> int | None:
    """The first example in which a number is not finite, or None."""
    if not tensor.is_floating_point():
        return None
    rows = max(1, NUMBERS * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows].reshape(len(tensor[start : start + rows]), -1)
        if not torch.isfinite(
            part.sum(dtype=torch.float64)
        ):  # one pass without a mask: a sum of finite numbers is finite
            bad = (~torch.isfinite(part)).any(dim=1).nonzero()
            if len(bad):
                return start + int(bad[0])
    return None


def _moved(
    encoder: nn.Module, head: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Features that differ from example to example, and targets, for a batch.

    A head may begin with zeros, so its parameters are moved a little. It is left in evaluation mode.
    """
    inputs, targets = batch
    head.eval()
    with torch.no_grad():
        for _, parameter in trainable(head):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        features = encoder.eval()(inputs)
        if features.is_floating_point():
            features = features + torch.randn_like(features) * features.std(correction=0).clamp_min(
                0.1
            )
        return features, targets


def _spread(count: int, numbers: int) -> np.ndarray:
    """The indices of a sample of examples, evenly spread: fewer where an output has many numbers."""
    sample = max(2, min(SAMPLE, NUMBERS // max(numbers, 1)))
    return np.unique(np.linspace(0, count - 1, sample).astype(np.int64))


def _try_all(task: Task, encoder: nn.Module, head: nn.Module, data: Data, batch_size: int) -> None:
    """The loss of all targets of data that are tensors, with the output for one example."""
    if not isinstance(data, tuple):
        return
    with torch.no_grad():
        output = _outputs_of(head.eval()(encoder.eval()(data[0][:1].clone())))
        for targets in data[1].split(max(1, min(batch_size, NUMBERS // output.numel()))):
            one_number(
                task.loss(output.repeat(len(targets), *[1] * (output.ndim - 1)), targets.clone())
            )


def _try_guess(
    client: "Client",
    encoder: nn.Module,
    head: nn.Module,
    batch_size: int,
    initial_guess: bool,
    positive_losses: bool,
) -> None:
    """The constant answer, which F(0) may have to be taken of."""
    task = client.task
    with _named(client, "training"), torch.no_grad():
        inputs, targets = take(
            client.train_data, np.arange(min(batch_size, size(client.train_data)))
        )
        output = head.eval()(encoder.eval()(inputs[:1]))
        try:
            answer = constant_answer(
                task, tuple(output.shape[1:]), output.dtype, [targets], even=True
            )
        except Exception as error:  # the user's own function may raise anything
            said = str(error) if isinstance(error, FederationError) else described(error)
            raise Unsound(f"its task's guess: {said}") from error
        if not initial_guess:
            return
        if answer is None:
            raise Unsound(
                f"initial_loss = 'guess': what a constant answer is to task '{task.name}' is not known: give Task(..., guess=...)"
            )
        loss = one_number(task.loss(answer.repeat(len(targets), *[1] * answer.ndim), targets))
        if positive_losses:
            check_positive(loss.item(), task)


def _try_metrics(
    task: Task,
    encoder: nn.Module,
    head: nn.Module,
    data: Data,
    batch_size: int,
    checked: set[object],
    trial: Trial,
) -> None:
    """Note why metrics cannot be taken of test data, by name. Raises for one that broadcasts targets against outputs."""
    with torch.no_grad():
        one = head.eval()(encoder.eval()(take(data, np.zeros(1, dtype=np.int64))[0]))
        inputs, targets = take(data, _spread(size(data), one.numel()))
        outputs = head(encoder(inputs.clone()))
    failed = {}
    for metric in task.metrics:
        key = ("metric", id(metric.function), outputs.shape[1:], targets.shape[1:])
        if key not in checked:
            features, expected = _moved(encoder, head, (inputs.clone(), targets))
            with torch.no_grad():
                moved = head(features)
            note = check_pairs(metric.function, moved, expected, f"metric '{metric.name}'")
            trial.notes += [] if note is None else [note]
            checked.add(key)
        try:
            with _no_broadcasting(outputs, targets, f"metric '{metric.name}'"):
                float(metric.function(outputs.clone(), targets.clone()))
        except Unsound:
            raise
        except Exception as error:  # noqa: BLE001  # the user's own metric may raise anything
            failed[metric.name] = described(error)
    if failed and size(data) > len(targets):  # some figures need more than a few examples
        raised = evaluate(task, encoder, head, data, batch_size).failed
        failed = {
            name: why
            for name, why in raised.items()
            if name in failed and not why.startswith(NOT_FINITE)
        }
    trial.failed = failed
