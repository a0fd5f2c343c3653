"""The settings of a run: frozen, from a TOML file and ``key=value`` words, checked before anything else happens."""

import codecs
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedgradnorm.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)

__all__ = [
    "AggregationConfig",
    "Component",
    "EngineConfig",
    "FaultsConfig",
    "FederationConfig",
    "MethodConfig",
    "ModelConfig",
    "RunConfig",
    "RunSettings",
    "Section",
    "TrainConfig",
    "WeightingConfig",
    "decoded",
    "dotted",
    "load_config",
    "overlaid",
    "parse_override",
    "read_toml",
    "validated",
]


class Section(BaseModel):
    """A table of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(BaseModel):
    """A table that names a part and gives its options: the other keys of the table."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options, without the name."""
        return dict(self.__pydantic_extra__ or {})

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same part with these options in place of its own."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**own, **options)


class MethodConfig(Component):
    """How a client trains in a round: the table ``[train.method]``, or its name alone."""

    name: str = Field(
        "fedrep",
        description="`fedrep`, `fedper`, `fedprox`, `fedavg`, `local`, `centralized`, or your own `module:Class`; its options beside it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TrainConfig(Section):
    """How to train: the table ``[train]``."""

    num_rounds: int = Field(50, ge=1, description="Rounds to train.")
    method: MethodConfig = Field(
        MethodConfig(),
        description="How a client trains in a round: a name, or a table with options.",
    )
    head_steps: int = Field(
        10, ge=1, description="SGD steps on the head in a round, the encoder fixed: τ_h."
    )
    encoder_steps: int = Field(
        10, ge=1, description="SGD steps on the encoder in a round, the head fixed: τ_ω."
    )
    head_lr: float = Field(0.03, gt=0, le=1e6, description="Step size of the head: α.")
    head_momentum: float = Field(
        0.0, ge=0, lt=1, description="Momentum of the head's SGD; it is kept from round to round."
    )
    encoder_lr: float = Field(
        0.03, gt=0, le=1e6, description="Step size of the encoder at a client: β."
    )
    server_lr: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="The server's step is η = encoder_steps · encoder_lr · server_lr.",
    )
    server_optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="What takes the aggregated direction."
    )
    server_momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of the server's SGD.")
    batch_size: int = Field(
        64, ge=1, description="Examples in a mini-batch; a smaller client uses all that it has."
    )
    fraction_train: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the clients that takes part in a round, drawn anew each time.",
    )
    participants: tuple[tuple[str, ...], ...] = Field(
        (),
        description="Client ids that take part, one list a round, the last one from then on; in place of fraction_train.",
    )
    min_clients: int = Field(
        1, ge=0, description="A round with fewer sound reports is undone and repeated."
    )
    max_retries: int = Field(
        3, ge=0, description="How often a round is repeated before the run stops."
    )
    max_update_ratio: float | None = Field(
        None,
        gt=1,
        description="A gradient longer than so many times the median of the last rounds is dropped; by default none is.",
    )
    eval_every: int = Field(
        5, ge=1, description="Test after the first and the last round, and after every so many."
    )
    loss_estimate: Literal["batches", "exact"] = Field(
        "batches",
        description="The loss F(k) in a report: the mean over the encoder's mini-batches, or re-evaluated on the data.",
    )
    loss_examples: int = Field(
        4096, ge=1, description="At most so many training examples for F(0), and for an exact F(k)."
    )
    initial_loss: Literal["measured", "guess"] = Field(
        "measured",
        description="F(0): the loss of the initial model, or that of the constant answer (log C for C classes).",
    )
    eval_batch_size: int = Field(
        512, ge=1, description="Test examples that pass through a model at once."
    )
    seed: int = Field(0, ge=0, description="All randomness comes from it.")

    @field_validator("participants")
    @classmethod
    def _check_participants(cls, value: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        if not all(value):
            raise ValueError("expected at least one client id in every list")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.server_optimizer == "adam" and self.server_momentum:
            raise ValueError('expected server_momentum only with server_optimizer = "sgd"')
        if self.participants and self.fraction_train < 1:
            raise ValueError("expected participants or fraction_train, not both")
        return self


class FaultsConfig(Section):
    """Faults on purpose, to see how a federation would fare: the table ``[faults]``. Each is a probability for each report."""

    drop: float = Field(0.0, ge=0, le=1, description="It never arrives.")
    delay: float = Field(
        0.0, ge=0, le=1, description="It arrives a round too late, and then counts for nothing."
    )
    nan: float = Field(0.0, ge=0, le=1, description="One of its numbers is not a number.")
    corrupt: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A gradient a thousand times too long, cut short or noise, or an infinite loss.",
    )


class FederationConfig(Component):
    """Who trains on what: the table ``[federation]``."""

    name: str = Field(
        "radcom",
        description="`radcom`, `mtfl`, `digits`, or your own `module:function`; its options beside it.",
    )


