"""Options of a part: declared once with their ranges, checked in configurations and in Python."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, Field, create_model

from fedgradnorm.errors import ConfigError
from fedgradnorm.validation import validated

MODELS: WeakKeyDictionary[Any, dict[tuple[str, ...], type[BaseModel]]] = WeakKeyDictionary()
"""By what makes a part, and by the arguments that are not options, the model of its options."""


class Options:
    """The base of dataclasses whose fields are checked against their annotations.

    An annotation states the type of a field and its range. A subclass that compares several
    options starts its ``__post_init__`` with ``super().__post_init__()``.

    Raises:
        ConfigError: a value of the wrong type, or out of range.

    >>> from dataclasses import dataclass
    >>> from typing import Annotated
    >>> @dataclass(frozen=True)
    ... class Mine(Options):
    ...     power: Annotated[float, Field(ge=0, le=4)] = 1.0
    >>> Mine(power=9)
    Traceback (most recent call last):
    fedgradnorm.errors.ConfigError: power: expected a number from 0 to 4, found 9
    """

    def __post_init__(self) -> None:
        """Check all fields, and convert their values as pydantic does: an integer to a float."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
            if field.init
        }
        checked = validated(options_model(type(self)), values, prefix="")
        for name in values:
            object.__setattr__(self, name, getattr(checked, name))


def options_model(maker: Callable[..., Any], given: tuple[str, ...] = ()) -> type[BaseModel]:
    """The pydantic model of the options of a class or a function, made once from its signature.

    Args:
        maker: the class or function.
        given: its arguments that are not options.

    Raises:
        ConfigError: a signature that cannot be read.
    """
    try:
        models = MODELS.setdefault(maker, {})
    except TypeError:  # it has no hash, or takes no weak references
        models = {}
    if given not in models:
        models[given] = _model(maker, given)
    return models[given]


def _model(maker: Callable[..., Any], given: tuple[str, ...]) -> type[BaseModel]:
    try:
        parameters = inspect.signature(maker, eval_str=True).parameters
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"its options cannot be read: {error}") from error
    factories = {
        field.name: Field(default_factory=field.default_factory)
        for field in (dataclasses.fields(maker) if dataclasses.is_dataclass(maker) else ())
        if field.default_factory is not dataclasses.MISSING
    }
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    for key, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif key not in given:
            required = parameter.default is parameter.empty
            default = ... if required else factories.get(key, parameter.default)
            fields[key] = (
                Any if parameter.annotation is parameter.empty else parameter.annotation,
                default,
            )
    config = ConfigDict(extra=extra, allow_inf_nan=False, arbitrary_types_allowed=True)
    model: type[BaseModel] = create_model("Options", __config__=config, **fields)
    return model
