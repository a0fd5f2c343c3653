"""What weightings and aggregations give, checked: they may be users' own code."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedgradnorm import registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.data import type_name
from fedgradnorm.errors import WeightingError, raised_as
from fedgradnorm.messages import Report
from fedgradnorm.weighting.base import Weighting, WeightingState, Weights


def first_state(weighting: Weighting, client_ids: Sequence[str]) -> WeightingState:
    """The state of a weighting before the first round.

    Raises:
        WeightingError: the weighting raised an error, or gave something else than a state.
    """
    what = f"{_named(weighting, 'weighting')}: init()"
    with raised_as(WeightingError, f"{what} raised"):
        state = weighting.init(sorted(client_ids))
    return _plain_state(state, what)


def weigh(
    weighting: Weighting, state: WeightingState, reports: Sequence[Report]
) -> tuple[Weights, WeightingState]:
    """The weights for these reports and the weighting's next state, in plain numbers.

    Raises:
        WeightingError: the weighting raised an error, or gave something else than these two.
    """
    what = f"{_named(weighting, 'weighting')}: update()"
    with raised_as(WeightingError, f"{what} raised"):
        pair = weighting.update(state, reports)
    if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Weights)):
        expected = "expected a pair (Weights, WeightingState)"
        raise WeightingError(f"{what}: {expected}, found {type_name(pair)}")
    weights, clients = pair[0], [report.client for report in reports]
    values = _finite_numbers(weights.values, clients, f"{what}: weights.values")
    if not (total := sum(values.values())) > 0:
        raise WeightingError(f"{what}: weights.values: expected a sum above 0, found {total:g}")
    targets = _finite_numbers(weights.targets, (), f"{what}: weights.targets")
    scale = _finite_numbers({"scale": weights.scale}, (), f"{what}: weights")["scale"]
    plain = Weights({client: values[client] for client in clients}, targets, scale)
    return plain, _plain_state(pair[1], what)


def _plain_state(state: object, what: str) -> WeightingState:
    """A weighting's state in plain numbers, as a checkpoint can hold it."""
    if not isinstance(state, WeightingState):
        raise WeightingError(f"{what}: expected a WeightingState, found {type_name(state)}")
    weights = _finite_numbers(state.weights, (), f"{what}: state.weights")
    if not isinstance(state.memory, Mapping):
        found = type_name(state.memory)
        raise WeightingError(f"{what}: state.memory: expected a dictionary, found {found}")
    return WeightingState(weights, _plain(state.memory, f"{what}: state.memory"))


def _finite_numbers(numbers: object, clients: Iterable[str], what: str) -> dict[str, float]:
    """Numbers by client as floats. Refuses a missing number, and one that is not finite."""
    if not isinstance(numbers, Mapping):
        raise WeightingError(
            f"{what}: expected a dictionary by client id, found {type_name(numbers)}"
        )
    if missing := [client for client in clients if client not in numbers]:
        expected = "expected a number for every client"
        raise WeightingError(f"{what}: {expected}, found none for '{missing[0]}'")
    values = numbers.values()
    if all(type(number) is float for number in values) and math.isfinite(sum(values)):
        return dict(numbers)
    return {client: _finite_number(number, client, what) for client, number in numbers.items()}


def _finite_number(number: Any, client: str, what: str) -> float:
    try:
        plain = float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        expected = f"expected a number for '{client}'"
        raise WeightingError(f"{what}: {expected}, found {number!r:.100}") from error
    if not math.isfinite(plain):
        raise WeightingError(f"{what}: expected a finite number for '{client}', found {plain}")
    return plain


def _plain(value: Any, what: str) -> Any:
    """A value as JSON has it. Numbers of NumPy and torch become Python's."""
    is_array = isinstance(value, np.ndarray | Tensor)
    if isinstance(value, np.generic) or (is_array and value.ndim == 0):
        value, is_array = value.item(), False
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise WeightingError(f"{what}: expected a finite number, found {value}")
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise WeightingError(f"{what}: expected texts as keys, found {odd[0]!r:.100}")
        return {
            key: held if type(held) is str else _plain(held, f"{what}[{key!r:.100}]")
            for key, held in value.items()
        }
    if isinstance(value, list | tuple):
        kind = type(value) if type(value) in (list, tuple) else list
        return kind(_plain(held, what) for held in value)
    hint = "; .tolist() makes numbers of it" if is_array else ""
    expected = "expected what JSON has: texts, finite numbers, lists and dictionaries"
    raise WeightingError(f"{what}: {expected}, found {type_name(value)}{hint}")


def aggregated(
    aggregate: Aggregation, reports: Sequence[Report], weights: Weights, encoder: Tensor
) -> Tensor:
    """The direction that an aggregation gives, shape ``(P,)``.

    Raises:
        WeightingError: the aggregation raised an error, or gave something else than a tensor of the
            encoder's type and shape.
    """
    what = _named(aggregate, "aggregation")
    with raised_as(WeightingError, f"{what} raised"):
        direction = aggregate(reports, weights)
    expected = f"{what}: expected a tensor of {encoder.dtype} and shape {tuple(encoder.shape)}"
    if not isinstance(direction, Tensor):
        raise WeightingError(f"{expected}, found {type_name(direction)}")
    if direction.shape != encoder.shape or direction.dtype != encoder.dtype:
        raise WeightingError(f"{expected}, found {direction.dtype} and {tuple(direction.shape)}")
    return direction


def _named(part: object, kind: str) -> str:
    """How messages name a part: by its kind and its name in the settings."""
    return f"{kind} '{registry.name_of(kind, type(part))}'"
