"""The phases of a client's round as programs: SGD steps on a part of a model."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedgradnorm.engines.programs import Loss, Program, Tensors
from fedgradnorm.engines.workspace import same
from fedgradnorm.parameters import concatenated, trainable
from fedgradnorm.task import Task

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and targets."""

ENCODER, HEAD = "encoder.", "head."
"""The prefixes of the tensors' names in a model of both."""

RATE = 0.01
"""The step size with which a program is tried."""

FAR = {torch.float32: 1e-2, torch.float64: 1e-5}
"""The largest relative distance between a program's gradient and autograd's.

It is far above rounding, which is a large share of a gradient near a minimum.
"""


class WrongProgram(Exception):  # noqa: N818  # it is an answer
    """A shortcut gives other numbers than the code that it stands for.

    A program's step has another loss or gradient than autograd has of the model, or an example has
    other features than it has by itself.
    """


class Phase:
    """Steps on the parameters of a model whose names begin with one of the given prefixes.

    Args:
        model: its values are scratch space.
        task: the task whose loss is reduced.
        parts: the prefixes of the trained parameters.
        batch: one batch of a client, with which a step is traced.
        width: the number of stacked clients, whose tensors, inputs and targets are stacked along
            dimension 0, or None for a single client.
        shared: the prefixes of untrained tensors that stacked clients share: these are not stacked.

    Raises:
        Exception: whatever `Program` or ``vmap`` raises on such a model.

    Attributes:
        trained: the names of the trained parameters, in the model's order. The loss need not
            depend on all of them, see ``program.has_gradient``.
        fixed: the names of all other tensors.
        program: the steps.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        parts: tuple[str, ...],
        batch: Batch,
        width: int | None = None,
        shared: tuple[str, ...] = (),
    ) -> None:
        self.width = width
        self.trained = tuple(name for name, _ in trainable(model) if name.startswith(parts))
        self.fixed = tuple(name for name in tensors_of(model) if name not in set(self.trained))
        self._axes = [None if name.startswith(shared) else 0 for name in self.fixed]
        (trained, fixed), loss = self.of(model), self.loss(model, task)
        inputs, targets = batch
        if width is not None:
            trained, fixed = self._widened(trained, fixed, width)
            inputs, targets = (part.expand(width, *part.shape) for part in batch)
            loss = vmap(loss, in_dims=(0, self._axes, 0, 0))
        self.program = Program(loss, trained, fixed, inputs, targets)

    def _widened(
        self, trained: Tensors, fixed: Tensors, width: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of clients that all have the same values. Shared tensors stay as they are."""
        pairs = zip((*trained, *fixed), (*[0] * len(trained), *self._axes), strict=True)
        wide = [part if axis is None else part.expand(width, *part.shape) for part, axis in pairs]
        return wide[: len(trained)], wide[len(trained) :]

    def of(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The trained and the fixed tensors of such a model."""
        tensors = tensors_of(model)
        return [tensors[name] for name in self.trained], [tensors[name] for name in self.fixed]

    def loss(self, model: nn.Module, task: Task) -> Loss:
        """The loss of one client as a function of these tensors."""
        names = (*self.trained, *self.fixed)

        def loss(trained: Tensors, fixed: Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
            tensors = dict(zip(names, (*trained, *fixed), strict=True))
            return task.loss(functional_call(model, tensors, (inputs,)), targets).reshape(())

        return loss

    def is_right(self, model: nn.Module, task: Task, batch: Batch, other: Batch) -> bool:
        """Whether the program's losses and gradients are the model's, over a step on each batch.

        The second batch was not traced: it shows what was wrongly taken for a constant. A stack,
        which has to be of two clients here, gives its second client the batches in reverse order.
        """
        trained, fixed = self.of(model)
        inputs, targets = ([first, second] for first, second in zip(batch, other, strict=True))
        expected = self._plain(model, task, [batch, other])
        if self.width is not None:
            of_second = self._plain(model, task, [other, batch])
            losses, *sums = zip(expected, of_second, strict=True)
            expected = [torch.stack(losses, dim=1), *map(torch.stack, sums)]
            trained, fixed = self._widened(trained, fixed, 2)
            inputs, targets = (
                [torch.stack(pair), torch.stack(pair[::-1])] for pair in (inputs, targets)
            )
        actual = self._tried(trained, fixed, inputs, targets)
        return all(same(*pair) for pair in zip(expected, actual, strict=True))

    def hold_against_autograd(
        self,
        model: nn.Module,
        task: Task,
        batch: Batch,
        given: tuple[Tensors, Tensors, Tensor, Tensor] | None = None,
        row: int | None = None,
    ) -> None:
        """Compare a step of the program with the step of the model. All values stay as they are.

        Args:
            model: with the values of one client.
            task: the client's task.
            batch: one of the client's batches.
            given: in a stack, what the program gets: trained and fixed tensors, inputs and targets.
                None: the model's own tensors and the batch.
            row: the client's place in the stack.

        Raises:
            WrongProgram: they differ.
        """
        parameters = dict(model.named_parameters())
        value = task.loss(model(batch[0]), batch[1]).reshape(())
        learned = [parameters[name] for name in self.trained]
        gradients = torch.autograd.grad(value, learned, allow_unused=True, materialize_grads=True)
        trained, fixed, inputs, targets = given or (*self.of(model), *batch)
        losses, *sums = self._tried(trained, fixed, [inputs], [targets])
        loss = losses.flatten()[0 if row is None else row]
        actual = concatenated(total if row is None else total[row] for total in sums)
        expected = concatenated(part.to_dense() for part in gradients)
        far = FAR.get(actual.dtype, 0.1)
        same_loss = torch.allclose(loss, value.detach(), rtol=far, atol=1e-6, equal_nan=True)
        apart, length = (torch.linalg.vector_norm(part) for part in (actual - expected, expected))
        if not same_loss or bool(apart > far * length + torch.finfo(actual.dtype).eps):
            raise WrongProgram("a traced step is no longer the step of its code")

    def _tried(
        self, trained: Tensors, fixed: Tensors, inputs: Tensors, targets: Tensors
    ) -> list[Tensor]:
        """The losses of the program's steps on copies of the tensors, and the gradients' sums."""
        sums = [torch.zeros_like(tensor) for tensor in trained]
        moved, rates = [tensor.clone() for tensor in trained], [RATE] * len(trained)
        losses = self.program.run(moved, fixed, inputs, targets, rates, starts=trained, sums=sums)
        return [losses, *sums]

    def _plain(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> list[Tensor]:
        """The same by autograd on the model itself, whose values are then put back."""
        parameters = dict(model.named_parameters())
        learned, losses = [parameters[name] for name in self.trained], []
        starts = [parameter.detach().clone() for parameter in learned]
        sums = [torch.zeros_like(parameter) for parameter in learned]
        for inputs, targets in batches:
            value = task.loss(model(inputs), targets).reshape(())
            computed = torch.autograd.grad(
                value, learned, allow_unused=True, materialize_grads=True
            )
            losses.append(value.detach())
            for parameter, start, total, part in zip(learned, starts, sums, computed, strict=True):
                torch.add(start, total.add_(part), alpha=-RATE, out=parameter.data)
        for parameter, start in zip(learned, starts, strict=True):
            parameter.data.copy_(start)
        return [torch.stack(losses), *sums]


def both(encoder: nn.Module, head: nn.Module) -> nn.Module:
    """An encoder and a head as one model."""
    return nn.Sequential(OrderedDict(encoder=encoder, head=head))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, by name."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach() for name, tensor in named}
