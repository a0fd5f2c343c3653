import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from fedgradnorm.compare.statistics import (
    FEWEST_PAIRS,
    delta_m,
    difference_of,
    expanded_level,
    final_value,
    skill,
    spread,
)


def by_seed(values):
    return dict(enumerate(values))


def test_a_constant_difference_is_certain_whatever_the_seeds_differ_by():
    found = difference_of(by_seed([10, 50, 20, 90, 30, 40]), by_seed([12, 52, 22, 92, 32, 42]))
    assert (found.mean, found.low, found.high, found.pairs, found.below, found.above) == (
        -2,
        -2,
        -2,
        6,
        6,
        0,
    )
    assert found.sign == -1


def test_only_seeds_that_both_have_are_paired():
    found = difference_of({0: 1.0, 1: 2.0, 7: 100.0}, {0: 3.0, 1: 5.0, 9: -100.0})
    assert (found.mean, found.pairs) == (-2.5, 2)
    assert difference_of({0: 1.0}, {1: 1.0}) is None


def test_fewer_pairs_than_can_hold_the_truth_give_no_interval():
    """All of n differences around 0 have one sign with probability 2 / 2^n, and no interval inside their range holds 0 then."""
    assert 2 / 2**FEWEST_PAIRS < 0.05 < 2 / 2 ** (FEWEST_PAIRS - 1)
    few = difference_of(by_seed([1, 2, 3, 4, 5]), by_seed([5, 7, 9, 8, 7]))
    assert (few.low, few.high, few.sign) == (None, None, 0)
    assert difference_of(by_seed([1, 2, 3, 4, 5, 6]), by_seed([5, 7, 9, 8, 7, 9])).low is not None


def test_the_interval_is_that_of_all_resamples_at_the_expanded_level():
    differences = [-9.0, -4.0, -6.0, 1.0, -7.0, -5.0]
    means = np.sort([np.mean(chosen) for chosen in itertools.product(differences, repeat=6)])
    tail = (1 - expanded_level(6)) / 2
    found = difference_of(by_seed(differences), by_seed([0.0] * 6))
    assert found.low == pytest.approx(np.quantile(means, tail), abs=0.4)
    assert found.high == pytest.approx(np.quantile(means, 1 - tail), abs=0.8)
    assert found.low < -7.5 < -2 < found.high


@pytest.mark.parametrize("pairs", [FEWEST_PAIRS, 8])
def test_intervals_hold_the_truth_about_as_often_as_they_say(pairs):
    """In 1,000 trials 95 % has a standard error of 0.7 points."""
    rng, zeros = np.random.default_rng(1), by_seed([0.0] * pairs)
    found = [difference_of(by_seed(rng.normal(size=pairs)), zeros) for _ in range(1000)]
    assert 0.93 <= np.mean([one.low <= 0 <= one.high for one in found]) <= 0.97


def test_the_expanded_level_gives_students_interval_to_the_normal_bootstrap():
    """The bootstrap of n numbers has the standard deviation s √((n - 1) / n) / √n; Student's interval is t s / √n."""
    for count in (6, 10, 30):
        from statistics import NormalDist

        z = NormalDist().inv_cdf((1 + expanded_level(count)) / 2)
        assert z * np.sqrt((count - 1) / count) == pytest.approx(t.ppf(0.975, count - 1))


@given(st.lists(st.integers(-50, 50), min_size=6, max_size=12), st.integers(-9, 9))
def test_the_interval_moves_with_the_differences_and_turns_with_their_sign(values, shift):
    zeros = by_seed([0.0] * len(values))
    found, moved = (
        difference_of(by_seed(values), zeros),
        difference_of(by_seed([value + shift for value in values]), zeros),
    )
    assert min(values) <= found.low <= found.mean <= found.high <= max(values)
    assert (moved.low, moved.high) == (
        pytest.approx(found.low + shift),
        pytest.approx(found.high + shift),
    )
    assert (found.below, found.above) == (sum(v < 0 for v in values), sum(v > 0 for v in values))


def test_delta_m_of_a_published_kind_of_table():
    """Segmentation IoU 60 -> 57 (less is worse), angle error 15 -> 18 (more is worse): -(5 + 20) / 2."""
    directions = {"segmentation": True, "normals": False}
    assert delta_m(
        {"segmentation": 57, "normals": 18}, {"segmentation": 60, "normals": 15}, directions
    ) == pytest.approx(-12.5)
    assert delta_m({"segmentation": 57}, {"segmentation": 60, "normals": 15}, directions) is None
    assert delta_m({"a": 1.0}, {"a": 0.0}, {"a": True}) is None


def test_skill_is_0_for_the_guess_and_100_for_perfection():
    assert skill(0.75, 0.5, higher_is_better=True, percent=True) == 50
    assert skill(0.1, 0.2, higher_is_better=False, percent=False) == 50
    assert skill(0.4, 0.5, higher_is_better=True, percent=True) == -20
    assert skill(7.0, 5.0, higher_is_better=True, percent=False) is None, (
        "nobody knows what is perfect"
    )


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.floats(0.1, 10))
def test_the_spread_knows_no_unit_and_no_order(rates, factor):
    assert spread([factor * rate for rate in reversed(rates)]) == pytest.approx(
        spread(rates), abs=1e-6
    )
    assert spread([rates[0]] * 3) == pytest.approx(0, abs=1e-6)


def test_the_end_is_the_last_tenth():
    curve = {round: float(round) for round in range(1, 41)}
    assert final_value(curve) == 38.5
    assert final_value({3: 5.0}) == 5.0
    assert final_value({}) is None
