"""Parts as objects: what each kind has to be, and tables of a configuration that hold one."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from fedgradnorm import ConfigError, Weighting, Weights
from fedgradnorm.aggregation import Aggregation, Mean
from fedgradnorm.config import AggregationConfig, Component, MethodConfig, TrainConfig
from fedgradnorm.engines.reference import ReferenceEngine
from fedgradnorm.registry import BUILT_INS, build, component_of, resolve, resolved
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.training import FedRep, Method, encoder_steps, method_of
from fedgradnorm.weighting import Equal, FedGradNorm
from tests.helpers import small_federation


@dataclass(frozen=True)
class Unfinished(Weighting):
    power: float = 1.0


class Duck:
    """It has what a weighting has, but is none."""

    def init(self, client_ids):
        return Equal().init(client_ids)

    def update(self, state, reports):
        return Equal().update(state, reports)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "weighting",
            "Duck",
            "weighting.name: '{}' makes an object of type Duck, not a valid weighting: "
            "derive it from fedgradnorm.weighting.Weighting",
        ),
        ("weighting", "Unfinished", "weighting.name: '{}' cannot be made: .*'?update'?"),
        (
            "aggregation",
            "Duck",
            "aggregation.name: .* derive it from fedgradnorm.aggregation.Aggregation",
        ),
        ("method", "Duck", "train.method.name: .* derive it from fedgradnorm.training.Method"),
    ],
)
def test_a_part_is_an_instance_of_its_abstract_class(kind, name, message):
    name = f"{__name__}:{name}"
    with pytest.raises(ConfigError, match=message.format(name)):
        build(kind, Component(name=name))


@pytest.mark.parametrize(
    ("kind", "base"),
    [("weighting", Weighting), ("aggregation", Aggregation), ("method", Method)],
)
def test_every_built_in_derives_from_it(kind, base):
    for name in BUILT_INS[kind]:
        assert issubclass(resolve(kind, name), base)


def test_defaults_of_a_weighting():
    class Plain(Weighting):
        def update(self, state, reports):
            return Weights({report.client: 1.0 for report in reports}), state

    assert Plain().reads_gradients
    assert not Plain().needs_positive_losses
    assert Plain().init(["a"]).weights == {"a": 1.0}
    assert FedGradNorm(gamma=0.5).needs_positive_losses
    assert not FedGradNorm(gamma=0).needs_positive_losses


def local_method(events):
    @dataclass(frozen=True)
    class Noted(Method):
        strength: float = 2.0

        def train_head(self, local):
            events.append(local.client.id)

        def train_encoder(self, local):
            return encoder_steps(local)

    return Noted(3)


def test_a_table_holds_an_object_whose_class_has_no_name_to_import():
    method = local_method([])
    table = component_of("method", method)
    assert isinstance(table, MethodConfig)
    assert table.name.endswith(":local_method.<locals>.Noted")
    assert table.options == {"strength": 3.0}
    assert build("method", table) is method
    assert resolved("method", table) is table
    assert table.with_options({"strength": 4.0}).part is None
    training = TrainConfig(method=table)
    assert method_of(training) is method
    assert method_of(training.model_copy(update={"num_rounds": 3})) is method
    dumped = training.model_dump()
    assert dumped["method"] == {"name": table.name, "strength": 3.0}
    with pytest.raises(ConfigError, match="cannot be imported"):
        method_of(TrainConfig.model_validate(dumped))
    assert method_of(TrainConfig()) == FedRep()


def test_a_held_method_trains():
    events, federation = [], small_federation()
    training = TrainConfig(method=component_of("method", local_method(events)), encoder_steps=1)
    engine, weighting = ReferenceEngine(federation, 0), Equal()
    state = initial_state(federation, weighting, 0)
    _, record = run_round(state, federation, engine, weighting, Mean(), training)
    assert sorted(report.client for report in record.reports) == sorted(events) == ["a", "b", "c"]


def test_a_weighting_and_an_aggregation_are_held_too():
    class First(Aggregation):
        def __call__(self, reports, weights):
            return torch.zeros_like(reports[0].gradient)

    aggregate = First()
    table = component_of("aggregation", aggregate)
    assert isinstance(table, AggregationConfig)
    assert (table.options, build("aggregation", table)) == ({}, aggregate)
    weighting = FedGradNorm(gamma=0.5)
    table = component_of("weighting", weighting)
    assert (table.name, table.options["gamma"]) == ("fedgradnorm", 0.5)
    assert build("weighting", table) is weighting


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        (
            "weighting",
            FedGradNorm,
            "weighting: expected a name or an instance of fedgradnorm.weighting.Weighting, "
            "found the class FedGradNorm",
        ),
        ("method", Equal(), "train.method: expected a name or .*, found an object of type Equal"),
        (
            "aggregation",
            None,
            "aggregation: expected a name or .* found an object of type NoneType",
        ),
    ],
)
def test_another_object_is_refused(kind, part, message):
    with pytest.raises(ConfigError, match=message):
        component_of(kind, part)


WITHOUT_TORCH = """
import sys
import types

sys.modules["torch"] = None
package = types.ModuleType("fedgradnorm")
package.__path__ = [sys.argv[1]]
sys.modules["fedgradnorm"] = package

from fedgradnorm.config import Component, load_config
from fedgradnorm.registry import BUILT_INS, describe, resolved

load_config(None, ["weighting.gamma=0.5"])
for kind in ("weighting", "aggregation", "method"):
    for name in BUILT_INS[kind]:
        describe(kind, name)
        resolved(kind, Component(name=name))
"""


def test_options_are_checked_without_torch():
    import fedgradnorm

    [folder] = fedgradnorm.__path__
    command = [sys.executable, "-c", WITHOUT_TORCH, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
