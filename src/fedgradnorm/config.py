"""The settings of a run: from a TOML file and ``key=value`` words, checked before anything else."""

import codecs
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from fedgradnorm.errors import ConfigError
from fedgradnorm.validation import validated

OWN = "or your own `module:{}`; its options beside it."
"""The end of the description of a part's name."""


class Section(BaseModel):
    """A table of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(BaseModel):
    """A table that names a part and gives its options: the other keys of the table.

    In Python it may hold the part itself. Copies hold it too; files and messages do not.
    """

    model_config = ConfigDict(frozen=True, extra="allow", title="a table with a name and options")

    name: str

    _part: Any = PrivateAttr(None)

    @property
    def options(self) -> dict[str, Any]:
        """The options, without the name."""
        return dict(self.model_extra or {})

    @property
    def part(self) -> Any:
        """The object that the table holds, or None."""
        return self._part

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same table with these options in place of its own."""
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**own, **options)

    def holding(self, part: object) -> Self:
        """A copy of the table that holds the object which its name and options describe."""
        copy = self.model_copy()
        copy._part = part
        return copy


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
StepSize = Annotated[float, Field(gt=0, le=1e6)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


def key(default: Any, description: str, **constraints: Any) -> Any:
    """A key of a table, with the description that the documentation shows."""
    return Field(default, description=description, **constraints)


class MethodConfig(Component):
    """How a client trains in a round: the table ``[train.method]``, or its name alone."""

    model_config = ConfigDict(title='a name, such as "fedrep", or a table with a name and options')

    name: str = key(
        "fedrep",
        "`fedrep`, `fedper`, `fedprox`, `fedavg`, `local`, `centralized`, " + OWN.format("Class"),
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TrainConfig(Section):
    """How to train: the table ``[train]``."""

    num_rounds: Count = key(50, "Rounds to train.")
    method: MethodConfig = key(
        MethodConfig(), "How a client trains in a round: a name, or a table with options."
    )
    head_steps: Count = key(10, "SGD steps on the head in a round, the encoder fixed: τ_h.")
    encoder_steps: Count = key(10, "SGD steps on the encoder in a round, the head fixed: τ_ω.")
    head_lr: StepSize = key(0.03, "Step size of the head: α.")
    head_momentum: Momentum = key(0.0, "Momentum of the head's SGD, kept from round to round.")
    encoder_lr: StepSize = key(0.03, "Step size of the encoder at a client: β.")
    server_lr: StepSize = key(
        1.0, "The server's step is η = encoder_steps · encoder_lr · server_lr."
    )
    server_optimizer: Literal["sgd", "adam"] = key(
        "sgd", "The optimiser that applies the aggregated direction."
    )
    server_momentum: Momentum = key(0.0, "Momentum of the server's SGD.")
    batch_size: Count = key(64, "Examples in a mini-batch; a client with fewer uses all of them.")
    fraction_train: float = key(
        1.0, "Share of the clients that takes part in a round, drawn anew each time.", gt=0, le=1
    )
    participants: tuple[tuple[str, ...], ...] = key(
        (),
        "In place of fraction_train: the ids of the clients that take part, one list "
        "per round. The last list holds for all later rounds.",
    )
    min_clients: Natural = key(1, "A round with fewer sound reports is undone and repeated.")
    max_retries: Natural = key(3, "How often a round is repeated before the run stops.")
    max_update_ratio: float | None = key(
        None,
        "A gradient longer than this multiple of the median of the last rounds is "
        "dropped; by default none is.",
        gt=1,
    )
    eval_every: Count = key(5, "Rounds between tests; the first and the last round are tested too.")
    loss_estimate: Literal["batches", "exact"] = key(
        "batches",
        "The loss F(k) in a report: the mean over the encoder's mini-batches, or "
        "re-evaluated on the data.",
    )
    loss_examples: Count = key(
        4096, "Maximum number of training examples for F(0) and an exact F(k)."
    )
    initial_loss: Literal["measured", "guess"] = key(
        "measured",
        "F(0): the loss of the initial model, or that of the constant answer (log C "
        "for C classes).",
    )
    eval_batch_size: Count = key(512, "Test examples that pass through a model at once.")
    seed: Natural = key(0, "The seed that all randomness is derived from.")

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
    """Faults on purpose, to test a federation: the table ``[faults]``. A probability per report."""

    drop: Probability = key(0.0, "The report never arrives.")
    delay: Probability = key(0.0, "It arrives a round too late, and is not counted.")
    nan: Probability = key(0.0, "One of its numbers is NaN.")
    corrupt: Probability = key(
        0.0,
        "Its gradient is a thousand times too long, cut short or noise, or its loss is infinite.",
    )


class FederationConfig(Component):
    """Who trains on what: the table ``[federation]``."""

    name: str = key("radcom", "`radcom`, `mtfl`, `digits`, " + OWN.format("function"))


class WeightingConfig(Component):
    """How the server weights the clients: the table ``[weighting]``."""

    name: str = key(
        "fedgradnorm",
        "One of those below, or your own `module:Class`; its options beside it. The "
        "default with `train.method=fedavg` is `examples`.",
    )


class AggregationConfig(Component):
    """How weighted gradients become one direction: the table ``[aggregation]``."""

    name: str = key(
        "mean", "`mean`, `clipped_mean`, `median`, `trimmed_mean`, " + OWN.format("Class")
    )


class EngineConfig(Component):
    """The engine that runs the clients: the table ``[engine]``."""

    name: str = key("vectorized", "`vectorized`, `reference`, " + OWN.format("Class"))


class ModelConfig(Component):
    """The encoder: the table ``[model]``."""

    name: str = key(
        "default",
        "`default` is the federation's own encoder; else a model, with its options beside it.",
    )
    norm_layer: Annotated[str, Field(coerce_numbers_to_str=True)] | tuple[str, ...] | None = key(
        None, "Encoder parameters of the norm layer; by default its last layer."
    )
    buffers: Literal["local", "averaged"] | None = key(
        None,
        "The encoder's buffers (BatchNorm statistics): by default as the federation "
        "says, which is `local`.",
    )


class RunSettings(Section):
    """What is written, and where: the table ``[run]``."""

    dir: str | None = key(
        None,
        "The run's folder; by default `runs/` and the name of the config file.",
        coerce_numbers_to_str=True,
    )
    checkpoint_every: Count = key(
        10, "Rounds between checkpoints; there is one after the last round too."
    )
    keep: Count = key(3, "Number of checkpoints to keep, the newest.")
    page: bool = key(
        True, "Whether the run ends with report.html, about 5 MB, if plotly is installed."
    )
    tensorboard: bool = key(
        True, "Whether TensorBoard events are written, if tensorboard is installed."
    )
    loss_targets: tuple[float, ...] = key(
        (0.8, 0.6, 0.4, 0.2),
        "The summary counts the rounds until the mean of F(k)/F(0) over five rounds "
        "falls to each of these.",
    )
    experiment: str | None = key(
        None,
        "A name for the clients' files of a run across machines; by default generated.",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
    )
    metric_targets: dict[str, float] = key(
        {}, "The summary counts the rounds until a task's test metric reaches this."
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
    versions: dict[str, str] = key({}, "Written into a run's folder, and not read.")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration from a file and from words on the command line, which take precedence.

    A word that names another part, such as ``weighting.name=equal``, drops the options that the
    file gives to its own part.

    Args:
        path: a TOML file; None for the defaults alone.
        overrides: words like ``train.num_rounds=5``. A value that is not TOML is a plain string.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, or a value of the wrong type or
            out of range.
    """
    values = {} if path is None else read_toml(path)
    parsed = [(*parse_override(word), word) for word in overrides]
    for key, value, _ in parsed:
        _drop_options_of_another_part(values, key, value)
    for key, value, word in parsed:
        _set(values, key, value, word)
    places = {key: "on the command line" for key, _, _ in parsed}
    place = "" if path is None else f"in {path}"
    return validated(RunConfig, values, prefix="", places=places, place=place)


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys.

    >>> dotted({"train": {"seed": 0}})
    {'train.seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        full = f"{prefix}{key}"
        flat |= dotted(value, f"{full}.") if isinstance(value, Mapping) else {full: value}
    return flat


def overlaid(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run with others laid over them, table by table.

    A table that names another part drops the options of the old part.

    >>> old = {"weighting": {"name": "fedgradnorm", "gamma": 0.5}, "train": {"seed": 1}}
    >>> overlaid(old, {"weighting": {"name": "equal"}})
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
    """The tables of a TOML file, with or without a byte order mark.

    Raises:
        ConfigError: a file that cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(decoded(path.read_bytes()))
    except OSError as error:
        reason = f"expected a readable TOML file; {error.strerror}"
        raise ConfigError(f"config file {path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path}: not valid TOML: {error}") from error


def decoded(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as Windows editors write.

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
        raise ValueError("its encoding is not UTF-8: it has zero bytes, as UTF-16 and UTF-32 do")
    if text.startswith("\N{ZERO WIDTH NO-BREAK SPACE}"):
        raise ValueError("its encoding is not UTF-8: it has two byte order marks")
    return text


def parse_override(word: str) -> tuple[str, Any]:
    """The dotted key and the value of a word such as ``train.seed=1``.

    Raises:
        ConfigError: a word of another form.
    """
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{word}': expected table.key=value, such as train.num_rounds=5")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return key, text
    # a line break in the text could begin another key
    return key, parsed["value"] if parsed.keys() == {"value"} else text


def _drop_options_of_another_part(values: dict[str, Any], dotted: str, name: Any) -> None:
    """Drop the options in a table, where the dotted key is its name and the name changes."""
    *tables, key = dotted.split(".")
    kind: Any = RunConfig
    part: Any = values
    for table in tables:
        field = kind.model_fields.get(table) if _is_a(BaseModel, kind) else None
        kind = None if field is None else field.annotation
        part = part.get(table) if isinstance(part, dict) else None
    if key == "name" and _is_a(Component, kind) and isinstance(part, dict):
        if part.get("name", kind.model_fields["name"].default) == name:
            return
        for option in part.keys() - kind.model_fields.keys():
            del part[option]


def _is_a(base: type, kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _set(values: dict[str, Any], dotted: str, value: Any, word: str) -> None:
    *tables, key = dotted.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"'{word}': '{table}' is a value, not a table")
    values[key] = value
