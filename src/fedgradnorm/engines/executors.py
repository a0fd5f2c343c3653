"""What runs the source of a program: TorchScript, or Python where TorchScript is missing.

`source.py` writes a program as text that is valid in both. TorchScript runs it without the
interpreter's lock, so threads do not wait for each other. Python runs the same operations in the
same order, with the same results, and needs nothing that torch may remove.
"""

import logging
import re
from collections.abc import Callable, Sequence
from threading import Event
from types import BuiltinFunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedgradnorm.errors import described, warn

log = logging.getLogger(__name__)

Steps: TypeAlias = Callable[..., Tensor]

NAME, OPERATION = re.compile(r"\bv_\w+"), re.compile(r"\btorch\.ops\.aten\.(\w+)\(")
SMALLEST = ("def steps() -> Tensor:", "    return torch.zeros(1)")
"""A program that every TorchScript can run."""

WARNED = Event()
"""Set once this process was warned that TorchScript is missing."""

INSIDE = " " * 8
"""How the lines of the loop over the steps begin."""


class Executable(NamedTuple):
    """What takes a program's steps, and whether Python runs it."""

    steps: Steps
    in_python: bool


def executable_of(lines: Sequence[str]) -> Executable:
    """The program of this source: by TorchScript, or else in Python.

    Where TorchScript runs no program at all, one warning says so.
    """
    try:
        return Executable(_in_torchscript(lines), in_python=False)
    except Exception as error:  # noqa: BLE001  # however torch removes it, or forbids it
        if _has_torchscript():
            log.info("TorchScript cannot run a program, Python does: %s", described(error))
        elif not WARNED.is_set():
            WARNED.set()
            warn(
                f"this torch does not run TorchScript ({described(error)}): steps are run from"
                " Python, which gives the same numbers and is slower, above all for many small"
                " clients"
            )
        return Executable(_in_python(lines), in_python=True)


def _has_torchscript() -> bool:
    try:
        _in_torchscript(SMALLEST)
    except Exception:  # noqa: BLE001  # as above
        return False
    return True


def _in_torchscript(lines: Sequence[str]) -> Steps:
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it is documented
        compiled: Steps = torch.jit.CompilationUnit("\n".join(lines) + "\n").steps

    def steps(*given: Any) -> Tensor:
        # The optimiser would replace the program by another one after its first runs.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it is documented
            return compiled(*given)

    return steps


def _in_python(lines: Sequence[str]) -> Steps:
    text = OPERATION.sub(_bound, "\n".join(_freed(lines)))
    namespace: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "List": list}
    exec(compile(text, "<program>", "exec"), namespace)  # noqa: S102  # as torch.fx runs a graph
    steps: Steps = namespace["steps"]
    return steps


def _bound(operation: re.Match[str]) -> str:
    """The quickest way from Python to an operation: torch's function in C, where there is one."""
    function = getattr(torch, operation[1], None)
    return f"torch.{operation[1]}(" if isinstance(function, BuiltinFunctionType) else operation[0]


def _freed(lines: Sequence[str]) -> list[str]:
    """The lines, which free each value of a step after its last use, as TorchScript does."""
    made = {line.split()[0] for line in lines if line.startswith(f"{INSIDE}v_") and " = " in line}
    last = {name: place for place, line in enumerate(lines) for name in NAME.findall(line)}
    unused: dict[int, list[str]] = {}
    for name, place in last.items():
        if name in made:
            unused.setdefault(place, []).append(name)
    return [
        f"{line}; del {', '.join(unused[place])}" if place in unused else line
        for place, line in enumerate(lines)
    ]
