"""What every registered weighting must do: a new method is tested by being registered."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgradnorm import WeightingState
from fedgradnorm.config import Component
from fedgradnorm.registry import BUILT_INS, build, resolve
from tests.helpers import report

EVERY_WEIGHTING = pytest.mark.parametrize("name", sorted(BUILT_INS["weighting"]))
ROUNDS = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1e3)), min_size=1), min_size=1, max_size=5
)


def make(name):
    return build("weighting", Component(name=name))


def play(method, rounds, state=None):
    state = state or method.init(["a", "b", "c"])
    weights = None
    for round in rounds:
        weights, state = method.update(state, [report(client, *round[client]) for client in sorted(round)])
    return weights, state


@EVERY_WEIGHTING
@given(rounds=ROUNDS)
def test_weights_are_finite_positive_and_sum_to_the_number_of_clients(name, rounds):
    weights, state = play(make(name), rounds)
    assert all(math.isfinite(value) and value > 0 for value in state.weights.values())
    assert sum(state.weights.values()) == pytest.approx(len({"a", "b", "c"}.union(*rounds)))
    assert weights.values.keys() == rounds[-1].keys()
    assert math.isfinite(weights.scale)
    assert weights.scale > 0


@EVERY_WEIGHTING
@given(rounds=ROUNDS)
def test_an_absent_client_keeps_its_weight_and_a_newcomer_starts_with_one(name, rounds):
    method = make(name)
    _, before = play(method, rounds)
    _, after = method.update(before, [report("b", 2.0, 0.5)])
    assert {client: after.weights[client] for client in before.weights if client != "b"} == {
        client: before.weights[client] for client in before.weights if client != "b"
    }
    weights, _ = method.update(method.init(["a"]), [report("new", 3.0, 0.4)])
    assert weights.values["new"] == pytest.approx(1.0)


@EVERY_WEIGHTING
@given(rounds=ROUNDS)
def test_update_is_pure_and_its_state_survives_json(name, rounds):
    method = make(name)
    _, state = play(method, rounds)
    copy = WeightingState(**json.loads(json.dumps(dataclasses.asdict(state), allow_nan=False)))
    some = [report("a", 1.5, 0.7), report("c", 0.5, 0.9)]
    first = method.update(state, some)
    assert method.update(copy, some) == first
    assert method.update(state, some) == first


@EVERY_WEIGHTING
def test_it_is_a_frozen_dataclass_of_options_with_a_documented_source(name):
    made_by = resolve("weighting", name)
    method = make(name)
    assert dataclasses.is_dataclass(made_by)
    assert made_by.__dataclass_params__.frozen
    assert method == make(name)
    assert ">>>" in made_by.__doc__


@EVERY_WEIGHTING
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_identical_clients_have_weight_one(name, count):
    clients = [f"c{index:04}" for index in range(count)]
    method = make(name)
    state = method.init(clients)
    for _ in range(3):
        weights, state = method.update(state, [report(client, 0.3, 0.8) for client in clients])
    assert weights.values == pytest.approx(dict.fromkeys(clients, 1.0))
