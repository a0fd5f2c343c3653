"""Without the extra everything else works, and nothing imports Flower."""

import subprocess
import sys

import pytest

from tests.launcher import launcher

QUIET = "import sys; assert not [name for name in sys.modules if name.split('.')[0] == 'flwr' and sys.modules[name]]"
RUN = [
    "run",
    "config.toml",
    "federation.name=digits",
    "train.num_rounds=1",
    "train.head_steps=1",
    "train.encoder_steps=1",
]


def python(folder, code, *words, blocked=True):
    """Run code in a new process, in which Flower is not to be found."""
    block = "import sys; sys.modules['flwr'] = None; " if blocked else ""
    return subprocess.run(
        [sys.executable, "-c", block + code, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("blocked", [True, False])
def test_importing_and_training_import_no_flower(tmp_path, blocked):
    code = (
        "import fedgradnorm; from fedgradnorm.federations import digits; "
        f"fedgradnorm.train(digits.make(0), num_rounds=1, head_steps=1, encoder_steps=1); {QUIET}"
    )
    process = python(tmp_path, code, blocked=blocked)
    assert process.returncode == 0, process.stderr


def test_a_nodes_process_imports_no_solvers(tmp_path):
    """Every message to a node starts a process, and what that does not need it does not load."""
    modules = "{'scipy.optimize', 'scipy.linalg', 'scipy.special', 'scipy.stats', 'sklearn', 'matplotlib', 'plotly'}"
    process = python(
        tmp_path,
        f"import sys, fedgradnorm.flower.client; print(sorted({modules} & sys.modules.keys()))",
        blocked=False,
    )
    assert (process.stdout, process.stderr) == ("[]\n", "")


def test_a_run_works(tmp_path, monkeypatch):
    (tmp_path / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    code, _, error = launcher().call(tmp_path, *RUN, "run.dir=run", missing=["flwr"])
    assert (code, error) == (0, "")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_engine_of_the_extra_names_it_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    words = (*RUN, "run.dir=run", "engine.name=flower-local")
    code, _, error = launcher().call(tmp_path, *words, missing=["flwr"])
    assert code == 2
    assert error == (
        "error: engine.name: 'flower-local' cannot be imported: Flower is not installed: pip install \"fedgradnorm[flower]\"\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_package_of_the_extra_names_it(tmp_path):
    process = python(tmp_path, "import fedgradnorm.flower")
    assert (
        process.stderr.splitlines()[-1]
        == 'ImportError: Flower is not installed: pip install "fedgradnorm[flower]"'
    )
