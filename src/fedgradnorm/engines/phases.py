"""The phases of a client's round as programs: SGD steps on some parameters of a model, which read all of it."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedgradnorm.engines.programs import Loss, Program
from fedgradnorm.engines.workspace import same
from fedgradnorm.parameters import trainable
from fedgradnorm.task import Task

__all__ = ["ENCODER", "HEAD", "Batch", "Phase", "WrongProgram", "both", "tensors_of"]

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and targets."""

ENCODER, HEAD = "encoder.", "head."
"""How the names of a model's tensors begin, of its two parts."""

RATE = 0.01
"""The step size with which a program is tried."""

FAR = {torch.float32: 1e-2, torch.float64: 1e-5}
"""A gradient that is further from autograd's than this share of its length is another one: near a minimum rounding is a large share."""


class WrongProgram(Exception):  # noqa: N818  # it says what is to be done: the round again, without it
    """A program's step has another loss or gradient than autograd has of the model, or examples other features than by themselves."""


class Phase:
    """Steps on the parameters of a model whose names begin with one of these.

    Args:
        model: with its values as scratch space.
        task: whose loss goes down.
        parts: how the names of the trained parameters begin.
        batch: one batch of a client, to trace a step with.
        width: of so many alike clients at once, all tensors, inputs and targets stacked along dimension 0; None: of one.
        shared: how the names of untrained tensors begin that such clients have in common, and that are not stacked.

    Raises:
        Exception: whatever `Program` or ``vmap`` raises on a model that cannot be traced or stacked.

    Attributes:
        trained: the names of the parameters that are trained and have a gradient, in the model's order.
        fixed: of all other tensors.
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
        if width is not None:
            trained, fixed = (
                _widened(trained, [0] * len(trained), width),
                _widened(fixed, self._axes, width),
            )
            batch = (
                batch[0].expand(width, *batch[0].shape),
                batch[1].expand(width, *batch[1].shape),
            )
            loss = self._of_many(loss)
        self.program = Program(loss, trained, fixed, *batch)

    def _of_many(self, loss: Loss) -> Loss:
        def losses(
            trained: Sequence[Tensor], fixed: Sequence[Tensor], inputs: Tensor, targets: Tensor
        ) -> Tensor:
            stacked: Tensor = vmap(loss, in_dims=(0, self._axes, 0, 0))(
                list(trained), list(fixed), inputs, targets
            )
            return stacked

        return losses

    def of(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The trained and the fixed tensors of such a model."""
        tensors = tensors_of(model)
        return [tensors[name] for name in self.trained], [tensors[name] for name in self.fixed]

    def loss(self, model: nn.Module, task: Task) -> Loss:
        """The loss of one client as a function of these tensors."""
        names = (*self.trained, *self.fixed)

        def loss(
            trained: Sequence[Tensor], fixed: Sequence[Tensor], inputs: Tensor, targets: Tensor
        ) -> Tensor:
            outputs = functional_call(
                model, dict(zip(names, (*trained, *fixed), strict=True)), (inputs,)
            )
            return task.loss(outputs, targets).reshape(())

        return loss

    def is_right(self, model: nn.Module, task: Task, batch: Batch, other: Batch) -> bool:
        """Whether the program's losses and gradients are those of the model, over a step on each of two batches.

        With another batch than was traced, what was wrongly taken for a constant shows. In a stack, which is to be one of two clients
        here, the second client gets the two the other way round.
        """
        trained, fixed = self.of(model)
        inputs, targets = ([one, two] for one, two in zip(batch, other, strict=True))
        if self.width is None:
            expected = self._plain(model, task, [batch, other])
        else:
            ways = [
                self._plain(model, task, batches) for batches in ([batch, other], [other, batch])
            ]
            expected = [
                torch.stack(parts, dim=1 if place == 0 else 0)
                for place, parts in enumerate(zip(*ways, strict=True))
            ]
            trained, fixed = (
                _widened(trained, [0] * len(trained), 2),
                _widened(fixed, self._axes, 2),
            )
            inputs, targets = (
                [torch.stack(pair), torch.stack(pair[::-1])] for pair in (inputs, targets)
            )
        sums = [torch.zeros_like(tensor) for tensor in trained]
        moved = [tensor.clone() for tensor in trained]
        losses = self.program.run(
            moved, fixed, inputs, targets, [RATE] * len(trained), starts=trained, sums=sums
        )
        return all(same(one, found) for one, found in zip(expected, (losses, *sums), strict=True))

    def hold_against_autograd(
        self,
        model: nn.Module,
        task: Task,
        batch: Batch,
        given: tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor] | None = None,
        row: int | None = None,
    ) -> None:
        """Raise WrongProgram where a step of the program is not that of the model. All values are left as they are.

        Args:
            model: with the values of one client.
            task: its task.
            batch: one of its batches.
            given: what the program is given of a stack: trained and fixed tensors, inputs and targets; None: those of the model.
            row: which client of the stack it is.
        """
        parameters = dict(model.named_parameters())
        value = task.loss(model(batch[0]), batch[1])
        expected = torch.autograd.grad(
            value,
            [parameters[name] for name in self.trained],
            allow_unused=True,
            materialize_grads=True,
        )
        trained, fixed, inputs, targets = given or (*self.of(model), *batch)
        sums = [torch.zeros_like(tensor) for tensor in trained]
        moved = [tensor.clone() for tensor in trained]
        losses = self.program.run(
            moved, fixed, [inputs], [targets], [RATE] * len(trained), starts=trained, sums=sums
        )
        loss = losses.flatten()[0 if row is None else row]
        gradient = torch.cat([(total if row is None else total[row]).reshape(-1) for total in sums])
        autograd = torch.cat(
            [
                part.to_dense().reshape(-1) if part.is_sparse else part.reshape(-1)
                for part in expected
            ]
        )
        far = FAR.get(gradient.dtype, 0.1)
        same_loss = torch.allclose(
            loss, value.detach().reshape(()), rtol=far, atol=1e-6, equal_nan=True
        )
        apart, length = (
            torch.linalg.vector_norm(gradient - autograd),
            torch.linalg.vector_norm(autograd),
        )
        if not same_loss or bool(apart > far * length + torch.finfo(gradient.dtype).eps):
            raise WrongProgram("a traced step is no longer the step of its code")

    def _plain(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> list[Tensor]:
        """The losses of such steps by autograd on the model itself, whose values are left as they were, and the sums of the gradients."""
        parameters = dict(model.named_parameters())
        learned, losses = [parameters[name] for name in self.trained], []
        starts, sums = (
            [parameter.detach().clone() for parameter in learned],
            [torch.zeros_like(parameter) for parameter in learned],
        )
        for inputs, targets in batches:
            value = task.loss(model(inputs), targets)
            gradients = torch.autograd.grad(
                value, learned, allow_unused=True, materialize_grads=True
            )
            losses.append(value.detach().reshape(()))
            with torch.no_grad():
                for parameter, start, total, gradient in zip(
                    learned, starts, sums, gradients, strict=True
                ):
                    torch.add(start, total.add_(gradient), alpha=-RATE, out=parameter.data)
        with torch.no_grad():
            for parameter, start in zip(learned, starts, strict=True):
                parameter.copy_(start)
        return [torch.stack(losses), *sums]


def both(encoder: nn.Module, head: nn.Module) -> nn.Module:
    """An encoder and a head as one model."""
    return nn.Sequential(OrderedDict(encoder=encoder, head=head))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, by name."""
    return {
        name: tensor.detach()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def _widened(tensors: Sequence[Tensor], axes: Sequence[int | None], width: int) -> list[Tensor]:
    """The tensors of so many clients that have the same ones; those without an axis are left as they are."""
    pairs = zip(tensors, axes, strict=True)
    return [
        tensor if axis is None else tensor.expand(width, *tensor.shape) for tensor, axis in pairs
    ]
