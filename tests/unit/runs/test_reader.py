"""Runs that are read back, and damaged ones."""

import pytest

from fedgradnorm import ConfigError, RunError, evaluate_run, load_model, resume, train
from fedgradnorm.config import load_config
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation
from tests.unit.runs.quick import QUICK, run_digits


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.toml").write_text("[train"), "config.toml: "),
        (lambda folder: (folder / "summary.json").unlink(), "summary.json: "),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json: "),
        (lambda folder: (folder / "summary.json").write_text("[]"), "summary.json: the whole: "),
        (lambda folder: (folder / "metrics.jsonl").write_text("{}\n{\n"), "metrics.jsonl line 2: "),
        (
            lambda folder: (folder / "models/encoder.safetensors").write_bytes(b"x" * 40),
            "encoder.safetensors",
        ),
        (lambda folder: (folder / "models/heads/class.safetensors").unlink(), "class.safetensors"),
        (
            lambda folder: (folder / "models/encoder.safetensors").write_bytes(
                (folder / "models/heads/class.safetensors").read_bytes()
            ),
            "run: ",
        ),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(tmp_path, damage, message):
    run_digits(tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(RunError, match=message):
        opened = Run(tmp_path / "run")
        opened.rows()
        opened.summary()
        load_model(tmp_path / "run", "class")


def test_a_folder_without_a_run():
    with pytest.raises(RunError, match="nowhere .* config.toml"):
        Run("nowhere")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"round": ' + "[" * 100_000])
def test_deep_nesting_is_an_error_like_any_other(tmp_path, text):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    (tmp_path / "run/summary.json").write_text(text)
    with pytest.raises(RunError, match="summary.json"):
        Run(tmp_path / "run").summary()
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="deep.toml"):
        load_config(tmp_path / "deep.toml")


@pytest.mark.parametrize("run", [5, None, b"run", ["run"]])
@pytest.mark.parametrize(
    "call", [resume, evaluate_run, lambda run, federation: load_model(run, "a", federation)]
)
def test_what_is_no_path_of_a_run_is_named(call, run):
    with pytest.raises(RunError, match="run: "):
        call(run, small_federation())
