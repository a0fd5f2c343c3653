"""All tensors of a module, by name, and the memory that they lie in."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from fedgradnorm.parameters import trainable


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, the buffers (persistent or not) and the tensors in attributes, by name."""
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                continue
            if value.grad_fn is None:
                tensors.setdefault(f"{prefix}.{name}".removeprefix("."), value)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def tensors_of(part: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module themselves, not detached, and without those of its parts."""
    attributes = ((name, value) for name, value in vars(part).items() if isinstance(value, Tensor))
    parameters = part.named_parameters(recurse=False, remove_duplicate=False)
    buffers = part.named_buffers(recurse=False, remove_duplicate=False)
    return dict(chain(parameters, buffers, attributes))


@torch.no_grad()
def load_held(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module by name, in place. Names that one of the two lacks are skipped."""
    for name, tensor in held_tensors(module).items():
        if name in tensors and tensors[name].shape == tensor.shape:
            tensor.copy_(tensors[name])


def is_lazy(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers that get their shapes from the first input."""
    return any(
        isinstance(tensor, UninitializedParameter | UninitializedBuffer)
        for tensor in (*module.parameters(), *module.buffers())
    )


@torch.no_grad()
def materialise(module: nn.Module, example: Tensor) -> None:
    """Give the lazy parameters of a module their shapes, by one example. The mode is restored."""
    training = module.training
    module.eval()(example)
    module.train(training)


def storages(tensors: Iterable[Tensor]) -> set[tuple[torch.device, int]]:
    """The device and the address of the memory of each tensor; none for lazy and empty tensors."""
    return {
        (tensor.device, tensor.untyped_storage().data_ptr())
        for tensor in tensors
        if not isinstance(tensor, UninitializedParameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel()
    }


def shared_memory(module: nn.Module) -> tuple[str, str] | None:
    """A trainable parameter and another parameter or buffer whose memory overlaps, or None.

    A parameter that has two names is not reported: it is trained as one.
    """
    trained = {name for name, _ in trainable(module)}
    tensors_of: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        for storage in storages([tensor]):
            tensors_of.setdefault(storage, []).append((name, tensor))
    for neighbours in tensors_of.values():
        for (name, tensor), (other_name, other) in combinations(neighbours, 2):
            if trained & {name, other_name} and _overlap(tensor, other):
                return (name, other_name) if name in trained else (other_name, name)
    return None


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    (start, end), (other_start, other_end) = _span(first), _span(second)
    size, other_size = first.element_size(), second.element_size()
    if start * size >= other_end * other_size or other_start * other_size >= end * size:
        return False
    if first.dtype != second.dtype:
        return True
    places, other_places = (
        torch.arange(stop).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        for tensor, stop in ((first, end), (second, other_end))
    )
    return bool(torch.isin(places, other_places).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of a tensor in its storage, and the one after the last."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    start = int(tensor.storage_offset())
    return start, start + sum((length - 1) * stride for length, stride in pairs) + 1


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements of a tensor lie in the same place, as in an expanded tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(stride == 0 and length > 1 for length, stride in pairs)


def have_memory_in_common(first: nn.Module, second: nn.Module) -> bool:
    """Whether tensors of two modules lie in the same memory."""
    return bool(storages(held_tensors(first).values()) & storages(held_tensors(second).values()))


def reads_tensors_of(original: nn.Module, call: Callable[[], object]) -> bool:
    """Whether a call uses a tensor of a module.

    A copy of the module does so if a hook or a stored function leads back to the original.
    """
    parts = [tensors_of(part).values() for part in original.modules()]
    reads = _Reads(chain.from_iterable(parts))
    with reads:
        call()
    return reads.happened


class _Reads(TorchFunctionMode):
    """Notices when a function of torch is called with one of these tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.ids, self.happened = {id(tensor) for tensor in tensors}, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument in (*args, *kwargs.values()):
            parts = argument if isinstance(argument, list | tuple) else (argument,)
            self.happened = self.happened or any(id(part) in self.ids for part in parts)
        return func(*args, **kwargs)
