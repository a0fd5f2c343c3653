"""The data of one client: a pair of tensors (the fast path), or any map-style dataset, now or on first use."""

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "Dataset", "batch_order", "load", "num_passes", "size", "take", "tensors"]


@runtime_checkable
class Dataset(Protocol):
    """Anything with a length that gives ``(input, target)`` for an index, such as ``torch.utils.data.Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


Data: TypeAlias = tuple[Tensor, Tensor] | Dataset
"""Inputs and targets with the examples along dimension 0, or a dataset of such pairs without that dimension."""


def load(source: Data | Callable[[], Data]) -> Data:
    """The data themselves: a source that is a function is called."""
    if isinstance(source, tuple) or not callable(source):
        return source
    return source()


def size(data: Data) -> int:
    """The number of examples."""
    return data[0].shape[0] if isinstance(data, tuple) else len(data)  # the len of a tensor is slow


def tensors(data: Data) -> tuple[Tensor, Tensor]:
    """The inputs and the targets. Raises TypeError for a dataset."""
    if isinstance(data, tuple):
        return data
    raise TypeError(f"expected a pair of tensors, found {type(data).__name__}")


def take(data: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """The examples at these indices as one batch."""
    if isinstance(data, tuple):
        index = torch.from_numpy(indices)
        return data[0][index], data[1][index]
    pairs = [data[int(index)] for index in indices]
    return torch.stack([torch.as_tensor(x) for x, _ in pairs]), torch.stack([torch.as_tensor(y) for _, y in pairs])


def num_passes(num_examples: int, batch_size: int, num_batches: int) -> int:
    """How many passes over the examples so many batches take."""
    return math.ceil(num_batches * min(batch_size, num_examples) / num_examples)


def batch_order(numbers: np.ndarray, batch_size: int, num_batches: int) -> np.ndarray:
    """The examples of random batches, drawn without replacement: one shuffled pass over the data after another.

    A batch holds ``batch_size`` examples, or all of them where there are fewer.

    Args:
        numbers: random numbers, shape ``(..., passes, examples)``: each pass goes through the examples in the order of its numbers.
        batch_size: examples a batch.
        num_batches: how many.

    Returns:
        Indices of examples, shape ``(..., num_batches, examples a batch)``.
    """
    passes, examples = numbers.argsort(axis=-1, kind="stable"), min(batch_size, numbers.shape[-1])
    drawn = passes.reshape(*numbers.shape[:-2], -1)[..., : num_batches * examples]
    return drawn.reshape(*numbers.shape[:-2], num_batches, examples)
