"""Whether a loss or a metric compares every output with every target, because their shapes broadcast.

The function is watched while it runs. What it makes is marked as derived from the outputs, from the targets, or from both.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Pairing", "sample_size", "watched"]

SAMPLE_SIZES = (62, 58, 46, 38, 34, 26, 22, 14, 10, 6, 4, 3, 2)
"""Numbers of examples to try a function with: even ones first, because some losses take examples in pairs."""

OUTPUTS, TARGETS = frozenset({"outputs"}), frozenset({"targets"})

ADDING = ("unsqueeze", "view", "_unsafe_view", "reshape")
"""Operations that give a tensor another dimension on purpose."""


@dataclass
class Pairing:
    """What a function does with outputs and targets.

    Attributes:
        broadcasts: whether an operation compares each output with each target because one of the two lacks a dimension.
        explicit: whether it does so with a dimension that the function has added itself, which may be meant.
        leaves_torch: whether no number that comes of tensors is read in torch, such as with ``.numpy()``.
    """

    broadcasts: bool = False
    explicit: bool = False
    leaves_torch: bool = True


def sample_size(shapes: Sequence[Sequence[int]], most: int) -> int | None:
    """A number of examples, at most ``most``, that no other dimension of these shapes has; None if there is none.

    >>> sample_size([(40, 62), (40,)], 64)
    58
    """
    others = {length for shape in shapes for length in shape[1:]}
    return next(
        (number for number in SAMPLE_SIZES if number <= most and number not in others), None
    )


def watched(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, targets: Tensor
) -> Pairing:
    """Run a function and say what it does with outputs and targets. No other dimension may be as long as dimension 0."""
    watch = _Watch(outputs, targets)
    with torch.no_grad(), warnings.catch_warnings(), watch:
        warnings.simplefilter("ignore")
        value = function(outputs, targets)
    if isinstance(value, Tensor) and watch.origin(value):
        watch.pairing.leaves_torch = False
    return watch.pairing


class _Watch(TorchDispatchMode):
    """Keeps for each tensor what it is derived from, and looks at every operation."""

    def __init__(self, outputs: Tensor, targets: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.pairing = len(outputs), Pairing()
        self._origins, self._widened = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._origins[outputs], self._origins[targets] = OUTPUTS, TARGETS

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without this, torch would import all of its compiler first, which takes a second."""
        return False

    def origin(self, tensor: Tensor) -> frozenset[str]:
        origin: frozenset[str] = self._origins.get(tensor, frozenset())
        return origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origin = frozenset().union(*(self.origin(operand) for operand in operands))
        if not origin:
            return result
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.pairing.leaves_torch = False
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._look(name, operands, made)
                self._origins[made] = origin | self.origin(made)
                if self._is_widened(name, operands, made):
                    self._widened[made] = True
        return result

    def _look(self, name: str, operands: Sequence[Tensor], made: Tensor) -> None:
        shapes = [operand.shape for operand in operands]
        if any(self._times(shape) > 1 for shape in shapes):
            return
        if name == "expand":
            if (
                made.ndim > operands[0].ndim
                and self._times(made.shape) > 1
                and _in_broadcast_tensors()
            ):
                self.pairing.broadcasts = True
            return
        try:
            together = np.broadcast_shapes(*shapes)  # that of torch would import its compiler first
        except ValueError:
            return
        if self._times(together) < 2 or tuple(made.shape) != together:
            return
        for one in operands:
            for other in operands:
                if (
                    one.ndim != other.ndim
                    and self.origin(one) >= OUTPUTS
                    and self.origin(other) >= TARGETS
                ):
                    wider = one if one.ndim > other.ndim else other
                    if wider in self._widened:
                        self.pairing.explicit = True
                    else:
                        self.pairing.broadcasts = True

    def _times(self, shape: Sequence[int]) -> int:
        return sum(length == self.number for length in shape)

    def _is_widened(self, name: str, operands: Sequence[Tensor], made: Tensor) -> bool:
        if name in ADDING and made.ndim > operands[0].ndim:
            return True
        return any(operand in self._widened and operand.ndim <= made.ndim for operand in operands)


def _in_broadcast_tensors() -> bool:
    """Whether torch.broadcast_tensors, which torch's losses call, runs just now."""
    frame = sys._getframe(1)
    for _ in range(8):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == "broadcast_tensors":
            return True
    return False
