"""Factories of modules that are safe to call again and again, and copies of users' modules."""

import copy
from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedgradnorm.errors import FederationError, described, raised_as
from fedgradnorm.modules.comparing import (
    GENERATORS,
    HOOKS,
    comparable,
    is_plain,
    is_value,
    plain_attributes,
)
from fedgradnorm.modules.tensors import have_memory_in_common, held_tensors, tensors_of
from fedgradnorm.parameters import trainable


class Source:
    """A factory of modules that is safe to call again and again.

    A factory that gives the same tensors in two calls, such as ``lambda: net``, is copied, so that
    the user's object is never written to. Plain attributes that are set in that object later, such
    as a temperature in ``on_round``, reach the copies by `follow`. If two calls under one seed give
    different values, those of the first call are used.

    Args:
        call: calls the factory under the generators of a key, which is hashable.
        key: a key to try it with.
        what: names the factory in errors, such as ``"encoder"``.

    Attributes:
        key: the key that it was tried with.
        shared: whether two calls gave the same tensors.
        varying: the name of a tensor or another attribute whose value differed in the second call,
            or None.

    Raises:
        FederationError: the factory raises, gives no module, or gives one that has to be copied
            and cannot be.
    """

    def __init__(self, call: Callable[[Any], object], key: Any, what: str) -> None:
        self._call, self.key, self.what = call, key, what
        self._first: dict[Any, nn.Module] = {}
        first, second = self.original(key), self.original(key)
        self.shared = first is second or have_memory_in_common(first, second)
        self._trained = {name for name, _ in trainable(first)}
        self.varying = None if self.shared else _difference(first, second, what)
        if self.varying is not None:
            self._first[key] = first

    def original(self, key: Any) -> nn.Module:
        """The module that the factory itself gives, which must not be written to."""
        with raised_as(FederationError, f"{self.what}: its factory raised"):
            module = self._call(key)
        if not isinstance(module, nn.Module):
            found = f"and it gave {type(module).__name__}"
            expected = "expected a function that makes an nn.Module"
            raise FederationError(f"{self.what}: {expected}, {found}")
        return module

    def make(self, key: Any) -> nn.Module:
        """A module that shares its tensors with no other."""
        if self.shared:
            module = self.original(key)
            for name in {name for name, _ in trainable(module)} ^ self._trained:
                text = f"'{name}' was frozen, or is no longer, since the federation was made"
                raise FederationError(f"{self.what}: {text}: make a new one")
            own = self._copied(module, "gives the same module again and again")
            FOLLOWED[own] = _Followed(module, own, self.what)
            return own
        if self.varying is not None:
            if key not in self._first:
                self._first[key] = self.original(key)
            reason = f"gives other values of '{self.varying}' in every call"
            return self._copied(self._first[key], reason)
        return self.original(key)

    def _copied(self, module: nn.Module, reason: str) -> nn.Module:
        text, hint = f"{self.what}: its factory {reason}", "let every call make a new one"
        if any(parameter._backward_hooks for parameter in module.parameters()):
            why = "hooks on its parameters would be lost in a copy"
            raise FederationError(f"{text}, and {why}: {hint}, with its hooks")
        try:
            return duplicate(module)
        except Exception as error:  # the user's own code may raise anything
            why = f"{_uncopyable(module)} cannot be copied ({described(error)})"
            hint = f"{hint}, or delete what an earlier pass has left in it"
            raise FederationError(f"{text}, and {why}: {hint}") from error


def _difference(first: nn.Module, second: nn.Module, what: str) -> str | None:
    """The name of a tensor or a plain attribute whose values differ in two modules, or None."""
    tensors, others = held_tensors(first), held_tensors(second)
    for name in sorted(tensors.keys() | others.keys()):
        pair = [held[name] for held in (tensors, others) if name in held]
        if len(pair) < 2 or len({(tensor.shape, tensor.dtype) for tensor in pair}) > 1:
            why = f"'{name}' is not the same kind of tensor in both"
            raise FederationError(f"{what}: two calls of its factory give other parameters: {why}")
        if not torch.allclose(pair[0], pair[1], rtol=0.0, atol=0.0, equal_nan=True):
            return name
    for (prefix, part), twin in zip(first.named_modules(), second.modules(), strict=True):
        values = plain_attributes(vars(twin))
        for name, value in plain_attributes(vars(part)).items():
            is_number = name.startswith("_torch")  # that of a compiled module
            if is_number or name not in values or not is_value(value):
                continue
            if comparable(value) != comparable(values[name]):
                return f"{prefix}.{name}".strip(".")
    return None


