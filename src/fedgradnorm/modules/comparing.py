"""Whether two modules, or two functions, do the same."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import BuiltinMethodType, CellType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
"""The classes of objects that random numbers are drawn from."""

OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes that every module has."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of a module that hold functions which users add to it."""

VALUES = (NoneType, int, float, complex, str, bytes)
COLLECTIONS = (list, tuple, set, frozenset)

DEEPEST = 20
"""At this depth, objects inside of others are compared by identity."""


def kind_of(function: Callable[..., object]) -> object:
    """A key that is the same for functions that do the same.

    It is the identity, or for partials of one function with equal arguments these arguments.
    """
    if isinstance(function, partial):
        try:
            key = (kind_of(function.func), function.args, frozenset(function.keywords.items()))
            hash(key)
        except TypeError:
            return id(function)
        return key
    return id(function)


def makeup_of(module: nn.Module) -> object:
    """A key that is the same for modules that do the same with the same parameters and buffers.

    It holds types, shapes, hooks and other attributes. An object whose attributes cannot be read,
    such as a generator, is only equal to itself.
    """
    tensors = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    layout = tuple(
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors
    )
    parts = module.named_modules(remove_duplicate=False)
    try:
        return layout, tuple((name, comparable(part)) for name, part in parts)
    except RecursionError:
        return _Itself(module)


def comparable(value: Any, inside: tuple[int, ...] = ()) -> object:
    """A key for a value, to be hashed and compared. Tensors in it are compared elsewhere.

    Args:
        value: any value.
        inside: the addresses of the objects that the value is part of.
    """
    kind, within = type(value), (*inside, id(value))
    if isinstance(value, float):
        return kind, repr(value)  # so that a NaN is equal to itself
    if isinstance(value, (*VALUES, type, torch.dtype, torch.device)):
        return kind, value
    if id(value) in inside or isinstance(value, Tensor):
        return kind
    if isinstance(value, nn.Module):
        hooks = [list(vars(value).get(name, {}).values()) for name in HOOKS]
        own = {name: held for name, held in vars(value).items() if name not in OF_TORCH}
        return kind, comparable([hooks, own], within)
    if isinstance(value, Mapping | list | tuple | deque):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return kind, tuple(
            (comparable(key, within), comparable(held, within)) for key, held in pairs
        )
    if isinstance(value, set | frozenset):
        return kind, frozenset(comparable(held, within) for held in value)
    if isinstance(value, np.ndarray):
        return kind, value.shape, value.tobytes()
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        parts = [cells, value.__defaults__, value.__kwdefaults__, vars(value)]
        return value.__code__, comparable(parts, within)
    if isinstance(value, partial):
        return kind, comparable([value.func, value.args, value.keywords], within)
    if isinstance(value, MethodType):
        return kind, comparable([value.__func__, value.__self__], within)
    readable = len(inside) < DEEPEST and not isinstance(value, GENERATORS)
    if readable and (attributes := _attributes_of(value)):
        return kind, comparable(attributes, within)
    return _Itself(value)


class _Itself:
    """Equal for one object only. The object is kept alive, so that no other gets its address."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that the user's class added and that hold no tensor, module or generator."""
    return {
        name: value
        for name, value in attributes.items()
        if name not in OF_TORCH and is_plain(value)
    }


def is_plain(value: object, seen: set[int] | None = None) -> bool:
    """Whether there is no tensor, module or generator in a value."""
    seen = set() if seen is None else seen
    if isinstance(value, (Tensor, nn.Module, *GENERATORS)):
        return False
    if isinstance(value, BuiltinMethodType):
        return not isinstance(value.__self__, GENERATORS)
    if isinstance(value, (*VALUES, type)) or id(value) in seen:
        return True
    seen.add(id(value))
    parts: Iterable[object]
    if isinstance(value, Mapping):
        parts = chain.from_iterable(value.items())
    elif isinstance(value, COLLECTIONS):
        parts = value
    elif isinstance(value, partial):
        parts = value.func, *value.args, *value.keywords.values()
    elif isinstance(value, MethodType):
        parts = [value.__self__]
    else:
        parts = _attributes_of(value).values()
    return all(is_plain(part, seen) for part in parts)


def is_value(value: object) -> bool:
    """Whether a value is made of numbers, texts and arrays alone, so that it can be compared."""
    if isinstance(value, Mapping):
        return all(is_value(part) for part in chain.from_iterable(value.items()))
    if isinstance(value, COLLECTIONS):
        return all(is_value(part) for part in value)
    return isinstance(value, (*VALUES, np.ndarray, np.generic))


def slots_of(kind: type) -> Iterator[str]:
    """The names of a class's slots for ``getattr``: private ones begin with the class's name."""
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                yield f"_{base.__name__.lstrip('_')}{name}"
            elif name not in ("__dict__", "__weakref__"):
                yield name


def _attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object; empty where they cannot be read."""
    try:
        slots = {name: getattr(value, name, None) for name in slots_of(type(value))}
        return {**getattr(value, "__dict__", {}), **slots}
    except Exception:  # noqa: BLE001  # a user's __getattr__ may raise anything
        return {}
