"""A client's steps as programs: traced once, and from then on run in one call.

A step is about fifty calls into torch, and Python makes calls for one thread at a time: threads
that train small clients wait for each other. Here a step, its gradients included, is traced into
a graph of torch's operations. One call then runs many such steps, see `executors.py`.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fedgradnorm.engines.executors import Executable, executable_of
from fedgradnorm.engines.failures import Untraceable
from fedgradnorm.engines.graphs import depends_on_values, outputs_of, simplify
from fedgradnorm.engines.source import source_of

LEAKS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
"""What takes a tensor's values out of torch, where a trace would see constants.

``item`` is not among them: on a traced tensor it raises by itself.
"""

TRACING = Lock()
"""Tracing patches torch for all threads."""

Tensors: TypeAlias = Sequence[Tensor]

Loss: TypeAlias = Callable[[Tensors, Tensors, Tensor, Tensor], Tensor]
"""A loss as a function of trained tensors, fixed tensors, inputs and targets.

Its value has shape ``()``, or ``(clients,)`` for stacked clients.
"""


class _KeptInside(TorchFunctionMode):
    """Refuses what takes values out of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LEAKS:
            raise Untraceable(f"{func.__name__}: what depends on values cannot be traced")
        return func(*args, **(kwargs or {}))


class Program:
    """SGD steps on tensors along the gradient of a loss.

    Args:
        loss: the loss. It is called once, here. Nothing in it may depend on values: only on shapes.
        trained: the tensors that are trained.
        fixed: the other tensors that the loss reads.
        inputs: a batch.
        targets: the targets of the batch.

    Raises:
        Exception: whatever the loss raises on tensors that are traced.
        Untraceable: an operation cannot be in a program, or changes what it was given.

    Attributes:
        has_gradient: for each trained tensor, whether the loss depends on it.

    >>> program = Program(
    ...     lambda w, _, x, y: (x @ w[0] - y).square().sum(),
    ...     [torch.zeros(2)], [], torch.eye(2), torch.zeros(2),
    ... )
    >>> weights = torch.tensor([1.0, 3.0])
    >>> program.run([weights], [], [torch.eye(2)] * 2, [torch.ones(2)] * 2, [0.25])
    tensor([4., 1.])
    >>> weights
    tensor([1.0000, 1.5000])
    """

    def __init__(
        self, loss: Loss, trained: Tensors, fixed: Tensors, inputs: Tensor, targets: Tensor
    ) -> None:
        module = _traced(loss, trained, fixed, inputs, targets)
        self._graph, self._num_trained = module.graph, len(trained)
        constants = module.graph.find_nodes(op="get_attr")
        self._constants = [getattr(module, str(node.target)).detach() for node in constants]
        self.has_gradient = [gradient is not None for gradient in outputs_of(module.graph)[1:]]
        self._executables: dict[tuple[frozenset[int], frozenset[int]], Executable] = {}
        self.in_python = self._executable(frozenset(), frozenset()).in_python

    def run(
        self,
        trained: Tensors,
        fixed: Tensors,
        inputs: Tensors,
        targets: Tensors,
        rates: Sequence[float],
        *,
        momentum: float = 0.0,
        velocity: Sequence[Tensor | None] = (),
        starts: Tensors = (),
        sums: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Take a step for each batch, in place: with step size ``rate``, ``t ← t - rate · g``.

        Args:
            trained: the tensors, with the shapes, types and layouts of those that were traced.
            fixed: likewise.
            inputs: a tensor for each step.
            targets: likewise.
            rates: step sizes, one for each trained tensor.
            momentum: for tensors with a velocity v: ``v ← momentum · v + g; t ← t - rate · v``.
            velocity: these, changed in place; None for tensors without.
            starts: the trained tensors before the first step, for those with a sum.
            sums: where gradients are summed, in place; None where they are not. A tensor with a
                sum is ``start - rate · sum`` after a step.

        Returns:
            The losses, with the steps along dimension 0.
        """
        moving = frozenset(place for place, v in enumerate(velocity) if v is not None)
        summed = frozenset(place for place, total in enumerate(sums) if total is not None)
        velocities = _without_gaps(velocity, trained) if moving else []
        summing = (list(starts), _without_gaps(sums, trained)) if summed else ([], [])
        lists = list(trained), list(fixed), self._constants, list(inputs), list(targets)
        with torch.no_grad():
            steps = self._executable(moving, summed).steps
            return steps(*lists, list(rates), momentum, velocities, *summing)

    def _executable(self, moving: frozenset[int], summed: frozenset[int]) -> Executable:
        if (moving, summed) not in self._executables:
            lines = source_of(self._graph, self._num_trained, moving, summed)
            self._executables[moving, summed] = executable_of(lines)
        return self._executables[moving, summed]


def _traced(
    loss: Loss, trained: Tensors, fixed: Tensors, inputs: Tensor, targets: Tensor
) -> GraphModule:
    """The graph of a step: its outputs are the loss and the gradients."""

    def step(trained: Tensors, *others: Any) -> list[Tensor | None]:
        value = loss(trained, *others)
        return [value.detach(), *torch.autograd.grad(value.sum(), trained, allow_unused=True)]

    learned = [tensor.detach().requires_grad_() for tensor in trained]
    # With one mode for the notes on all tensors, and not one mode for each tensor, a trace takes
    # a third less time.
    notes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with TRACING, _KeptInside(), tracing(notes):
        module = make_fx(step)(learned, [tensor.detach() for tensor in fixed], inputs, targets)
    for node in module.graph.nodes:
        if depends_on_values(node):
            raise Untraceable(f"{node.target} gives a shape that depends on values")
        if node.target is torch.ops.aten.as_strided.default:
            raise Untraceable(f"{node.target} depends on how a tensor lies in memory")
    for node in module.graph.nodes:
        if node.op == "get_attr":  # a constant, of which an older torch notes nothing
            node.meta.setdefault("val", getattr(module, str(node.target)))
    simplify(module.graph)
    return module


def _without_gaps(tensors: Sequence[Tensor | None], trained: Tensors) -> list[Tensor]:
    """The tensors, and for each None any tensor: TorchScript's lists have no gaps."""
    pairs = zip(tensors, trained, strict=True)
    return [anything if tensor is None else tensor for tensor, anything in pairs]
