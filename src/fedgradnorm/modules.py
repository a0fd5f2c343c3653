"""What users' factories give: modules with tensors of their own, alike under one seed, whatever the factory does."""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import combinations
from types import BuiltinMethodType, CellType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from fedgradnorm.errors import FederationError, FedGradNormError, described

__all__ = [
    "GENERATORS",
    "Source",
    "duplicate",
    "follow",
    "have_memory_in_common",
    "held_tensors",
    "is_lazy",
    "kind_of",
    "load_held",
    "makeup_of",
    "materialise",
    "overlaps_itself",
    "reads_tensors_of",
    "shared_memory",
    "slots_of",
]

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
"""The classes of objects that random numbers are drawn from."""

OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes that every module has."""

DEEPEST = 20
"""Objects inside of so many others are told apart by their identity."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Of these, what users add functions to."""


class Source:
    """A factory of modules that can be called again and again, whatever it gives.

    A factory that gives the same tensors in two calls, such as ``lambda: net``, is copied: nothing is ever written to the user's object.
    What is later set in that object's plain attributes, such as a temperature in ``on_round``, reaches the copies by `follow`. Of a
    factory that gives other values in two calls under one seed, those of the first call are used.

    Args:
        call: calls the factory under the generators of a key, which is hashable.
        key: a key to try it with.
        what: names it in errors, such as ``"encoder"``.

    Attributes:
        key: the key that it was tried with.
        shared: whether two calls gave the same tensors.
        varying: the name of a tensor, or of another attribute, that had another value in the second call, or None.

    Raises:
        FederationError: a factory that raises or gives no module, or one that cannot be copied although it has to be.
    """

    def __init__(self, call: Callable[[Any], object], key: Any, what: str) -> None:
        self._call, self.key, self.what = call, key, what
        self._first: dict[Any, nn.Module] = {}
        one, two = self._called(key), self._called(key)
        before, after = held_tensors(one), held_tensors(two)
        self.shared = one is two or bool(_places(before.values()) & _places(after.values()))
        self._trained = trained_names(one)
        self.varying = (
            None if self.shared else _difference(before, after, what) or _other_attribute(one, two)
        )
        if self.varying is not None:
            self._first[key] = one

    def _called(self, key: Any) -> nn.Module:
        try:
            made = self._call(key)
        except FedGradNormError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise FederationError(f"{self.what}: its factory raised {described(error)}") from error
        if not isinstance(made, nn.Module):
            raise FederationError(
                f"{self.what}: expected a function that makes an nn.Module, and it gave {type(made).__name__}"
            )
        return made

    def original(self, key: Any) -> nn.Module:
        """What the factory itself gives, which is not to be written to."""
        return self._called(key)

    def make(self, key: Any) -> nn.Module:
        """A module whose tensors nothing else has."""
        if self.shared:
            made = self._called(key)
            for name in trained_names(made) ^ self._trained:
                raise FederationError(
                    f"{self.what}: '{name}' was frozen, or is no longer, since the federation was made: make a new one"
                )
            own = self._copied(made, "gives the same module again and again")
            COPIES[own] = _Followed(made, own, self.what)
            return own
        if self.varying is not None:
            if key not in self._first:
                self._first[key] = self._called(key)
            return self._copied(
                self._first[key], f"gives other values of '{self.varying}' in every call"
            )
        return self._called(key)

    def _copied(self, made: nn.Module, why: str) -> nn.Module:
        if any(parameter._backward_hooks for parameter in made.parameters()):
            raise FederationError(
                f"{self.what}: its factory {why}, and hooks on its parameters would be lost in a copy: let every call make a new one, "
                "with its hooks"
            )
        try:
            return duplicate(made)
        except Exception as error:  # the user's own code may raise anything
            raise FederationError(
                f"{self.what}: its factory {why}, and {_uncopyable(made)} cannot be copied ({described(error)}): let every call make a new "
                "one, or delete what an earlier pass has left in it"
            ) from error


def trained_names(module: nn.Module) -> set[str]:
    """The names of the parameters that are not frozen."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def follow(*modules: nn.Module) -> None:
    """Set in copies what was set in attributes of the users' objects since they were copied; other modules are left alone."""
    for module in modules:
        if module in COPIES:
            COPIES[module].update()


