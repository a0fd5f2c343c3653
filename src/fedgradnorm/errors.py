"""The errors and warnings that a user can meet. Each names what was wrong, where, and what was expected."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

__all__ = [
    "ClientError",
    "ConfigError",
    "DataError",
    "FedGradNormError",
    "FedGradNormWarning",
    "FederationError",
    "MessageError",
    "RunError",
    "StoppedError",
    "WeightingError",
    "described",
    "warn",
]

PACKAGE = str(Path(__file__).parent)


class FedGradNormError(Exception):
    """The parent of every error that this package raises on purpose."""

    exit_code = 2
    """What the command line ends with."""

    result: Any = None
    """The `Result` of the rounds that are done, where training has begun."""


class FedGradNormWarning(UserWarning):
    """A run goes on, with something that its user has to know."""


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


class ClientError(FedGradNormError, RuntimeError):
    """A client's own model, loss or data raised an error after training had begun. Its cause is that error."""

    exit_code = 1


class WeightingError(FedGradNormError, RuntimeError):
    """A weighting or an aggregation raised an error, or gave what it must not. Its cause is that error, if there is one."""

    exit_code = 1


class StoppedError(FedGradNormError, RuntimeError):
    """A run ended before its last round. Its folder holds a checkpoint to go on from."""

    exit_code = 1


def described(error: BaseException) -> str:
    """The type of an error of someone else, and the beginning of what it says, as one line."""
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def printable(text: str) -> str:
    r"""A text of someone else for a terminal, a log or a page: what is no printable character, such as an escape, is spelt out.

    >>> printable("no\x1b[2J luck")
    'no\\x1b[2J luck'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def warn(message: str) -> None:
    """Give a warning at the line outside this package that led here, however often it was given before."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    warnings.warn_explicit(message, FedGradNormWarning, frame.f_code.co_filename, frame.f_lineno)


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
