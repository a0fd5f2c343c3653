from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedgradnorm import (
    ConfigError,
    FedGradNorm,
    WeightingState,
)
from tests.helpers import (
    report,
    reports,
)

NORMS = st.floats(1e-6, 1e6)
RATES = st.floats(1e-3, 1e3)
METHODS = st.builds(
    FedGradNorm,
    gamma=st.floats(0, 3),
    solver=st.sampled_from(["step", "exact"]),
    weight_lr=st.floats(1e-4, 10),
    weight_steps=st.integers(1, 5),
    damping=st.floats(0.01, 1),
    min_weight=st.floats(1e-6, 0.5),
    normalize=st.sampled_from(["sum", "norm"]),
    group_by=st.sampled_from(["client", "task"]),
)


def test_golden_five_rounds_of_three_clients():
    """Worked by hand with α_p = 1/10, γ = 1, p_min = 1/10, one step a round, from p = (1, 1, 1) for clients (a, b, c).

    Round 1. n = (1, 2, 1), F̃ = (1, 1, 1): r = (1, 1, 1), G = (1, 2, 1), Ḡ = 4/3, targets (4/3, 4/3, 4/3).
        Signs of G - target: (-, +, -). p = (1 + 1/10, 1 - 2/10, 1 + 1/10) = (11/10, 8/10, 11/10); the sum is 3 already.
    Round 2. n = (2, 1, 1), F̃ = (1, 1/2, 1/2): mean F̃ = 2/3, r = (3/2, 3/4, 3/4), G = (22/10, 8/10, 11/10), Ḡ = 41/30,
        targets (41/20, 41/40, 41/40) = (2.05, 1.025, 1.025). Signs (+, -, +). p = (9/10, 9/10, 10/10), sum 28/10,
        times 30/28: (27/28, 27/28, 30/28).
    Round 3. n = (1, 1, 2), F̃ = (1/2, 1/2, 1/2): r = 1, G = (27/28, 27/28, 60/28), Ḡ = 38/28 = every target. Signs (-, -, +).
        p = (135/140 + 14/140, 135/140 + 14/140, 150/140 - 28/140) = (149, 149, 122)/140; the sum is 3 already.
    Round 4. b is absent. n = (1, ., 1), F̃ = (2/5, ., 2/5): r = 1, G = (149, ., 122)/140, Ḡ = 271/280 = both targets. Signs (+, ., -).
        p = (149 - 14, 149, 122 + 14)/140 = (135, 149, 136)/140; a and c have the sum 271/140 that they had.
    Round 5. n = (20, 1, 1), F̃ = (1/5, 1/5, 4/5): mean 2/5, r = (1/2, 1/2, 2), G = (2700, 149, 136)/140, Ḡ = 995/140,
        targets (995/280, 995/280, 1990/140). Signs (+, -, -). p = (135/140 - 2 → 14/140 = p_min, 163/140, 150/140),
        sum 327/140, times 420/327: (14, 163, 150)/109.
    """
    method = FedGradNorm(gamma=1.0, weight_lr=0.1, min_weight=0.1)
    state = method.init(["a", "b", "c"])
    rounds = [
        (
            {"a": 1, "b": 2, "c": 1},
            {"a": 1, "b": 1, "c": 1},
            [11 / 10, 8 / 10, 11 / 10],
            {"a": 4 / 3, "b": 4 / 3, "c": 4 / 3},
        ),
        (
            {"a": 2, "b": 1, "c": 1},
            {"a": 1, "b": 0.5, "c": 0.5},
            [27 / 28, 27 / 28, 30 / 28],
            {"a": 2.05, "b": 1.025, "c": 1.025},
        ),
        (
            {"a": 1, "b": 1, "c": 2},
            {"a": 0.5, "b": 0.5, "c": 0.5},
            [149 / 140, 149 / 140, 122 / 140],
            dict.fromkeys("abc", 38 / 28),
        ),
        (
            {"a": 1, "c": 1},
            {"a": 0.4, "c": 0.4},
            [135 / 140, 149 / 140, 136 / 140],
            {"a": 271 / 280, "c": 271 / 280},
        ),
        (
            {"a": 20, "b": 1, "c": 1},
            {"a": 0.2, "b": 0.2, "c": 0.8},
            [14 / 109, 163 / 109, 150 / 109],
            {"a": 995 / 280, "b": 995 / 280, "c": 1990 / 140},
        ),
    ]
    for norms, rates, expected, targets in rounds:
        weights, state = method.update(state, reports(norms, rates))
        np.testing.assert_allclose(
            [state.weights[client] for client in "abc"], expected, rtol=1e-12
        )
        assert weights.values == {client: state.weights[client] for client in norms}
        assert weights.targets == pytest.approx(targets, rel=1e-12)
        assert weights.scale == 1.0


