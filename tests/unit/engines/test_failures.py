"""Defects of the fast engine are raised in the tests, and cost users speed but no run."""

import pytest
import torch
from torch import nn

import fedgradnorm.engines.vectorized  # noqa: F401  # before its names are replaced
from fedgradnorm import Federation, FedGradNormWarning, train
from fedgradnorm.engines.failures import STRICT, Attempt, Untraceable, is_an_answer
from fedgradnorm.parameters import flatten
from tests.helpers import small_client, small_federation

SETTINGS = {"num_rounds": 2, "head_steps": 2, "encoder_steps": 2, "batch_size": 8}
DEFECTS = [
    "fedgradnorm.engines.workspace.same",
    "fedgradnorm.engines.planning.same",
    "fedgradnorm.engines.planning.stack_of",
    "fedgradnorm.engines.vectorized.stacked_update",
    "fedgradnorm.engines.testing._evaluations",
]


@pytest.mark.parametrize("place", DEFECTS)
def test_a_defect_is_raised_in_strict_mode(place, monkeypatch):
    monkeypatch.setattr(place, None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        train(small_federation("abcdef"), **SETTINGS)


@pytest.mark.parametrize("place", DEFECTS)
def test_a_defect_costs_a_user_speed_and_a_warning_asks_to_report_it(place, monkeypatch):
    expected = train(small_federation("abcdef"), engine="reference", **SETTINGS).rows
    monkeypatch.delenv(STRICT)
    monkeypatch.setattr(place, None)
    with pytest.warns(FedGradNormWarning, match="TypeError: 'NoneType'.*please report it"):
        rows = train(small_federation("abcdef"), **SETTINGS).rows
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([row["loss"] for row in expected], rel=1e-4)


class NotSeven(nn.Linear):
    """Refuses batches of seven examples, which no step has."""

    def forward(self, inputs):
        if len(inputs) == 7:
            raise KeyError(7)
        return super().forward(inputs)


def test_an_error_of_the_users_own_code_is_an_answer():
    train(Federation([small_client("a"), small_client("b")], lambda: NotSeven(6, 4)), **SETTINGS)


def of_torch():
    torch.stack([torch.ones(2), torch.ones(3)])


def of_a_trace():
    raise Untraceable("no")


def of_the_user():
    return {}["key"]


@pytest.mark.parametrize("cause", [of_torch, of_a_trace, of_the_user])
def test_answers_end_an_attempt(cause):
    with Attempt("it is not done"):
        cause()
        raise AssertionError("it was not ended")


def test_an_interrupt_is_never_an_answer():
    with pytest.raises(KeyboardInterrupt), Attempt("it is not done"):
        raise KeyboardInterrupt


def test_errors_that_torch_raises_for_this_package_are_its_defects():
    with pytest.raises(AttributeError) as caught:
        flatten(3)
    assert not is_an_answer(caught.value)
    with pytest.raises(TypeError) as caught:
        torch.add("a", "b")
    assert is_an_answer(caught.value)  # this test called torch, as a user does
