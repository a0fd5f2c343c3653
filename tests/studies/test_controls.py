"""The control of the studies: another method's weights, and a direction of length 1."""

import pytest
import torch

from fedgradnorm import ConfigError
from fedgradnorm.aggregation import Mean
from fedgradnorm.config import WeightingConfig
from fedgradnorm.messages import Report
from fedgradnorm.registry import build
from fedgradnorm.weighting import Equal, FedGradNorm
from studies.controls import UnitLength

OTHERS = {
    "equal": Equal(),
    "step": FedGradNorm(solver="step"),
    "exact": FedGradNorm(solver="exact"),
}


def reports(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    gradients = (
        torch.randn(count, 30, generator=generator)
        * torch.tensor([[0.01], [1.0], [3.0], [50.0]])[:count]
    )
    return [
        Report(f"c{i}", f"t{i}", g, 0.5 + 0.1 * i, 1.0, float(g[-5:].norm()), 10)
        for i, g in enumerate(gradients)
    ]


@pytest.mark.parametrize("of", OTHERS)
def test_the_direction_has_length_1_and_the_other_methods_weights(of):
    control, other = UnitLength(of=of), OTHERS[of]
    state = expected = control.init([f"c{i}" for i in range(4)])
    for round in range(3):
        got = reports(round)
        weights, state = control.update(state, got)
        theirs, expected = other.update(expected, got)
        assert weights.values == theirs.values
        assert weights.targets == theirs.targets
        assert state == expected
        assert Mean()(got, weights).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_direction_of_length_0_stays_as_it_is():
    zero = [Report(f"c{i}", "t", torch.zeros(5), 1.0, 1.0, 1.0, 10) for i in range(2)]
    weights, _ = UnitLength().update(UnitLength().init(["c0", "c1"]), zero)
    assert weights.scale == 1.0


def test_a_study_can_name_it_and_a_wrong_option_is_told():
    assert build(
        "weighting", WeightingConfig(name="studies.controls:UnitLength", of="exact")
    ) == UnitLength("exact")
    with pytest.raises(ConfigError, match="weighting.of: expected"):
        build("weighting", WeightingConfig(name="studies.controls:UnitLength", of="nash"))
