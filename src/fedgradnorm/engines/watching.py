"""The Python values that models and losses read: whether a shortcut that was found right is right still.

A program, and whatever else replaces calls of a user's code, keeps what that code read when it was
tried: an attribute, a global, the state of a generator. `Watch` lists all places that the code of a
model and a loss can read, by what its functions name, and says whether one has another value.
"""

import argparse
import datetime as dt
import decimal
import dis
import enum
import fractions
import functools
import logging
import os
import pathlib
import random
import re
import sys
import threading
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgradnorm.modules import GENERATORS, slots_of

__all__ = ["CannotTell", "Watch"]

MOST_PLACES = 20_000
"""With more of them, to look at a model's Python takes longer than a shortcut can save."""

HASHED_BYTES = 2**26
"""Larger NumPy arrays are not looked at: that would take longer than a shortcut can save."""

TRUSTED = frozenset({"torch", "numpy", "fedgradnorm", *sys.stdlib_module_names})
"""Packages whose functions read nothing that changes but what they are given."""

NOT_TRUSTED = frozenset(
    {
        "time",
        "datetime",
        "secrets",
        "uuid",
        "pathlib",
        "io",
        "socket",
        "subprocess",
        "tempfile",
        "contextvars",
        "ctypes",
        "multiprocessing",
    }
)
"""Of these, what reads the clock, files, or the world."""

READS_FREELY = frozenset(
    {"open", "read_text", "read_bytes", "eval", "exec", "compile", "input", "__import__"}
)
"""Functions that may read whatever there is."""

NOT_CALLED = frozenset(
    {
        "__init__",
        "__new__",
        "__init_subclass__",
        "__set_name__",
        "__class_getitem__",
        "__repr__",
        "__str__",
        "__format__",
        "__del__",
    }
    | {
        "__reduce__",
        "__reduce_ex__",
        "__getstate__",
        "__setstate__",
        "__copy__",
        "__deepcopy__",
        "__dir__",
        "__sizeof__",
    }
)
"""Special methods that no step calls by itself. The others may be called without being named."""

NEVER_CHANGING = (
    *(
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
    ),
    *(
        types.ClassMethodDescriptorType,
        types.GenericAlias,
        types.UnionType,
        type(NotImplemented),
        types.CodeType,
    ),
    *(
        np.ufunc,
        np.dtype,
        torch.finfo,
        torch.iinfo,
        torch._ops.OpOverload,
        torch._ops.OpOverloadPacket,
        torch.jit.ScriptFunction,
    ),
    *(
        re.Pattern,
        enum.Enum,
        decimal.Decimal,
        fractions.Fraction,
        dt.date,
        dt.time,
        dt.timedelta,
        pathlib.PurePath,
    ),
    *(logging.Logger, logging.LoggerAdapter),
)
"""Objects whose value never changes, or that no step reads anything of."""

PLAIN_HOLDERS = (types.SimpleNamespace, argparse.Namespace)
"""Classes of the standard library that only hold what a user puts into them."""

STATE = frozenset({"_parameters", "_buffers"})
"""Where a module has its tensors."""

OF_TORCH = (
    frozenset(vars(nn.Module()))
    - STATE
    - {
        *(
            "_modules",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    }
)
"""The attributes of every module that training itself changes, or that no forward pass reads."""

VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, slice, range, type(...)),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


class CannotTell(Exception):  # noqa: N818  # it is an answer
    """A model or a loss reads something whose value cannot be seen, such as an iterator."""


class Watch:
    """The values that some modules and functions read, as they are when the watch begins.

    Args:
        models: modules whose parameters and buffers do not count.
        functions: what else is called.

    Raises:
        CannotTell: there is something whose value cannot be seen, or there are too many places.
    """

    def __init__(self, models: Iterable[nn.Module], functions: Iterable[object]) -> None:
        self._places = list(_Walk(models, functions).places())
        self._seen = [place.look() for place in self._places]
        self._copies = [place.copy() for place in self._places]

    def changed(self) -> str | None:
        """The first place that has another value now, in words; None where there is none."""
        for place, seen in zip(self._places, self._seen, strict=True):
            if place.look() != seen:
                return place.name
        return None

    def put_back(self) -> None:
        """Set the places to the values that they had, as far as Python can."""
        for place, seen, copy in zip(self._places, self._seen, self._copies, strict=True):
            if place.look() != seen:
                place.set(copy)


