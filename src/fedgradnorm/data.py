"""The data of one client: a pair of tensors (the fast path), or any map-style dataset."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

LARGE_BYTES = 8 * 2**20
"""The most bytes of inputs at once where nothing is trained: features of images are far larger."""

NUMBERS = 2**22
"""The most numbers that are looked at at once, of inputs or of outputs."""

FIRST = 16
"""The number of examples in the first batch of a dataset, before their size is known."""

FEW, SMALL = 4, 1024
"""All examples are shuffled if they are at most FEW times the drawn ones, or at most SMALL."""


NOT_BY_NUMBER = (Mapping, IterableDataset, str, bytes, np.ndarray, Tensor)
"""Types that have a length and items, but are not a dataset of pairs."""

WEIGHTS = "; weights of examples belong in the target{}, where the loss reads them"

COLUMNS = "for the columns of the inputs, and of the targets"
HINTS = {
    "DataFrame": f"give torch.tensor(frame.to_numpy()) {COLUMNS}",
    "ndarray": "give a pair of tensors: torch.from_numpy(array)",
    "Tensor": "give the targets too",
}


@runtime_checkable
class Dataset(Protocol):
    """An object with a length that gives ``(input, target)`` for an index, as torch's do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


Data: TypeAlias = tuple[Tensor, Tensor] | Dataset
"""Inputs and targets with the examples along dimension 0, or a dataset of single such pairs."""


def misfit(data: object) -> str | None:
    """Why an object cannot be a client's data, and what to do; None if it can.

    The items of a dataset are not looked at, unless it is a list.
    """
    if isinstance(data, tuple):
        return _misfit_of_pair(data)
    is_dataset = isinstance(data, Dataset) and not isinstance(data, NOT_BY_NUMBER)
    if is_dataset and not hasattr(data, "iloc"):
        return _misfit_of_item(data[0], 0) if isinstance(data, list) and data else None
    if isinstance(data, IterableDataset):
        hint = "an IterableDataset has no examples by number: give a map-style one"
    elif isinstance(data, DataLoader):
        hint = "give its .dataset: the batches are drawn by train.batch_size"
    else:
        hint = HINTS.get(type(data).__name__, "")
    found = f"expected (inputs, targets) or a map-style dataset, found {type_name(data)}"
    return f"{found}; {hint}" if hint else found


def _misfit_of_pair(data: Sequence[object]) -> str | None:
    if len(data) != 2:
        hint = WEIGHTS.format("s") if len(data) == 3 else ""
        return f"expected a pair (inputs, targets), found a tuple of {len(data)}{hint}"
    for name, part in zip(("inputs", "targets"), data, strict=True):
        if not isinstance(part, Tensor):
            how = "torch.from_numpy(array)" if isinstance(part, np.ndarray) else "torch.tensor(...)"
            return f"{name}: expected a tensor, found {type_name(part)}: {how} makes one"
        if part.layout != torch.strided or part.is_nested:
            how = f"found layout {part.layout}: .to_dense() makes one"
            return f"{name}: expected a dense tensor, {how}"
        if part.ndim == 0:
            return f"{name}: expected the examples along dimension 0, found a tensor of one number"
    return None


def _misfit_of_item(item: object, index: int) -> str | None:
    if isinstance(item, tuple | list) and len(item) == 2:
        return None
    found = f"{len(item)} parts" if isinstance(item, tuple | list) else type_name(item)
    hint = WEIGHTS.format("") if found == "3 parts" else ""
    return f"example {index}: expected a pair (input, target), found {found}{hint}"


def type_name(value: object) -> str:
    """The name of a value's type, for an error."""
    return "None" if value is None else type(value).__name__


def size(data: Data) -> int:
    """The number of examples."""
    return data[0].shape[0] if isinstance(data, tuple) else len(data)  # len() is slower


def tensors(data: Data) -> tuple[Tensor, Tensor]:
    """The inputs and the targets. Raises TypeError for a dataset."""
    if isinstance(data, tuple):
        return data
    raise TypeError(f"expected a pair of tensors, found {type(data).__name__}")


