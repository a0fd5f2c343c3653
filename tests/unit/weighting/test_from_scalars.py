"""The weightings that look at losses, numbers of examples or nothing: golden values, limits, and what their papers promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgradnorm import ConfigError
from fedgradnorm.aggregation import Mean
from fedgradnorm.randomness import generator
from fedgradnorm.weighting import AFL, DWA, GLS, QFFL, RLW, Examples, Fixed, Uncertainty
from fedgradnorm.weighting.afl import on_simplex
from tests.helpers import report

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


def with_losses(losses, **fields):
    """Reports of clients c0, c1, ... with these losses, the initial one being 1."""
    return [report(f"c{index}", 1.0, loss, **fields) for index, loss in enumerate(losses)]


def ids(count):
    return [f"c{index}" for index in range(count)]


def play(method, rounds):
    """The weights after rounds of losses, as a list, and the scale."""
    state = method.init(ids(len(rounds[0])))
    for losses in rounds:
        weights, state = method.update(state, with_losses(losses))
    return list(weights.values.values()), weights.scale


# examples


def test_golden_examples():
    """10, 20 and 30 examples of 60, times 3 clients; without b, a and c share the 2 that they have: 2 · 10/40 and 2 · 30/40."""
    some = [
        report(client, 1.0, num_examples=count)
        for client, count in (("a", 10), ("b", 20), ("c", 30))
    ]
    method = Examples()
    weights, state = method.update(method.init(["a", "b", "c"]), some)
    assert weights.values == pytest.approx({"a": 0.5, "b": 1.0, "c": 1.5})
    weights, _ = method.update(state, [some[0], some[2]])
    assert weights.values == pytest.approx({"a": 0.5, "c": 1.5})
    assert method.update(
        state, [report("a", 1.0, num_examples=0), report("b", 1.0, num_examples=0)]
    )[0].values == {"a": 0.75, "b": 0.75}


# fixed


def test_golden_fixed_by_client_then_by_task_then_1():
    method = Fixed(clients={"b": 6.0}, tasks={"smile": 2.0})
    some = [
        report("a", 1.0, task="smile"),
        report("b", 1.0, task="smile"),
        report("c", 1.0, task="pose"),
        report("d", 1.0, task="pose"),
    ]
    weights, state = method.update(method.init(["a", "b", "c", "d"]), some)
    assert weights.values == pytest.approx({"a": 0.8, "b": 2.4, "c": 0.4, "d": 0.4})
    assert method.update(state, some)[0].values == pytest.approx(weights.values)


def test_fixed_names_an_unknown_client_before_training_and_an_unknown_task_once_all_tasks_are_known():
    with pytest.raises(
        ConfigError,
        match=r"weighting\.clients\.sit-a: there is no client 'sit-a'; did you mean 'site-a'\?",
    ):
        Fixed(clients={"sit-a": 2.0}).init(["site-a", "site-b"])
    Fixed(clients={"later": 2.0}).init([])
    method = Fixed(tasks={"smle": 2.0})
    _, state = method.update(
        method.init(["a", "b"]), [report("a", 1.0, task="pose")]
    )  # b may still have it
    with pytest.raises(
        ConfigError,
        match=r"weighting\.tasks\.smle: there is no task 'smle'; did you mean 'smile'\?",
    ):
        method.update(state, [report("b", 1.0, task="smile")])


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_fixed_weights_are_above_0(weight):
    with pytest.raises(ConfigError, match="clients.a: expected a (finite )?number above 0"):
        Fixed(clients={"a": weight})
    with pytest.raises(ConfigError, match="tasks.t: expected a (finite )?number above 0"):
        Fixed(tasks={"t": weight})


# dwa


def test_golden_dwa_three_rounds():
    """T = 2. Round 1: nothing to compare with, so 1. Round 2: r = (1, 1/2). Round 3, without b: r_a = 2, r_c not yet known.

    Round 4: of b the last loss is that of round 2, so r_b = 2 / (1/2) = 4, against r_a = 1.
    """
    method = DWA(temperature=2.0)
    weights, state = method.update(method.init(["c0", "c1"]), with_losses([1.0, 1.0]))
    assert weights.values == {"c0": 1.0, "c1": 1.0}
    weights, state = method.update(state, with_losses([1.0, 0.5]))
    total = math.exp(0.5) + math.exp(0.25)
    assert weights.values == pytest.approx(
        {"c0": 2 * math.exp(0.5) / total, "c1": 2 * math.exp(0.25) / total}
    )
    _, state = method.update(state, with_losses([2.0]))
    weights, _ = method.update(state, with_losses([2.0, 2.0]))
    total = math.exp(0.5) + math.exp(2)
    assert weights.values == pytest.approx(
        {"c0": 2 * math.exp(0.5) / total, "c1": 2 * math.exp(2) / total}
    )


@given(
    rounds=st.lists(st.tuples(*[st.floats(0.1, 10)] * 3), min_size=2, max_size=4),
    factor=st.floats(1e-3, 1e3),
)
def test_dwa_does_not_see_the_scale_of_a_loss(rounds, factor):
    scaled = [(first * factor, *others) for first, *others in rounds]
    assert play(DWA(), scaled)[0] == pytest.approx(play(DWA(), rounds)[0])


def test_dwa_with_a_loss_that_was_0():
    weights, scale = play(DWA(), [(1.0, 0.0), (1.0, 1.0)])
    assert weights == pytest.approx([0.0, 2.0])
    assert scale == pytest.approx(1.0)


# rlw


def test_rlw_draws_from_seed_round_and_client_alone():
    method = RLW(seed=5)
    both, state = method.update(method.init(["c0", "c1", "c2"]), with_losses([1.0, 1.0, 1.0]))
    pair, _ = method.update(method.init(["c0", "c1", "c2"]), with_losses([9.0, 3.0]))
    assert pair.values["c0"] / pair.values["c1"] == pytest.approx(
        both.values["c0"] / both.values["c1"]
    )
    draws = [generator(5, 1, client, "rlw").standard_normal() for client in ids(3)]
    assert list(both.values.values()) == pytest.approx(3 * np.exp(draws) / np.exp(draws).sum())
    second, state = method.update(state, with_losses([1.0, 1.0, 1.0]))
    assert second.values != both.values
    assert state.memory == {"round": 2}
    assert RLW(seed=6).update(RLW().init([]), with_losses([1.0, 1.0, 1.0]))[0].values != both.values


def test_rlw_is_even_on_average():
    method, sums = RLW(), np.zeros(3)
    state = method.init(ids(3))
    for _ in range(2000):
        weights, state = method.update(state, with_losses([1.0, 2.0, 3.0]))
        sums += list(weights.values.values())
    np.testing.assert_allclose(
        sums / 2000, 1.0, atol=4 * 0.6 / math.sqrt(2000)
    )  # a weight's standard deviation is about 0.6


# uncertainty


def test_golden_uncertainty_two_steps():
    """lr = 0.4, F = (1/2, 2). Step 1 from s = 0: s - 0.2 (1 - F) = (-0.1, 0.2). Step 2: s - 0.2 (1 - F exp(-s))."""
    s = [-0.1 - 0.2 * (1 - 0.5 * math.exp(0.1)), 0.2 - 0.2 * (1 - 2 * math.exp(-0.2))]
    expected = [2 * math.exp(-own) / (math.exp(-s[0]) + math.exp(-s[1])) for own in s]
    assert play(Uncertainty(weight_lr=0.4), [(0.5, 2.0)] * 2)[0] == pytest.approx(expected)
    assert play(Uncertainty(weight_lr=0.4, weight_steps=2), [(0.5, 2.0)])[0] == pytest.approx(
        expected
    )


@given(losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=4), factor=st.floats(0.1, 10))
def test_uncertainty_ends_at_the_inverse_losses_whatever_their_scale(losses, factor):
    scaled = [losses[0] * factor, *losses[1:]]
    weights, _ = play(Uncertainty(weight_lr=0.5, weight_steps=300), [scaled])
    inverse = 1 / np.array(scaled)
    np.testing.assert_allclose(weights, len(losses) * inverse / inverse.sum(), rtol=1e-6)


@pytest.mark.parametrize("losses", [(1e90, 1.0), (0.0, 1.0), (0.0, 1e90), (1e90, 1e90)])
def test_uncertainty_with_extreme_losses_stays_finite_and_comes_back(losses):
    method = Uncertainty(weight_lr=1.0)
    state = method.init(ids(2))
    for _ in range(50):
        weights, state = method.update(state, with_losses(losses))
        assert all(math.isfinite(value) and value >= 0 for value in weights.values.values())
    for _ in range(200):
        weights, state = method.update(state, with_losses((1.0, 1.0)))
    assert weights.values == pytest.approx({"c0": 1.0, "c1": 1.0}, abs=1e-3)


# gls


def test_gls_is_the_gradient_of_the_geometric_mean():
    """F_i(x) = ‖x - z_i‖² at a point x: the direction against central differences of (Π F_i)^(1/n)."""
    rng = np.random.default_rng(0)
    x, centres = rng.normal(size=4), rng.normal(size=(3, 4))

    def losses(x):
        return ((x - centres) ** 2).sum(axis=1)

    some = [
        report(f"c{index}", 1.0, loss, gradient=torch.tensor(2 * (x - centre)))
        for index, (loss, centre) in enumerate(zip(losses(x), centres, strict=True))
    ]
    weights, _ = GLS().update(GLS().init(ids(3)), some)
    step = 1e-6 * np.eye(4)
    numeric = [
        (losses(x + e).prod() ** (1 / 3) - losses(x - e).prod() ** (1 / 3)) / 2e-6 for e in step
    ]
    np.testing.assert_allclose(Mean()(some, weights), numeric, rtol=1e-6)


@given(losses=POSITIVE, factor=st.floats(1e-3, 1e3))
def test_gls_weighs_each_loss_the_same(losses, factor):
    weights, scale = play(GLS(), [losses])
    np.testing.assert_allclose(np.array(weights) * losses, weights[0] * losses[0])
    scaled, scaled_scale = play(GLS(), [[factor * loss for loss in losses]])
    assert scaled == pytest.approx(weights)
    assert scaled_scale == pytest.approx(scale)
    assert scale >= 1 - 1e-9  # the geometric mean is at least the harmonic one


def test_gls_with_a_loss_of_0():
    weights, scale = play(GLS(), [(0.0, 1.0)])
    assert weights == pytest.approx([2.0, 2e-6], rel=1e-5)
    assert scale == pytest.approx((1e3 + 1e-3) / 2)


# qffl


@given(losses=POSITIVE, q=st.floats(0, 5))
def test_qffl_is_the_power_of_the_loss(losses, q):
    weights, scale = play(QFFL(q=q), [losses])
    powers = np.array(losses) ** q
    np.testing.assert_allclose(weights, len(losses) * powers / powers.sum(), rtol=1e-9)
    assert scale == pytest.approx(1.0)


def test_golden_qffl_with_a_lipschitz_constant():
    """q = 2, F = (1, 2), ‖g‖² = (4, 9), L = 6: F^q = (1, 4), h = F^q + q F^(q-1) ‖g‖² / L = (1 + 8/6, 4 + 36/6) = (7/3, 10).

    a = (1, 4) / (37/3): p = (2/5, 8/5) and scale 15/37.
    """
    some = [
        report("c0", 1.0, 1.0, gradient=torch.tensor([2.0, 0.0])),
        report("c1", 1.0, 2.0, gradient=torch.tensor([0.0, -3.0])),
    ]
    weights, _ = QFFL(q=2.0, lipschitz=6.0).update(QFFL().init(ids(2)), some)
    assert weights.values == pytest.approx({"c0": 0.4, "c1": 1.6})
    assert weights.scale == pytest.approx(15 / 37)


def test_relative_losses_do_not_see_the_unit_of_a_loss():
    some = [report("c0", 1.0, 0.5, initial_loss=100.0), report("c1", 1.0, 1.0, initial_loss=0.01)]
    for method in (QFFL(q=1.0, loss="relative"), AFL(weight_lr=2 / 3, loss="relative")):
        assert method.update(method.init(ids(2)), some)[0].values == pytest.approx(
            {"c0": 2 / 3, "c1": 4 / 3}
        )
    absolute, _ = QFFL(q=1.0).update(QFFL().init(ids(2)), some)
    assert absolute.values["c0"] == pytest.approx(2 * 50 / 50.01)


# afl


def test_golden_afl_two_rounds():
    """lr = 0.1. λ = (1/2, 1/2) + (0.1, 0.3), less 0.2: (0.4, 0.6). Then + (0.1, 1.5), less 0.8 would be (-0.3, 1.3): (0, 1)."""
    assert play(AFL(), [(1.0, 3.0)])[0] == pytest.approx([0.8, 1.2])
    assert play(AFL(), [(1.0, 3.0), (1.0, 15.0)])[0] == pytest.approx([0.0, 2.0])


def test_afl_comes_back_to_a_client_that_had_no_weight():
    method = AFL()
    _, state = method.update(method.init(ids(2)), with_losses([0.0, 100.0]))
    weights, _ = method.update(state, with_losses([5.0, 0.0]))
    assert weights.values == pytest.approx({"c0": 1.0 - 0.5, "c1": 2.0 - 0.5}, abs=1e-5)


def test_afl_finds_the_worst_mixture():
    """Two quadratics (x ∓ 1)², the one lifted by 1/2: at the saddle point both losses are equal, (x - 1)² = (x + 1)² - ... : x = -1/8.

    (x - 1)² = (x + 1)² + 1/2 gives x = -1/8, and x is the mixture's minimum λ_1 - λ_2, so λ_1 = 7/16.
    """
    method, x, path = AFL(weight_lr=0.02), 0.0, []
    state = method.init(ids(2))
    for _ in range(3000):
        some = [
            report(
                f"c{index}",
                1.0,
                (x - z) ** 2 + lift,
                gradient=torch.tensor([2 * (x - z)], dtype=torch.float64),
            )
            for index, (z, lift) in enumerate(((1.0, 0.0), (-1.0, 0.5)))
        ]
        weights, state = method.update(state, some)
        x -= 0.05 * Mean()(some, weights).item()
        path.append((x, weights.values["c0"] / 2))
    np.testing.assert_allclose(np.mean(path[-1000:], axis=0), [-1 / 8, 7 / 16], atol=5e-3)


@given(point=st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_the_projection_onto_the_simplex_is_the_nearest_point(point):
    """By its variational inequality: ⟨v - Πv, vertex - Πv⟩ ≤ 0 for every vertex."""
    point = np.array(point)
    near = on_simplex(point)
    assert near.min() >= 0
    assert near.sum() == pytest.approx(1.0)
    for vertex in np.eye(len(point)):
        assert (point - near) @ (vertex - near) <= 1e-9


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DWA, {"temperature": 0.0}),
        (RLW, {"seed": -1}),
        (Uncertainty, {"weight_lr": 0.0}),
        (Uncertainty, {"weight_steps": 0}),
        (QFFL, {"q": -1.0}),
        (QFFL, {"lipschitz": 0.0}),
        (QFFL, {"lipschitz": 1.0, "loss": "relative"}),
        (QFFL, {"loss": "x"}),
        (AFL, {"weight_lr": math.nan}),
        (AFL, {"loss": "x"}),
    ],
)
def test_an_option_out_of_range_is_named(method, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        method(**options)