class _Followed:
    """A user's module and a copy of it."""

    def __init__(self, original: nn.Module, own: nn.Module, what: str) -> None:
        self._original, self._what = original, what
        self._pairs = [
            (vars(one), vars(other))
            for one, other in zip(original.modules(), own.modules(), strict=True)
        ]
        self._seen = [
            {name: _makeup(value, ()) for name, value in _plain_attributes(one)}
            for one, _ in self._pairs
        ]
        self._fixed = _not_followed(original)

    def update(self) -> None:
        """Set in the copy what was set in plain attributes of the original. Raises FederationError for anything else that was changed."""
        now = _not_followed(self._original)
        if now != self._fixed:
            name = next(key for key in (self._fixed | now) if self._fixed.get(key) != now.get(key))
            raise FederationError(
                f"{self._what}: '{name}' of the module that its factory gives was changed while training, which trains copies of that "
                "module: of these, only attributes without tensors and modules follow"
            )
        for (attributes, own), seen in zip(self._pairs, self._seen, strict=True):
            for name, value in _plain_attributes(attributes):
                makeup = _makeup(value, ())
                if seen.get(name) != makeup:
                    seen[name] = makeup
                    own[name] = _deep_copy(value)


COPIES: WeakKeyDictionary[nn.Module, _Followed] = WeakKeyDictionary()
"""Copies of users' objects that are alive."""


def _plain_attributes(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in attributes.items()
        if name not in OF_TORCH and _is_plain(value, set())
    ]


def _not_followed(module: nn.Module) -> dict[str, object]:
    """What a copy does not follow of the original, by name: its tensors, its modules and its hooks."""
    found: dict[str, object] = {}
    for prefix, part in module.named_modules():
        attributes = [(name, one) for name, one in vars(part).items() if isinstance(one, Tensor)]
        for name, one in (*part._parameters.items(), *part._buffers.items(), *attributes):
            if one is not None:
                found[f"{prefix}.{name}".strip(".")] = id(one), one._version, one.requires_grad
        found[prefix or "the layers"] = [(name, id(one)) for name, one in part._modules.items()]
        for name in HOOKS:
            found[f"{prefix}.{name}".strip(".")] = [
                id(hook) for hook in getattr(part, name, {}).values()
            ]
    return found


def duplicate(module: nn.Module) -> nn.Module:
    """A copy with tensors, modules, generators and other values of its own. What cannot be copied, such as a lock, is common to both."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, BuiltinMethodType) and isinstance(value.__self__, GENERATORS):
                memo[id(value)] = getattr(copy.deepcopy(value.__self__, memo), value.__name__)
            elif name not in OF_TORCH and _is_plain(value, set()) and _deep_copy(value) is value:
                memo[id(value)] = value
    with torch.no_grad():  # else the parameters of a scripted module have a history
        made = copy.deepcopy(module, memo)
    for own, original in zip(made.parameters(), module.parameters(), strict=True):
        own.requires_grad_(original.requires_grad)
    return made


def _deep_copy(value: Any) -> Any:
    """A copy of a value, or itself where it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001  # the user's own classes may raise anything
        return value


def _uncopyable(module: nn.Module) -> str:
    """The first attribute that cannot be copied, in words."""
    for prefix, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._parameters.items(), *part._buffers.items()):
            if (
                not isinstance(value, nn.Module)
                and name != "_modules"
                and _deep_copy(value) is value
                and not _is_plain(value, set())
            ):
                return f"'{prefix}.{name}'".replace("'.", "'")
    return "it"


