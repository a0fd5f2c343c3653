"""A study: methods, seeds, variants and step sizes to compare, from a TOML file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from fedgradnorm.config import (
    Component,
    RunConfig,
    Section,
    dotted,
    overlaid,
    parse_override,
    read_toml,
)
from fedgradnorm.errors import ConfigError, nearest
from fedgradnorm.validation import validated

Seed = Annotated[int, Field(ge=0)]
OWN = ("train.seed", "run.dir", "run.page", "run.tensorboard", "run.keep", "versions")
"""Settings that the comparison sets in every cell."""


class Axis(Section):
    """A table ``[[tuning.axes]]``: settings that are tuned together, and the values to try."""

    keys: tuple[str, ...] = Field(
        min_length=1,
        description="Dotted settings that get the same value, such as train.encoder_lr.",
    )
    values: tuple[float, ...] = Field(min_length=1, description="The values, in ascending order.")
    not_for: tuple[str, ...] = Field(
        (), description="Methods that have the first value only: the settings do not affect them."
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if list(self.values) != sorted(set(self.values)):
            raise ValueError("expected values in ascending order, each once")
        return self


class Tuning(Section):
    """The table ``[tuning]``: how step sizes are chosen, for every method on the same grid."""

    seeds: tuple[Seed, ...] = Field(
        min_length=1, description="Seeds to tune on, all different from the study's seeds."
    )
    num_rounds: int | None = Field(
        None, ge=1, description="Rounds of a tuning run; by default those of the settings."
    )
    axes: tuple[Axis, ...] = Field(
        min_length=1, description="The grid: every combination of the axes' values."
    )


class Targets(Section):
    """The table ``[targets]``: the targets that rounds are counted to."""

    loss_ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.8, 0.6, 0.4, 0.2), description="Shares of the initial loss."
    )
    metrics: dict[str, float] = Field({}, description="By task, a target for its main test metric.")


class Method(Component):
    """A table ``[[methods]]``: a name, and the settings of a run that make the method."""

    name: str = Field(
        min_length=1, max_length=60, description="The method's name in tables and charts."
    )


class Variant(Component):
    """A table ``[[variants]]``: a name, and settings under which all methods are compared."""

    name: str = Field(max_length=60, description="The variant's name, such as a tenth of the data.")


class Study(Section):
    """A whole study: the file's top level."""

    title: str = Field(min_length=1, description="The page's title.")
    question: str = Field("", description="The question in a sentence.")
    config: str | None = Field(
        None, description="A run's TOML file to start from, relative to the study's file."
    )
    base: dict[str, Any] = Field({}, description="Settings of a run, which override that file.")
    methods_file: str | None = Field(
        None,
        description="A TOML file of [[methods]], relative to the study's file. "
        "methods may contain their names; without methods, the study has all of them.",
    )
    seeds: tuple[Seed, ...] = Field(
        min_length=1, description="Seeds of the comparison, the same for all methods."
    )
    methods: tuple[Method, ...] = Field(
        min_length=1, description="The methods to compare, in the order of tables and charts."
    )
    variants: tuple[Variant, ...] = Field(
        (Variant(name=""),),
        min_length=1,
        description="The settings to compare under; by default those of the base.",
    )
    baseline: str = Field("equal", description="The method that the others are compared with.")
    single: str | None = Field(
        None, description="The method that trains every task alone: the reference of delta-m."
    )
    tuning: Tuning | None = Field(
        None, description="How step sizes are chosen; by default the settings have them."
    )
    targets: Targets = Field(Targets(), description="The targets that rounds are counted to.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        methods = [method.name for method in self.methods]
        for kind, names in (("methods", methods), ("variants", [v.name for v in self.variants])):
            if twice := _repeated(names):
                raise ValueError(f"expected {kind} with different names, found '{twice}' twice")
        wanted = [("baseline to name", self.baseline), ("single to name", self.single)]
        for axis in self.axes:
            wanted += [("tuning.axes to be not for", name) for name in axis.not_for]
        for what, name in wanted:
            if name is not None and name not in methods:
                hint = f"there is no method '{name}'; {nearest(name, methods)}"
                raise ValueError(f"expected {what} a method, but {hint}")
        self._check_seeds()
        self._check_settings()
        return self

    def _check_seeds(self) -> None:
        tuned = () if self.tuning is None else self.tuning.seeds
        for key, seeds in (("seeds", self.seeds), ("tuning.seeds", tuned)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"expected {key} without repetition, found {list(seeds)}")
        if both := sorted(set(self.seeds) & set(tuned)):
            shared = ", ".join(map(str, both))
            raise ValueError(
                f"expected tuning.seeds that are not among seeds, but {shared} is in both"
            )

    def _check_settings(self) -> None:
        tuned = self.tuned_keys
        if twice := _repeated(tuned):
            raise ValueError(f"expected every setting on one axis of tuning, found {twice} twice")
        parts = list[tuple[str, Component]]()
        parts += [(f"methods '{method.name}'", method) for method in self.methods]
        parts += [(f"variants '{variant.name}'", variant) for variant in self.variants]
        for where, part in parts:
            _check_tables(part.options, where)
            for key in dotted(part.options):
                if key in tuned:
                    raise ValueError(f"expected {where} to leave {key} alone, which is tuned")
        _check_tables(self.base, "base")

    @property
    def tuned_keys(self) -> tuple[str, ...]:
        """The dotted settings that are tuned."""
        return tuple(key for axis in self.axes for key in axis.keys)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of tuning; empty if nothing is tuned."""
        return () if self.tuning is None else self.tuning.axes

    @property
    def shows_variants(self) -> bool:
        """Whether there is more than one variant, or one with a name."""
        return len(self.variants) > 1 or self.variants[0].name != ""

    def with_methods(self, names: Sequence[str]) -> "Study":
        """The study of these methods and the baseline.

        Without the method of single-task training, it has no reference for delta-m.

        Raises:
            ConfigError: there is no method of such a name.
        """
        known = [method.name for method in self.methods]
        for name in names:
            if name not in known:
                raise ConfigError(f"methods: there is no method '{name}'; {nearest(name, known)}")
        kept = tuple(method for method in self.methods if method.name in {*names, self.baseline})
        single = self.single if self.single in names else None
        return self.model_copy(update={"methods": kept, "single": single})


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that comes more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _check_tables(settings: Mapping[str, Any], where: str) -> None:
    for table, value in settings.items():
        if table not in RunConfig.model_fields:
            hint = f"there is no table '{table}'; {nearest(table, RunConfig.model_fields)}"
            raise ValueError(f"expected {where} to set what a run has, but {hint}")
        if not isinstance(value, Mapping):
            example = f"such as {table}.name = ..., found {value!r}"
            raise ValueError(f"expected {where} to set {table} as a table, {example}")
    for key in dotted(settings):
        if key.startswith(OWN):
            raise ValueError(f"expected {where} to leave {key} alone, which the comparison sets")


def load_study(path: Path, overrides: Sequence[str] = (), *, full: bool = False) -> Study:
    """Read a study from a TOML file, with its base settings.

    Args:
        path: the file.
        overrides: arguments such as ``seeds=[0,1]`` for a key of the study, or
            ``train.num_rounds=5`` for a setting of the base. They take precedence over the file.
        full: whether the keys of the file's table ``[full]`` override the study: its size for a
            larger machine.

    Raises:
        ConfigError: a missing or malformed file, an unknown key, seeds that overlap, a baseline
            that is not among the methods, and the like.
    """
    values = read_toml(path)
    large = values.pop("full", {})
    if not isinstance(large, Mapping):
        raise ConfigError(f"full: expected a table, found {large!r} in {path}")
    if full and not large:
        raise ConfigError(f"--full: there is no table [full] in {path}")
    if full:
        values = _laid_over(values, large)
    for word in overrides:
        key, value = parse_override(word)
        values = _laid_over(values, nested(key, value))
    values = _with_shared_methods(path, values)
    study = validated(Study, values, prefix="", place=f"in {path}")
    base = read_toml(path.parent / study.config) if study.config is not None else {}
    for kind in ("run", "versions"):
        base.pop(kind, None)  # a study does not use a run's folder
    return study.model_copy(update={"base": overlaid(base, study.base)})


def _with_shared_methods(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The study's values, with the methods that it names read from their file."""
    file, given = values.get("methods_file"), values.get("methods")
    named = [item for item in given if isinstance(item, str)] if isinstance(given, list) else []
    if not isinstance(file, str):
        if named:
            name = f"'{named[0]}' names a method of a file"
            raise ConfigError(f"methods: {name}, but no methods_file is given in {path}")
        return dict(values)
    place = path.parent / file
    shared = read_toml(place).get("methods")
    if not isinstance(shared, list) or not all(
        isinstance(table, Mapping) and isinstance(table.get("name"), str) for table in shared
    ):
        expected = "expected tables [[methods]], each with a name"
        raise ConfigError(f"methods_file: {expected}, in {place}")
    known = {table["name"]: table for table in shared}
    for name in named:
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(f"methods: there is no method '{name}' in {place}; {near}")
    if given is None:
        return {**values, "methods": shared}
    if isinstance(given, list):
        given = [known[item] if isinstance(item, str) else item for item in given]
    return {**values, "methods": given}


def _laid_over(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Override keys of the study, and settings of a run in its base."""
    run_keys = RunConfig.model_fields.keys() - Study.model_fields.keys()
    of_study = {key: value for key, value in settings.items() if key not in run_keys}
    of_run = {key: value for key, value in settings.items() if key in run_keys}
    result = overlaid(values, of_study)
    return {**result, "base": overlaid(result.get("base", {}), of_run)} if of_run else result


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key with its value as nested tables.

    >>> nested("train.seed", 1)
    {'train': {'seed': 1}}
    """
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}
