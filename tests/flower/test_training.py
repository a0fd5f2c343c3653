import fcntl
import logging

import pytest

from fedgradnorm import FedGradNorm
from fedgradnorm.build import IN_PYTHON
from fedgradnorm.config import RunConfig
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.flower import FlowerLocalEngine, training
from fedgradnorm.flower.training import round_line, train_on_grid
from fedgradnorm.runs.reader import Run
from tests.helpers import small_federation, timeless


def settings(folder, **train):
    values = {"num_rounds": 2, "head_steps": 2, "encoder_steps": 2, "batch_size": 8, **train}
    return RunConfig.model_validate(
        {"federation": {"name": IN_PYTHON}, "train": values, "run": {"dir": str(folder)}}
    )


def go(engine, folder, **train):
    return train_on_grid(settings(folder, **train), engine, FedGradNorm())


@pytest.fixture
def engine():
    return FlowerLocalEngine(small_federation(), 0)


def test_more_rounds_go_on_with_a_run_and_give_what_they_would_have_given(engine, tmp_path):
    go(engine, tmp_path / "run")
    go(engine, tmp_path / "run", num_rounds=4)
    go(FlowerLocalEngine(small_federation(), 0), tmp_path / "whole", num_rounds=4)
    rows = [
        [row for row in timeless(Run(tmp_path / name).rows()) if row["round"] > 2]
        for name in ("run", "whole")
    ]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert len(rows[0]) == 6


def test_a_run_does_not_go_on_with_other_settings(engine, tmp_path):
    go(engine, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(
        ConfigError, match=r"begins anew\); changed: train\.encoder_lr = 0\.2 \(was 0\.03\)$"
    ):
        go(engine, tmp_path / "run", num_rounds=4, encoder_lr=0.2)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_two_runs_do_not_write_to_one_folder(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOCK_TIMEOUT", 0.3)
    with (tmp_path / ".run.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another run is writing to it"):
            go(engine, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    go(engine, tmp_path / "run")
    assert Run(tmp_path / "run").rows()


@pytest.mark.parametrize("what", ["writer.save_checkpoint", "settings.write_atomically"])
def test_a_folder_that_cannot_be_written_says_how_a_run_across_machines_is_gone_on_with(
    engine, tmp_path, monkeypatch, what
):
    def full(*_):
        raise OSError(28, "No space left on device")

    go(engine, tmp_path / "run")
    monkeypatch.setattr(f"fedgradnorm.runs.{what}", full)
    with pytest.raises(
        RunError, match="cannot be written: No space left on device.*: start its Flower app again$"
    ):
        go(engine, tmp_path / "run", num_rounds=4)
    monkeypatch.undo()
    go(engine, tmp_path / "run", num_rounds=4)


def test_rounds_are_logged_with_who_was_dropped(engine, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedgradnorm")
    go(engine, tmp_path / "run")
    lines = [record.message for record in caplog.records if record.message.startswith("round ")]
    assert len(lines) == 2
    rows = Run(tmp_path / "run").rows()[3:]
    assert lines[1] == round_line(rows, 2)
    assert lines[1].startswith(
        f"round 2/2  a loss {rows[0]['loss']:.4g} p {rows[0]['weight']:.3f}  b loss "
    )
    rows[1] |= {"loss": None, "dropped": "no report: its node is gone"}
    assert round_line(rows, 2).endswith("  dropped: b: no report: its node is gone")
    assert round_line([{**rows[0], "client": str(number)} for number in range(12)], 2).endswith(
        "  and 2 more"
    )