def _is_plain(value: object, seen: set[int]) -> bool:
    """Whether there is no tensor, module or generator in a value."""
    if isinstance(value, (Tensor, nn.Module, *GENERATORS)):
        return False
    if isinstance(value, BuiltinMethodType):
        return not isinstance(value.__self__, GENERATORS)
    if (
        value is None
        or isinstance(value, bool | int | float | complex | str | bytes | type)
        or id(value) in seen
    ):
        return True
    seen.add(id(value))
    if isinstance(value, Mapping):
        return all(_is_plain(one, seen) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(one, seen) for one in value)
    if isinstance(value, partial):
        return all(
            _is_plain(one, seen) for one in (value.func, *value.args, *value.keywords.values())
        )
    if isinstance(value, MethodType):
        return _is_plain(value.__self__, seen)
    return all(_is_plain(one, seen) for one in _attributes_of(value).values())


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module by name: parameters, buffers, persistent or not, and tensors that are plain attributes."""
    found: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if (
                isinstance(value, Tensor)
                and value.grad_fn is None
                and not isinstance(value, nn.Parameter)
            ):
                found.setdefault(f"{prefix}.{name}".removeprefix("."), value)
    return {name: tensor.detach() for name, tensor in found.items()}


@torch.no_grad()
def load_held(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module by their names, in place; names that one of the two lacks are left alone."""
    for name, tensor in held_tensors(module).items():
        if name in tensors and tensors[name].shape == tensor.shape:
            tensor.copy_(tensors[name])


def kind_of(function: Callable[..., object]) -> object:
    """What functions have in common that do the same: themselves, or of partials of one function equal arguments."""
    if isinstance(function, partial):
        try:
            key = (kind_of(function.func), function.args, frozenset(function.keywords.items()))
            hash(key)
        except TypeError:
            return id(function)
        return key
    return id(function)


def makeup_of(module: nn.Module) -> object:
    """What modules have in common that do the same with the same parameters and buffers: types, hooks, and values of other attributes.

    An object without attributes that can be read, such as a generator, is the same as itself alone.
    """
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    layout = tuple(
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors
    )
    try:
        return layout, tuple(
            (name, _makeup(part, ())) for name, part in module.named_modules(remove_duplicate=False)
        )
    except RecursionError:
        return _Itself(module)


def _makeup(value: Any, inside: tuple[int, ...]) -> object:
    """A value that can be hashed and compared; ``inside`` has the addresses of what it is in."""
    kind, within = type(value), (*inside, id(value))
    if isinstance(value, float):
        return kind, repr(value)  # a NaN is the same as itself here
    if value is None or isinstance(
        value, bool | int | complex | str | bytes | type | torch.dtype | torch.device
    ):
        return kind, value
    if id(value) in inside or isinstance(value, Tensor):  # tensors are looked at elsewhere
        return kind
    if isinstance(value, nn.Module):
        hooks = [list(vars(value)[name].values()) for name in HOOKS]
        return kind, _makeup(
            [hooks, {name: held for name, held in vars(value).items() if name not in OF_TORCH}],
            within,
        )
    if isinstance(value, Mapping | list | tuple | deque):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return kind, tuple((_makeup(key, within), _makeup(held, within)) for key, held in pairs)
    if isinstance(value, set | frozenset):
        return kind, frozenset(_makeup(held, within) for held in value)
    if isinstance(value, np.ndarray):
        return kind, value.shape, value.tobytes()
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return value.__code__, _makeup(
            [cells, value.__defaults__, value.__kwdefaults__, vars(value)], within
        )
    if isinstance(value, partial):
        return kind, _makeup([value.func, value.args, value.keywords], within)
    if isinstance(value, MethodType):
        return kind, _makeup([value.__func__, value.__self__], within)
    if _attributes_of(value) and len(inside) < DEEPEST and not isinstance(value, GENERATORS):
        return kind, _makeup(_attributes_of(value), within)
    return _Itself(value)


def slots_of(kind: type) -> Iterator[str]:
    """The names of a class's slots as ``getattr`` takes them: private ones begin with the class's name."""
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield (
                    f"_{base.__name__.lstrip('_')}{name}"
                    if name.startswith("__") and not name.endswith("__")
                    else name
                )


def _attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, or none where they cannot be read."""
    try:
        return {
            **getattr(value, "__dict__", {}),
            **{name: getattr(value, name, None) for name in slots_of(type(value))},
        }
    except Exception:  # noqa: BLE001  # a user's __getattr__ may raise anything
        return {}


class _Itself:
    """An object that is equal to itself alone, and kept alive, so that no other one gets its address."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def is_lazy(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers whose shapes only an input tells."""
    return any(
        isinstance(tensor, UninitializedParameter | UninitializedBuffer)
        for tensor in (*module.parameters(), *module.buffers())
    )


@torch.no_grad()
def materialise(module: nn.Module, example: Tensor) -> None:
    """Let an input give the lazy parameters of a module their shapes. Its mode is put back."""
    training = module.training
    module.eval()(example)
    module.train(training)


