"""From a name in a configuration to an object: a built-in name, or ``module:attribute`` for a user's own."""

import inspect
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, create_model

from fedgradnorm.config import Component, validated
from fedgradnorm.errors import ConfigError, FedGradNormError, described, nearest

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
    "method": {
        "centralized": "fedgradnorm.training.centralized:Centralized",
        "fedavg": "fedgradnorm.training.fedavg:FedAvg",
        "fedper": "fedgradnorm.training.fedper:FedPer",
        "fedprox": "fedgradnorm.training.fedprox:FedProx",
        "fedrep": "fedgradnorm.training.fedrep:FedRep",
        "local": "fedgradnorm.training.local:Local",
    },
    "weighting": {
        "afl": "fedgradnorm.weighting.afl:AFL",
        "cagrad": "fedgradnorm.weighting.cagrad:CAGrad",
        "dwa": "fedgradnorm.weighting.dwa:DWA",
        "equal": "fedgradnorm.weighting.equal:Equal",
        "examples": "fedgradnorm.weighting.examples:Examples",
        "fedgradnorm": "fedgradnorm.weighting.fedgradnorm:FedGradNorm",
        "fedhca2": "fedgradnorm.weighting.fedhca2:FedHCA2",
        "fedmgda_plus": "fedgradnorm.weighting.fedmgda_plus:FedMGDAPlus",
        "fixed": "fedgradnorm.weighting.fixed:Fixed",
        "gls": "fedgradnorm.weighting.gls:GLS",
        "imtl_g": "fedgradnorm.weighting.imtl_g:IMTLG",
        "mgda": "fedgradnorm.weighting.mgda:MGDA",
        "nash_mtl": "fedgradnorm.weighting.nash_mtl:NashMTL",
        "pcgrad": "fedgradnorm.weighting.pcgrad:PCGrad",
        "qffl": "fedgradnorm.weighting.qffl:QFFL",
        "rlw": "fedgradnorm.weighting.rlw:RLW",
        "uncertainty": "fedgradnorm.weighting.uncertainty:Uncertainty",
    },
    "engine": {
        "flower-local": "fedgradnorm.flower.local_engine:FlowerLocalEngine",
        "reference": "fedgradnorm.engines.reference:ReferenceEngine",
        "vectorized": "fedgradnorm.engines.vectorized:VectorizedEngine",
    },
}

GIVEN = {
    "federation": ("seed",),
    "model": ("input_shape",),
    "method": (),
    "weighting": (),
    "aggregation": (),
    "engine": ("federation", "seed"),
}
"""By kind, the arguments that the package gives; all others are options for a configuration to set."""


MEMBERS = {
    "federation": ("clients", "encoder", "check_data"),
    "model": ("forward", "named_parameters"),
    "method": ("train_head", "train_encoder", "own_encoder", "lockstep"),
    "weighting": ("init", "update"),
    "aggregation": ("__call__",),
    "engine": ("execute", "evaluate", "client_states", "restore"),
}
"""By kind, what a part has to have."""

TABLES = {"method": "train.method"}
"""By kind, the table of a configuration that names such a part, where it is not called as the kind is."""


def resolve(kind: str, name: str) -> Any:
    """The object of this name.

    Raises:
        ConfigError: an unknown name, or a module or attribute that cannot be imported.
    """
    known = BUILT_INS[kind]
    target = known.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError(
            f"{_table(kind)}.name: there is no {kind} '{name}'; {nearest(name, known)} (your own: 'module:attribute')"
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{_table(kind)}.name: '{name}' cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # the user's own module may raise anything
        raise ConfigError(
            f"{_table(kind)}.name: '{name}' cannot be imported: {_raised(error)}"
        ) from error


def resolved(kind: str, part: Part) -> Part:
    """The same part with the defaults of its options filled in, checked against the signature of what makes it.

    Raises:
        ConfigError: an unknown option (names the nearest), or one of the wrong type.
    """
    options = validated(
        _options_model(kind, part.name), part.options, prefix=_table(kind)
    ).model_dump()
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
        raise ConfigError(f"{_table(kind)}.{error}") from error
    except FedGradNormError:
        raise
    except TypeError as error:
        raise ConfigError(f"{_table(kind)}.name: '{part.name}' cannot be made: {error}") from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ConfigError(
            f"{_table(kind)}.name: '{part.name}' cannot be made: {_raised(error)}"
        ) from error
    missing = [name for name in MEMBERS[kind] if not hasattr(made, name)]
    if missing:
        raise ConfigError(
            f"{_table(kind)}.name: '{part.name}' makes no {kind}: a {type(made).__name__} without '{missing[0]}'"
        )
    return made


def _raised(error: BaseException) -> str:
    """What an error of someone else says, and the line that it comes from."""
    last = extract_tb(error.__traceback__)[-1]
    place = (
        ""
        if isinstance(error, SyntaxError)
        else f" ({Path(last.filename).name}, line {last.lineno})"
    )
    return described(error) + place


def name_of(kind: str, made_by: type) -> str:
    """The name under which a class is found: that of a built-in, or ``module:attribute``."""
    target = f"{made_by.__module__}:{made_by.__qualname__}"
    return next((name for name, known in BUILT_INS[kind].items() if known == target), target)


def describe(kind: str, name: str) -> tuple[str, dict[str, Any]]:
    """The first line of a part's documentation, and its options with their defaults."""
    options = {
        key: field.get_default() for key, field in _options_model(kind, name).model_fields.items()
    }  # PydanticUndefined: required
    return (inspect.getdoc(resolve(kind, name)) or "").partition("\n")[0], options


def _table(kind: str) -> str:
    return TABLES.get(kind, kind)


def _options_model(kind: str, name: str) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    maker = resolve(kind, name)
    try:
        parameters = inspect.signature(maker, eval_str=True).parameters
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(
            f"{_table(kind)}.name: '{name}' is nothing that makes a {kind}: {error}"
        ) from error
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.name in ({"name", "norm_layer", "buffers"} if kind == "model" else {"name"}):
            raise ConfigError(
                f"{_table(kind)}.name: '{name}' has an option '{parameter.name}', which the table [{_table(kind)}] keeps for itself"
            )
        elif parameter.name not in GIVEN[kind]:
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            fields[parameter.name] = (
                annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
    config = ConfigDict(extra=extra, allow_inf_nan=False, arbitrary_types_allowed=True)
    model: type[BaseModel] = create_model(name, __config__=config, **fields)
    return model
