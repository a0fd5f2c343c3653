"""A client's steps as programs: traced once, and from then on run in one call.

A step is some fifty calls into torch, and Python makes calls for one thread at a time: threads that train small clients wait for one
another. Here a step, its gradients included, is traced into a graph of torch's operations, and a TorchScript program takes many such steps
without coming back to Python. The products that are weight gradients go straight into what they are for, so that no gradient is written.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

__all__ = ["Loss", "Program"]

aten = torch.ops.aten
TIMES = aten.mul.Scalar
PRODUCTS = {aten.mm.default: "addmm_", aten.bmm.default: "baddbmm_"}
"""Products, and what adds one to a tensor."""

LEAKS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
"""What takes a tensor's values out of torch, where a trace would take them for constants. On ``item`` it raises by itself."""

TRACING = Lock()
"""Tracing patches torch for all threads."""

Loss: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor], Tensor]
"""Of trained and of fixed tensors, inputs and targets. Its value has shape ``()``, or ``(clients,)`` where each has one of its own."""


class _KeptInside(TorchFunctionMode):
    """Values stay in torch."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in LEAKS:
            raise TypeError(f"{func.__name__}: what depends on values cannot be traced")
        return func(*args, **(kwargs or {}))


class Program:
    """SGD steps on some tensors, along the gradient of a loss.

    Args:
        loss: what goes down. It is called once, here; what of it depends on values, and not on shapes alone, cannot be traced.
        trained: the tensors that it trains.
        fixed: other tensors that it reads.
        inputs: a batch.
        targets: their targets.

    Raises:
        Exception: whatever the loss raises on tensors that are traced.
        TypeError: an operation that no program can have, or one that changes what it was given.

    >>> program = Program(lambda w, _, x, y: (x @ w[0] - y).square().sum(), [torch.zeros(2)], [], torch.eye(2), torch.zeros(2))
    >>> weights = torch.tensor([1.0, 3.0])
    >>> program.run([weights], [], [torch.eye(2)] * 2, [torch.ones(2)] * 2, [0.25])
    tensor([4., 1.])
    >>> weights
    tensor([1.0000, 1.5000])
    """

    def __init__(
        self,
        loss: Loss,
        trained: Sequence[Tensor],
        fixed: Sequence[Tensor],
        inputs: Tensor,
        targets: Tensor,
    ) -> None:
        def step(
            trained: list[Tensor], fixed: list[Tensor], inputs: Tensor, targets: Tensor
        ) -> list[Tensor | None]:
            value = loss(trained, fixed, inputs, targets)
            return [value.detach(), *torch.autograd.grad(value.sum(), trained, allow_unused=True)]

        learned = [tensor.detach().requires_grad_() for tensor in trained]
        # One mode for what the trace notes of every tensor: without it there is a new one for each, and a trace takes two thirds longer.
        notes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
        with TRACING, _KeptInside(), tracing(notes):
            module = make_fx(step)(learned, [tensor.detach() for tensor in fixed], inputs, targets)
        for node in module.graph.nodes:
            if _depends_on_values(node):
                raise TypeError(f"{node.target} gives a shape that depends on values")
            if node.target is aten.as_strided.default:
                raise TypeError(f"{node.target} depends on how a tensor lies in memory")
        _simplify(module.graph)
        self._graph, self._num_trained = module.graph, len(trained)
        self._constants = [
            getattr(module, str(node.target)).detach()
            for node in module.graph.nodes
            if node.op == "get_attr"
        ]
        self.has_gradient = [gradient is not None for gradient in _outputs(module.graph)[1:]]
        self._compiled: dict[tuple[frozenset[int], frozenset[int]], Any] = {}
        self._compile(frozenset(), frozenset())

    def run(
        self,
        trained: Sequence[Tensor],
        fixed: Sequence[Tensor],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        rates: Sequence[float],
        *,
        momentum: float = 0.0,
        velocity: Sequence[Tensor | None] = (),
        starts: Sequence[Tensor] = (),
        sums: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Take a step for each batch, in place: with step size ``rate``, ``t ← t - rate · g``.

        Args:
            trained: the tensors, with the shapes, types and layouts of those that were traced.
            fixed: likewise.
            inputs: a tensor for each step.
            targets: likewise.
            rates: step sizes, one for each trained tensor.
            momentum: of those tensors that have a velocity v: ``v ← momentum · v + g; t ← t - rate · v``.
            velocity: these, changed in place; None for others.
            starts: the trained tensors before the first step, for those with a sum.
            sums: where gradients are added up; None where they are not. A tensor with a sum is ``start - rate · sum`` after a step.

        Returns:
            The losses, with the steps along dimension 0.
        """
        moving = frozenset(place for place, one in enumerate(velocity) if one is not None)
        summed = frozenset(place for place, one in enumerate(sums) if one is not None)
        # A list has no gaps: what a program does not use is filled with anything.
        velocity = (
            [tensor if one is None else one for one, tensor in zip(velocity, trained, strict=True)]
            if moving
            else []
        )
        sums, starts = (
            (
                [tensor if one is None else one for one, tensor in zip(sums, trained, strict=True)],
                starts,
            )
            if summed
            else ([], [])
        )
        # An optimised program would be another one after its first runs.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it is documented
            losses: Tensor = self._compile(moving, summed)(
                list(trained),
                list(fixed),
                self._constants,
                list(inputs),
                list(targets),
                list(rates),
                momentum,
                velocity,
                list(starts),
                sums,
            )
        return losses

    def _compile(self, moving: frozenset[int], summed: frozenset[int]) -> Any:
        if (moving, summed) not in self._compiled:
            unit = torch.jit.CompilationUnit(
                "".join(f"{line}\n" for line in self._lines(moving, summed))
            )
            self._compiled[moving, summed] = unit.steps
        return self._compiled[moving, summed]

    def _lines(self, moving: frozenset[int], summed: frozenset[int]) -> Iterator[str]:
        """The program's text."""
        given = [node for node in self._graph.nodes if node.op == "placeholder"]
        trained, fixed, (inputs, targets) = (
            given[: self._num_trained],
            given[self._num_trained : -2],
            given[-2:],
        )
        constants = [node for node in self._graph.nodes if node.op == "get_attr"]
        loss, *gradients = _outputs(self._graph)
        updates = [
            _update(place, node, gradient, trained, moves=place in moving, sums=place in summed)
            for place, (node, gradient) in enumerate(zip(trained, gradients, strict=True))
            if gradient is not None
        ]
        lists = ("trained", "fixed", "constants", "inputs", "targets", "velocity", "starts", "sums")
        types = {
            **dict.fromkeys(lists, "List[Tensor]"),
            "rates": "List[float]",
            "momentum": "float",
        }
        order = (
            "trained",
            "fixed",
            "constants",
            "inputs",
            "targets",
            "rates",
            "momentum",
            "velocity",
            "starts",
            "sums",
        )
        yield f"def steps({', '.join(f'{name}: {types[name]}' for name in order)}) -> Tensor:"
        yield "    losses: List[Tensor] = []"
        for name, nodes in (("trained", trained), ("fixed", fixed), ("constants", constants)):
            yield from (f"    {_name(node)} = {name}[{place}]" for place, node in enumerate(nodes))
        yield "    for step in range(len(inputs)):"
        yield f"        {_name(inputs)} = inputs[step]"
        yield f"        {_name(targets)} = targets[step]"
        yield from (f"        {line}" for line in _body(self._graph, trained, loss, updates))
        yield f"        losses.append({_name(loss)})"
        yield "    return torch.stack(losses)"