def test_golden_two_steps_hold_the_targets():
    """n = (1, 3), r = 1, α_p = 1/10: Ḡ = 2. Step 1: p = (1.1, 0.7), G = (1.1, 2.1). Were Ḡ taken anew it would be 1.6.

    Held at 2, step 2 goes on: p = (1.2, 0.4), sum 1.6, times 2/1.6: (1.5, 0.5). A third step from (1.2, 0.4) would turn b around.
    """
    method = FedGradNorm(weight_lr=0.1, weight_steps=2)
    weights, _ = method.update(method.init(["a", "b"]), reports({"a": 1, "b": 3}, {"a": 1, "b": 1}))
    assert weights.values == pytest.approx({"a": 1.5, "b": 0.5}, rel=1e-12)


def test_golden_exact_with_damping():
    """n = (1, 4), F̃ = (1/2, 3/2), γ = 2: r = (1/2, 3/2), r²/n = (1/4, 9/16) ∝ (4, 9), so p* = (8/13, 18/13).

    With ρ = 1/4 from p = 1: p = (3/4 + 2/13, 3/4 + 9/26) = (47/52, 57/52).
    """
    method = FedGradNorm(gamma=2, solver="exact", damping=0.25)
    weights, _ = method.update(
        method.init(["a", "b"]), reports({"a": 1, "b": 4}, {"a": 0.5, "b": 1.5})
    )
    assert weights.values == pytest.approx({"a": 47 / 52, "b": 57 / 52}, rel=1e-12)


def test_golden_group_by_task():
    """Task x has the clients a and b with n = (1, 3), so n_x = 2; task y has c with n = 4; rates are equal.

    The exact solver gives p ∝ 1/n by task: p_x = 2 p_y, and 2 p_x + p_y = 3 clients: p_x = 6/5, p_y = 3/5.
    """
    method = FedGradNorm(solver="exact", damping=1.0, group_by="task")
    some = [report("a", 1, task="x"), report("b", 3, task="x"), report("c", 4, task="y")]
    weights, _ = method.update(method.init(["a", "b", "c"]), some)
    assert weights.values == pytest.approx({"a": 1.2, "b": 1.2, "c": 0.6}, rel=1e-12)


def test_an_absent_client_follows_its_task_when_weights_are_by_task():
    method = FedGradNorm(solver="exact", damping=1.0, group_by="task")
    state = method.init(["a", "b", "c"])
    _, state = method.update(
        state, [report("a", 1, task="x"), report("b", 1, task="x"), report("c", 1, task="y")]
    )
    _, state = method.update(state, [report("a", 2, task="x"), report("c", 1, task="y")])
    assert state.weights["b"] == state.weights["a"] < state.weights["c"]
    assert sum(state.weights.values()) == pytest.approx(3)


def test_norm_keeps_the_length_that_equal_weights_would_give():
    norms = {"a": 1.0, "b": 5.0, "c": 9.0}
    method = FedGradNorm(solver="exact", normalize="norm")
    weights, _ = method.update(method.init(norms), reports(norms, {"a": 1, "b": 0.7, "c": 0.3}))
    assert weights.scale * sum(
        weights.values[client] * norms[client] for client in norms
    ) == pytest.approx(15)


@st.composite
def histories(draw):
    """Some rounds, in each some clients with their norms and rates; clients d and e are not known at the start."""
    return [
        {
            client: (draw(NORMS), draw(RATES))
            for client in draw(st.sets(st.sampled_from("abcde"), min_size=1))
        }
        for _ in range(draw(st.integers(1, 6)))
    ]


def play(method, history, rename=dict, task_of=str.upper):
    name = rename if callable(rename) and rename is not dict else lambda client: client
    state = method.init([name(client) for client in "abc"])
    weights = None
    for round in history:
        some = [
            report(name(client), n, rate, task=task_of(client))
            for client, (n, rate) in round.items()
        ]
        weights, state = method.update(state, sorted(some, key=lambda one: one.client))
    return weights, state


def in_two_tasks(client):
    return "x" if client in "ace" else "y"


@given(METHODS, histories())
def test_weights_are_positive_and_sum_to_the_number_of_clients(method, history):
    weights, state = play(method, history, task_of=in_two_tasks)
    known = set("abc").union(*history)
    assert state.weights.keys() == known
    assert all(0 < weight < np.inf for weight in state.weights.values())
    assert sum(state.weights.values()) == pytest.approx(len(known), rel=1e-9)
    assert weights.values == {client: state.weights[client] for client in history[-1]}


