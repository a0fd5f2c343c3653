import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fedgradnorm import cli

# One kernel thread: on small tensors, and with other tests beside it, more of them only wait for one another.
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")
# An error of ours in the fast engine is raised, and not taken for a model that has no shortcut.
os.environ["FEDGRADNORM_STRICT"] = "1"


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