def _outputs(graph: Graph) -> list[Any]:
    """The loss, and a gradient, or None, for each trained tensor."""
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def _simplify(graph: Graph) -> None:
    """Take out of a graph what gives its argument back."""
    mutable = any(_is_mutable(node) for node in graph.nodes)
    for node in list(graph.nodes):
        argument = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(argument, Node) and (
            _gives_back(node, argument)
            or (not mutable and node.target is TIMES and node.args[1] == 1)
        ):
            node.replace_all_uses_with(argument)
        elif (
            isinstance(argument, Node)
            and _turns(node) is not None
            and _turns(node) == _turns(argument)
        ):
            (before,) = argument.all_input_nodes
            node.replace_all_uses_with(before)


def _gives_back(node: Node, argument: Node) -> bool:
    """Whether a node is its argument by another name."""
    named = node.target in (aten.detach.default, aten.alias.default)
    return named or (
        node.target in (aten.expand.default, aten.view.default)
        and _layout(node) == _layout(argument)
    )


def _layout(node: Node) -> tuple[object, ...]:
    tensor = node.meta["val"]
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _turns(node: Node) -> set[int] | None:
    """The two dimensions that a node exchanges."""
    if node.target is aten.t.default:
        return {0, 1}
    if node.target is aten.transpose.int:
        return {dimension % node.meta["val"].ndim for dimension in node.args[1:]}
    return None


def _depends_on_values(node: Node) -> bool:
    """Whether a node's shape is another one for other values."""
    if (
        not isinstance(node.target, OpOverload)
        or torch.Tag.dynamic_output_shape not in node.target.tags
    ):
        return False
    indices = node.args[1] if node.target is aten.index.Tensor else None
    masks = (torch.bool, torch.uint8)
    return not isinstance(indices, list | tuple) or any(
        isinstance(one, Node) and one.meta["val"].dtype in masks for one in indices
    )


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _changed(node: Node) -> Iterator[Node]:
    """The arguments that a node changes."""
    if _is_mutable(node):
        for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]  # an OpOverload
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if (
                argument.alias_info is not None
                and argument.alias_info.is_write
                and isinstance(value, Node)
            ):
                yield value


