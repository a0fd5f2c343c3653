"""From a name in a configuration to a part: a built-in name, or ``module:attribute`` of a user."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeVar

from pydantic import BaseModel

from fedgradnorm.config import (
    AggregationConfig,
    Component,
    EngineConfig,
    MethodConfig,
    ModelConfig,
    WeightingConfig,
)
from fedgradnorm.errors import ConfigError, FedGradNormError, described, nearest
from fedgradnorm.options import options_model
from fedgradnorm.validation import validated

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
    "model": {"cnn": "fedgradnorm.models:cnn", "mlp": "fedgradnorm.models:mlp"},
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

GIVEN = {"federation": ("seed",), "model": ("input_shape",), "engine": ("federation", "seed")}
"""By kind, the arguments that the package gives; all others are options for a configuration."""

BASES = {
    "federation": "fedgradnorm:Federation",
    "model": "torch.nn:Module",
    "method": "fedgradnorm.training:Method",
    "weighting": "fedgradnorm.weighting:Weighting",
    "aggregation": "fedgradnorm.aggregation:Aggregation",
    "engine": "fedgradnorm.engine:Engine",
}
"""By kind, the class that every part is an instance of. It is imported when a part is built."""

TABLES: dict[str, type[Component]] = {
    "model": ModelConfig,
    "method": MethodConfig,
    "weighting": WeightingConfig,
    "aggregation": AggregationConfig,
    "engine": EngineConfig,
}
"""By kind, its table, where it differs from `Component` or is given in Python too."""


def check_name(kind: str, name: str) -> None:
    """Raise ConfigError for a name that is neither built in nor ``module:attribute``; no import."""
    known = BUILT_INS[kind]
    if name not in known and ":" not in name:
        hint = f"{nearest(name, known)} (your own: 'module:attribute')"
        raise ConfigError(f"{_table(kind)}.name: there is no {kind} '{name}'; {hint}")


def resolve(kind: str, name: str) -> Any:
    """The class or function that a name stands for.

    Raises:
        ConfigError: an unknown name, or a module or attribute that cannot be imported.
    """
    check_name(kind, name)
    module, _, attribute = BUILT_INS[kind].get(name, name).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the user's own module may raise anything
        plain = isinstance(error, ImportError | AttributeError | ValueError | TypeError)
        why = f"'{name}' cannot be imported: {error if plain else _raised(error)}"
        raise ConfigError(f"{_table(kind)}.name: {why}") from error


def resolved(kind: str, part: Part) -> Part:
    """The same table with the defaults of its options filled in, checked against what makes it.

    A table that holds an object has all its options, and they are checked already.

    Raises:
        ConfigError: an unknown option (names the nearest), or a value of the wrong type or range.
    """
    if part.part is not None:
        return part
    model = _options_model(kind, part.name)
    return part.with_options(validated(model, part.options, prefix=_table(kind)).model_dump())


def build(kind: str, part: Component, **given: Any) -> Any:
    """Make a part from its name and options, or take the object that the table holds.

    Args:
        kind: what it is.
        part: the table.
        given: what the package gives to every part of this kind.

    Raises:
        ConfigError: as `resolved`; an option that the part refuses; or an object of another kind.
    """
    if part.part is not None:
        return part.part
    checked = resolved(kind, part).options
    where = f"{_table(kind)}.name: '{part.name}'"
    try:
        made = resolve(kind, part.name)(**given, **checked)
    except ConfigError as error:
        raise ConfigError(f"{_table(kind)}.{error}") from error
    except FedGradNormError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        why = error if isinstance(error, TypeError) else _raised(error)
        raise ConfigError(f"{where} cannot be made: {why}") from error
    if not isinstance(made, _base(kind)):
        base = _base_name(kind)
        advice = f"return a {base}" if kind in ("federation", "model") else f"derive it from {base}"
        raise ConfigError(f"{where} makes {_shown(made)}, not a valid {kind}: {advice}")
    return made


def component_of(kind: str, part: object) -> Any:
    """The table of a configuration for a part that is given in Python, with all its options.

    Args:
        kind: ``"method"``, ``"weighting"``, ``"aggregation"`` or ``"engine"``.
        part: a name, a mapping with a name and options, such a table, or an object (not of an
            engine), which the table holds. Its class does not have to be importable.

    Raises:
        ConfigError: as `resolved`; or an object of another kind.

    >>> from fedgradnorm.weighting import Equal
    >>> component_of("weighting", Equal())
    WeightingConfig(name='equal')
    """
    table = TABLES[kind]
    if isinstance(part, table):
        return resolved(kind, part)
    if isinstance(part, str):
        return resolved(kind, table(name=part))
    if isinstance(part, Mapping):
        return resolved(kind, validated(table, part, prefix=_table(kind)))
    if kind == "engine":
        expected = (
            "a name, such as 'vectorized' or 'reference', or a mapping with a name and options"
        )
        raise ConfigError(f"engine: expected {expected}, found {part!r:.100}")
    if not isinstance(part, _base(kind)):
        expected = f"a name or an instance of {_base_name(kind)}"
        raise ConfigError(f"{_table(kind)}: expected {expected}, found {_shown(part)}")
    is_dataclass = dataclasses.is_dataclass(part) and not isinstance(part, type)
    options = dataclasses.asdict(part) if is_dataclass else {}
    return table(name=name_of(kind, type(part)), **options).holding(part)


def _base(kind: str) -> Any:
    module, _, attribute = BASES[kind].partition(":")
    return getattr(import_module(module), attribute)


def _base_name(kind: str) -> str:
    return BASES[kind].replace(":", ".")


def _shown(part: object) -> str:
    if isinstance(part, type):
        return f"the class {part.__name__} in the place of an object, such as {part.__name__}()"
    return f"an object of type {type(part).__name__}"


def _raised(error: BaseException) -> str:
    """What an error of a user's code says, and the line that raised it."""
    last = extract_tb(error.__traceback__)[-1]
    place = f" ({Path(last.filename).name}, line {last.lineno})"
    return described(error) + ("" if isinstance(error, SyntaxError) else place)


def name_of(kind: str, made_by: type) -> str:
    """The name under which a class is found: that of a built-in, or ``module:attribute``."""
    target = f"{made_by.__module__}:{made_by.__qualname__}"
    return next((name for name, known in BUILT_INS[kind].items() if known == target), target)


def describe(kind: str, name: str) -> tuple[str, dict[str, Any]]:
    """The summary of a part's documentation with its source, and its options with their defaults.

    The summary is the first line. The source is a paragraph that begins with "Source:". An option
    without a default has ``PydanticUndefined``.
    """
    fields = _options_model(kind, name).model_fields
    options = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    text = inspect.getdoc(resolve(kind, name)) or ""
    summary = text.partition("\n")[0]
    if source := re.search(r"^Source: (.+?)\.?(?:\n\n|$)", text, flags=re.DOTALL | re.MULTILINE):
        summary = f"{summary.removesuffix('.')} ({' '.join(source[1].split())})."
    return summary, options


def _table(kind: str) -> str:
    return "train.method" if kind == "method" else kind


def _options_model(kind: str, name: str) -> type[BaseModel]:
    table = _table(kind)
    maker = resolve(kind, name)
    try:
        model = options_model(maker, GIVEN.get(kind, ()))
    except ConfigError as error:
        raise ConfigError(f"{table}.name: '{name}': {error}") from error
    for option in TABLES.get(kind, Component).model_fields.keys() & model.model_fields.keys():
        reason = f"an option '{option}', which the table [{table}] keeps for itself"
        raise ConfigError(f"{table}.name: '{name}' has {reason}")
    return model
