"""What is read off a traced graph of torch's operations, and what is taken out of it."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: "addmm_", aten.bmm.default: "baddbmm_"}
"""Matrix products, and the method that adds one to a tensor."""


def outputs_of(graph: Graph) -> list[Any]:
    """The loss, and for each trained tensor its gradient, or None."""
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def simplify(graph: Graph) -> None:
    """Bypass the operations that return their argument."""
    mutable = writes(graph)
    for node in list(graph.nodes):
        argument = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(argument, Node):
            continue
        times_one = node.target is aten.mul.Scalar and node.args[1] == 1
        if _gives_back(node, argument) or (times_one and not mutable):
            node.replace_all_uses_with(argument)
        elif _turns(node) is not None and _turns(node) == _turns(argument):
            (before,) = argument.all_input_nodes
            node.replace_all_uses_with(before)


def _gives_back(node: Node, argument: Node) -> bool:
    """Whether a node is its argument under another name."""
    return node.target in (aten.detach.default, aten.alias.default) or (
        node.target in (aten.expand.default, aten.view.default)
        and _layout(node) == _layout(argument)
    )


def _layout(node: Node) -> tuple[object, ...]:
    tensor = node.meta["val"]
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _turns(node: Node) -> set[int] | None:
    """The two dimensions that a node exchanges; None for other nodes."""
    if node.target is aten.t.default:
        return {0, 1}
    if node.target is aten.transpose.int:
        return {dimension % node.meta["val"].ndim for dimension in node.args[1:]}
    return None


def depends_on_values(node: Node) -> bool:
    """Whether a node's shape depends on the values of its arguments."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.dynamic_output_shape not in target.tags:
        return False
    indices = node.args[1] if target is aten.index.Tensor else None
    masks = (torch.bool, torch.uint8)
    return not isinstance(indices, list | tuple) or any(
        isinstance(index, Node) and index.meta["val"].dtype in masks for index in indices
    )


def is_mutable(node: Node) -> bool:
    """Whether a node changes one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def writes(graph: Graph) -> bool:
    """Whether any operation of a graph changes one of its arguments."""
    return any(map(is_mutable, graph.nodes))


def changed(node: Node) -> Iterator[Node]:
    """The arguments that a node changes."""
    if not isinstance(node.target, OpOverload) or not is_mutable(node):
        return
    for place, argument in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        alias = argument.alias_info
        if alias is not None and alias.is_write and isinstance(value, Node):
            yield value


def owner(node: Node) -> Node:
    """The node whose memory a node is a view of: itself, unless it is a view."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        if node.target is not operator.getitem:
            returned = node.target._schema.returns if isinstance(node.target, OpOverload) else []
            if not any(result.alias_info is not None for result in returned):
                break
        node = node.args[0]
    return node


def product(gradient: Node, trained: Sequence[Node]) -> tuple[str, Node, Node, bool] | None:
    """How a gradient that is a matrix product is added to a tensor without being written itself.

    Returns the method that adds it, the operands, and whether the gradient is the product
    transposed. None for other gradients, and where an operand is itself trained, since it would
    have changed by then.
    """
    turned = _turns(gradient)
    node = gradient.args[0] if turned is not None else gradient
    if not isinstance(node, Node) or node.target not in PRODUCTS:
        return None
    ndim = node.meta["val"].ndim
    if turned not in (None, {ndim - 2, ndim - 1}):
        return None
    operands = [part for part in node.args if isinstance(part, Node) and owner(part) not in trained]
    if len(operands) != 2:
        return None
    return PRODUCTS[node.target], operands[0], operands[1], turned is not None


def reached(nodes: Iterable[Node]) -> set[Node]:
    """These nodes, and all that they are computed from."""
    waiting, seen = list(nodes), set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return seen