def _owner(node: Node) -> Node:
    """The node whose memory a node is a view of: itself, unless it is one."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        if node.target is not operator.getitem:
            returned = node.target._schema.returns if isinstance(node.target, OpOverload) else []
            if not any(one.alias_info is not None for one in returned):
                break
        node = node.args[0]
    return node


def _product(gradient: Node, trained: Sequence[Node]) -> tuple[str, Node, Node] | None:
    """What adds a gradient that is a product to a tensor, and the product's operands as they are then to be given: turned, or not.

    None for other gradients, and where an operand is itself trained: it would have changed by then.
    """
    node = (
        gradient.args[0]
        if _turns(gradient) is not None and isinstance(gradient.args[0], Node)
        else gradient
    )
    if node.target not in PRODUCTS or (
        node is not gradient
        and _turns(gradient) != {node.meta["val"].ndim - 2, node.meta["val"].ndim - 1}
    ):
        return None
    operands = [
        operand
        for operand in node.args
        if isinstance(operand, Node) and _owner(operand) not in trained
    ]
    return (PRODUCTS[node.target], operands[0], operands[1]) if len(operands) == 2 else None


def _added(target: str, gradient: Node, product: tuple[str, Node, Node] | None, factor: str) -> str:
    """The line that adds a gradient, times a factor, to a tensor."""
    if product is None:
        return f"{target}.add_({_name(gradient)}, alpha={factor})"
    add, left, right = product
    if gradient.target in PRODUCTS:
        return f"{target}.{add}({_name(left)}, {_name(right)}, beta=1.0, alpha={factor})"
    return f"{target}.{add}({_name(right)}.transpose(-2, -1), {_name(left)}.transpose(-2, -1), beta=1.0, alpha={factor})"


class Update(NamedTuple):
    """What changes a trained tensor: its node, what has to be computed before, and the lines."""

    trained: Node
    needs: tuple[Node, ...]
    lines: tuple[str, ...]


def _update(
    place: int, node: Node, gradient: Node, trained: Sequence[Node], *, moves: bool, sums: bool
) -> Update:
    product = (
        _product(gradient, trained)
        if not any(_is_mutable(one) for one in node.graph.nodes)
        else None
    )
    needs = (gradient,) if product is None else product[1:]
    if sums:
        step = (
            f"torch.add(starts[{place}], sums[{place}], alpha=-rates[{place}], out={_name(node)})"
        )
        return Update(node, needs, (_added(f"sums[{place}]", gradient, product, "1.0"), step))
    if moves:
        step = f"{_name(node)}.add_(velocity[{place}], alpha=-rates[{place}])"
        return Update(
            node,
            needs,
            (
                f"velocity[{place}].mul_(momentum)",
                _added(f"velocity[{place}]", gradient, product, "1.0"),
                step,
            ),
        )
    return Update(node, needs, (_added(_name(node), gradient, product, f"-rates[{place}]"),))


def _body(
    graph: Graph, trained: Sequence[Node], loss: Node, updates: Sequence[Update]
) -> Iterator[str]:
    """The lines of a step: operations, and each update as soon as nothing reads its tensor any more, while that is in the cache."""
    given = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    for node in graph.nodes:
        if any(_owner(changed) in given for changed in _changed(node)):
            raise TypeError(f"{node.target} changes what the program was given")
    used = _reached(
        [
            loss,
            *(node for update in updates for node in update.needs),
            *filter(_is_mutable, graph.nodes),
        ]
    )
    waits = {
        update: {node for node in used if node in update.needs or _reads(node, update.trained)}
        - given
        for update in updates
    }
    read = {loss, *(node for update in updates for node in update.needs)}
    for node in graph.nodes:
        if node not in used or node in given:
            continue
        yield _operation(node)
        if node in read and _owner(node) in trained:  # it is a view of what is about to change
            yield f"{_name(node)} = {_name(node)}.clone()"
        for update, awaited in list(waits.items()):
            awaited.discard(node)
            if not awaited:
                yield from update.lines
                del waits[update]
    for update in waits:
        yield from update.lines


def _reads(node: Node, tensor: Node) -> bool:
    return any(_owner(argument) is tensor for argument in node.all_input_nodes)


def _reached(nodes: Iterable[Node]) -> set[Node]:
    """These nodes, and all that they are computed from."""
    waiting, reached = list(nodes), set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += node.all_input_nodes
    return reached


def _operation(node: Node) -> str:
    if node.target is operator.getitem:
        return f"{_name(node)} = {_literal(node.args[0])}[{node.args[1]}]"
    if isinstance(node.target, OpOverload):
        words = [
            *map(_literal, node.args),
            *(f"{name}={_literal(value)}" for name, value in node.kwargs.items()),
        ]
        # A batch may lie in memory in another way than the one that was traced.
        view = node.target is aten.view.default and not any(
            _is_mutable(one) for one in node.graph.nodes
        )
        name = "aten::reshape" if view else node.target._schema.name
        return f"{_name(node)} = torch.ops.{name.replace('::', '.')}({', '.join(words)})"
    raise TypeError(f"{node.target}: no operation of torch")


def _name(node: Node) -> str:
    return f"v_{node.name}"


def _literal(value: Any) -> str:
    """An argument, as a program writes it."""
    if isinstance(value, Node):
        return _name(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    raise TypeError(f"{value!r}: no argument of a program")