class _Place:
    """Something that holds values.

    Args:
        name: it in words.
        read: gives what it holds.
        write: sets what it holds; without it, that cannot be set.
        copied: how what it holds is copied.
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
        return float, repr(value)  # a NaN is the same as itself here
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


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return (
        generator.get_state().numpy().tobytes()
        if isinstance(generator, torch.Generator)
        else generator.get_state()
    )


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    else:
        generator.set_state(state)


class _Walk:
    """All places that can be read from some roots on, each once."""

    def __init__(self, models: Iterable[nn.Module], functions: Iterable[object]) -> None:
        models = list(models)
        self._parts = {id(part) for model in models for part in model.modules()}
        self._waiting: list[tuple[str, object]] = [
            (_name_of(root), root) for root in (*models, *functions)
        ]
        self._reached: set[int] = set()
        self._kept: list[object] = []  # so that no address is used twice
        self._names = {"forward", "__call__"}
        self._methods: list[tuple[str, types.FunctionType]] = []
        self._namespaces: dict[int, tuple[str, dict[str, Any], set[str]]] = {}
        self._modules: list[types.ModuleType] = []

    def places(self) -> Iterator[_Place]:
        """The places. Raises CannotTell."""
        count = 0
        while self._waiting or self._find_called():
            for place in self._visit(*self._waiting.pop()):
                count += 1
                if count > MOST_PLACES:
                    raise CannotTell(f"there are more than {MOST_PLACES:,} places to look at")
                yield place
        for name, namespace, names in self._namespaces.values():
            yield _names_in(name, namespace, names)

    def _find_called(self) -> bool:
        """Let the methods wait whose names some function has: they may be called."""
        self._waiting += [
            (name, method) for name, method in self._methods if method.__name__ in self._names
        ]
        self._methods = [
            (name, method) for name, method in self._methods if method.__name__ not in self._names
        ]
        return bool(self._waiting)

    def _visit(self, name: str, value: Any) -> Iterator[_Place]:
        if isinstance(value, VALUES) or id(value) in self._reached:
            return
        self._reached.add(id(value))
        self._kept.append(value)
        if isinstance(value, random.SystemRandom):
            raise CannotTell(f"{name} draws from the system")
        if isinstance(value, GENERATORS):
            yield _Place(name, lambda: value, partial(_set_state, value), _state_of)
        elif isinstance(value, Tensor):
            yield _Place(
                name, lambda: value, partial(_copy_into, value), lambda held: held.detach().clone()
            )
        elif isinstance(value, np.ndarray):
            if value.dtype.hasobject or value.nbytes > HASHED_BYTES:
                raise CannotTell(f"{name} is a large array, or one of objects")
            yield _Place(
                name,
                lambda: value,
                partial(np.copyto, value) if value.flags.writeable else None,
                np.copy,
            )
        elif isinstance(value, np.generic):
            yield _Place(name, lambda: value)
        elif isinstance(value, nn.Module):
            yield from self._visit_module(value)
        elif isinstance(value, types.FunctionType):
            yield from self._visit_function(value)
        elif isinstance(value, type):
            yield from self._visit_class(value)
        elif isinstance(value, types.ModuleType):
            self._visit_namespace(value)
        elif isinstance(value, Mapping | list | tuple | set | frozenset | deque):
            yield _Place(name, lambda: value, partial(_fill, value), _copy_of)
            self._wait(name, value.values() if isinstance(value, Mapping) else value)
        elif isinstance(value, functools._lru_cache_wrapper):
            raise CannotTell(f"{name} keeps what it gave before")
        elif (inner := _functions_in(value)) is not None:
            self._wait(name, inner)
        elif isinstance(value, Iterator):
            raise CannotTell(f"{name} is an iterator")
        elif isinstance(value, types.BuiltinFunctionType):
            self._visit_builtin(name, value)
        elif isinstance(value, threading.local) or (
            type(value).__module__ in NOT_TRUSTED and not isinstance(value, NEVER_CHANGING)
        ):
            raise CannotTell(f"{name} is of the type {type(value).__name__}")
        elif not isinstance(value, NEVER_CHANGING) and type(value).__module__ != "typing":
            if not _has_attributes(value):
                raise CannotTell(
                    f"{name} is of the type {type(value).__name__}, whose value cannot be seen"
                )
            yield from self._visit_object(value)

    def _visit_builtin(self, name: str, value: Any) -> None:
        """A function in C: of a module, or bound to an object whose value it may read."""
        if isinstance(value.__self__, types.ModuleType | type | None):
            if value.__module__ in NOT_TRUSTED or value.__name__ in READS_FREELY:
                raise CannotTell(f"it uses {value.__module__}.{value.__name__}")
        else:
            self._wait(name, [value.__self__])

    def _visit_module(self, module: nn.Module) -> Iterator[_Place]:
        hidden = OF_TORCH | STATE if id(module) in self._parts else OF_TORCH - {"training"}
        yield from self._visit_attributes(module, vars(module), hidden)
        yield from self._visit_class(type(module))

    def _visit_object(self, value: object) -> Iterator[_Place]:
        attributes = _got(value, "__dict__")
        yield from self._visit_attributes(
            value, {} if attributes is None else attributes, frozenset()
        )
        slots = {key: getattr(value, key) for key in slots_of(type(value)) if hasattr(value, key)}
        if slots:

            def read() -> dict[str, Any]:
                return {key: getattr(value, key, None) for key in slots}

            def write(copy: Mapping[str, Any]) -> None:
                for key, held in copy.items():
                    setattr(value, key, held)

            yield _Place(f"an attribute of {_name_of(value)}", read, write)
            self._wait(_name_of(value), slots.values())
        yield from self._visit_class(type(value))

    def _visit_attributes(
        self, owner: object, attributes: dict[str, Any], hidden: frozenset[str]
    ) -> Iterator[_Place]:
        def read() -> dict[str, Any]:
            return {key: value for key, value in attributes.items() if key not in hidden}

        yield _Place(
            f"an attribute of {_name_of(owner)}",
            read,
            lambda copy: _refill(attributes, read(), copy),
        )
        for key, value in read().items():
            self._waiting.append((f"{_name_of(owner)}.{key}", value))

    def _visit_class(self, kind: type) -> Iterator[_Place]:
        if kind.__module__ in NOT_TRUSTED and not issubclass(kind, NEVER_CHANGING):
            raise CannotTell(f"it uses {kind.__module__}.{kind.__name__}")
        if kind.__module__ in ("datetime", "pathlib"):
            raise CannotTell(f"it uses {kind.__module__}.{kind.__name__}")
        for base in kind.__mro__:
            if _is_trusted(base.__module__) or (base is not kind and id(base) in self._reached):
                continue
            self._reached.add(id(base))
            yield _Place(
                f"an attribute of {base.__name__}",
                partial(_read_class, base),
                partial(_write_class, base),
            )
            for key, value in vars(base).items():
                if (
                    isinstance(value, types.FunctionType)
                    and key.startswith("__")
                    and key not in NOT_CALLED
                ):
                    self._waiting.append((f"{base.__name__}.{key}", value))
                elif isinstance(value, types.FunctionType):
                    self._methods.append((f"{base.__name__}.{key}", value))
                elif not key.startswith("__"):
                    self._waiting.append((f"{base.__name__}.{key}", value))

    def _visit_function(self, function: types.FunctionType) -> Iterator[_Place]:
        if function is os.getenv:
            self._waiting.append(("os.environ", os.environ))
        if function.__module__ in NOT_TRUSTED:
            raise CannotTell(f"it uses {function.__module__}.{function.__name__}")
        if _is_trusted(function.__module__):
            return
        name, names = function.__qualname__, set(_names_of(function.__code__))
        if function.__closure__:
            cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
            yield _Place(
                f"a variable of {name}", partial(_read_cells, cells), partial(_write_cells, cells)
            )
            self._wait(name, _read_cells(cells).values())
        yield _Place(
            f"what {name} is", partial(_read_function, function), partial(_write_function, function)
        )
        self._wait(
            name,
            (*(function.__defaults__ or ()), function.__kwdefaults__, *vars(function).values()),
        )
        for imported in _imports_of(function.__code__):
            if imported not in sys.modules and not _is_trusted(imported):
                raise CannotTell(f"{name} imports {imported}")
            self._waiting += [(imported, sys.modules[imported])] if imported in sys.modules else []
        self._look_up(str(function.__module__), function.__globals__, names)
        if READS_FREELY & (names - function.__globals__.keys()):
            raise CannotTell(f"{name} uses {min(READS_FREELY & names)}")
        self._names |= names
        for module in self._modules:
            self._look_up(module.__name__, vars(module), self._names)

    def _visit_namespace(self, module: types.ModuleType) -> None:
        """Look at what functions may name of an imported module."""
        if module.__name__ in NOT_TRUSTED:
            raise CannotTell(f"it uses {module.__name__}")
        if module is os:
            self._waiting.append(("os.environ", os.environ))
        elif not _is_trusted(module.__name__):
            self._modules.append(module)
            self._look_up(module.__name__, vars(module), self._names)

    def _look_up(self, name: str, namespace: dict[str, Any], names: set[str]) -> None:
        """Let those values of a namespace wait that have one of these names."""
        _, _, known = self._namespaces.setdefault(id(namespace), (name, namespace, set()))
        new = {key for key in names - known if key in namespace and not key.startswith("__")}
        known |= new
        self._waiting += [(f"{name}.{key}", namespace[key]) for key in sorted(new)]

    def _wait(self, name: str, values: Iterable[object]) -> None:
        self._waiting += [(f"what {name} holds", value) for value in values]


def _name_of(value: object) -> str:
    return (
        value.__qualname__ if isinstance(value, types.FunctionType | type) else type(value).__name__
    )


def _is_trusted(module: object) -> bool:
    return str(module).partition(".")[0] in TRUSTED


def _functions_in(value: Any) -> list[object] | None:
    """What is called, or read, when something like a function is called; None for other values."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.MethodWrapperType):
        return [value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, value.keywords, vars(value)]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    wrapped = _got(value, "__wrapped__")  # functools.wraps and its like
    return None if wrapped is None else [wrapped]


