"""A traced step written as the source of a function that takes many of them.

The text is valid in Python and in TorchScript. A matrix product that is a weight's gradient goes
straight into the weight, or into the gradients' sum, so the gradient itself is never written.
"""

import math
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fedgradnorm.engines import graphs
from fedgradnorm.engines.failures import Untraceable
from fedgradnorm.engines.graphs import owner

PARAMETERS = {
    **dict.fromkeys(("trained", "fixed", "constants", "inputs", "targets"), "List[Tensor]"),
    "rates": "List[float]",
    "momentum": "float",
    **dict.fromkeys(("velocity", "starts", "sums"), "List[Tensor]"),
}
"""What the function takes, in this order, and the types."""


class Update(NamedTuple):
    """What changes a trained tensor: its node, what has to be computed before, and the lines."""

    trained: Node
    needs: tuple[Node, ...]
    lines: tuple[str, ...]


def source_of(
    graph: Graph, num_trained: int, moving: Collection[int], summed: Collection[int]
) -> list[str]:
    """The lines of a function ``steps`` that takes a step for each batch.

    Args:
        graph: a traced step: of trained and fixed tensors, inputs and targets.
        num_trained: the number of trained tensors.
        moving: the places of those that have a velocity.
        summed: the places of those whose gradients are summed.

    Raises:
        Untraceable: an operation changes what the function was given, or has no source.
    """
    given = graph.find_nodes(op="placeholder")
    trained, fixed, (inputs, targets) = given[:num_trained], given[num_trained:-2], given[-2:]
    loss, *gradients = graphs.outputs_of(graph)
    updates = [
        _update(place, node, gradient, trained, moves=place in moving, sums=place in summed)
        for place, (node, gradient) in enumerate(zip(trained, gradients, strict=True))
        if gradient is not None
    ]
    words = ", ".join(f"{name}: {kind}" for name, kind in PARAMETERS.items())
    constants = graph.find_nodes(op="get_attr")
    lists = {"trained": trained, "fixed": fixed, "constants": constants}
    return [
        f"def steps({words}) -> Tensor:",
        "    losses: List[Tensor] = []",
        *(
            f"    {_name(node)} = {name}[{place}]"
            for name, nodes in lists.items()
            for place, node in enumerate(nodes)
        ),
        "    for step in range(len(inputs)):",
        f"        {_name(inputs)} = inputs[step]",
        f"        {_name(targets)} = targets[step]",
        *(f"        {line}" for line in _body(graph, trained, loss, updates)),
        f"        losses.append({_name(loss)})",
        "    return torch.stack(losses)",
    ]


def _update(
    place: int, node: Node, gradient: Node, trained: Sequence[Node], *, moves: bool, sums: bool
) -> Update:
    added = None if graphs.writes(node.graph) else graphs.product(gradient, trained)
    needs = (gradient,) if added is None else added[1:3]
    name, rate = _name(node), f"-rates[{place}]"

    def add(target: str, factor: str) -> str:
        if added is None:
            return f"{target}.add_({_name(gradient)}, alpha={factor})"
        method, left, right = added[0], _name(added[1]), _name(added[2])
        if added[3]:
            left, right = f"{right}.transpose(-2, -1)", f"{left}.transpose(-2, -1)"
        return f"{target}.{method}({left}, {right}, beta=1.0, alpha={factor})"

    if sums:
        total = f"sums[{place}]"
        step = f"torch.add(starts[{place}], {total}, alpha={rate}, out={name})"
        return Update(node, needs, (add(total, "1.0"), step))
    if moves:
        velocity = f"velocity[{place}]"
        step = f"{name}.add_({velocity}, alpha={rate})"
        return Update(node, needs, (f"{velocity}.mul_(momentum)", add(velocity, "1.0"), step))
    return Update(node, needs, (add(name, rate),))


def _body(
    graph: Graph, trained: Sequence[Node], loss: Node, updates: Sequence[Update]
) -> Iterator[str]:
    """The lines of a step: the operations, and each update as soon as nothing reads its tensor.

    The tensor is then still in the cache.
    """
    given = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    for node in graph.nodes:
        if any(owner(argument) in given for argument in graphs.changed(node)):
            raise Untraceable(f"{node.target} changes what the program was given")
    read = {loss, *(node for update in updates for node in update.needs)}
    used = graphs.reached([*read, *filter(graphs.is_mutable, graph.nodes)]) - given
    waits = {
        update: {node for node in used if node in update.needs or _reads(node, update.trained)}
        for update in updates
    }
    for node in filter(used.__contains__, graph.nodes):
        yield _operation(node)
        if node in read and owner(node) in trained:  # it is a view of what is about to change
            yield f"{_name(node)} = {_name(node)}.clone()"
        for update, awaited in list(waits.items()):
            awaited.discard(node)
            if not awaited:
                yield from update.lines
                del waits[update]
    for update in waits:
        yield from update.lines


def _reads(node: Node, tensor: Node) -> bool:
    return any(owner(argument) is tensor for argument in node.all_input_nodes)


def _operation(node: Node) -> str:
    if node.target is operator.getitem:
        return f"{_name(node)} = {_literal(node.args[0])}[{node.args[1]}]"
    if isinstance(node.target, OpOverload):
        words = [_literal(argument) for argument in node.args]
        if node.target is torch.ops.aten._to_copy.default and not isinstance(node.args[0], Node):
            # `vmap` traces a number beside a stacked tensor as a copy of that number: here it is a
            # tensor, with all its digits.
            kind = ", dtype=torch.float64" if isinstance(node.args[0], float) else ""
            words[0] = f"torch.tensor({words[0]}{kind})"
        words += [f"{name}={_literal(value)}" for name, value in node.kwargs.items()]
        # A batch may lie in memory in another way than the one that was traced.
        view = node.target is torch.ops.aten.view.default and not graphs.writes(node.graph)
        name = "aten::reshape" if view else node.target._schema.name
        return f"{_name(node)} = torch.ops.{name.replace('::', '.')}({', '.join(words)})"
    raise Untraceable(f"{node.target} is not an operation of torch")


def _name(node: Node) -> str:
    return f"v_{node.name}"


def _literal(value: Any) -> str:
    """An argument as source."""
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
    raise Untraceable(f"{value!r} cannot be an argument in a program")