def follow(*modules: nn.Module) -> None:
    """Bring copies up to date with attributes that were set in the users' modules since then."""
    for module in modules:
        if module in FOLLOWED:
            FOLLOWED[module].update()


class _Followed:
    """A user's module and a copy of it."""

    def __init__(self, original: nn.Module, own: nn.Module, what: str) -> None:
        self._original, self._what = original, what
        modules = zip(original.modules(), own.modules(), strict=True)
        self._pairs = [(vars(part), vars(copied)) for part, copied in modules]
        self._seen = [
            {name: comparable(value) for name, value in plain_attributes(attributes).items()}
            for attributes, _ in self._pairs
        ]
        self._fixed = _not_followed(original)

    def update(self) -> None:
        """Set in the copy what was set in plain attributes of the original; refuse all else."""
        now = _not_followed(self._original)
        if now != self._fixed:
            names = self._fixed.keys() | now.keys()
            name = next(name for name in names if self._fixed.get(name) != now.get(name))
            text = f"'{name}' of the module that its factory gives was changed while training"
            why = "which trains copies of that module"
            hint = "of these, only attributes without tensors and modules follow"
            raise FederationError(f"{self._what}: {text}, {why}: {hint}")
        for (attributes, own), seen in zip(self._pairs, self._seen, strict=True):
            for name, value in plain_attributes(attributes).items():
                key = comparable(value)
                if seen.get(name) != key:
                    seen[name] = key
                    own[name] = _deep_copy(value)


FOLLOWED: WeakKeyDictionary[nn.Module, _Followed] = WeakKeyDictionary()
"""The copies of users' modules that are alive."""


def _not_followed(module: nn.Module) -> dict[str, object]:
    """By name, a key for each of a module's parts that a copy does not follow."""
    keys: dict[str, object] = {}
    for prefix, part in module.named_modules():
        for name, tensor in tensors_of(part).items():
            keys[f"{prefix}.{name}".strip(".")] = id(tensor), tensor._version, tensor.requires_grad
        keys[prefix or "the layers"] = [(name, id(child)) for name, child in part.named_children()]
        for name in HOOKS:
            hooks = getattr(part, name, {}).values()
            keys[f"{prefix}.{name}".strip(".")] = [id(hook) for hook in hooks]
    return keys


def duplicate(module: nn.Module) -> nn.Module:
    """A copy that shares no tensor, module or generator with the original.

    What cannot be copied, such as a lock, is shared.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, BuiltinMethodType) and isinstance(value.__self__, GENERATORS):
                memo[id(value)] = getattr(copy.deepcopy(value.__self__, memo), value.__name__)
        for value in plain_attributes(vars(part)).values():
            if _deep_copy(value) is value:
                memo[id(value)] = value
    with torch.no_grad():  # else the parameters of a scripted module have a history
        own = copy.deepcopy(module, memo)
    for parameter, original in zip(own.parameters(), module.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return own


def _deep_copy(value: Any) -> Any:
    """A copy of a value, or the value itself if it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001  # the user's own classes may raise anything
        return value


def _uncopyable(module: nn.Module) -> str:
    """The name of the first attribute that cannot be copied, for an error."""
    for prefix, part in module.named_modules():
        for name, value in {**vars(part), **tensors_of(part)}.items():
            if isinstance(value, nn.Module) or name == "_modules" or is_plain(value):
                continue
            if _deep_copy(value) is value:
                return f"'{prefix}.{name}'".replace("'.", "'")
    return "it"
