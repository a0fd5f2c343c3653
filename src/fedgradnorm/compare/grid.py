"""The cells of a study: one run for each method, variant and seed, and while step sizes are tuned for each of these too."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedgradnorm.build import resolve_config
from fedgradnorm.compare.spec import Method, Study, Variant
from fedgradnorm.config import RunConfig, overlaid, validated
from fedgradnorm.errors import ConfigError

__all__ = ["Cell", "Point", "final_cells", "identity", "points_of", "tuning_cells"]

Point = tuple[float, ...]
"""A point of the tuning grid: a value for each axis."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        variant: the variant's name.
        method: the method's name.
        point: the step sizes, one for each axis of tuning.
        seed: the run's seed.
        config: all settings, without a folder.
    """

    variant: str
    method: str
    point: Point
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The cell's folder: other settings, another folder. Cells with the same settings share one."""
        digest = hashlib.sha256(identity(self.config).encode()).hexdigest()[:16]
        return f"{re.sub(r'[^a-z0-9]+', '-', self.method.lower()).strip('-')[:40] or 'method'}-seed{self.seed}-{digest}"


def identity(config: RunConfig) -> str:
    """All settings that a run's figures depend on, as one text."""
    settings = config.model_dump(mode="json", exclude={"run", "versions"}, exclude_none=True)
    return json.dumps(settings, sort_keys=True)


def points_of(study: Study, method: str | None = None) -> list[Point]:
    """Every combination of the axes' values; one empty point where nothing is tuned.

    Given a method's name, those that it is tuned on: of an axis that is not for it the first value only.
    """
    return list(
        product(
            *(axis.values[:1] if method in axis.not_for else axis.values for axis in study.axes)
        )
    )


def tuning_cells(study: Study) -> list[Cell]:
    """The runs that step sizes are chosen by, the first seed of everything first."""
    if study.tuning is None:
        return []
    return [
        _cell(study, variant, method, point, seed, study.tuning.num_rounds)
        for seed in study.tuning.seeds
        for variant in study.variants
        for method in study.methods
        for point in points_of(study, method.name)
    ]


def final_cells(study: Study, chosen: Mapping[tuple[str, str], Point | None]) -> list[Cell]:
    """The runs of the comparison, the first seed of everything first.

    Args:
        study: the study.
        chosen: by variant and method, the point that was chosen; None where the method diverged at all of them.
    """
    found = []
    for seed, variant, method in product(study.seeds, study.variants, study.methods):
        point = chosen[variant.name, method.name]
        if point is not None:
            found.append(_cell(study, variant, method, point, seed, None))
    return found


def _cell(
    study: Study, variant: Variant, method: Method, point: Point, seed: int, num_rounds: int | None
) -> Cell:
    values: Mapping[str, Any] = study.base
    for settings in (variant.options, method.options):
        values = overlaid(values, settings)
    for axis, value in zip(study.axes, point, strict=True):
        for key in axis.keys:
            values = overlaid(values, _nested(key.split("."), value))
    own: dict[str, Any] = (
        {"seed": seed} if num_rounds is None else {"seed": seed, "num_rounds": num_rounds}
    )
    values = overlaid(values, {"train": own})
    where = " ".join(
        filter(
            None, (f"methods '{method.name}'", f"variants '{variant.name}'" if variant.name else "")
        )
    )
    try:
        config = _with_own_seed(
            resolve_config(validated(RunConfig, values, prefix="")), values.get("weighting")
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Cell(variant.name, method.name, point, seed, config)


def _with_own_seed(config: RunConfig, given: Any) -> RunConfig:
    """A weighting that draws numbers of its own (an option `seed`) draws others in every run, unless the study sets its seed."""
    options = config.weighting.options
    if type(options.get("seed")) is not int or (isinstance(given, Mapping) and "seed" in given):
        return config
    return config.model_copy(
        update={"weighting": config.weighting.with_options({**options, "seed": config.train.seed})}
    )


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}
