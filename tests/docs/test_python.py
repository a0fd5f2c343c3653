"""The page on training from Python: every block runs, those on other trackers with stand-ins."""

import sys

import pytest
import torch

from fedgradnorm import train
from tests.docs.test_docs import blocks
from tests.helpers import small_federation

QUICK = {"num_rounds": 2, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}


class Tracker:
    """Notes what it is called with, whatever the function."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def note(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return note

    def of(self, name):
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def tracked(monkeypatch):
    tracker = Tracker()
    for module in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, tracker)
    return tracker


def test_the_page_trains_exports_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, _, _, export, load = blocks("docs/python.md", "python")
    names = {}
    for code in (training, export, load):
        exec(code, names)
    assert isinstance(names["outputs"], torch.Tensor)
    assert names["outputs"].shape == (3, 10)


@pytest.mark.parametrize(
    ("block", "name", "logged"), [(1, "WandB", "log"), (2, "MLflow", "log_metrics")]
)
def test_the_pages_trackers_are_told_every_round(tracked, block, name, logged):
    names = {}
    exec(blocks("docs/python.md", "python")[block], names)
    result = train(small_federation(), callbacks=[names[name]()], **QUICK)
    calls = tracked.of(logged)
    assert len(calls) == len(result.rows)
    assert {options["step"] for _, _, options in calls} == {1, 2}
    assert any("loss" in key for key in calls[0][1][0])
    assert tracked.calls[-1][0] in ("finish", "end_run")
