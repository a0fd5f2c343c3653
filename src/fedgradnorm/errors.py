"""The errors that a user can meet. Each message names what was wrong, where, and what was expected."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["ConfigError", "DataError", "FedGradNormError", "FederationError", "MessageError", "RunError", "StoppedError"]


class FedGradNormError(Exception):
    """The parent of every error that this package raises on purpose."""

    exit_code = 2
    """What the command line ends with."""


class ConfigError(FedGradNormError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(FedGradNormError, ValueError):
    """A data file is missing, damaged, or holds something that it must not."""


class FederationError(FedGradNormError, ValueError):
    """The clients, the encoder and the heads do not fit together."""


class MessageError(FedGradNormError, ValueError):
    """A message between server and client is not what it has to be."""


class RunError(FedGradNormError, RuntimeError):
    """A run folder cannot be written or read."""


class StoppedError(FedGradNormError, RuntimeError):
    """A run ended before its last round. Its folder holds a checkpoint to go on from."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest known one, or all of them.

    >>> nearest("gama", ["gamma", "seed"])
    "did you mean 'gamma'?"
    >>> nearest("xyz", ["gamma", "seed"])
    'known: gamma, seed'
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise a ConfigError for the setting ``name`` unless the condition holds.

    >>> require(False, "gamma", "a number of at least 0", -1)
    Traceback (most recent call last):
    fedgradnorm.errors.ConfigError: gamma: expected a number of at least 0, found -1
    """
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, found {found!r}")
