"""Few numbers by which tensors are recognised, up to rounding."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedgradnorm.identity.records import Sketch

GROUPS = 4
"""The most groups of columns that a sketch sums over."""

DIGITS = 5
"""Digits after the point of a sketch's numbers."""

CLOSE = 1e-3
"""Numbers are the same if they differ by less than this share of their scale.

Data that are computed on another machine differ by rounding.
"""

SKETCH_SCALE, WHOLE_SCALE = 3.0, 0.1
"""The scales of the numbers in a sketch of examples, and in a sketch of all targets."""

NEGLIGIBLE = 1e-7
"""A column below this share of the median column is rounding."""


def sketch(part: Tensor) -> Sketch:
    """Numbers around 1 for a few examples. A change in any column shows, whatever its scale.

    For every column there are its deviations from its mean, relative to the largest one; the mean
    and the largest deviation, relative to the largest number; and the logarithm of that number.
    The sketch has weighted sums of these over groups of columns.
    """
    values = _rows(part)
    if values.numel() == 0:
        return []
    scales = values.abs().amax(dim=0)
    known = scales > NEGLIGIBLE * (scales[scales > 0].median() if (scales > 0).any() else 1.0)
    zero = torch.zeros((), dtype=torch.float64)
    scales = scales.where(known, torch.ones_like(scales))
    relative = (values / scales).where(known, zero)
    centre = relative.mean(dim=0)
    spread = (relative - centre).abs().amax(dim=0)
    varied = spread > CLOSE
    divisors = spread.where(varied, torch.ones_like(spread))
    deviations = ((relative - centre) / divisors).where(varied, zero)
    rows = torch.cat([deviations, torch.stack([centre, spread, scales.log()])])
    weights = 1 + 0.5 * _weights(values.shape[1])
    groups = (rows * weights).tensor_split(min(GROUPS, values.shape[1]), dim=1)
    sums = torch.cat([group.sum(dim=1) / group.shape[1] ** 0.5 for group in groups])
    return [round(number, DIGITS) for number in sums.tolist()]


def whole(targets: Tensor) -> Sketch:
    """Two sums over all targets, relative to the sum of magnitudes, and the logarithm of that.

    In the second sum every example has a weight of its own.
    """
    if targets.is_complex():
        targets = torch.view_as_real(targets)
    rows = targets.detach().reshape(len(targets), -1)
    sums = rows.sum(dim=1, dtype=torch.float64).nan_to_num(0.0, 0.0, 0.0).cpu()
    total = max(float(sums.abs().sum()), 1e-300)
    weighted = float(sums @ _weights(len(sums)))
    return [float(sums.sum()) / total, weighted / total, float(np.log(total))]


def means(part: Tensor) -> Iterator[float]:
    """For each example its mean, and then its mean with a different weight for every place."""
    values = _rows(part)
    yield from values.mean(dim=1).nan_to_num().tolist()
    yield from ((values @ _weights(values.shape[1])) / max(values.shape[1], 1)).tolist()


def of_all(tensors: Iterable[Tensor]) -> list[float]:
    """Two numbers for all values of some tensors."""
    values = [_rows(tensor[None])[0] for tensor in tensors]
    return list(means(torch.cat(values)[None])) if values else []


def is_close(first: Sequence[float], second: Sequence[float], scale: float | None = None) -> bool:
    """Whether numbers are the same up to rounding. The default scale is the largest of them."""
    if len(first) != len(second):
        return False
    if scale is None:
        scale = max((abs(number) for number in (*first, *second)), default=0.0)
    return all(abs(a - b) <= CLOSE * scale for a, b in zip(first, second, strict=True))


def _weights(count: int) -> Tensor:
    return torch.cos(torch.arange(count, dtype=torch.float64))


def _rows(part: Tensor) -> Tensor:
    """The numbers of some examples, one row per example. Numbers that are not finite become 0."""
    if part.is_complex():
        part = torch.view_as_real(part)
    return part.detach().cpu().double().reshape(len(part), -1).nan_to_num(0.0, 0.0, 0.0)
