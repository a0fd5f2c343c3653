"""The cells of a study: one run for each method, variant and seed, and for each tuned step size."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedgradnorm.build import resolve_config
from fedgradnorm.compare.spec import Method, Study, Variant, nested
from fedgradnorm.config import RunConfig, overlaid
from fedgradnorm.errors import ConfigError
from fedgradnorm.validation import validated

Point = tuple[float, ...]
"""A point of the tuning grid: a value for each axis."""


@dataclass(frozen=True)
class Cell:
    """One run of a study. ``config`` has all settings, without a folder."""

    variant: str
    method: str
    point: Point
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of the cell's folder. Cells with the same settings share a folder."""
        digest = hashlib.sha256(identity(self.config).encode()).hexdigest()[:16]
        method = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")[:40] or "method"
        return f"{method}-seed{self.seed}-{digest}"


def identity(config: RunConfig) -> str:
    """All settings that a run's figures depend on, as one text."""
    settings = config.model_dump(mode="json", exclude={"run", "versions"}, exclude_none=True)
    return json.dumps(settings, sort_keys=True)


def points_of(study: Study, method: str | None = None) -> list[Point]:
    """Every combination of the axes' values, or one empty point if nothing is tuned.

    With a method's name, the points that it is tuned on. Of an axis that is not for it, these have
    the first value only.
    """
    axes = (axis.values[:1] if method in axis.not_for else axis.values for axis in study.axes)
    return list(product(*axes))


def tuning_cells(study: Study) -> list[Cell]:
    """The runs that choose the step sizes, ordered by seed."""
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
    """The runs of the comparison, ordered by seed.

    Args:
        study: the study.
        chosen: by variant and method, the chosen point; None if the method diverged at all points.
    """
    return [
        _cell(study, variant, method, point, seed, None)
        for seed, variant, method in product(study.seeds, study.variants, study.methods)
        if (point := chosen[variant.name, method.name]) is not None
    ]


def _cell(
    study: Study, variant: Variant, method: Method, point: Point, seed: int, num_rounds: int | None
) -> Cell:
    values: Mapping[str, Any] = study.base
    for settings in (variant.options, method.options):
        values = overlaid(values, settings)
    for axis, value in zip(study.axes, point, strict=True):
        for key in axis.keys:
            values = overlaid(values, nested(key, value))
    own = {"seed": seed} if num_rounds is None else {"seed": seed, "num_rounds": num_rounds}
    values = overlaid(values, {"train": own})
    where = f"methods '{method.name}'" + (f" variants '{variant.name}'" if variant.name else "")
    try:
        config = resolve_config(validated(RunConfig, values, prefix=""))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    own_seed = _with_own_seed(config, values.get("weighting"))
    return Cell(variant.name, method.name, point, seed, own_seed)


def _with_own_seed(config: RunConfig, given: Any) -> RunConfig:
    """A weighting with an option ``seed`` gets the run's seed, unless the study sets the option."""
    options = config.weighting.options
    if type(options.get("seed")) is not int or (isinstance(given, Mapping) and "seed" in given):
        return config
    weighting = config.weighting.with_options({**options, "seed": config.train.seed})
    return config.model_copy(update={"weighting": weighting})