@given(METHODS, histories())
def test_relabelling_the_clients_relabels_the_weights_and_nothing_else(method, history):
    new = dict(
        zip("abcde", "wxvzu", strict=True)
    ).__getitem__  # another alphabetical order, so other sums
    _, state = play(method, history, task_of=in_two_tasks)
    _, renamed = play(method, history, rename=new, task_of=in_two_tasks)
    assert dict(renamed.weights) == pytest.approx(
        {new(client): weight for client, weight in state.weights.items()}, rel=1e-9
    )


@given(METHODS, st.lists(NORMS, min_size=1, max_size=6), RATES)
def test_balance_is_left_as_it_is(method, norms, rate):
    """Equal weighted norms p_i n_i and equal rates: p stays."""
    method = replace(method, group_by="client")
    clients = [f"c{index}" for index in range(len(norms))]
    p = 1 / np.array(norms)
    p *= len(norms) / p.sum()
    assume(p.min() > method.min_weight)
    state = WeightingState(dict(zip(clients, p.tolist(), strict=True)), {"groups": {}})
    _, after = method.update(
        state, [report(client, n, rate) for client, n in zip(clients, norms, strict=True)]
    )
    assert dict(after.weights) == pytest.approx(dict(state.weights), rel=1e-9)


@given(METHODS, NORMS, RATES, st.integers(1, 6))
def test_equal_norms_and_equal_rates_leave_equal_weights(method, norm, rate, count):
    clients = [f"c{index}" for index in range(count)]
    weights, _ = method.update(
        method.init(clients), [report(client, norm, rate) for client in clients]
    )
    assert weights.values == pytest.approx(dict.fromkeys(clients, 1.0), rel=1e-12)


@given(
    st.floats(0, 3),
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=6),
    st.floats(0.01, 100),
)
def test_the_scale_of_a_loss_cancels_at_the_fixed_point(gamma, clients, scale):
    """A loss times c: F(0), F(k) and n times c. Then p_i is divided by c before rescaling, and the p_i n_i keep their ratios."""
    method = FedGradNorm(gamma=gamma, solver="exact", damping=1.0, min_weight=1e-12)
    names = [f"c{index}" for index in range(len(clients))]
    plain = [report(name, n, rate) for name, (n, rate) in zip(names, clients, strict=True)]
    scaled = [
        report(names[0], clients[0][0] * scale, clients[0][1], initial_loss=scale),
        *plain[1:],
    ]
    assert scaled[0].loss == pytest.approx(plain[0].loss * scale)
    before, _ = method.update(method.init(names), plain)
    after, _ = method.update(method.init(names), scaled)
    pushes = [
        [weights.values[one.client] * one.grad_norm for one in some]
        for weights, some in ((before, plain), (after, scaled))
    ]
    np.testing.assert_allclose(np.divide(*pushes), np.divide(*pushes)[0], rtol=1e-9)
    assert after.values[names[0]] / after.values[names[1]] == pytest.approx(
        before.values[names[0]] / before.values[names[1]] / scale
    )


@given(METHODS, histories())
def test_above_its_target_a_client_loses_weight_to_those_below(method, history):
    method = replace(
        method, weight_steps=1, group_by="client"
    )  # with several steps, large ones go there and back
    *earlier, last = history
    _, state = play(method, [*earlier, {"a": (1.0, 1.0)}])
    weights, _ = method.update(state, [report(client, *last[client]) for client in sorted(last)])
    old = {client: state.weights.get(client, 1.0) for client in last}
    gap = {client: old[client] * last[client][0] / weights.targets[client] - 1 for client in last}
    for high, low in product(last, last):
        if gap[high] > 1e-6 and gap[low] < -1e-6:
            before, after = old[high] / old[low], weights.values[high] / weights.values[low]
            assert after < before or weights.values[high] == pytest.approx(
                min(weights.values.values())
            )  # held up by min_weight


@given(METHODS, NORMS, st.lists(RATES, min_size=2, max_size=6, unique=True))
def test_with_equal_norms_the_slowest_task_gains_weight(method, norm, rates):
    method = replace(method, weight_steps=1, gamma=method.gamma + 0.01)
    assume(max(rates) > 1.01 * sorted(rates)[-2])
    names = [f"c{index}" for index in range(len(rates))]
    weights, _ = method.update(
        method.init(names),
        [report(name, norm, rate) for name, rate in zip(names, rates, strict=True)],
    )
    assert weights.values[names[int(np.argmax(rates))]] > 1