def take(data: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """The examples at these indices as one batch.

    Raises:
        TypeError: an item of a dataset is not a pair of tensors, arrays or numbers.
        ValueError: items of a dataset have different shapes.
    """
    if isinstance(data, tuple):
        index = torch.from_numpy(indices)
        return data[0][index], data[1][index]
    numbers = indices.tolist()
    pairs = [_pair(data[index], index) for index in numbers]
    inputs, targets = zip(*pairs, strict=True)
    return _stacked(inputs, numbers, "input"), _stacked(targets, numbers, "target")


def _pair(item: Any, index: int) -> tuple[Tensor, Tensor]:
    if (why := _misfit_of_item(item, index)) is not None:
        raise TypeError(why)
    parts = []
    for name, part in zip(("input", "target"), item, strict=True):
        try:
            parts.append(torch.as_tensor(part))
        except (TypeError, ValueError, RuntimeError) as error:
            expected = f"expected a tensor, an array or a number, found {type_name(part)}"
            raise TypeError(f"example {index}: {name}: {expected}") from error
    return parts[0], parts[1]


def _stacked(parts: Sequence[Tensor], indices: Sequence[int], name: str) -> Tensor:
    shape = tuple(parts[0].shape)
    for index, part in zip(indices, parts, strict=True):
        if part.shape != shape:
            found = f"expected {name}s of one shape, found {shape} and {tuple(part.shape)}"
            raise ValueError(f"examples {indices[0]} and {index}: {found}")
    return torch.stack(list(parts))


def in_batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All examples in order, in batches of this size, or smaller if their inputs are large.

    The batches are copies, because the user's own code may change them in place.
    """
    count, start, most = size(data), 0, min(batch_size, FIRST)
    if isinstance(data, tuple):
        most = _examples_at_once(data[0][:1], batch_size)
    while start < count:
        end = min(start + most, count)
        if isinstance(data, tuple):
            batch = data[0][start:end].clone(), data[1][start:end].clone()
        else:
            batch = take(data, np.arange(start, end))
        yield batch
        start, most = end, _examples_at_once(batch[0][:1], batch_size)


def _examples_at_once(example: Tensor, batch_size: int) -> int:
    return max(1, min(batch_size, LARGE_BYTES // max(example.nbytes, 1)))


def num_passes(num_examples: int, batch_size: int, num_batches: int) -> int:
    """How many passes over the examples this number of batches takes."""
    return math.ceil(num_batches * min(batch_size, num_examples) / num_examples)


def draws_few(num_examples: int, count: int) -> bool:
    """Whether so few examples are drawn that shuffling all of them would be a waste.

    >>> draws_few(2_000, 640), draws_few(2_000_000, 640)
    (False, True)
    """
    return num_examples > max(FEW * count, SMALL)


def distinct(rng: np.random.Generator, num_examples: int, count: int) -> np.ndarray:
    """Different random numbers below ``num_examples``, shape ``(count,)``.

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
    """The examples of random batches, drawn without replacement in one shuffled pass after another.

    A batch holds ``batch_size`` examples, or all of them if there are fewer.

    Args:
        numbers: random numbers, shape ``(..., passes, examples)``. Each pass goes through the
            examples in the order of its numbers.
        batch_size: the number of examples per batch.
        num_batches: the number of batches.

    Returns:
        Indices of examples, shape ``(..., num_batches, examples per batch)``.
    """
    passes, examples = numbers.argsort(axis=-1, kind="stable"), min(batch_size, numbers.shape[-1])
    drawn = passes.reshape(*numbers.shape[:-2], -1)[..., : num_batches * examples]
    return drawn.reshape(*numbers.shape[:-2], num_batches, examples)


def bad_examples(data: Data, kind: str) -> Iterator[tuple[int, str]]:
    """The first input and the first target that are not finite, if the data are tensors.

    Yields:
        The number of the example, and the beginning of a message about it.
    """
    if not isinstance(data, tuple):
        return
    for name, tensor in zip(("input", "target"), data, strict=True):
        row = _first_bad_row(tensor)
        if row is not None:
            values = tensor[row].flatten()
            value = values[~torch.isfinite(values)][0].item()
            yield row, f"example {row} of its {kind} data: the {name} holds {value}, and the"


def _first_bad_row(tensor: Tensor) -> int | None:
    """The first example with a number that is not finite, or None."""
    if not tensor.is_floating_point():
        return None
    rows = max(1, NUMBERS * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        part = part.reshape(len(part), -1)
        # a finite sum needs no mask: its numbers are finite
        if not torch.isfinite(part.sum(dtype=torch.float64)):
            bad = (~torch.isfinite(part)).any(dim=1).nonzero()
            if len(bad):
                return start + int(bad[0])
    return None


def batch_with(data: Data, row: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """A batch that begins with this example."""
    others = [index for index in range(min(batch_size, size(data))) if index != row]
    return take(data, np.array([row, *others][:batch_size]))


def is_finite(gradient: Tensor) -> bool:
    """Whether all numbers of a dense or sparse gradient are finite."""
    return bool(torch.isfinite(gradient.to_dense() if gradient.is_sparse else gradient).all())
