"""How a function pairs outputs with targets, with and without torch's dispatch modes."""

import builtins
import warnings

import pytest
import torch
from torch.nn import functional

from fedgradnorm import FedGradNormWarning, train
from fedgradnorm.broadcasting import Pairing, dispatch_mode, watched
from tests.helpers import small_federation

OUTPUTS, TARGETS = torch.randn(6, 1), torch.randn(6)


@pytest.fixture
def without_dispatch_modes(monkeypatch):
    """torch itself keeps the module: its own code imports it late."""
    imported = builtins.__import__

    def without(name, variables=None, *others):
        own = (variables or {}).get("__name__", "").startswith("fedgradnorm")
        if own and name == "torch.utils._python_dispatch":
            raise ModuleNotFoundError(name)
        return imported(name, variables, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    dispatch_mode.cache_clear()
    yield
    dispatch_mode.cache_clear()


@pytest.mark.parametrize(
    ("function", "targets", "expected"),
    [
        (functional.mse_loss, TARGETS[:, None], Pairing(leaves_torch=False)),
        (functional.mse_loss, TARGETS, Pairing(broadcasts=True, leaves_torch=False)),
        (lambda o, t: (o - t).square().mean(), TARGETS, Pairing(True, leaves_torch=False)),
        (lambda o, t: (o[:, None] - t).mean(), TARGETS[:, None], Pairing(False, True, False)),
        (lambda o, t: abs(o.numpy() - t.numpy()).mean(), TARGETS, Pairing()),
    ],
)
def test_what_a_function_does_with_outputs_and_targets(function, targets, expected):
    assert watched(lambda *pair: float(function(*pair)), OUTPUTS, targets) == expected


@pytest.mark.usefixtures("without_dispatch_modes")
def test_without_dispatch_modes_nothing_is_watched_and_one_warning_says_so():
    with pytest.warns(FedGradNormWarning, match=r"torch\.utils\._python_dispatch") as caught:
        pairings = [watched(functional.mse_loss, OUTPUTS, TARGETS) for _ in range(2)]
    assert pairings == [Pairing(), Pairing()]
    assert len(caught) == 1


@pytest.mark.usefixtures("without_dispatch_modes")
def test_without_dispatch_modes_the_reference_engine_trains():
    with pytest.warns(FedGradNormWarning) as caught:
        result = train(small_federation(), engine="reference", num_rounds=1)
    assert result.state.round == 1
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(small_federation(), engine="reference", num_rounds=1)
