"""A run's config.toml: the resolved settings, written and read back."""

import tomllib
from pathlib import Path

import tomli_w

from fedgradnorm.atomic import write_atomically
from fedgradnorm.config import RunConfig, decoded
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.runs.entries import how_to_resume, writing
from fedgradnorm.validation import validated


def as_toml(config: RunConfig) -> bytes:
    """The settings as TOML. Raises ConfigError if a value has no TOML form."""
    try:
        return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)).encode()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a setting cannot be written to config.toml: {error}") from error


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.toml. Raises RunError if the folder cannot be written."""
    with writing(folder, f"when it can be: {how_to_resume(folder, config)}"):
        write_atomically(folder / "config.toml", as_toml(config))


def load_config_of(folder: Path) -> RunConfig:
    """The settings of a run. Raises RunError or ConfigError if its config.toml is damaged."""
    path = folder / "config.toml"
    try:
        values = tomllib.loads(decoded(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read; {error}") from error
    return validated(RunConfig, values, prefix="", place=f"in {path}")
