"""The errors and warnings of this package. Each says what is wrong, where, and what is expected."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).parent)


class FedGradNormError(Exception):
    """The base of every error that this package raises on purpose."""

    exit_code = 2
    """The exit code of the command line."""

    result: Any = None
    """The `Result` of the completed rounds, if training has begun."""

    hint = ""
    """How to resume the run that the error has ended; the error says it behind its reason."""

    @property
    def reason(self) -> str:
        """What the error says, without the hint."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.reason}; {self.hint}" if self.hint else self.reason


class FedGradNormWarning(UserWarning):
    """A run continues, with something that its user should know."""


class ConfigError(FedGradNormError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(FedGradNormError, ValueError):
    """A data file is missing, damaged, or has content that is not allowed."""


class FederationError(FedGradNormError, ValueError):
    """The clients, the encoder and the heads do not fit together."""


class MessageError(FedGradNormError, ValueError):
    """A message between server and client is not valid."""


class RunError(FedGradNormError, RuntimeError):
    """A run folder cannot be written or read."""


class ClientError(FedGradNormError, RuntimeError):
    """A client's model, loss or data raised an error, its cause, after training had begun."""

    exit_code = 1


class WeightingError(FedGradNormError, RuntimeError):
    """A weighting or an aggregation raised an error, its cause, or returned an invalid value."""

    exit_code = 1


class StoppedError(FedGradNormError, RuntimeError):
    """A run ended before its last round. Its folder has a checkpoint to resume from."""

    exit_code = 1


def described(error: BaseException) -> str:
    """The type of an error of a user's code and the start of its message, as one line."""
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def raised_as(kind: type[FedGradNormError], text: str) -> Iterator[None]:
    """Raise errors of the user's own code as this kind of error: the text, and what was raised."""
    try:
        yield
    except FedGradNormError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise kind(f"{text} {described(error)}") from error


def printable(text: str) -> str:
    r"""A foreign text for a terminal, a log or a page, with unprintable characters spelt out.

    >>> printable("no\x1b[2J luck")
    'no\\x1b[2J luck'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def warn(message: str) -> None:
    """Give a warning at the calling line outside this package, each time that it is called."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    warnings.warn_explicit(message, FedGradNormWarning, frame.f_code.co_filename, frame.f_lineno)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them.

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