def test_a_task_that_is_solved_exactly_keeps_a_positive_weight():
    for solver in ("step", "exact"):
        method = FedGradNorm(solver=solver, damping=1.0)
        weights, _ = method.update(
            method.init(["a", "b"]), reports({"a": 1, "b": 1}, {"a": 0, "b": 1})
        )
        assert 0 < weights.values["a"] < weights.values["b"]
        weights, _ = method.update(
            method.init(["a", "b"]), reports({"a": 1, "b": 1}, {"a": 0, "b": 0})
        )
        assert weights.values == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "gamma: expected a number from 0 to 10, found -1"),
        ({"gamma": float("nan")}, "gamma"),
        ({"solver": "newton"}, "solver: expected 'step' or 'exact', found 'newton'"),
        ({"weight_lr": 0}, "weight_lr"),
        ({"weight_steps": 0}, "weight_steps"),
        ({"damping": 1.5}, "damping"),
        ({"min_weight": 1}, "min_weight"),
        ({"normalize": "max"}, "normalize"),
        ({"group_by": "site"}, "group_by"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FedGradNorm(**options)


@pytest.mark.parametrize("solver", ["step", "exact"])
def test_golden_a_client_with_nothing_to_learn_keeps_its_weight(solver):
    """By hand, γ = 1, from p = (1, 1, 1), n = (1, 0, 3), F̃ = (1, 0, 1): a and c are weighed by themselves.

    step, α_p = 1/10: G = (1, 3), Ḡ = 2 = both targets, p = (1 + 1/10, 1 - 3/10) = (11/10, 7/10), sum 18/10, times 20/18: (11/9, 7/9).
    exact, ρ = 1: p ∝ 1 / n = (1, 1/3), sum 2: (3/2, 1/2).
    """
    method = FedGradNorm(gamma=1.0, weight_lr=0.1, solver=solver, damping=1.0)
    some = [report("a", 1.0), report("b", 0.0, 0.0), report("c", 3.0)]
    weights, state = method.update(method.init(["a", "b", "c"]), some)
    expected = {
        "step": {"a": 11 / 9, "b": 1.0, "c": 7 / 9},
        "exact": {"a": 3 / 2, "b": 1.0, "c": 1 / 2},
    }[solver]
    assert weights.values == pytest.approx(expected)
    assert state.weights == pytest.approx(expected)
    assert weights.targets == pytest.approx({"a": 2.0, "c": 2.0})
    everyone, after = method.update(state, [replace(one, grad_norm=0.0) for one in some])
    assert everyone.values == after.weights == state.weights


@pytest.mark.parametrize("solver", ["step", "exact"])
def test_a_client_whose_loss_is_below_its_floor_keeps_its_weight_unless_gamma_is_0(solver):
    some = [report("a", 1.0), replace(report("b", 2.0), loss=-0.1), report("c", 3.0)]
    method = FedGradNorm(solver=solver)
    assert method.update(method.init(["a", "b", "c"]), some)[0].values["b"] == 1.0
    norms_only = FedGradNorm(solver=solver, gamma=0.0, damping=1.0, weight_lr=0.1)
    positive = [some[0], replace(some[1], loss=0.1), some[2]]
    one, other = (
        norms_only.update(norms_only.init(["a", "b", "c"]), given)[0] for given in (some, positive)
    )
    assert one.values == other.values


def test_a_task_pools_those_of_its_clients_that_have_something_to_learn():
    """Group x has n = 2 (its other client has 0), y has 1: with γ = 0, exact and ρ = 1, p ∝ 1/n, three clients: (3/4, 3/4, 3/2)."""
    method = FedGradNorm(solver="exact", gamma=0.0, damping=1.0, group_by="task")
    some = [report("a", 2.0, task="x"), report("b", 0.0, task="x"), report("c", 1.0, task="y")]
    weights, _ = method.update(method.init(["a", "b", "c"]), some)
    assert weights.values == pytest.approx({"a": 3 / 4, "b": 3 / 4, "c": 3 / 2})
    silent, _ = method.update(
        method.init(["a", "b", "c"]),
        [report("a", 0.0, task="x"), report("b", 0.0, task="x"), some[2]],
    )
    assert silent.values == {"a": 1.0, "b": 1.0, "c": 1.0}


@pytest.mark.parametrize("normalize", ["sum", "norm"])
def test_where_nobody_has_anything_to_learn_the_weights_and_the_scale_stay(normalize):
    method = FedGradNorm(normalize=normalize)
    weights, _ = method.update(
        method.init(["a", "b"]), [report("a", 0.0, 0.0), report("b", 0.0, 0.0)]
    )
    assert (weights.values, weights.scale) == ({"a": 1.0, "b": 1.0}, 1.0)


def test_norm_keeps_the_length_when_only_some_take_part():
    """Weights (1.9, 0.1), only b takes part with n = 19: equal weights would give a direction of length 19, and so it stays."""
    method = FedGradNorm(normalize="norm", weight_lr=1e-6)
    weights, _ = method.update(
        WeightingState({"a": 1.9, "b": 0.1}, {"groups": {}}), [report("b", 19.0)]
    )
    assert weights.scale == pytest.approx(1.0)
