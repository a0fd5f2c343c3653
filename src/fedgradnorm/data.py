"""The data of one client: a pair of tensors (the fast path), or any map-style dataset, now or on first use."""

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "Dataset", "batch_order", "load", "size", "take", "tensors"]


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


def batch_order(num_examples: int, batch_size: int, num_batches: int, rng: np.random.Generator) -> np.ndarray:
    """The examples of random batches, drawn without replacement: one shuffled pass over the data after another.

    A batch holds ``batch_size`` examples, or all of them where there are fewer. Shape ``(num_batches, that)``.
    """
    drawn = num_batches * min(batch_size, num_examples)
    passes = np.empty((-(-drawn // num_examples), num_examples), dtype=np.int64)
    passes[:] = np.arange(num_examples)
    return rng.permuted(passes, axis=1, out=passes).reshape(-1)[:drawn].reshape(num_batches, -1)
