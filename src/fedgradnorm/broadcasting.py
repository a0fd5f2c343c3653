"""Whether a loss or a metric compares every output with every target, because shapes broadcast.

The function is watched while it runs. Its tensors are marked as derived from the outputs, from the
targets, or from both.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedgradnorm.errors import warn

SAMPLE_SIZES = (62, 58, 46, 38, 34, 26, 22, 14, 10, 6, 4, 3, 2)
"""Numbers of examples to try, even ones first: some losses take examples in pairs."""

OUTPUTS, TARGETS = frozenset({"outputs"}), frozenset({"targets"})

ADDING = ("unsqueeze", "view", "_unsafe_view", "reshape")
"""Operations that add a dimension on purpose."""


@dataclass
class Pairing:
    """What a function does with outputs and targets.

    Attributes:
        broadcasts: an operation compares each output with each target, because one of the two
            lacks a dimension.
        explicit: it does so with a dimension that the function has added, which may be meant.
        leaves_torch: no number is read from a tensor in torch; the function may use ``.numpy()``.
    """

    broadcasts: bool = False
    explicit: bool = False
    leaves_torch: bool = True


def sample_size(shapes: Sequence[Sequence[int]], most: int) -> int | None:
    """A number of examples up to ``most`` that is the size of no other dimension, or None.

    >>> sample_size([(40, 62), (40,)], 64)
    58
    """
    others = {length for shape in shapes for length in shape[1:]}
    return next((size for size in SAMPLE_SIZES if size <= most and size not in others), None)


def watched(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, targets: Tensor
) -> Pairing:
    """Run a function and say what it does with outputs and targets.

    No other dimension may have the size of dimension 0. Without torch's dispatch modes, nothing is
    watched, and there is one warning.
    """
    base = dispatch_mode()
    if base is None:
        return Pairing()
    watch = _Watch(outputs, targets)

    class Mode(base):  # type: ignore[misc, valid-type]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            """Without this, torch imports its whole compiler, which takes a second."""
            return False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            watch.ran(func.overloadpacket.__name__, list(_tensors((args, kwargs))), result)
            return result

    with torch.no_grad(), warnings.catch_warnings(), Mode():
        warnings.simplefilter("ignore")
        value = function(outputs, targets)
    if isinstance(value, Tensor) and watch.origin(value):
        watch.pairing.leaves_torch = False
    return watch.pairing


@cache
def dispatch_mode() -> Any:
    """The class that sees every operation of torch, or None. It has no public name."""
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        warn(
            f"torch {torch.__version__} has no torch.utils._python_dispatch: it is not checked "
            "whether losses and metrics broadcast targets against outputs"
        )
        return None
    return TorchDispatchMode


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


class _Watch:
    """Remembers what each tensor is derived from, and looks at every operation."""

    def __init__(self, outputs: Tensor, targets: Tensor) -> None:
        self.number, self.pairing = len(outputs), Pairing()
        self._origins, self._widened = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._origins[outputs], self._origins[targets] = OUTPUTS, TARGETS

    def origin(self, tensor: Tensor) -> frozenset[str]:
        origin: frozenset[str] = self._origins.get(tensor, frozenset())
        return origin

    def ran(self, name: str, operands: Sequence[Tensor], result: object) -> None:
        """Take note of an operation that ran."""
        origin = frozenset().union(*(self.origin(operand) for operand in operands))
        if not origin:
            return
        if name == "_local_scalar_dense":
            self.pairing.leaves_torch = False
        for tensor in _tensors(result):
            self._look(name, operands, tensor)
            self._origins[tensor] = origin | self.origin(tensor)
            if self._is_widened(name, operands, tensor):
                self._widened[tensor] = True

    def _look(self, name: str, operands: Sequence[Tensor], result: Tensor) -> None:
        """Notice an operation whose result pairs each example with each other one."""
        shapes = [operand.shape for operand in operands]
        if any(self._times(shape) > 1 for shape in shapes):
            return
        if name == "expand":
            widens = result.ndim > operands[0].ndim and self._times(result.shape) > 1
            if widens and _in_broadcast_tensors():
                self.pairing.broadcasts = True
            return
        try:
            together = np.broadcast_shapes(*shapes)  # torch's would import its compiler first
        except ValueError:
            return
        if self._times(together) < 2 or tuple(result.shape) != together:
            return
        for output in operands:
            for target in operands:
                of_both = self.origin(output) >= OUTPUTS and self.origin(target) >= TARGETS
                if not of_both or output.ndim == target.ndim:
                    continue
                wider = output if output.ndim > target.ndim else target
                if wider in self._widened:
                    self.pairing.explicit = True
                else:
                    self.pairing.broadcasts = True

    def _times(self, shape: Sequence[int]) -> int:
        """How many dimensions have the number of examples."""
        return sum(length == self.number for length in shape)

    def _is_widened(self, name: str, operands: Sequence[Tensor], result: Tensor) -> bool:
        """Whether a tensor has a dimension that the function added on purpose."""
        if name in ADDING and result.ndim > operands[0].ndim:
            return True
        return any(tensor in self._widened and tensor.ndim <= result.ndim for tensor in operands)


def _in_broadcast_tensors() -> bool:
    """Whether torch.broadcast_tensors, which torch's losses call, is running."""
    frame = inspect.currentframe()
    for _ in range(11):
        if frame is None:
            return False
        if frame.f_code.co_name == "broadcast_tensors":
            return True
        frame = frame.f_back
    return False
