"""A run's folder: what may be replaced, and what is left as it is."""

import dataclasses
import shutil
from typing import ClassVar

import pytest

from fedgradnorm import (
    ConfigError,
    Equal,
    Federation,
    FederationError,
    RunError,
    StoppedError,
    Weighting,
    train,
)
from fedgradnorm.api import run
from fedgradnorm.config import load_config
from fedgradnorm.engine import Engine
from fedgradnorm.errors import WeightingError
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation
from tests.unit.runs.quick import run_digits

QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}


WORDS = ["federation.name=digits", *(f"train.{key}={value}" for key, value in QUICK.items())]


class Failing(Weighting):
    """A weighting without a first state."""

    def init(self, client_ids):
        raise ZeroDivisionError

    def update(self, state, reports):
        raise ZeroDivisionError


def test_a_run_folder_that_exists_is_left_alone_unless_told(tmp_path):
    run_digits(tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="run folder .*/run .*--overwrite"):
        run_digits(tmp_path / "run")
    with pytest.raises(ConfigError):
        run_digits(tmp_path / "run", "weighting.gamma=-1", overwrite=True)
    with pytest.raises(ConfigError, match="metric_targets.x"):
        run_digits(tmp_path / "run", "run.metric_targets.x=1", overwrite=True)
    with pytest.raises(FederationError, match="'x'"):
        run_digits(tmp_path / "run", "train.participants=[['class'], ['x']]", overwrite=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    run_digits(tmp_path / "run", "train.seed=1", overwrite=True)
    assert Run(tmp_path / "run").config.train.seed == 1


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="'thesis.txt'"):
        run_digits(tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious/thesis.txt").read_text() == "years of work"


def test_only_a_run_is_overwritten_and_never_a_folder_that_also_holds_something_else(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.toml").write_text('[federation]\nname = "digits"\n')
    with pytest.raises(RunError, match="project .*config.toml"):
        run(load_config(folder / "config.toml", [*WORDS, f"run.dir={folder}"]), overwrite=True)
    run(load_config(None, [*WORDS, f"run.dir={tmp_path / 'run'}"]))
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="'thesis.txt'"):
        run(load_config(None, [*WORDS, f"run.dir={tmp_path / 'run'}"]), overwrite=True)
    assert (folder / "config.toml").exists()
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("folder", ["x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_is_an_error(tmp_path, folder):
    with pytest.raises(RunError, match="run folder .*: "):
        train(small_federation(), run_dir=tmp_path / folder, **QUICK)
    with pytest.raises(RunError, match="config.toml"):
        Run(tmp_path / folder)


def test_a_link_is_not_overwritten(tmp_path):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunError, match="link.*run.dir"):
        train(small_federation(), run_dir=tmp_path / "link", overwrite=True, **QUICK)


def test_a_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(small_federation(), run_dir="~/runs/one", **QUICK)
    assert (tmp_path / "runs/one/report.html").exists()


def test_a_weighting_whose_options_cannot_be_written_costs_no_run(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Odd(Equal):
        what: object = print

    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    with pytest.raises(ConfigError, match="config.toml"):
        train(small_federation(), Odd(), run_dir=tmp_path / "run", overwrite=True, **QUICK)
    assert (tmp_path / "run/summary.json").exists()


def failing(_):
    raise KeyError("on_round")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"participants": [["a"], []]}, ConfigError),
        ({"on_round": lambda: 0}, ConfigError),
        ({"should_stop": lambda rows: True}, ConfigError),
        ({"on_round": failing}, KeyError),
        ({"weighting": Failing()}, WeightingError),
        (
            {"min_clients": 3, "max_retries": 0, "engine": "tests.unit.runs.test_folder:Silent"},
            StoppedError,
        ),
    ],
)
def test_a_run_is_replaced_only_when_the_new_one_has_done_a_round(tmp_path, arguments, error):
    train(small_federation(), run_dir=tmp_path / "run", **QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(error):
        train(
            small_federation(), run_dir=tmp_path / "run", overwrite=True, **{**QUICK, **arguments}
        )
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    train(
        small_federation(),
        run_dir=tmp_path / "run",
        overwrite=True,
        should_stop=None,
        **{**QUICK, "num_rounds": 1},
    )
    assert len(Run(tmp_path / "run").rows()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run"]


def test_a_run_that_is_killed_in_its_first_round_leaves_the_one_before_beside_it(tmp_path):
    folder, old = tmp_path / "run", tmp_path / ".run.replaced"
    train(small_federation(), run_dir=folder, **QUICK)
    shutil.copytree(folder, old)
    (folder / "metrics.jsonl").write_text("")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(KeyError):
        train(small_federation(), run_dir=folder, overwrite=True, on_round=failing, **QUICK)
    assert (folder / "summary.json").exists()
    assert not old.exists()
    shutil.copytree(folder, old)
    assert train(small_federation(), run_dir=folder, overwrite=True, **QUICK).state.round == 2
    assert not old.exists()


class Silent(Engine):
    """An engine whose clients never answer."""

    client_states: ClassVar = {}

    def __init__(self, federation: Federation, seed: int):
        pass

    def execute(self, instructions):
        return []

    def evaluate(self, encoder, buffers, batch_size):
        return {}

    def restore(self, states):
        pass
