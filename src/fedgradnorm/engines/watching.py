"""The Python values that models and losses read: whether a shortcut that was right is right still.

A program, and every other shortcut that stands for calls of a user's code, keeps what that code
read when it was tried: an attribute, a global, the state of a generator. `Watch` remembers all
places that the code can read, by what its functions name, and says whether one has another value.
"""

import dis
import functools
import os
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedgradnorm.engines import places
from fedgradnorm.engines.failures import Untraceable
from fedgradnorm.engines.places import Place
from fedgradnorm.engines.trust import NEVER_CHANGING, NOT_CALLED, NOT_TRUSTED, READS_ANY, is_trusted
from fedgradnorm.modules import GENERATORS, slots_of
from fedgradnorm.modules.comparing import HOOKS

MOST_PLACES = 20_000
"""With more places, looking at them takes longer than a shortcut can save."""

HASHED_BYTES = 2**26
"""Larger NumPy arrays are not looked at: that takes longer than a shortcut can save."""

STATE = frozenset({"_parameters", "_buffers"})
"""Where a module has its tensors."""

OF_TORCH = frozenset(vars(nn.Module())) - STATE - {"_modules", *HOOKS}
"""The attributes of every module that training itself changes, or that no forward pass reads."""


class CannotTell(Untraceable):
    """A model or a loss reads something whose value cannot be seen, such as an iterator."""


class Watch:
    """The values that some modules and functions read, as they are when the watch begins.

    Args:
        models: modules, whose parameters and buffers do not count.
        functions: what else is called.

    Raises:
        CannotTell: there is something whose value cannot be seen, or there are too many places.
    """

    def __init__(self, models: Sequence[nn.Module], functions: Sequence[object]) -> None:
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