class WeightingConfig(Component):
    """How the server weights the clients: the table ``[weighting]``."""

    name: str = Field(
        "fedgradnorm",
        description="One of those below, or your own `module:Class`; its options beside it. With `train.method=fedavg`: `examples`.",
    )


class AggregationConfig(Component):
    """How weighted gradients become one direction: the table ``[aggregation]``."""

    name: str = Field(
        "mean",
        description="`mean`, `clipped_mean`, `median`, `trimmed_mean`, or your own `module:Class`.",
    )


class EngineConfig(Component):
    """What runs the clients: the table ``[engine]``."""

    name: str = Field(
        "vectorized",
        description="`vectorized`, `reference`, or your own `module:Class`; its options beside it.",
    )


class ModelConfig(Component):
    """The encoder: the table ``[model]``."""

    name: str = Field(
        "default",
        description="`default` is the federation's own encoder; else a model, with its options beside it.",
    )
    norm_layer: Annotated[str, Field(coerce_numbers_to_str=True)] | tuple[str, ...] | None = Field(
        None, description="Encoder parameters of the norm layer; by default its last layer."
    )
    buffers: Literal["local", "averaged"] | None = Field(
        None,
        description="The encoder's buffers (BatchNorm statistics): by default as the federation says, which is `local`.",
    )


class RunSettings(Section):
    """What is written, and where: the table ``[run]``."""

    dir: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="The run's folder; by default `runs/` and the name of the config file.",
    )
    checkpoint_every: int = Field(
        10,
        ge=1,
        description="A checkpoint is written after the last round, and after every so many.",
    )
    keep: int = Field(3, ge=1, description="So many checkpoints are kept, the last ones.")
    page: bool = Field(
        True,
        description="Whether the run ends with report.html, about 5 MB, where plotly is installed.",
    )
    tensorboard: bool = Field(
        True, description="Whether TensorBoard events are written, where tensorboard is installed."
    )
    loss_targets: tuple[float, ...] = Field(
        (0.8, 0.6, 0.4, 0.2),
        description="The summary counts the rounds until the mean of F(k)/F(0) over five rounds falls to each of these.",
    )
    experiment: str | None = Field(
        None,
        description="Names the clients' files of a run across machines; made up when it begins.",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
    )
    metric_targets: dict[str, float] = Field(
        {}, description="The summary counts the rounds until a task's test metric reaches this."
    )


class RunConfig(Section):
    """A whole run."""

    federation: FederationConfig = FederationConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    weighting: WeightingConfig = WeightingConfig()
    aggregation: AggregationConfig = AggregationConfig()
    engine: EngineConfig = EngineConfig()
    faults: FaultsConfig = FaultsConfig()
    run: RunSettings = RunSettings()
    versions: dict[str, str] = Field({}, description="Written into a run's folder, and not read.")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file and of words from the command line, which win over the file.

    A word that names another part, such as ``weighting.name=equal``, drops the options that the file gives to its own part.

    Args:
        path: a TOML file; None for the defaults alone.
        overrides: words like ``train.num_rounds=5``. The value is read as TOML, or as a plain string where it is none.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, or a value of the wrong type or out of range.
    """
    values = {} if path is None else read_toml(path)
    places = {}
    parsed = [(*parse_override(word), word) for word in overrides]
    for dotted, value, _ in parsed:
        _drop_options_of_another_part(values, dotted, value)
    for dotted, value, word in parsed:
        _set(values, dotted, value, word)
        places[dotted] = "on the command line"
    return validated(
        RunConfig, values, prefix="", places=places, place="" if path is None else f"in {path}"
    )


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys.

    >>> dotted({"train": {"seed": 0}})
    {'train.seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            dotted(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def overlaid(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with others laid over them, table by table; one that names another part drops the options of the old one.

    >>> overlaid({"weighting": {"name": "fedgradnorm", "gamma": 0.5}, "train": {"seed": 1}}, {"weighting": {"name": "equal"}})
    {'weighting': {'name': 'equal'}, 'train': {'seed': 1}}
    """
    result = dict(values)
    for table, value in settings.items():
        if isinstance(value, Mapping) and "name" in value:
            _drop_options_of_another_part(result, f"{table}.name", value["name"])
        result[table] = _merged(result.get(table), value)
    return result


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, with or without a byte order mark. Raises ConfigError where it is none."""
    try:
        text = decoded(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"config file {path}: expected a readable TOML file; {error.strerror}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"config file {path}: not valid TOML: {error}") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path}: not valid TOML: {error}") from error


def decoded(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with that byte order mark, as editors of Windows write it.

    Raises:
        ValueError: another encoding.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError("its encoding is not UTF-8, but UTF-32")
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its encoding is not UTF-8: {error}") from error
    if "\0" in text:
        raise ValueError(
            "its encoding is not UTF-8: there are bytes of 0 in it, as in UTF-16 or UTF-32"
        )
    if text.startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
        raise ValueError(
            "its encoding is not UTF-8 with at most one byte order mark: there are two of these"
        )
    return text


def parse_override(word: str) -> tuple[str, Any]:
    """The dotted key and the value of a word such as ``train.seed=1``. Raises ConfigError where it is none."""
    dotted, equals, text = word.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"'{word}': expected table.key=value, such as train.num_rounds=5")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return dotted, text
    return dotted, parsed["value"] if parsed.keys() == {
        "value"
    } else text  # a line break could begin another key


def _drop_options_of_another_part(values: dict[str, Any], dotted: str, name: Any) -> None:
    *tables, key = dotted.split(".")
    kind: Any = RunConfig
    part: Any = values
    for table in tables:
        field = (
            kind.model_fields.get(table)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
            else None
        )
        kind, part = (
            field.annotation if field is not None else None,
            part.get(table) if isinstance(part, dict) else None,
        )
    if (
        key == "name"
        and isinstance(kind, type)
        and issubclass(kind, Component)
        and isinstance(part, dict)
    ):
        if part.get("name", kind.model_fields["name"].default) == name:
            return
        for option in part.keys() - kind.model_fields.keys():
            del part[option]


def _set(values: dict[str, Any], dotted: str, value: Any, word: str) -> None:
    *tables, key = dotted.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"'{word}': '{table}' is a value, not a table")
    values[key] = value


def validated(
    model: type[Model],
    values: Mapping[str, Any],
    prefix: str,
    places: Mapping[str, str] | None = None,
    place: str = "",
) -> Model:
    """A pydantic model of these values.

    Args:
        model: the model.
        values: the values.
        prefix: the dotted name of the table, which a message begins with.
        places: where single keys (dotted) came from.
        place: where the others came from.

    Raises:
        ConfigError: the first thing that is wrong, with its key, what was expected, what was found, and where.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_message(model, error, values, prefix, places or {}, place)) from error


