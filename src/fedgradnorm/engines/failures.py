"""Which errors mean that a shortcut cannot be had, and what all others mean.

A shortcut is tried on the user's own models. Some errors are the answer: this model cannot be
traced, or cannot be stacked. Every other error is a defect of this package. A user's run continues
without the shortcut, with a warning. In strict mode, which the tests use, the error is raised.
"""

import os
import sys
from types import TracebackType

from fedgradnorm.errors import described, warn

STRICT = "FEDGRADNORM_STRICT"
"""The environment variable that turns the strict mode on, unless it is empty."""


class Untraceable(TypeError):  # noqa: N818  # it is an answer
    """An operation cannot be part of a program."""


ANSWERS = (Untraceable, RuntimeError, ValueError)
"""What torch raises on code that it cannot trace or stack.

RuntimeError: ``vmap`` on ``.item()``, on random numbers and on operations without a batching rule;
a trace on control flow that depends on values (``torch._subclasses`` derives its exceptions from
RuntimeError); a kernel on shapes or types that it refuses. NotImplementedError is a RuntimeError.
ValueError: ``vmap`` on results that are not tensors, ``functional_call`` on tied parameters,
``torch.fx.proxy.TraceError``.
"""

OTHERS = frozenset({"torch", "numpy", *sys.stdlib_module_names})
"""Packages whose errors are their caller's."""


def is_strict() -> bool:
    """Whether errors that are not an answer are raised."""
    return bool(os.environ.get(STRICT))


def is_an_answer(error: BaseException) -> bool:
    """Whether an error says that a shortcut cannot be had, or comes from the user's own code."""
    return isinstance(error, ANSWERS) or _raised_by_user(error.__traceback__)


def _raised_by_user(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame outside these packages is the user's."""
    package = ""
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0]
        package = package if name in OTHERS else name
        traceback = traceback.tb_next
    return package != "fedgradnorm"


class Attempt:
    """A block that may fail: an error in it ends the block, and the code behind it runs.

    Args:
        what: what is then done without, for the warning on an error that is not an answer.

    >>> with Attempt("clients are not stacked"):
    ...     raise RuntimeError("vmap: no batching rule")
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, Exception) or (is_strict() and not is_an_answer(error)):
            return False
        if not is_an_answer(error):
            warn(f"{self.what}: {unexpected(error)}")
        return True


def unexpected(error: BaseException) -> str:
    """An error that is not an answer, in words."""
    return (
        f"{described(error)}: this is an error in fedgradnorm, which makes training slower and"
        " changes no number; please report it"
    )
