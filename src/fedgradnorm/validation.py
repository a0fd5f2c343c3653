"""Values checked against a pydantic model, with errors in the words of a configuration."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedgradnorm.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)

EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "a text",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "byte_size": "a number of bytes, or a text such as '2GB'",
    "byte_size_unit": "a number of bytes, or a text such as '2GB'",
}
"""By pydantic's type of an error, what was expected, in words that are not Python's."""

TABLE_TYPES = {"dict_type", "model_type", "model_attributes_type", "dataclass_type", "mapping_type"}
BOUND_TYPES = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
BOUNDS = ("gt", "ge", "lt", "le")


def validated(
    model: type[Model],
    values: Mapping[str, Any],
    prefix: str,
    places: Mapping[str, str] | None = None,
    place: str = "",
) -> Model:
    """Build a pydantic model from values.

    Args:
        model: the model. The title in its configuration, if any, is what errors call its table.
        values: the values.
        prefix: the dotted name of the table; messages begin with it.
        places: where single keys (dotted) came from.
        place: where the others came from.

    Raises:
        ConfigError: the first error, with its key, what was expected, what was found, and where.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        # "missing" comes last: a misspelt key explains it
        first, *others = sorted(error.errors(), key=lambda detail: detail["type"] == "missing")
        keys = _keys(first["loc"], values)
        place = (places or {}).get(".".join(keys), place)
        more = f" (and {len(others)} more)" if others else ""
        message = " ".join(filter(None, (_message(model, first, keys, prefix), place)))
        raise ConfigError(message + more) from error


def _keys(location: Sequence[str | int], values: Any) -> list[str]:
    """The keys of a location, without the names of types with which pydantic ends some."""
    keys: list[str] = []
    for part in location:
        is_key = isinstance(values, Mapping) and part in values
        if not is_key and not (isinstance(values, Sequence) and isinstance(part, int)):
            break
        keys.append(str(part))
        values = values[part]
    return keys


def _message(model: type[BaseModel], error: ErrorDetails, keys: list[str], prefix: str) -> str:
    """What is wrong with one key."""
    full = ".".join(filter(None, (prefix, *keys)))
    if error["type"] == "extra_forbidden":
        table = _model_at(model, keys[:-1]) or model
        return f"unknown key '{full}'; {nearest(keys[-1], table.model_fields)}"
    if error["type"] == "missing":
        return f"'{'.'.join(filter(None, (full, str(error['loc'][-1]))))}' is missing"
    expected = _expected(model, error, keys)
    if not full:  # an error of all keys together
        return f"expected {expected}"
    return f"{full}: expected {expected}, found {_shown(error['input'])}"


def _expected(model: type[BaseModel], error: ErrorDetails, keys: Sequence[str]) -> str:
    """What was expected in the place of a value."""
    kind = error["type"]
    if kind == "too_short":
        return f"at least {error['ctx']['min_length']} in it"
    if kind in TABLE_TYPES:
        table = _model_at(model, keys)
        return (table.model_config.get("title") if table else None) or "a table"
    if kind in BOUND_TYPES or kind == "finite_number":
        field = _field_at(model, keys)
        bounds = {} if field is None else _bounds(field.annotation, field.metadata)
        number = "a finite number" if kind == "finite_number" else "a number"
        if bounds or kind == "finite_number":
            return number + _range(bounds)
    said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, expected ")
    return EXPECTED.get(kind, said)


def _range(bounds: Mapping[str, float]) -> str:
    """The end of "a number ...", for bounds by the names that pydantic gives them.

    >>> _range({"gt": 0, "le": 1e6}), _range({"ge": 1}), _range({"gt": 0, "lt": 0.5})
    (' above 0, at most 1e6', ' of at least 1', ' between 0 and 0.5')
    """
    gt, ge, lt, le = (_short(bounds[name]) if name in bounds else "" for name in BOUNDS)
    if gt and lt:
        return f" between {gt} and {lt}"
    if ge and (lt or le):
        return f" from {ge} to {le or f'below {lt}'}"
    lower = f" above {gt}" if gt else f" of at least {ge}" if ge else ""
    upper = f" below {lt}" if lt else f" of at most {le}" if le else ""
    return f"{lower}, at most {le}" if lower and le else lower + upper


def _short(number: float) -> str:
    """A number without the zeros of its exponent.

    >>> _short(1e6), _short(0.5), _short(1024)
    ('1e6', '0.5', '1024')
    """
    return f"{number:g}".replace("e+0", "e") if isinstance(number, float) else str(number)


def _bounds(annotation: Any, metadata: Sequence[Any] = ()) -> dict[str, float]:
    """The bounds of the numbers in a type; none where its parts have different ones."""
    declared = set(_declared_bounds(annotation, metadata))
    bounds = dict(declared)
    return bounds if len(bounds) == len(declared) else {}


def _declared_bounds(annotation: Any, metadata: Sequence[Any]) -> Iterator[tuple[str, float]]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _declared_bounds(None, item.metadata)
        else:
            yield from ((name, getattr(item, name)) for name in BOUNDS if hasattr(item, name))
    if get_origin(annotation) is Annotated:
        yield from _declared_bounds(get_args(annotation)[0], annotation.__metadata__)
    else:
        for part in get_args(annotation):
            yield from _declared_bounds(part, ())


def _field_at(model: type[BaseModel], keys: Sequence[str]) -> FieldInfo | None:
    """The field that keys lead to; for keys of a plain mapping, that of the mapping."""
    field: FieldInfo | None = None
    for key in keys:
        if not key.isdigit():
            table = model if field is None else next(_models_in(field.annotation), None)
            if table is None or key not in table.model_fields:
                break
            field = table.model_fields[key]
    return field


def _model_at(model: type[BaseModel], keys: Sequence[str]) -> type[BaseModel] | None:
    """The model of the table that keys lead to."""
    field = _field_at(model, keys)
    return model if field is None else next(_models_in(field.annotation), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type: itself, or those in its union or its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:  # thousands of digits, or very deep nesting
        return f"what cannot be shown: {error}"
    return text if len(text) <= 200 else f"{text[:200]}..."
