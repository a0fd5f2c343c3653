"""What is known of the code of torch, NumPy and the standard library, so that it is not walked."""

import datetime as dt
import decimal
import enum
import fractions
import logging
import pathlib
import re
import sys
import types

import numpy as np
import torch

TRUSTED = frozenset({"torch", "numpy", "fedgradnorm", *sys.stdlib_module_names})
"""Packages whose functions read nothing that changes except what they are given."""

NOT_TRUSTED = frozenset(
    {"contextvars", "ctypes", "datetime", "io", "multiprocessing", "pathlib", "secrets"}
    | {"socket", "subprocess", "tempfile", "time", "uuid"}
)
"""Modules of these packages that read the clock, files, or the world."""

READS_ANY = frozenset(
    {"__import__", "compile", "eval", "exec", "input", "open", "read_bytes", "read_text"}
)
"""Functions that may read anything."""

NOT_CALLED = frozenset(
    {"__class_getitem__", "__copy__", "__deepcopy__", "__del__", "__dir__", "__format__"}
    | {"__getstate__", "__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__"}
    | {"__repr__", "__set_name__", "__setstate__", "__sizeof__", "__str__"}
)
"""Special methods that no step calls by itself. The others may be called without being named."""

DESCRIPTORS = (
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
OF_TORCH = (
    torch.finfo,
    torch.iinfo,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
    getattr(torch.jit, "ScriptFunction", ()),  # a torch without TorchScript has none
)
NEVER_CHANGING = (
    *DESCRIPTORS,
    *OF_TORCH,
    *(types.CodeType, types.GenericAlias, types.UnionType, type(NotImplemented)),
    *(np.ufunc, np.dtype, re.Pattern, enum.Enum, decimal.Decimal, fractions.Fraction),
    *(dt.date, dt.time, dt.timedelta, pathlib.PurePath),
    *(logging.Logger, logging.LoggerAdapter),
)
"""Types whose objects never change, or of which no step reads anything."""


def is_trusted(module: object) -> bool:
    """Whether a module belongs to a trusted package."""
    return str(module).partition(".")[0] in TRUSTED
