"""One pass of a client's data through its model, its loss and its metrics, before a run begins.

It finds what would go wrong silently, or only after hours: numbers that are not finite, targets
that broadcast against the outputs, a loss that is a sum, an output that no loss reads.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.data import NUMBERS, Data, bad_examples, batch_with, is_finite, size, take
from fedgradnorm.errors import FederationError, FedGradNormError, described, warn
from fedgradnorm.evaluation import NotFinite, evaluate
from fedgradnorm.guess import constant_answer
from fedgradnorm.members import Client
from fedgradnorm.messages import has_rate, no_rate
from fedgradnorm.modules import kind_of, reads_tensors_of
from fedgradnorm.parameters import trainable
from fedgradnorm.soundness import SAMPLE, Unsound, check_loss, check_pairs, one_number, shapes
from fedgradnorm.task import Task


@dataclass
class Trial:
    """The result of the pass of one client.

    Attributes:
        reached: the names of the encoder's parameters that its loss has a gradient for.
        failed: by metric, why it cannot be taken of the test data.
        notes: what may be wrong, in words.
    """

    reached: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_client(
    client: Client,
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
    """Pass a client's data once through its model, its loss and its metrics.

    Args:
        client: the client.
        encoder: scratch space.
        head: scratch space; its parameters are changed.
        batch_size: the number of examples in a mini-batch of training.
        eval_batch_size: the number of examples at once where nothing is trained.
        checked: what was found sound for similar clients; this client is added.
        positive_losses: whether the weighting needs losses above the task's floor.
        initial_guess: whether F(0) is the loss of the constant answer.
        originals: the user's own encoder and heads, of which training uses copies.

    Raises:
        FederationError: anything that is wrong, with the client's id.
    """
    passing = _Pass(client, encoder, head, batch_size, eval_batch_size, checked, originals)
    notes = passing.trial.notes
    with _named(client, "training"):
        passing.train(positive_losses and not initial_guess)
        passing.read_all(client.train_data)
    if initial_guess or client.task.guess is not None:
        with _named(client, "training"), torch.no_grad():
            passing.guess(initial_guess, positive_losses)
    if client.test_data is not None:
        with _named(client, "test"):
            passing.read_all(client.test_data)
            notes += passing.bad_tests(client.test_data)
            passing.take_metrics(client.test_data)
    for note in notes:
        warn(f"client '{client.id}': {note}")
    return passing.trial


@contextmanager
def _named(client: Client, kind: str) -> Iterator[None]:
    """Let an error name the client and its data."""
    try:
        yield
    except FedGradNormError:
        raise
    except Unsound as error:
        raise FederationError(f"client '{client.id}': {error}") from error
    except Exception as error:  # the user's own code may raise anything
        reason = f"its {kind} data do not pass through its model and loss: {described(error)}"
        raise FederationError(f"client '{client.id}': {reason}") from error


@dataclass
class _Pass:
    """A client and scratch space for its pass. `check_client` explains the attributes."""

    client: Client
    encoder: nn.Module
    head: nn.Module
    batch_size: int
    eval_batch_size: int
    checked: set[object]
    originals: Sequence[nn.Module]
    trial: Trial = field(default_factory=Trial)

    def __post_init__(self) -> None:
        self.task = self.client.task

    def answers(self, inputs: Tensor, *, training: bool = False) -> Tensor:
        """What the model gives for some inputs. Raises TypeError unless it is a tensor."""
        outputs = self.head.train(training)(self.encoder.train(training)(inputs))
        if not isinstance(outputs, Tensor):
            raise TypeError(f"expected the head to give a tensor, found {type(outputs).__name__}")
        return outputs

    def train(self, positive_losses: bool) -> None:
        """Take the loss and the gradient of one step in training mode, and try the loss."""
        task, data = self.task, self.client.train_data
        inputs, targets = take(data, np.arange(min(self.batch_size, size(data))))
        with _batch_norm_named(size(data), self.batch_size):
            outputs = self.answers(inputs.clone(), training=True)
        with _no_broadcasting(outputs, targets, "the loss"):
            loss = one_number(task.loss(outputs.clone(), targets.clone()))
        functions = kind_of(task.head), kind_of(task.loss)
        key = ("loss", *functions, outputs.shape[1:], targets.shape[1:], targets.dtype)
        if key not in self.checked:
            self._check_reads(outputs.detach(), targets)
        if not loss.requires_grad and outputs.requires_grad:
            text = f"it is {loss.item():.4g} without a gradient"
            raise Unsound(f"the loss does not depend on the outputs: {text}")
        if not loss.requires_grad:
            raise ValueError("the outputs do not depend on a parameter that is trained")
        gradients = self._gradients(loss)
        self._check_finite_rows()
        if not torch.isfinite(loss):
            raise Unsound(f"the loss of its first batch is {loss.item()}")
        self.trial.reached = self._reached(gradients, inputs, targets)
        for name, gradient in gradients.items():
            if not is_finite(gradient):
                where = f"at the encoder's '{name}'"
                raise Unsound(f"the gradient of its first batch is not finite, {where}")
        sample = _spread(size(data), outputs[0].numel())
        # the first examples may all have no target
        if positive_losses and not has_rate(loss.item(), task.loss_floor):
            inputs, expected = take(data, sample)
            with torch.no_grad():
                outputs = self.head(self.encoder.train()(inputs))
                _check_positive(one_number(task.loss(outputs, expected)).item(), task)
        if key not in self.checked:
            note = check_loss(task, self.head, *self._moved(*take(data, sample)))
            self.trial.notes += [] if note is None else [note]
            self.checked.add(key)

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradients of the encoder's parameters that a loss depends on, by name."""
        if not loss.requires_grad:
            return {}
        names, parameters = zip(*trainable(self.encoder), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(names, gradients, strict=True)
        return {name: gradient for name, gradient in pairs if gradient is not None}

    def _reached(self, gradients: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> list[str]:
        """The names of the parameters that the loss depends on, in either mode."""
        names = set(gradients)
        if len(names) < len(trainable(self.encoder)):  # a layer may be dropped at random
            loss = self.task.loss(self.answers(inputs.clone()), targets.clone())
            names |= set(self._gradients(loss))
        return sorted(names)

    def _check_reads(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise Unsound for a loss that reads a tensor of a module that training copies."""

        def loss() -> Tensor:
            return self.task.loss(outputs.clone(), targets.clone())

        with torch.no_grad():
            if any(reads_tensors_of(original, loss) for original in self.originals):
                text = "the loss reads a tensor of the encoder or a head, of which training uses"
                raise Unsound(f"{text} copies: expected it to use its arguments alone")

    def _check_finite_rows(self) -> None:
        """Refuse examples that are not finite, unless the loss and gradient with them are."""
        data = self.client.train_data
        for row, found in bad_examples(data, "training"):
            inputs, targets = batch_with(data, row, self.batch_size)
            loss = one_number(self.task.loss(self.head(self.encoder(inputs)), targets))
            if not torch.isfinite(loss):
                raise Unsound(f"{found} loss of a batch with it is {loss.item()}")
            if not loss.requires_grad:
                continue
            trained = [*trainable(self.encoder), *trainable(self.head)]
            parameters = [parameter for _, parameter in trained]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            if not all(gradient is None or is_finite(gradient) for gradient in gradients):
                raise Unsound(f"{found} gradient of a batch with it is not finite")

    def bad_tests(self, data: Data) -> list[str]:
        """What is wrong with test examples that are not finite, unless their loss is finite."""
        notes = []
        for row, found in bad_examples(data, "test"):
            inputs, targets = batch_with(data, row, min(self.eval_batch_size, SAMPLE))
            with torch.no_grad():
                loss = one_number(self.task.loss(self.answers(inputs), targets)).item()
            if not math.isfinite(loss):
                notes.append(f"{found} loss of a batch with it is {loss}")
        return notes

    def _moved(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features that differ from example to example, and the targets, in evaluation mode."""
        self.head.eval()
        with torch.no_grad():
            for _, parameter in trainable(self.head):  # a head may begin with zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            features = self.encoder.eval()(inputs)
            if features.is_floating_point():
                spread = features.std(correction=0).clamp_min(0.1)
                features = features + torch.randn_like(features) * spread
            return features, targets

    def read_all(self, data: Data) -> None:
        """If the data are tensors, take the loss of all targets with one example's output."""
        if not isinstance(data, tuple):
            return
        with torch.no_grad():
            output = self.answers(data[0][:1].clone())
            most = max(1, min(self.eval_batch_size, NUMBERS // output.numel()))
            for targets in data[1].split(most):
                outputs = output.repeat(len(targets), *[1] * (output.ndim - 1))
                one_number(self.task.loss(outputs, targets.clone()))

    def guess(self, initial_guess: bool, positive_losses: bool) -> None:
        """Try the constant answer, whose loss may be F(0)."""
        task, data = self.task, self.client.train_data
        inputs, targets = take(data, np.arange(min(self.eval_batch_size, size(data))))
        output = self.answers(inputs[:1])
        try:
            kind = tuple(output.shape[1:]), output.dtype
            answer = constant_answer(task, *kind, [targets], even=True)
        except Exception as error:  # the user's own function may raise anything
            reason = str(error) if isinstance(error, FederationError) else described(error)
            raise Unsound(f"its task's guess: {reason}") from error
        if not initial_guess:
            return
        if answer is None:
            text = f"what a constant answer is to task '{task.name}' is not known"
            raise Unsound(f"initial_loss = 'guess': {text}: give Task(..., guess=...)")
        loss = one_number(task.loss(answer.repeat(len(targets), *[1] * answer.ndim), targets))
        if positive_losses:
            _check_positive(loss.item(), task)

    def take_metrics(self, data: Data) -> None:
        """Note why metrics cannot be taken of test data. Raises Unsound if one broadcasts."""
        with torch.no_grad():
            output = self.answers(take(data, np.zeros(1, dtype=np.int64))[0])
            inputs, targets = take(data, _spread(size(data), output.numel()))
            outputs = self.head(self.encoder(inputs.clone()))
        failed = {}
        for metric in self.task.metrics:
            what = f"metric '{metric.name}'"
            key = ("metric", id(metric.function), outputs.shape[1:], targets.shape[1:])
            if key not in self.checked:
                features, expected = self._moved(inputs.clone(), targets)
                with torch.no_grad():
                    moved = self.head(features)
                note = check_pairs(metric.function, moved, expected, what)
                self.trial.notes += [] if note is None else [note]
                self.checked.add(key)
            try:
                with _no_broadcasting(outputs, targets, what):
                    float(metric.function(outputs.clone(), targets.clone()))
            except Unsound:
                raise
            except Exception as error:  # noqa: BLE001  # the user's own metric may raise anything
                failed[metric.name] = described(error)
        if failed and size(data) > len(targets):  # some metrics need more than a few examples
            whole = evaluate(self.task, self.encoder, self.head, data, self.eval_batch_size)
            raised = {name: why for name, why in whole.failed.items() if name in failed}
            failed = {name: why for name, why in raised.items() if not isinstance(why, NotFinite)}
        self.trial.failed = failed


@contextmanager
def _batch_norm_named(num_examples: int, batch_size: int) -> Iterator[None]:
    """Say what to do if BatchNorm gets a batch of one example."""
    try:
        yield
    except ValueError as error:
        # torch raises a plain ValueError, which only its words tell from others
        is_batch_norm = "more than 1 value per channel" in str(error)
        if not is_batch_norm or min(num_examples, batch_size) > 1:
            raise
        is_alone = num_examples == 1
        found = "it has one training example" if is_alone else f"train.batch_size is {batch_size}"
        raise Unsound(f"{found}, and BatchNorm needs at least 2 in a batch: {error}") from error


@contextmanager
def _no_broadcasting(outputs: Tensor, targets: Tensor, what: str) -> Iterator[None]:
    """Raise Unsound if torch warns that targets are broadcast; repeat other warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        # torch gives a plain UserWarning, which only its words tell from others
        if "different to the input size" in str(warning.message):
            raise Unsound(shapes(f"{what} broadcasts targets against outputs", outputs, targets))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _check_positive(loss: float, task: Task) -> None:
    """Raise Unsound for a first loss that gives no training rate."""
    if not has_rate(loss, task.loss_floor):
        raise Unsound(no_rate(loss, loss, task.loss_floor, task.name))


def _spread(count: int, numbers: int) -> np.ndarray:
    """The indices of a sample of examples, evenly spread; fewer if an output has many numbers."""
    sample = max(2, min(SAMPLE, NUMBERS // max(numbers, 1)))
    return np.unique(np.linspace(0, count - 1, sample).astype(np.int64))
