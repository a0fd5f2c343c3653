"""Examples that hold numbers which are not finite."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedgradnorm.data import Data, size, take

NUMBERS = 2**22
"""The most numbers that are looked at at once, of inputs or of outputs."""


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
