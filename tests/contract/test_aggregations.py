"""What every registered aggregation must do: a new one is tested by being registered."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgradnorm import ConfigError, Weights
from fedgradnorm.config import Component
from fedgradnorm.registry import BUILT_INS, build, resolve
from tests.helpers import examples, report

NAMES = sorted(BUILT_INS["aggregation"])
ROBUST = ["clipped_mean", "median", "trimmed_mean"]
EVERY_AGGREGATION = pytest.mark.parametrize("name", NAMES)
EVERY_ROBUST_ONE = pytest.mark.parametrize("name", ROBUST)

VALUES = st.floats(
    -1e3, 1e3, width=32, allow_subnormal=False
)  # below the smallest normal number a product keeps few digits
CLIENTS = st.lists(
    st.tuples(st.lists(VALUES, min_size=4, max_size=4), st.floats(1e-3, 1e3)),
    min_size=1,
    max_size=7,
)  # of each a gradient and a weight
SCALES = st.floats(0.1, 10)

FEW = settings(max_examples=examples(10))


def make(name):
    return build("aggregation", Component(name=name))


def round_of(clients, scale=1.0, dtype=torch.float32):
    """Reports and weights of a round."""
    some = [
        report(f"c{index}", 1.0, gradient=torch.tensor(gradient, dtype=dtype))
        for index, (gradient, _) in enumerate(clients)
    ]
    return some, Weights(
        {one.client: weight for one, (_, weight) in zip(some, clients, strict=True)}, scale=scale
    )


def weighted(clients, scale=1.0):
    """The weighted gradients u_i, whose plain mean is the weighted mean, in double precision. Shape ``(n, P)``."""
    gradients = torch.tensor([gradient for gradient, _ in clients], dtype=torch.float64)
    p = torch.tensor([weight for _, weight in clients], dtype=torch.float64)
    return (p * len(p) * scale / p.sum())[:, None] * gradients


def close_to(largest):
    return {"rtol": 1e-4, "atol": 1e-5 * float(largest) + 1e-30}


@EVERY_AGGREGATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEW
@given(clients=CLIENTS, scale=SCALES)
def test_the_direction_is_finite_of_the_encoders_shape_and_type_and_inside_what_was_sent(
    name, dtype, clients, scale
):
    direction = make(name)(*round_of(clients, scale, dtype))
    assert direction.shape == (4,)
    assert direction.dtype == dtype
    assert torch.isfinite(direction).all()
    u = weighted(clients, scale)
    slack = 1e-4 * u.abs().max() + 1e-30
    least, most = u.amin(dim=0), u.amax(dim=0)
    if name == "clipped_mean":  # a shortened gradient lies between 0 and itself
        least, most = least.clamp(max=0), most.clamp(min=0)
    assert (direction >= least - slack).all()
    assert (direction <= most + slack).all()


@EVERY_AGGREGATION
@FEW
@given(zeros=st.integers(1, 5), others=st.integers(0, 2))
def test_gradients_of_nothing_but_zeros_are_no_trouble(name, zeros, others):
    """A gradient may be 0 where the norm that is reported with it is not."""
    clients = [([0.0] * 4, 1.0)] * zeros + [([1.0, -2.0, 0.0, 3.0], 1.0)] * others
    direction = make(name)(*round_of(clients))
    assert torch.isfinite(direction).all()
    if not others:
        assert torch.equal(direction, torch.zeros(4))


@EVERY_AGGREGATION
@FEW
@given(
    exponents=st.lists(st.integers(-38, 37), min_size=1, max_size=6),
    weights=st.lists(st.floats(1e-3, 1), min_size=6, max_size=6),
)
def test_the_direction_is_finite_whenever_the_weighted_gradients_are(name, exponents, weights):
    """Up to 1e37, where a norm in single precision has long overflowed."""
    clients = [
        ([10.0**exponent] * 4, weight) for exponent, weight in zip(exponents, weights, strict=False)
    ]
    assert torch.isfinite(make(name)(*round_of(clients))).all()


@EVERY_AGGREGATION
@FEW
@given(
    gradient=st.lists(VALUES, min_size=4, max_size=4),
    count=st.integers(1, 7),
    weight=st.floats(1e-3, 1e3),
    scale=SCALES,
)
def test_identical_gradients_of_equal_weight_give_that_gradient(
    name, gradient, count, weight, scale
):
    direction = make(name)(*round_of([(gradient, weight)] * count, scale))
    expected = scale * torch.tensor(gradient)
    torch.testing.assert_close(direction, expected, **close_to(expected.abs().max()))


@EVERY_AGGREGATION
@FEW
@given(
    gradient=st.lists(VALUES, min_size=4, max_size=4),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=7),
    scale=SCALES,
)
def test_identical_gradients_of_any_weights_give_their_direction(name, gradient, weights, scale):
    """The mean gives the gradient itself. The others are robust in the p_i g_i, and so make it longer or shorter, but do not turn it."""
    direction = make(name)(*round_of([(gradient, weight) for weight in weights], scale)).double()
    factors = [scale * len(weights) * weight / sum(weights) for weight in weights]
    target = torch.tensor(gradient, dtype=torch.float64)
    if not target.any():
        assert not direction.any()
        return
    factor = float(direction @ target / (target @ target))
    torch.testing.assert_close(
        direction, factor * target, **close_to(max(factors) * target.abs().max())
    )
    assert min(factors) * 0.999 <= factor <= max(factors) * 1.001
    if name == "mean":
        assert factor == pytest.approx(scale, rel=1e-4)


@EVERY_AGGREGATION
@FEW
@given(clients=CLIENTS, data=st.data())
def test_the_order_of_reports_does_not_matter(name, clients, data):
    some, weights = round_of(clients)
    turned = data.draw(st.permutations(some))
    method, largest = make(name), weighted(clients).abs().max()
    torch.testing.assert_close(method(turned, weights), method(some, weights), **close_to(largest))


@EVERY_AGGREGATION
@FEW
@given(clients=CLIENTS, exponent=st.integers(-10, 10), sign=st.sampled_from([1, -1]))
def test_it_is_homogeneous_in_the_gradients(name, clients, exponent, sign):
    factor = sign * 2.0**exponent
    method, (some, weights) = make(name), round_of(clients)
    times = [dataclasses.replace(one, gradient=factor * one.gradient) for one in some]
    largest = abs(factor) * weighted(clients).abs().max()
    torch.testing.assert_close(
        method(times, weights), factor * method(some, weights), **close_to(largest)
    )


@EVERY_AGGREGATION
@FEW
@given(clients=CLIENTS, factor=st.floats(1e-2, 1e2), scale=SCALES)
def test_only_the_ratios_of_weights_count_and_the_scale_is_a_factor(name, clients, factor, scale):
    method, (some, weights) = make(name), round_of(clients)
    largest = weighted(clients).abs().max()
    times = Weights(
        {client: factor * weight for client, weight in weights.values.items()}, scale=scale
    )
    torch.testing.assert_close(
        method(some, times), scale * method(some, weights), **close_to(scale * largest)
    )


@EVERY_AGGREGATION
@FEW
@given(gradient=st.lists(VALUES, min_size=4, max_size=4), weight=st.floats(1e-3, 1e3), scale=SCALES)
def test_a_client_alone_is_followed_whatever_its_weight(name, gradient, weight, scale):
    expected = scale * torch.tensor(gradient)
    torch.testing.assert_close(
        make(name)(*round_of([(gradient, weight)], scale)),
        expected,
        **close_to(expected.abs().max()),
    )


@EVERY_AGGREGATION
@FEW
@given(
    clients=st.lists(
        st.tuples(st.lists(VALUES, min_size=4, max_size=4), st.floats(1e-3, 1e3)),
        min_size=2,
        max_size=2,
    )
)
def test_of_two_clients_none_is_an_outlier(name, clients):
    """Half of two is one: nobody can tell which one is wrong. Only clipping shortens the one that is longer."""
    u = weighted(clients)
    lengths = u.norm(dim=1)
    if name == "clipped_mean" and lengths.max() > lengths.min():
        return
    torch.testing.assert_close(
        make(name)(*round_of(clients)).double(), u.mean(dim=0), **close_to(u.abs().max())
    )


@FEW
@given(
    directions=st.lists(
        st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(any), min_size=1, max_size=7
    ),
    weights=st.lists(st.floats(1e-2, 1e2), min_size=7, max_size=7),
)
def test_clipped_mean_is_the_mean_where_weighted_gradients_are_equally_long(directions, weights):
    """Which is what FedGradNorm strives for."""
    clients = []
    for direction, weight in zip(directions, weights, strict=False):
        vector = torch.tensor(direction, dtype=torch.float64)
        if vector.norm() < 1e-6:
            vector = torch.ones(4, dtype=torch.float64)
        clients.append(((vector / vector.norm() / weight).tolist(), weight))
    largest = weighted(clients).abs().max()
    torch.testing.assert_close(
        make("clipped_mean")(*round_of(clients)),
        make("mean")(*round_of(clients)),
        **close_to(largest),
    )


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
@FEW
@given(
    middle=st.lists(VALUES, min_size=4, max_size=4),
    steps=st.lists(st.floats(0, 10), min_size=1, max_size=3),
)
def test_median_and_trimmed_mean_are_the_mean_of_what_lies_evenly_around_it(name, middle, steps):
    clients = [
        ([value + sign * step for value in middle], 1.0) for step in steps for sign in (1, -1)
    ] + [(middle, 1.0)]
    largest = weighted(clients).abs().max()
    torch.testing.assert_close(
        make(name)(*round_of(clients)), make("mean")(*round_of(clients)), **close_to(largest)
    )


@EVERY_ROBUST_ONE
@FEW
@given(
    honest=st.lists(
        st.tuples(st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0.5, 2)),
        min_size=2,
        max_size=7,
    ),
    bad=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    exponent=st.integers(0, 30),
    weight=st.floats(0.5, 2),
)
def test_one_of_three_or_more_moves_a_robust_one_by_a_bounded_amount(
    name, honest, bad, exponent, weight
):
    clients = [*honest, ([10.0**exponent * value for value in bad], weight)]
    direction = make(name)(*round_of(clients)).double()
    u = weighted(clients)[: len(honest)]
    if name == "clipped_mean":
        bound = (
            3 * u.norm(dim=1).max()
        )  # it lets no gradient through that is longer than thrice the median one
        assert direction.norm() <= bound * 1.001 + 1e-12
    else:
        assert (direction >= u.amin(dim=0) - 1e-5).all()
        assert (direction <= u.amax(dim=0) + 1e-5).all()


@FEW
@given(
    honest=st.lists(
        st.tuples(st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0.5, 2)),
        min_size=2,
        max_size=7,
    )
)
def test_one_moves_the_mean_as_far_as_it_likes(honest):
    lengths = [
        float(make("mean")(*round_of([*honest, ([factor] * 4, 1.0)])).norm())
        for factor in (1e3, 1e6, 1e9)
    ]
    assert lengths[1] / lengths[0] == pytest.approx(1000, rel=0.1)
    assert lengths[2] / lengths[1] == pytest.approx(1000, rel=0.1)


@EVERY_ROBUST_ONE
def test_three_of_ten_move_a_robust_one_no_further_than_the_seven_reach(name):
    method = (
        build("aggregation", Component(name=name, trim=0.3))
        if name == "trimmed_mean"
        else make(name)
    )
    honest = [([1.0, -1.0, 0.1 * index, 2.0], 1.0) for index in range(7)]
    direction = method(*round_of([*honest, *[([1e9, 1e9, -1e9, 1e9], 1.0)] * 3]))
    assert direction.norm() < 3 * weighted(honest).norm(dim=1).max()


@EVERY_AGGREGATION
@FEW
@given(clients=CLIENTS)
def test_it_is_pure(name, clients):
    method, (some, weights) = make(name), round_of(clients)
    before, values = [one.gradient.clone() for one in some], dict(weights.values)
    first = method(some, weights)
    kept = first.clone()
    second = method(some, weights)
    assert torch.equal(first, second)
    assert all(torch.equal(one.gradient, old) for one, old in zip(some, before, strict=True))
    assert weights.values == values
    second.add_(1.0)  # the direction is nobody else's memory
    assert torch.equal(first, kept)
    assert all(torch.equal(one.gradient, old) for one, old in zip(some, before, strict=True))


@EVERY_AGGREGATION
def test_it_is_a_frozen_dataclass_of_options_with_an_example(name):
    made_by = resolve("aggregation", name)
    assert dataclasses.is_dataclass(made_by)
    assert made_by.__dataclass_params__.frozen
    assert make(name) == make(name)
    assert ">>>" in made_by.__doc__
    assert "Args:" in made_by.__doc__ or not dataclasses.fields(made_by)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *(
            ("clipped_mean", "clip", value)
            for value in (0.0, -1.0, float("inf"), float("nan"), "much")
        ),
        *(("trimmed_mean", "trim", value) for value in (0.0, 0.5, -0.1, 1.0, float("nan"), "some")),
        *((name, "no_such_option", 1) for name in NAMES),
    ],
)
def test_options_out_of_range_are_refused_with_their_name(name, option, value):
    with pytest.raises(ConfigError, match=option):
        build("aggregation", Component(name=name, **{option: value}))
    if option != "no_such_option" and isinstance(value, float):
        with pytest.raises(ConfigError, match=option):
            resolve("aggregation", name)(**{option: value})