def shared_memory(module: nn.Module) -> tuple[str, str] | None:
    """The names of a trainable parameter and another parameter or buffer that lie in the same memory without being the same, or None.

    One parameter under two names is not meant: it is one, and is trained as one.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    storages: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        for place in _places([tensor]):
            storages.setdefault(place, []).append((name, tensor))
    for together in storages.values():
        for (name, one), (other, two) in combinations(together, 2):
            if (name in trained or other in trained) and _overlap(one, two):
                return (name, other) if name in trained else (other, name)
    return None


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors of one storage have a number in common."""
    (start, end), (other_start, other_end) = _span(one), _span(two)
    if start >= other_end or other_start >= end:
        return False
    return (
        bool(np.intersect1d(_numbers_of(one), _numbers_of(two)).size)
        if one.dtype == two.dtype
        else True
    )


def _numbers_of(tensor: Tensor) -> np.ndarray:
    """The places in its storage of the numbers of a tensor."""
    places = np.array([tensor.storage_offset()])
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + np.arange(length) * stride).reshape(-1)
    return places


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several numbers of a tensor lie in the same memory, as those of an expanded one do."""
    return any(
        stride == 0 and length > 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def have_memory_in_common(one: nn.Module, two: nn.Module) -> bool:
    """Whether a tensor of one module lies in the memory of one of another."""
    return bool(_places(held_tensors(one).values()) & _places(held_tensors(two).values()))


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after the last."""
    size = tensor.element_size()
    reach = sum(
        (length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return int(tensor.storage_offset() * size), int((tensor.storage_offset() + reach + 1) * size)


def reads_tensors_of(original: nn.Module, call: Callable[[], object]) -> bool:
    """Whether a call uses a tensor of a module: that of a copy does if a hook or a stored function leads back to the original."""
    reads = _Reads(_themselves(original))
    with reads:
        call()
    return reads.found


def _themselves(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a module as the objects that they are."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


class _Reads(TorchFunctionMode):
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors, self.found = {id(tensor) for tensor in tensors}, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument in (*args, *kwargs.values()):
            parts = argument if isinstance(argument, list | tuple) else (argument,)
            self.found = self.found or any(id(part) in self.tensors for part in parts)
        return func(*args, **kwargs)


def _other_attribute(one: nn.Module, two: nn.Module) -> str | None:
    """The name of an attribute without tensors that has another value in two modules, or None."""
    for (prefix, before), (_, after) in zip(one.named_modules(), two.named_modules(), strict=True):
        others = dict(_plain_attributes(vars(after)))
        for name, value in _plain_attributes(vars(before)):
            own = not name.startswith("_torch")  # a compiled module has a number of its own
            if (
                own
                and name in others
                and _is_value(value)
                and _makeup(value, ()) != _makeup(others[name], ())
            ):
                return f"{prefix}.{name}".strip(".")
    return None


def _is_value(value: object) -> bool:
    """Whether a value is made of numbers, texts and arrays, and not an object that is another one in every call."""
    if isinstance(value, Mapping):
        return all(_is_value(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_value(one) for one in value)
    return value is None or isinstance(
        value, bool | int | float | complex | str | bytes | np.ndarray | np.generic
    )


def _places(tensors: Iterable[Tensor]) -> set[tuple[torch.device, int]]:
    """The storages of tensors."""
    found = set()
    for tensor in tensors:
        if (
            not isinstance(tensor, UninitializedParameter)
            and tensor.layout == torch.strided
            and tensor.device.type != "meta"
        ):
            found |= (
                {(tensor.device, tensor.untyped_storage().data_ptr())} if tensor.numel() else set()
            )
    return found


def _difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor], what: str) -> str | None:
    """The name of a tensor that has other values in two modules, or None. Raises FederationError where it is not in both."""
    for name in sorted(one.keys() | two.keys()):
        before, after = one.get(name), two.get(name)
        if (
            before is None
            or after is None
            or before.shape != after.shape
            or before.dtype != after.dtype
        ):
            raise FederationError(
                f"{what}: two calls of its factory give other parameters: '{name}' is not the same kind of tensor in both"
            )
        if not torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True):
            return name
    return None