def _message(
    model: type[BaseModel],
    error: ValidationError,
    values: Mapping[str, Any],
    prefix: str,
    places: Mapping[str, str],
    place: str,
) -> str:
    first, *others = sorted(
        error.errors(), key=lambda one: one["type"] == "missing"
    )  # which a misspelt key explains
    keys: list[str] = []
    table: Any = values
    for part in first[
        "loc"
    ]:  # pydantic ends some locations with the names of types: those are no keys of ours
        if not (isinstance(table, Mapping) and part in table) and not (
            isinstance(table, Sequence) and isinstance(part, int)
        ):
            break
        keys.append(str(part))
        table = table[part]  # type: ignore[index]  # a key of a table, or a number in a list
    dotted = ".".join(keys)
    where = places.get(dotted, place)
    full = ".".join(filter(None, (prefix, dotted)))
    if first["type"] == "extra_forbidden":
        message = f"unknown key '{full}'; {nearest(keys[-1], _known_keys(model, keys[:-1]))}"
    elif first["type"] == "missing":
        message = f"'{'.'.join(filter(None, (full, str(first['loc'][-1]))))}' is missing"
    else:
        expected = (
            first["msg"].removeprefix("Input should be ").removeprefix("Value error, expected ")
        )
        if first["type"] == "too_short":
            expected = f"at least {first['ctx']['min_length']} in it"
        elif first["type"] in ("byte_size", "byte_size_unit"):
            expected = "a number of bytes, or a text such as '2GB'"
        else:
            expected = EXPECTED.get(first["type"], expected)
            if first["type"] in TABLE_TYPES:
                expected = _table_text(model, keys)
        found = _shown(first["input"])
        message = (
            f"{full}: expected {expected}, found {found}" if full else f"expected {expected}"
        )  # of all keys together
    more = f" (and {len(others)} more)" if others else ""
    return " ".join(filter(None, (message, where))) + more


EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "a text",
    "set_type": "a list",
    "frozen_set_type": "a list",
}
"""What pydantic says in words of Python, in those of a configuration."""

TABLE_TYPES = {"dict_type", "model_type", "model_attributes_type", "dataclass_type", "mapping_type"}


def _table_text(model: type[BaseModel], keys: Sequence[str]) -> str:
    """What a table has to be, in words: that of a part has a name."""
    kind: Any = model
    for key in keys:
        field = (
            kind.model_fields.get(key)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
            else None
        )
        kind = None if field is None else field.annotation
    if isinstance(kind, type) and issubclass(kind, MethodConfig):
        return f'a name, such as "{kind().name}", or a table with a name and options'
    if isinstance(kind, type) and issubclass(kind, Component):
        return "a table with a name and options"
    return "a table"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, or very deep nesting
        return f"what cannot be shown: {error}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _known_keys(model: type[BaseModel], tables: Sequence[str]) -> list[str]:
    for table in tables:
        if not table.isdigit():
            model = next(_models_in(model.model_fields[table].annotation), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The tables in a type: itself, or what may be in its place, or in its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
