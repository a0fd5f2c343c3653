"""What every registered weighting must do: a new method is tested by being registered."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgradnorm import WeightingState
from fedgradnorm.aggregation import Mean
from fedgradnorm.config import Component
from fedgradnorm.registry import BUILT_INS, build, resolve
from tests.helpers import examples, report

NAMES = sorted(BUILT_INS["weighting"])
EVERY_WEIGHTING = pytest.mark.parametrize("name", NAMES)
RANDOM = {"rlw"}
"""Those that promise identical clients no equal weights."""
BY_NAME = {"rlw", "pcgrad"}
"""Those whose draws depend on who is who, so that relabelling the clients does more than relabelling the weights."""
SIGNED = {"imtl_g"}
"""Those whose applied weights may be negative. Remembered ones never are."""

NUMBERS = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
GRADIENTS = st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=5)
FEW = settings(max_examples=examples(12))
ROUNDS = st.lists(
    st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1e3)), min_size=1
    ),
    min_size=1,
    max_size=5,
)


def make(name):
    return build("weighting", Component(name=name))


def play(method, rounds, state=None):
    state = state or method.init(["a", "b", "c"])
    weights = None
    for round in rounds:
        weights, state = method.update(
            state, [report(client, *round[client]) for client in sorted(round)]
        )
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


def round_of(gradients, losses=(0.5, 1.0, 2.0)):
    """Reports with these gradients, the norm being that of the whole gradient, and some losses and numbers of examples."""
    some = []
    for index, gradient in enumerate(gradients):
        vector = torch.tensor(gradient, dtype=torch.float64)
        norm = float(vector.norm())
        some.append(
            report(
                f"c{index}",
                norm,
                losses[index % len(losses)],
                gradient=vector,
                num_examples=10 + 5 * index,
            )
        )
    return some


@EVERY_WEIGHTING
@FEW
@given(rounds=st.lists(GRADIENTS, min_size=1, max_size=3), exponent=st.integers(-25, 25))
def test_whatever_the_gradients_are_the_direction_is_finite_and_all_weights_keep_their_sum(
    name, rounds, exponent
):
    method = make(name)
    state = method.init(["c0", "c1", "other"])
    for gradients in rounds:
        some = round_of([[10.0**exponent * value for value in gradient] for gradient in gradients])
        clients = [one.client for one in some]
        before = sum(state.weights.get(client, 1.0) for client in clients)
        weights, state = method.update(state, some)
        assert sum(weights.values.values()) == pytest.approx(before, rel=1e-6)
        assert all(
            math.isfinite(value) and (value >= 0 or name in SIGNED)
            for value in weights.values.values()
        )
        assert all(value > 0 for value in state.weights.values())
        assert sum(state.weights.values()) == pytest.approx(
            len({"c0", "c1", "other"}.union(state.weights))
        )
        assert math.isfinite(weights.scale)
        assert weights.scale > 0
        assert torch.isfinite(Mean()(some, weights)).all()


@EVERY_WEIGHTING
@FEW
@given(
    gradients=st.lists(st.lists(st.floats(-1, 1), min_size=4, max_size=4), min_size=2, max_size=4),
    data=st.data(),
)
def test_relabelling_the_clients_relabels_the_weights_and_nothing_else(name, gradients, data):
    if (name in BY_NAME and len(gradients) > 2) or name in RANDOM:
        return
    gradients = [
        [value + (index == place) for place, value in enumerate(gradient)]
        for index, gradient in enumerate(gradients)
    ]
    some = round_of(gradients)
    order = data.draw(st.permutations(range(len(some))))
    renamed = [
        dataclasses.replace(some[old], client=f"c{new}", task=f"c{new}")
        for new, old in enumerate(order)
    ]
    method = make(name)
    first, second = (
        method.update(method.init([one.client for one in given]), given)[0]
        for given in (some, renamed)
    )
    assert [second.values[f"c{new}"] for new in range(len(order))] == pytest.approx(
        [first.values[f"c{old}"] for old in order], abs=1e-5
    )
    torch.testing.assert_close(Mean()(renamed, second), Mean()(some, first), rtol=1e-5, atol=1e-8)


@EVERY_WEIGHTING
@pytest.mark.parametrize("zeros", [1, 2])
def test_gradients_of_nothing_but_zeros_are_no_trouble(name, zeros):
    method = make(name)
    some = round_of([[0.0] * 4] * zeros + [[1.0, 0.0, -2.0, 0.0]])
    for given_reports in (some, some[:zeros]):
        weights, state = method.update(method.init([]), given_reports)
        assert torch.isfinite(Mean()(given_reports, weights)).all()
        assert all(value > 0 for value in state.weights.values())


ANY_LOSS = st.one_of(st.sampled_from([0.0, -1.0, 1.0, 1e-12]), st.floats(-1e3, 1e3))
ANY_REPORT = st.tuples(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),
    ANY_LOSS,
    ANY_LOSS,
    st.sampled_from([0.0, -1.0, -1e4, 2.0]),
)


@EVERY_WEIGHTING
@given(
    rounds=st.lists(
        st.dictionaries(st.sampled_from("abcd"), ANY_REPORT, min_size=1), min_size=1, max_size=4
    )
)
def test_nothing_to_learn_and_losses_of_any_sign_are_no_trouble(name, rounds):
    """Norms of 0, and losses that are 0, negative, or below the floor of their task."""
    method = make(name)
    state = method.init(["a", "b", "c"])
    for round in rounds:
        some = []
        for client, (norm, loss, initial, floor) in sorted(round.items()):
            fields = {"gradient": torch.full((3,), norm), "loss_floor": floor}
            some.append(
                dataclasses.replace(report(client, norm, **fields), loss=loss, initial_loss=initial)
            )
        before = sum(state.weights.get(client, 1.0) for client in round)
        weights, state = method.update(state, some)
        assert sum(weights.values.values()) == pytest.approx(before, rel=1e-6)
        assert all(math.isfinite(value) for value in weights.values.values())
        assert all(math.isfinite(value) and value > 0 for value in state.weights.values())
        assert math.isfinite(weights.scale)
        assert weights.scale > 0
        assert torch.isfinite(Mean()(some, weights)).all()
        json.dumps(dataclasses.asdict(state), allow_nan=False)


def needs_losses(name):
    return make(name).needs_positive_losses


@pytest.mark.parametrize("name", [name for name in NAMES if needs_losses(name)])
def test_a_client_without_a_training_rate_keeps_its_weight_and_the_others_are_weighed_as_without_it(
    name,
):
    method = make(name)
    others = [report("a", 1.0, 0.5), report("c", 3.0, 0.9)]
    lost = dataclasses.replace(report("b", 2.0), loss=-0.5, initial_loss=-0.1)
    alone, _ = method.update(method.init(["a", "b", "c"]), others)
    weights, state = method.update(method.init(["a", "b", "c"]), [others[0], lost, others[1]])
    assert weights.values["b"] == state.weights["b"] == 1.0
    assert {client: weights.values[client] for client in "ac"} == pytest.approx(alone.values)
    floored = dataclasses.replace(lost, loss_floor=-1.0)  # from the floor on they are 0.5 and 0.9
    assert floored.inverse_training_rate == pytest.approx(0.5 / 0.9)
    same = dataclasses.replace(lost, loss=0.5, initial_loss=0.9)
    given_floor, given_same = (
        method.update(method.init(["a", "b", "c"]), [others[0], one, others[1]])[0]
        for one in (floored, same)
    )
    assert given_floor.values == pytest.approx(given_same.values)


@pytest.mark.parametrize("name", [name for name in NAMES if not needs_losses(name)])
def test_to_a_weighting_that_reads_no_losses_their_sign_is_nothing(name):
    method = make(name)
    some = round_of([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.2, 1.0, 0.0]])
    negative = [
        dataclasses.replace(one, loss=one.loss - 10, initial_loss=one.initial_loss - 10)
        for one in some
    ]
    one, other = (
        method.update(method.init(["c0", "c1", "c2"]), given)[0] for given in (some, negative)
    )
    assert one.values == pytest.approx(other.values)


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
    if name in RANDOM:
        assert sum(weights.values.values()) == pytest.approx(count)
    else:
        assert weights.values == pytest.approx(dict.fromkeys(clients, 1.0))
