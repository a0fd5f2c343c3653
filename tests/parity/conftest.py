"""The programs' executor: ``--executor=python`` runs all parity tests without TorchScript.

By default the quick ones run with both, the others with TorchScript.
"""

from threading import Event

import pytest
import torch

from fedgradnorm.engines import executors


def pytest_addoption(parser):
    parser.addoption("--executor", choices=["torchscript", "python"], default="torchscript")


def removed(_):
    raise RuntimeError("TorchScript was removed")


@pytest.fixture(autouse=True)
def executor(request, monkeypatch):
    """That of the test's own parameter, or else of the command line."""
    name = getattr(request, "param", request.config.getoption("--executor", "torchscript"))
    if name == "python":
        monkeypatch.setattr(torch.jit, "CompilationUnit", removed)
        warned = Event()
        warned.set()
        monkeypatch.setattr(executors, "WARNED", warned)
    return name
