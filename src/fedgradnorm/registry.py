"""From a name in a configuration to an object: a built-in name, or ``module:attribute`` for a user's own."""

import inspect
from importlib import import_module
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, create_model

from fedgradnorm.config import Component, validated
from fedgradnorm.errors import ConfigError, nearest

__all__ = ["BUILT_INS", "build", "describe", "name_of", "resolve", "resolved"]

Part = TypeVar("Part", bound=Component)

BUILT_INS: dict[str, dict[str, str]] = {
    "aggregation": {
        "clipped_mean": "fedgradnorm.aggregation.clipped_mean:ClippedMean",
        "mean": "fedgradnorm.aggregation.mean:Mean",
        "median": "fedgradnorm.aggregation.median:Median",
        "trimmed_mean": "fedgradnorm.aggregation.trimmed_mean:TrimmedMean",
    },
    "federation": {
        "digits": "fedgradnorm.federations.digits:make",
        "mtfl": "fedgradnorm.federations.mtfl:make",
        "radcom": "fedgradnorm.federations.radcom:make",
    },
    "model": {
        "cnn": "fedgradnorm.models:cnn",
        "mlp": "fedgradnorm.models:mlp",
    },
    "weighting": {
        "equal": "fedgradnorm.weighting.equal:Equal",
        "fedgradnorm": "fedgradnorm.weighting.fedgradnorm:FedGradNorm",
    },
    "engine": {
        "flower-local": "fedgradnorm.flower.engine:FlowerLocalEngine",
        "reference": "fedgradnorm.engines.reference:ReferenceEngine",
        "vectorized": "fedgradnorm.engines.vectorized:VectorizedEngine",
    },
}

GIVEN = {"federation": ("seed",), "model": ("input_shape",), "weighting": (), "aggregation": (), "engine": ("federation", "seed")}
"""By kind, the arguments that the package gives; all others are options for a configuration to set."""


MEMBERS = {
    "federation": ("clients", "encoder", "check_data"),
    "model": ("forward", "named_parameters"),
    "weighting": ("init", "update"),
    "aggregation": ("__call__",),
    "engine": ("execute", "evaluate", "client_states", "restore"),
}
"""By kind, what a part has to have."""


def resolve(kind: str, name: str) -> Any:
    """The object of this name.

    Raises:
        ConfigError: an unknown name, or a module or attribute that cannot be imported.
    """
    known = BUILT_INS[kind]
    target = known.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError(f"{kind}.name: there is no {kind} '{name}'; {nearest(name, known)} (your own: 'module:attribute')")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{kind}.name: '{name}' cannot be imported: {error}") from error


def resolved(kind: str, part: Part) -> Part:
    """The same part with the defaults of its options filled in, checked against the signature of what makes it.

    Raises:
        ConfigError: an unknown option (names the nearest), or one of the wrong type.
    """
    options = validated(_options_model(kind, part.name), part.options, prefix=kind).model_dump()
    return part.with_options(options)


def build(kind: str, part: Component, **given: Any) -> Any:
    """Make a part from its name and options, and from what the package gives to every part of this kind.

    Raises:
        ConfigError: as `resolved`; whatever the part itself finds out of range; or something that is no such part.
    """
    checked = resolved(kind, part).options
    try:
        made = resolve(kind, part.name)(**given, **checked)
    except ConfigError as error:
        raise ConfigError(f"{kind}.{error}") from error
    except TypeError as error:
        raise ConfigError(f"{kind}.name: '{part.name}' cannot be made: {error}") from error
    missing = [name for name in MEMBERS[kind] if not hasattr(made, name)]
    if missing:
        raise ConfigError(f"{kind}.name: '{part.name}' makes no {kind}: a {type(made).__name__} without '{missing[0]}'")
    return made


def name_of(kind: str, made_by: type) -> str:
    """The name under which a class is found: that of a built-in, or ``module:attribute``."""
    target = f"{made_by.__module__}:{made_by.__qualname__}"
    return next((name for name, known in BUILT_INS[kind].items() if known == target), target)


def describe(kind: str, name: str) -> tuple[str, dict[str, Any]]:
    """The first line of a part's documentation, and its options with their defaults."""
    options = {key: field.get_default() for key, field in _options_model(kind, name).model_fields.items()}  # PydanticUndefined: required
    return (inspect.getdoc(resolve(kind, name)) or "").partition("\n")[0], options


def _options_model(kind: str, name: str) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    maker = resolve(kind, name)
    try:
        parameters = inspect.signature(maker, eval_str=True).parameters
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"{kind}.name: '{name}' is nothing that makes a {kind}: {error}") from error
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.name in ({"name", "norm_layer", "buffers"} if kind == "model" else {"name"}):
            raise ConfigError(f"{kind}.name: '{name}' has an option '{parameter.name}', which the table [{kind}] keeps for itself")
        elif parameter.name not in GIVEN[kind]:
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            fields[parameter.name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    config = ConfigDict(extra=extra, allow_inf_nan=False, arbitrary_types_allowed=True)
    model: type[BaseModel] = create_model(name, __config__=config, **fields)
    return model
