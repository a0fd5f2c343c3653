"""What the command line answers without torch: help, the version and errors in a configuration."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedgradnorm

PROGRAM = """
import sys
sys.modules["torch"] = None  # an import of torch raises ImportError
from fedgradnorm.cli import main
sys.argv[0] = "fedgradnorm"
main()
"""


def answer(folder, *words):
    """The exit code and the output of the command line, in a process that cannot import torch."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, re.sub(r"[\s│]+", " ", process.stdout + process.stderr)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--help"], "Resume a run that was stopped"),
        (["--version"], f"fedgradnorm {fedgradnorm.__version__}"),
        (["list", "--help"], "List the parts that a configuration can name"),
        (["run", "--help"], "Settings that take precedence over the file"),
        (["compare", "--help"], "the table 'full' of the file"),
        (["flower", "status", "--help"], "2: there is no run"),
    ],
)
def test_help_and_the_version_need_no_torch(tmp_path, words, text):
    code, output = answer(tmp_path, *words)
    assert code == 0, output
    assert text in output


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("[train]\nround = 3", [], "unknown key 'train.round'; did you mean"),
        (
            "[train]\nhead_lr = -1",
            [],
            "found -1 in my.toml",
        ),
        ("[train]\nseed = 'a'", [], "train.seed: expected "),
        ("[train", [], "config file my.toml: not valid TOML"),
        ("", ["train.seeds=3"], "unknown key 'train.seeds'; did you mean 'seed'?"),
        ("", ["federation.name=digit"], "federation.name: there is no federation 'digit'"),
        ("", ["model.name=mpl"], "model.name: there is no model 'mpl'; did you mean 'mlp'?"),
        ("", ["train.method=fedpr"], "train.method.name: there is no method 'fedpr'"),
        ("", ["weighting.name=equl"], "there is no weighting 'equl'; did you mean 'equal'?"),
        ("", ["aggregation.name=men"], "aggregation.name: there is no aggregation 'men'"),
        ("", ["engine.name=referenc"], "there is no engine 'referenc'; did you mean 'reference'?"),
    ],
)
def test_an_error_in_a_configuration_needs_no_torch(tmp_path, content, words, message):
    Path(tmp_path / "my.toml").write_text(content)
    code, output = answer(tmp_path, "run", "my.toml", *words)
    assert code == 2
    assert output.startswith("error: ")
    assert message in output


def test_an_error_quotes_a_path_as_it_is(tmp_path):
    _, output = answer(tmp_path, "run", ":bug:.toml")
    assert output.startswith("error: config file :bug:.toml: expected")


def test_an_error_in_a_study_needs_no_torch(tmp_path):
    Path(tmp_path / "my.toml").write_text("seed = [0]")
    code, output = answer(tmp_path, "compare", "my.toml")
    assert code == 2
    assert "unknown key 'seed'; did you mean 'seeds'?" in output


def test_every_exported_name_is_there_and_sorted():
    assert fedgradnorm.__all__ == sorted(fedgradnorm.__all__)
    assert set(fedgradnorm.__all__) <= set(dir(fedgradnorm))
    for name in fedgradnorm.__all__:
        assert getattr(fedgradnorm, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = fedgradnorm.Nothing


def test_importing_the_package_loads_no_torch():
    code = "import fedgradnorm, sys; assert 'torch' not in sys.modules; fedgradnorm.Task"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", ["fedgradnorm.train", "fedgradnorm.resume", "fedgradnorm.api"])
def test_run_is_a_function_whatever_is_imported_first(first):
    code = f"import fedgradnorm, fedgradnorm.api; {first}; assert callable(fedgradnorm.run)"
    subprocess.run([sys.executable, "-c", code], check=True)
