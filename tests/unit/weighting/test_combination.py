import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgradnorm import WeightingState
from fedgradnorm.aggregation import Mean
from fedgradnorm.weighting.combination import LEAST, combination, proportional, start
from tests.helpers import report


def some_reports(gradients):
    return [
        report(f"c{index}", 1.0, gradient=torch.tensor(gradient, dtype=torch.float64))
        for index, gradient in enumerate(gradients)
    ]


@given(
    coefficients=st.lists(st.floats(-10, 10), min_size=1, max_size=6).filter(
        lambda a: sum(a) > 1e-3
    ),
    old=st.lists(st.floats(0.01, 5), min_size=6, max_size=6),
    exponent=st.integers(-20, 20),
)
def test_the_mean_of_the_weights_is_the_combination(coefficients, old, exponent):
    """Σ a_i g_i itself, for unit gradients g_i the coefficients one by one, whatever the weights were before."""
    coefficients = [10.0**exponent * a for a in coefficients]
    reports = some_reports(np.eye(len(coefficients)).tolist())
    state = WeightingState({f"c{index}": weight for index, weight in enumerate(old)})
    weights, after = combination(state, reports, coefficients)
    np.testing.assert_allclose(
        Mean()(reports, weights), coefficients, rtol=1e-9, atol=1e-9 * max(map(abs, coefficients))
    )
    assert weights.scale == pytest.approx(sum(coefficients))
    assert sum(weights.values.values()) == pytest.approx(sum(old[: len(coefficients)]))
    assert sum(after.weights.values()) == pytest.approx(sum(old))
    absent = {f"c{index}": old[index] for index in range(len(coefficients), len(old))}
    assert {client: after.weights[client] for client in absent} == absent


def test_golden_a_weight_of_0_is_applied_and_remembered_as_the_least():
    reports = some_reports([[1.0], [1.0], [1.0]])
    weights, state = combination(start(["c0", "c1", "c2"]), reports, [0.5, 0.0, 1.5])
    assert weights.values == pytest.approx({"c0": 0.75, "c1": 0.0, "c2": 2.25})
    assert weights.scale == pytest.approx(2.0)
    assert state.weights["c1"] == LEAST
    assert state.weights["c0"] == pytest.approx(0.75, rel=1e-5)
    assert sum(state.weights.values()) == pytest.approx(3.0, rel=1e-15)
    alone, _ = combination(
        state, reports[1:2], [7.0]
    )  # it can still be weighted, and aggregated, by itself
    assert alone.values == {"c1": LEAST}
    assert Mean()(reports[1:2], alone).item() == pytest.approx(7.0)


def test_golden_a_negative_weight_is_applied_and_remembered_as_the_least():
    """a = (-½, 1, 3/2): Σ = 2, p = 3 a / 2. The others' remembered weights, 3/2 and 9/4, share 3 - 10⁻⁶."""
    weights, state = combination(
        start(["c0", "c1", "c2"]), some_reports([[1.0]] * 3), [-0.5, 1.0, 1.5]
    )
    assert weights.values == pytest.approx({"c0": -0.75, "c1": 1.5, "c2": 2.25})
    assert state.weights == pytest.approx({"c0": LEAST, "c1": 3 * 2 / 5, "c2": 3 * 3 / 5}, rel=1e-5)


@pytest.mark.parametrize(
    "coefficients",
    [
        [0.0, 0.0],
        [-1.0, -2.0],
        [1.0, -1.0],
        [1.0, -1.0 + 1e-9],
        [float("nan"), 1.0],
        [float("inf"), 1.0],
        [1e308, 1e308],
    ],
)
def test_coefficients_without_a_sum_give_equal_weights(coefficients):
    state = WeightingState({"c0": 0.5, "c1": 1.0, "other": 1.5})
    weights, after = combination(state, some_reports([[1.0], [2.0]]), coefficients)
    assert weights.values == {"c0": 0.75, "c1": 0.75}
    assert weights.scale == 1.0
    assert after.weights == {"c0": 0.75, "c1": 0.75, "other": 1.5}


def test_the_remembered_weights_never_run_out():
    """Rounds of two, the one of them always weighted 0: what they share stays what it was, and above 0."""
    state = start(["c0", "c1", "c2", "c3"])
    reports = some_reports([[1.0]] * 4)
    for number in range(400):
        pair = [reports[number % 4], reports[(number + 1) % 4]]
        weights, state = combination(state, sorted(pair, key=lambda one: one.client), [0.0, 1.0])
        assert min(state.weights.values()) >= LEAST * (1 - 1e-6)
        assert sum(state.weights.values()) == pytest.approx(4.0)
        assert torch.isfinite(Mean()(pair, weights)).all()


def test_a_memory_is_kept_unless_a_new_one_is_given():
    state = start(["c0"], round=3)
    assert combination(state, some_reports([[1.0]]), [1.0])[1].memory == {"round": 3}
    assert proportional(state, some_reports([[1.0]]), [1.0], {"round": 4})[1].memory == {"round": 4}
    assert state.memory == {"round": 3}