def _got(value: object, name: str) -> Any:
    """An attribute, or None where there is none, whatever the user's ``__getattr__`` raises."""
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001
        return None


def _names_of(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that code names, also in texts, as for ``getattr``, with that of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _imports_of(code: types.CodeType) -> Iterator[str]:
    """The modules that code imports."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "IMPORT_NAME")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports_of(constant)


def _names_in(name: str, namespace: dict[str, Any], names: set[str]) -> _Place:
    """The values of a namespace that have these names."""

    def read() -> dict[str, Any]:
        return {key: namespace.get(key) for key in sorted(names)}

    return _Place(f"a global of {name}", read, namespace.update)


def _has_attributes(value: object) -> bool:
    """Whether what an object holds is in attributes that can be read."""
    return _got(value, "__dict__") is not None or any(
        "__slots__" in vars(base) for base in type(value).__mro__
    )


def _read_class(kind: type) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(kind).items()
        if not key.startswith("__") or isinstance(value, types.FunctionType)
    }


def _write_class(kind: type, copy: Mapping[str, Any]) -> None:
    for key, value in copy.items():
        if vars(kind).get(key) is not value:
            setattr(kind, key, value)


def _read_function(function: types.FunctionType) -> dict[str, Any]:
    return {
        **vars(function),
        **{key: getattr(function, key) for key in ("__code__", "__defaults__", "__kwdefaults__")},
    }


def _write_function(function: types.FunctionType, copy: Mapping[str, Any]) -> None:
    for key, value in copy.items():
        if getattr(function, key, None) is not value:
            setattr(function, key, value)


@torch.no_grad()
def _copy_into(tensor: Tensor, copy: Tensor) -> None:
    tensor.copy_(copy)


def _read_cells(cells: Mapping[str, types.CellType]) -> dict[str, Any]:
    found = {}
    for name, cell in cells.items():
        try:
            found[name] = cell.cell_contents
        except ValueError:  # nothing is in it yet
            found[name] = None
    return found


def _write_cells(cells: Mapping[str, types.CellType], copy: Mapping[str, Any]) -> None:
    for name, value in copy.items():
        cells[name].cell_contents = value


def _refill(attributes: dict[str, Any], own: Mapping[str, Any], copy: Mapping[str, Any]) -> None:
    for key in own.keys() - copy.keys():
        del attributes[key]
    attributes.update(copy)


def _copy_of(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set | deque) else value


def _fill(value: Any, copy: Any) -> None:
    """Let a container have its old contents."""
    if isinstance(value, list):
        value[:] = copy
    elif isinstance(value, dict):
        _refill(value, dict(value), copy)
    elif isinstance(value, set | deque):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(copy)
