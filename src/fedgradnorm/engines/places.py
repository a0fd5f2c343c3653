"""Places that hold Python values: looked at, copied, and set back to a copy."""

import inspect
import random
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgradnorm.modules import GENERATORS

VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type(...)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
"""Types whose objects never change: these are compared by value."""


class Place:
    """Something that holds values.

    Args:
        name: the place in words.
        read: returns the values.
        write: sets them; None where they cannot be set.
        copied: copies them.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Any],
        write: Callable[[Any], object] | None = None,
        copied: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.name, self._read, self._write, self._copied = name, read, write, copied

    def look(self) -> tuple[Any, ...]:
        """What it holds: immutable values as they are, others by identity."""
        value = self._read()
        if isinstance(value, Mapping):
            return tuple((_token(key), _token(held)) for key, held in value.items())
        if isinstance(value, set | frozenset):
            return (frozenset(map(_token, value)),)
        return tuple(map(_token, value if isinstance(value, list | tuple | deque) else [value]))

    def copy(self) -> Any:
        """A copy, which also keeps alive what is compared by identity."""
        return self._copied(self._read())

    def set(self, copy: Any) -> None:
        """Let it hold this again."""
        if self._write is not None:
            self._write(copy)


def _token(value: Any) -> object:
    """What two looks at a value have in common as long as it is the same."""
    if isinstance(value, float):
        return float, repr(value)  # so that NaN equals itself
    if isinstance(value, VALUES):
        return type(value), value if not isinstance(value, slice | range) else repr(value)
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return id(value), value.shape, zlib.crc32(np.ascontiguousarray(value).data)
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if isinstance(value, GENERATORS):
        return id(value), repr(_state_of(value))
    return id(value)


def generator_at(name: str, generator: Any) -> Place:
    """The state of a random generator."""
    return Place(name, lambda: generator, partial(_set_state, generator), _state_of)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    else:
        generator.set_state(state)


def tensor_at(name: str, tensor: Tensor) -> Place:
    """The values of a tensor."""
    copied = lambda held: held.detach().clone()  # noqa: E731
    return Place(name, lambda: tensor, torch.no_grad()(lambda copy: tensor.copy_(copy)), copied)


def array_at(name: str, array: np.ndarray) -> Place:
    """The values of a NumPy array."""
    write = partial(np.copyto, array) if array.flags.writeable else None
    return Place(name, lambda: array, write, np.copy)


def container_at(name: str, container: Any) -> Place:
    """What a list, a dict, a set or the like holds."""

    def copied(value: Any) -> Any:
        return value.copy() if isinstance(value, dict | list | set | deque) else value

    def write(copy: Any) -> None:
        if isinstance(container, list):
            container[:] = copy
        elif isinstance(container, dict):
            _refill(container, dict(container), copy)
        elif isinstance(container, set | deque):
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(copy)

    return Place(name, lambda: container, write, copied)


def attributes_at(name: str, attributes: dict[str, Any], hidden: frozenset[str]) -> Place:
    """An object's attributes, except the hidden ones."""

    def read() -> dict[str, Any]:
        return {key: value for key, value in attributes.items() if key not in hidden}

    return Place(name, read, lambda copy: _refill(attributes, read(), copy))


def _refill(attributes: dict[str, Any], own: Mapping[str, Any], copy: Mapping[str, Any]) -> None:
    for key in own.keys() - copy.keys():
        del attributes[key]
    attributes.update(copy)


def _assign(owner: object, copy: Mapping[str, Any]) -> None:
    for key, value in copy.items():
        if inspect.getattr_static(owner, key, None) is not value:
            setattr(owner, key, value)


def slots_at(name: str, owner: object, slots: Iterable[str]) -> Place:
    """The slots of an object."""
    write = partial(_assign, owner)
    return Place(name, lambda: {key: getattr(owner, key, None) for key in slots}, write)


def class_at(kind: type) -> Place:
    """The attributes and methods of a class."""

    def read() -> dict[str, Any]:
        return {
            key: value
            for key, value in vars(kind).items()
            if not key.startswith("__") or isinstance(value, types.FunctionType)
        }

    return Place(f"an attribute of {kind.__name__}", read, partial(_assign, kind))


def function_at(function: types.FunctionType) -> Place:
    """The code, the defaults and the attributes of a function."""
    parts = ("__code__", "__defaults__", "__kwdefaults__")

    def read() -> dict[str, Any]:
        return {**vars(function), **{key: getattr(function, key) for key in parts}}

    return Place(f"what {function.__qualname__} is", read, partial(_assign, function))


def cells_at(name: str, cells: Mapping[str, types.CellType]) -> Place:
    """The variables of a closure."""

    def write(copy: Mapping[str, Any]) -> None:
        for key, value in copy.items():
            cells[key].cell_contents = value

    return Place(name, partial(held_by_cells, cells), write)


def held_by_cells(cells: Mapping[str, types.CellType]) -> dict[str, Any]:
    """The variables' values, by name; None for those that are not set yet."""
    values = {}
    for name, cell in cells.items():
        try:
            values[name] = cell.cell_contents
        except ValueError:
            values[name] = None
    return values


def globals_at(name: str, namespace: dict[str, Any], names: set[str]) -> Place:
    """The values of a namespace that have these names."""
    name, write = f"a global of {name}", namespace.update
    return Place(name, lambda: {key: namespace.get(key) for key in sorted(names)}, write)
