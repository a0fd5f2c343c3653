"""The data of one client: a pair of tensors (the fast path), or any map-style dataset, now or on first use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = [
    "Data",
    "Dataset",
    "batch_order",
    "distinct",
    "draws_few",
    "in_batches",
    "misfit",
    "num_passes",
    "size",
    "take",
    "tensors",
]

LARGE_BYTES = 8 * 2**20
"""Inputs that pass through a model at once where nothing is trained take no more: what a model makes of images is many times as large."""

FIRST = 16
"""Examples of a data set in its first batch, before it is known how large one is."""

FEW, SMALL = 4, 1024
"""All examples are put in order as long as they are no more than this many times those that are drawn, or this many."""


NOT_BY_NUMBER = (Mapping, IterableDataset, str, bytes, np.ndarray, Tensor)
"""What has a length and items, and is no data set of pairs all the same."""


@runtime_checkable
class Dataset(Protocol):
    """Anything with a length that gives ``(input, target)`` for an index, such as ``torch.utils.data.Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


Data: TypeAlias = tuple[Tensor, Tensor] | Dataset
"""Inputs and targets with the examples along dimension 0, or a dataset of such pairs without that dimension."""


def misfit(data: object) -> str | None:
    """Why something cannot be a client's data, with what to do, or None. Of a dataset that is not a list no item is looked at."""
    if isinstance(data, tuple):
        return _misfit_of_pair(data)
    if (
        isinstance(data, Dataset)
        and not isinstance(data, NOT_BY_NUMBER)
        and not hasattr(data, "iloc")
    ):
        return _misfit_of_item(data[0], 0) if isinstance(data, list) and data else None
    what = {
        "DataLoader": "give its .dataset: the batches are drawn by train.batch_size",
        "DataFrame": "give torch.tensor(frame.to_numpy()) for the columns of the inputs, and of the targets",
        "ndarray": "give a pair of tensors: torch.from_numpy(array)",
        "Tensor": "give the targets too",
    }.get("DataLoader" if isinstance(data, DataLoader) else type(data).__name__)
    if isinstance(data, IterableDataset):
        what = "an IterableDataset has no examples by number: give a map-style one"
    return f"expected (inputs, targets) or a map-style dataset, found {_kind(data)}" + (
        f"; {what}" if what else ""
    )


def _misfit_of_pair(data: Sequence[object]) -> str | None:
    if len(data) != 2:
        hint = (
            "; weights of examples belong into the targets, where the loss reads them"
            if len(data) == 3
            else ""
        )
        return f"expected a pair (inputs, targets), found a tuple of {len(data)}{hint}"
    for name, part in zip(("inputs", "targets"), data, strict=True):
        if not isinstance(part, Tensor):
            how = "torch.from_numpy(array)" if isinstance(part, np.ndarray) else "torch.tensor(...)"
            return f"{name}: expected a tensor, found {_kind(part)}: {how} makes one"
        if part.layout != torch.strided or part.is_nested:
            return f"{name}: expected a dense tensor, found layout {part.layout}: .to_dense() makes one"
        if part.ndim == 0:
            return f"{name}: expected the examples along dimension 0, found a tensor of one number"
    return None


def _misfit_of_item(item: object, index: int) -> str | None:
    if isinstance(item, tuple | list) and len(item) == 2:
        return None
    found = f"{len(item)} parts" if isinstance(item, tuple | list) else _kind(item)
    hint = (
        "; weights of examples belong into the target, where the loss reads them"
        if found == "3 parts"
        else ""
    )
    return f"example {index}: expected a pair (input, target), found {found}{hint}"


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def size(data: Data) -> int:
    """The number of examples."""
    return data[0].shape[0] if isinstance(data, tuple) else len(data)  # the len of a tensor is slow


def tensors(data: Data) -> tuple[Tensor, Tensor]:
    """The inputs and the targets. Raises TypeError for a dataset."""
    if isinstance(data, tuple):
        return data
    raise TypeError(f"expected a pair of tensors, found {type(data).__name__}")


def take(data: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """The examples at these indices as one batch.

    Raises:
        TypeError: a dataset's item is no pair of what a tensor can be made of.
        ValueError: items of a dataset have other shapes than one another.
    """
    if isinstance(data, tuple):
        index = torch.from_numpy(indices)
        return data[0][index], data[1][index]
    numbers = [int(index) for index in indices]
    pairs = [_pair(data[index], index) for index in numbers]
    inputs, targets = (
        _stacked([pair[part] for pair in pairs], numbers, name)
        for part, name in ((0, "input"), (1, "target"))
    )
    return inputs, targets


def _pair(item: Any, index: int) -> tuple[Tensor, Tensor]:
    if (why := _misfit_of_item(item, index)) is not None:
        raise TypeError(why)
    found = []
    for name, part in zip(("input", "target"), item, strict=True):
        try:
            found.append(torch.as_tensor(part))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"example {index}: {name}: expected a tensor, an array or a number, found {_kind(part)}"
            ) from error
    return found[0], found[1]


def _stacked(parts: Sequence[Tensor], indices: Sequence[int], name: str) -> Tensor:
    for index, part in zip(indices, parts, strict=True):
        if part.shape != parts[0].shape:
            first, other = (tuple(one.shape) for one in (parts[0], part))
            raise ValueError(
                f"examples {indices[0]} and {index}: expected {name}s of one shape, found {first} and {other}"
            )
    return torch.stack(list(parts))


def in_batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples in their order, a batch after another: so many examples, or fewer where their inputs are large.

    The batches are copies, because the user's own code may change them in place.
    """
    count, start = size(data), 0
    most = (
        _examples_at_once(data[0][:1], batch_size)
        if isinstance(data, tuple)
        else min(batch_size, FIRST)
    )
    while start < count:
        end = min(start + most, count)
        batch = (
            (data[0][start:end].clone(), data[1][start:end].clone())
            if isinstance(data, tuple)
            else take(data, np.arange(start, end))
        )
        yield batch
        start, most = end, _examples_at_once(batch[0][:1], batch_size)


def _examples_at_once(example: Tensor, batch_size: int) -> int:
    return max(1, min(batch_size, LARGE_BYTES // max(example.nbytes, 1)))


def num_passes(num_examples: int, batch_size: int, num_batches: int) -> int:
    """How many passes over the examples so many batches take."""
    return math.ceil(num_batches * min(batch_size, num_examples) / num_examples)


def draws_few(num_examples: int, count: int) -> bool:
    """Whether so few of the examples are drawn that all of them are not to be put in order for it.

    >>> draws_few(2_000, 640), draws_few(2_000_000, 640)
    (False, True)
    """
    return num_examples > max(FEW * count, SMALL)


def distinct(rng: np.random.Generator, num_examples: int, count: int) -> np.ndarray:
    """The first ``count`` different ones of random numbers below ``num_examples``, shape ``(count,)``: as the start of a random order.

    Time and memory grow with the count alone, which should be well below the number of examples.

    >>> len(set(distinct(np.random.default_rng(0), 10**12, 100).tolist()))
    100
    """
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < count:
        drawn = np.concatenate([drawn, rng.integers(num_examples, size=count)])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return drawn[:count]


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
