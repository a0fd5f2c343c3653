"""Settings that name no weighting get the method's own."""

import pytest

from fedgradnorm import ConfigError, Equal, train
from fedgradnorm.build import resolve_config
from fedgradnorm.config import load_config
from fedgradnorm.federations import digits

QUICK = {"num_rounds": 1, "head_steps": 1, "encoder_steps": 1}


@pytest.mark.parametrize(
    ("words", "weighting"),
    [
        ([], "fedgradnorm"),
        (["train.method=fedper"], "fedgradnorm"),
        (["train.method=fedavg"], "examples"),
        (["train.method=fedavg", "weighting.name=fedgradnorm"], "fedgradnorm"),
        (["train.method=fedavg", "weighting.name=equal"], "equal"),
    ],
)
def test_fedavg_weights_by_examples_unless_it_is_told_otherwise(words, weighting):
    assert resolve_config(load_config(None, words)).weighting.name == weighting


def test_an_option_of_another_weighting_is_an_error():
    with pytest.raises(ConfigError, match=r"unknown key 'weighting.gamma'"):
        resolve_config(load_config(None, ["train.method=fedavg", "weighting.gamma=0.5"]))


def test_the_same_holds_in_python():
    federation = digits.make(0, sizes={"class": 300, "parity": 100})
    assert train(federation, method="fedavg", **QUICK).weights["class"] > 1
    assert set(train(federation, Equal(), method="fedavg", **QUICK).weights.values()) == {1.0}