class _Walk:
    """All places that can be reached from some modules and functions, each once."""

    def __init__(self, models: Sequence[nn.Module], functions: Sequence[object]) -> None:
        self._parts = {id(part) for model in models for part in model.modules()}
        roots = *models, *functions
        self._waiting: list[tuple[str, object]] = [(_name_of(root), root) for root in roots]
        self._reached: set[int] = set()
        self._kept: list[object] = []  # so that no address is used twice
        self._names = {"forward", "__call__"}
        self._methods: list[tuple[str, types.FunctionType]] = []
        self._namespaces: dict[int, tuple[str, dict[str, Any], set[str]]] = {}
        self._modules: list[types.ModuleType] = []

    def places(self) -> Iterator[Place]:
        """The places. Raises CannotTell."""
        count = 0
        while self._waiting or self._called_methods():
            for place in self._visit(*self._waiting.pop()):
                count += 1
                if count > MOST_PLACES:
                    raise CannotTell(f"there are more than {MOST_PLACES:,} places to look at")
                yield place
        for name, namespace, names in self._namespaces.values():
            yield places.globals_at(name, namespace, names)

    def _called_methods(self) -> bool:
        """Queue the methods whose names some function has: they may be called."""
        self._waiting += [named for named in self._methods if named[1].__name__ in self._names]
        self._methods = [named for named in self._methods if named[1].__name__ not in self._names]
        return bool(self._waiting)

    def _visit(self, name: str, value: Any) -> Iterator[Place]:
        if isinstance(value, places.VALUES) or id(value) in self._reached:
            return
        self._reached.add(id(value))
        self._kept.append(value)
        if isinstance(value, random.SystemRandom):
            raise CannotTell(f"{name} draws from the system")
        if isinstance(value, GENERATORS):
            yield places.generator_at(name, value)
        elif isinstance(value, Tensor):
            yield places.tensor_at(name, value)
        elif isinstance(value, np.ndarray):
            if value.dtype.hasobject or value.nbytes > HASHED_BYTES:
                raise CannotTell(f"{name} is a large array, or one of objects")
            yield places.array_at(name, value)
        elif isinstance(value, np.generic):
            yield Place(name, lambda: value)
        elif isinstance(value, nn.Module):
            yield from self._visit_module(value)
        elif isinstance(value, types.FunctionType):
            yield from self._visit_function(value)
        elif isinstance(value, type):
            yield from self._visit_class(value)
        elif isinstance(value, types.ModuleType):
            self._visit_namespace(value)
        elif isinstance(value, Mapping | list | tuple | set | frozenset | deque):
            yield places.container_at(name, value)
            self._wait(name, value.values() if isinstance(value, Mapping) else value)
        else:
            yield from self._visit_other(name, value)

    def _visit_other(self, name: str, value: Any) -> Iterator[Place]:
        """Something like a function, or an object."""
        kind, module = type(value).__name__, type(value).__module__
        if isinstance(value, functools._lru_cache_wrapper):
            raise CannotTell(f"{name} keeps what it gave before")
        if (inner := _functions_in(value)) is not None:
            self._wait(name, inner)
        elif isinstance(value, Iterator):
            raise CannotTell(f"{name} is an iterator")
        elif isinstance(value, types.BuiltinFunctionType):
            self._visit_builtin(name, value)
        elif isinstance(value, threading.local) or (
            module in NOT_TRUSTED and not isinstance(value, NEVER_CHANGING)
        ):
            raise CannotTell(f"{name} is of the type {kind}")
        elif not isinstance(value, NEVER_CHANGING) and module != "typing":
            if not _has_attributes(value):
                raise CannotTell(f"{name} is of the type {kind}, whose value cannot be seen")
            yield from self._visit_object(value)

    def _visit_builtin(self, name: str, value: Any) -> None:
        """A function in C: of a module, or bound to an object whose value it may read."""
        if not isinstance(value.__self__, types.ModuleType | type | None):
            self._wait(name, [value.__self__])
        elif value.__module__ in NOT_TRUSTED or value.__name__ in READS_ANY:
            raise CannotTell(f"it uses {value.__module__}.{value.__name__}")

    def _visit_module(self, module: nn.Module) -> Iterator[Place]:
        hidden = OF_TORCH | STATE if id(module) in self._parts else OF_TORCH - {"training"}
        yield from self._visit_attributes(module, vars(module), hidden)
        yield from self._visit_class(type(module))

    def _visit_object(self, value: object) -> Iterator[Place]:
        attributes = _got(value, "__dict__")
        attributes = {} if attributes is None else attributes
        yield from self._visit_attributes(value, attributes, frozenset())
        slots = {key: getattr(value, key) for key in slots_of(type(value)) if hasattr(value, key)}
        if slots:
            yield places.slots_at(f"an attribute of {_name_of(value)}", value, list(slots))
            self._wait(_name_of(value), slots.values())
        yield from self._visit_class(type(value))

    def _visit_attributes(
        self, owner: object, attributes: dict[str, Any], hidden: frozenset[str]
    ) -> Iterator[Place]:
        name = _name_of(owner)
        yield places.attributes_at(f"an attribute of {name}", attributes, hidden)
        shown = [(key, value) for key, value in attributes.items() if key not in hidden]
        self._waiting += [(f"{name}.{key}", value) for key, value in shown]

    def _visit_class(self, kind: type) -> Iterator[Place]:
        reads_more = kind.__module__ in NOT_TRUSTED and not issubclass(kind, NEVER_CHANGING)
        if reads_more or kind.__module__ in ("datetime", "pathlib"):
            raise CannotTell(f"it uses {kind.__module__}.{kind.__name__}")
        for base in kind.__mro__:
            if is_trusted(base.__module__) or (base is not kind and id(base) in self._reached):
                continue
            self._reached.add(id(base))
            yield places.class_at(base)
            for key, value in vars(base).items():
                named, special = (f"{base.__name__}.{key}", value), key.startswith("__")
                if not isinstance(value, types.FunctionType):
                    self._waiting += [] if special else [named]
                elif special and key not in NOT_CALLED:
                    self._waiting.append(named)
                else:
                    self._methods.append(named)

    def _visit_function(self, function: types.FunctionType) -> Iterator[Place]:
        if function is os.getenv:
            self._waiting.append(("os.environ", os.environ))
        if function.__module__ in NOT_TRUSTED:
            raise CannotTell(f"it uses {function.__module__}.{function.__name__}")
        if is_trusted(function.__module__):
            return
        name, code, names = function.__qualname__, function.__code__, _names_of(function.__code__)
        if function.__closure__:
            cells = dict(zip(code.co_freevars, function.__closure__, strict=True))
            yield places.cells_at(f"a variable of {name}", cells)
            self._wait(name, places.held_by_cells(cells).values())
        yield places.function_at(function)
        defaults = *(function.__defaults__ or ()), function.__kwdefaults__
        self._wait(name, (*defaults, *vars(function).values()))
        for imported in _imports_of(code):
            if imported in sys.modules:
                self._waiting.append((imported, sys.modules[imported]))
            elif not is_trusted(imported):
                raise CannotTell(f"{name} imports {imported}")
        self._look_up(str(function.__module__), function.__globals__, names)
        if READS_ANY & (names - function.__globals__.keys()):
            raise CannotTell(f"{name} uses {min(READS_ANY & names)}")
        self._names |= names
        for module in self._modules:
            self._look_up(module.__name__, vars(module), self._names)

    def _visit_namespace(self, module: types.ModuleType) -> None:
        """Look at what functions may name of an imported module."""
        if module.__name__ in NOT_TRUSTED:
            raise CannotTell(f"it uses {module.__name__}")
        if module is os:
            self._waiting.append(("os.environ", os.environ))
        elif not is_trusted(module.__name__):
            self._modules.append(module)
            self._look_up(module.__name__, vars(module), self._names)

    def _look_up(self, name: str, namespace: dict[str, Any], names: set[str]) -> None:
        """Queue the values of a namespace that have one of these names."""
        _, _, known = self._namespaces.setdefault(id(namespace), (name, namespace, set()))
        new = {key for key in names - known if key in namespace and not key.startswith("__")}
        known |= new
        self._waiting += [(f"{name}.{key}", namespace[key]) for key in sorted(new)]

    def _wait(self, name: str, values: Iterable[object]) -> None:
        self._waiting += [(f"what {name} holds", value) for value in values]


def _name_of(value: object) -> str:
    named = isinstance(value, types.FunctionType | type)
    return value.__qualname__ if named else type(value).__name__  # type: ignore[attr-defined]


def _functions_in(value: Any) -> list[object] | None:
    """What is called or read when something like a function is called; None for other values."""
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
    except Exception:  # noqa: BLE001  # the user's own code
        return None


def _has_attributes(value: object) -> bool:
    """Whether an object keeps its values in attributes that can be read."""
    slots = any("__slots__" in vars(base) for base in type(value).__mro__)
    return slots or _got(value, "__dict__") is not None


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """This code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes_in(constant)


def _names_of(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, also in texts, such as those for ``getattr``."""
    names = {name for part in _codes_in(code) for name in part.co_names}
    texts = (text for part in _codes_in(code) for text in part.co_consts if isinstance(text, str))
    return names | {text for text in texts if text.isidentifier()}


def _imports_of(code: types.CodeType) -> list[str]:
    """The modules that code imports."""
    instructions = (line for part in _codes_in(code) for line in dis.get_instructions(part))
    return [line.argval for line in instructions if line.opname == "IMPORT_NAME"]
