import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _pytest.terminal import TerminalReporter
from hypothesis import settings

from fedgradnorm import cli
from tests.helpers import PROFILE, QUICK_EXAMPLES

# On small tensors, and beside other tests, several kernel threads only wait for one another.
torch.set_num_threads(1)
# An error of ours in the fast engine is raised, and not taken for a model that has no shortcut.
os.environ["FEDGRADNORM_STRICT"] = "1"
for profile, number in (("quick", QUICK_EXAMPLES), ("thorough", 10 * QUICK_EXAMPLES)):
    settings.register_profile(
        profile, max_examples=number, deadline=None, derandomize=bool(os.environ.get("CI"))
    )
settings.load_profile(PROFILE)

SLOW = ("tests/deployment", "tests/fuzz", "tests/studies", "tests/faults", "tests/parity")
"""Folders whose tests start first, in this order, so that no worker is left alone with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = "/".join(item.nodeid.split("/")[:2])
        return SLOW.index(folder) if folder in SLOW else len(SLOW)

    items.sort(key=rank)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """How many inputs the fuzz tests tried, and how many of them were refused."""
    for report in terminalreporter.getreports(""):
        for name, value in report.user_properties if report.when == "teardown" else ():
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(autouse=True)
def cache_in_a_folder_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGRADNORM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def real_data(variable: str, name: str) -> Path:
    """A real data set that a variable names, or that lies in ``shared/data`` beside the checkout; else the test is skipped."""
    beside = Path(__file__).parents[2] / "shared" / "data" / name
    path = Path(os.environ.get(variable, beside))
    if not path.exists():
        pytest.skip(f"needs {name}: set {variable} to its path")
    return path


@pytest.fixture(scope="session")
def mtfl_zip() -> Path:
    return real_data("FEDGRADNORM_MTFL", "MTFL.zip")


@pytest.fixture(scope="session")
def radcom_hdf5() -> Path:
    return real_data("FEDGRADNORM_RADCOM", "RadComDynamic.hdf5")


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Calls the command line with some words: its exit status, standard output and standard error."""

    def call(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedgradnorm", *map(str, words)])
        monkeypatch.setattr(sys, "path", sys.path[:])
        try:
            cli.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return call
