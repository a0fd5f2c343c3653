import json
from dataclasses import dataclass

import pytest

from fedgradnorm import ConfigError, FedGradNorm, Method, Weighting, run, train
from fedgradnorm.aggregation import Median
from fedgradnorm.config import load_config
from fedgradnorm.federations import digits
from fedgradnorm.runs.reader import Run
from fedgradnorm.training import FedProx, FedRep
from tests.helpers import small_federation, timeless

QUICK = {"num_rounds": 3, "head_steps": 1, "encoder_steps": 1, "batch_size": 8}

SAYS = [
    ({"aggregation": "median"}, ["aggregation.name=median"]),
    ({"aggregation": Median()}, ["aggregation.name=median"]),
    (
        {"aggregation": {"name": "trimmed_mean", "trim": 0.3}},
        ["aggregation.name=trimmed_mean", "aggregation.trim=0.3"],
    ),
    ({"engine": {"name": "vectorized", "threads": 1}}, ["engine.threads=1"]),
    ({"engine": "reference"}, ["engine.name=reference"]),
    ({"weighting": FedGradNorm(gamma=0.5)}, ["weighting.gamma=0.5"]),
    (
        {"weighting": {"name": "dwa", "temperature": 3.0}},
        ["weighting.name=dwa", "weighting.temperature=3.0"],
    ),
    ({"method": FedProx(mu=0.5)}, ["train.method.name=fedprox", "train.method.mu=0.5"]),
    ({"method": "fedper"}, ["train.method=fedper"]),
    ({"faults": {"corrupt": 0.2}}, ["faults.corrupt=0.2"]),
    ({"run": {"keep": 1, "loss_targets": [0.5]}}, ["run.keep=1", "run.loss_targets=[0.5]"]),
    ({"fraction_train": 0.5}, ["train.fraction_train=0.5"]),
]


@pytest.mark.parametrize(("said", "words"), SAYS, ids=lambda value: str(value)[:40])
def test_python_says_whatever_a_configuration_says(tmp_path, said, words):
    train(digits.make(0), run_dir=tmp_path / "python", **said, **QUICK)
    quick = [f"train.{key}={value}" for key, value in QUICK.items()]
    folder = tmp_path / "configured"
    run(load_config(None, ["federation.name=digits", f"run.dir={folder}", *quick, *words]))
    by_python, configured = Run(tmp_path / "python"), Run(folder)
    assert json.dumps(timeless(by_python.rows())) == json.dumps(timeless(configured.rows()))
    settings = [
        opened.config.model_dump(exclude={"federation"}) for opened in (by_python, configured)
    ]
    for one in settings:
        one["run"].pop("dir")
    assert settings[0] == settings[1]


def test_objects_of_classes_that_cannot_be_imported_train():
    @dataclass(frozen=True)
    class Heavy(Weighting):
        factor: float = 2.0

        def init(self, client_ids):
            return FedGradNorm().init(client_ids)

        def update(self, state, reports):
            weights, after = FedGradNorm().update(state, reports)
            object.__setattr__(weights, "scale", self.factor)
            return weights, after

    seen = []

    @dataclass(frozen=True)
    class Watched(FedRep):
        def train_head(self, local):
            seen.append(local.client.id)
            super().train_head(local)

    plain = train(small_federation(), server_lr=2.0, **QUICK)
    own = train(small_federation(), Heavy(), method=Watched(), engine="reference", **QUICK)
    assert sorted(set(seen)) == ["a", "b", "c"]
    assert own.config.weighting.name.endswith("Heavy")
    losses = [[row["loss"] for row in result.rows] for result in (plain, own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"weighting": Weighting}, "weighting"),
        ({"weighting": 3}, "weighting"),
        ({"weighting": {"name": "dwa", "temprature": 1}}, "temperature"),
        ({"method": FedRep}, "method"),
        ({"method": 3}, "method"),
        ({"method": {"name": "fedprox", "mu": -1}}, "mu"),
        ({"aggregation": max}, "aggregation"),
        ({"engine": {"name": "vectorized", "device": 3}}, "device"),
        ({"engine": {"thread": 1}}, "threads"),
        ({"faults": {"drop": 2}}, "faults.drop"),
        ({"faults": {"dorp": 0}}, "drop"),
        ({"run": {"kep": 1}}, "keep"),
        ({"run": {"dir": 3}}, "run_dir"),
        ({"run": {"dir": "a"}, "run_dir": "b"}, "run_dir"),
        ({"num_round": 3}, "num_rounds"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_named(said, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=named):
        train(small_federation(), **said)
    assert not list(tmp_path.iterdir())


def test_a_method_class_is_told_to_be_made_an_object():
    with pytest.raises(ConfigError, match="FedRep"):
        train(small_federation(), method=FedRep)
    assert issubclass(FedRep, Method)
