"""The weightings that look at the updates: closed forms for two clients, brute force, optimality conditions, naive vector versions."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from fedgradnorm import ConfigError
from fedgradnorm.aggregation import Mean
from fedgradnorm.randomness import generator
from fedgradnorm.weighting import IMTLG, MGDA, CAGrad, Equal, FedHCA2, FedMGDAPlus, NashMTL, PCGrad
from fedgradnorm.weighting.nash_mtl import bargain
from fedgradnorm.weighting.updates import BLOCK, gram_matrix, least_norm, least_norm_near
from tests.helpers import report

RNG = np.random.default_rng(7)
EVERY = [MGDA(), CAGrad(), FedHCA2(), IMTLG(), NashMTL(max_norm=1e9), PCGrad(), FedMGDAPlus()]
GROUPS = [MGDA, CAGrad, FedHCA2, IMTLG, NashMTL, PCGrad, FedMGDAPlus]
SEEDS = pytest.mark.parametrize("seed", range(5))


def name_of(method):
    return type(method).__name__ if not isinstance(method, type) else method.__name__


def some_reports(gradients, tasks=None):
    gradients = np.asarray(gradients)
    return [
        report(
            f"c{index:03}",
            1.0,
            gradient=torch.tensor(gradient, dtype=torch.float64),
            task=tasks[index] if tasks else "",
        )
        for index, gradient in enumerate(gradients)
    ]


def direction(method, gradients, tasks=None):
    some = some_reports(gradients, tasks)
    weights, _ = method.update(method.init([one.client for one in some]), some)
    return Mean()(some, weights).numpy()


def conflicting(seed, count, length):
    """Random gradients, some of which conflict, of different lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, length)) * np.exp(rng.normal(size=(count, 1)))


def simplex_grid(steps):
    return (
        np.array(
            [
                (i, j, steps - i - j)
                for i, j in product(range(steps + 1), repeat=2)
                if i + j <= steps
            ]
        )
        / steps
    )


# the Gram matrix


def test_the_gram_matrix_over_several_blocks_is_that_of_the_whole():
    gradients = [
        torch.randn(BLOCK + 17, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    ]
    whole = torch.stack(gradients).double()
    np.testing.assert_allclose(gram_matrix(gradients), (whole @ whole.T).numpy(), rtol=1e-12)


def test_the_gram_matrix_of_single_precision_does_not_overflow():
    assert gram_matrix([torch.full((2,), 1e30)])[0, 0] == pytest.approx(2e60)


# mgda


@SEEDS
def test_mgda_of_two_clients_is_its_closed_form(seed):
    """min over t in [0, 1] of ‖t g_1 + (1 - t) g_2‖²: t = ⟨g_2 - g_1, g_2⟩ / ‖g_1 - g_2‖², cut to [0, 1]."""
    first, second = conflicting(seed, 2, 3)
    share = np.clip((second - first) @ second / ((first - second) ** 2).sum(), 0, 1)
    np.testing.assert_allclose(
        direction(MGDA(), [first, second]),
        share * first + (1 - share) * second,
        rtol=1e-9,
        atol=1e-9,
    )


@SEEDS
def test_mgda_of_three_clients_is_no_longer_than_any_point_of_a_grid(seed):
    gradients = conflicting(seed, 3, 4)
    lengths = np.linalg.norm(simplex_grid(200) @ gradients, axis=1)
    ours = np.linalg.norm(direction(MGDA(), gradients))
    assert ours <= lengths.min() + 1e-9
    assert ours >= lengths.min() - 0.02 * np.linalg.norm(gradients, axis=1).max()


@pytest.mark.parametrize(("count", "length"), [(10, 3), (30, 200), (120, 60)])
def test_mgda_lowers_every_loss_at_least_as_its_own_squared_length(count, length):
    """The optimality condition of the least norm: ⟨g_i, d⟩ ≥ ‖d‖² for all i."""
    gradients = conflicting(3, count, length) + 0.7
    d = direction(MGDA(), gradients)
    assert (gradients @ d).min() >= d @ d - 1e-9 * (gradients**2).sum(axis=1).max()


def test_mgda_where_the_gradients_cancel_is_0():
    assert np.abs(direction(MGDA(), [[1.0, 0.0], [-2.0, 0.0]])).max() < 1e-5


def test_clients_that_agree_share_evenly():
    weights = least_norm(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
    np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 1 / 3], rtol=1e-6)


# cagrad


@SEEDS
@pytest.mark.parametrize("c", [0.3, 0.9, 2.0])
def test_cagrad_serves_the_worst_served_best_of_all_directions_in_its_ball(seed, c):
    """Against a grid of directions in the plane: max of min_i ⟨g_i, d⟩ over ‖d - g_0‖ ≤ c ‖g_0‖."""
    gradients = conflicting(seed, 3, 2)
    mean = gradients.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    angles, radii = np.meshgrid(np.linspace(0, 2 * np.pi, 721), np.linspace(0, radius, 101))
    ball = mean + np.stack(
        [(radii * np.cos(angles)).ravel(), (radii * np.sin(angles)).ravel()], axis=1
    )
    best = (ball @ gradients.T).min(axis=1).max()
    d = direction(CAGrad(c=c), gradients)
    assert np.linalg.norm(d - mean) <= radius * (1 + 1e-9)
    largest = np.linalg.norm(gradients, axis=1).max()
    assert (gradients @ d).min() >= best - 1e-6 * largest * (1 + best) - (
        0 if best > 1e-3 else largest * radius
    )


@SEEDS
def test_cagrad_without_a_ball_is_the_mean_and_with_a_large_one_points_as_mgda(seed):
    gradients = conflicting(seed, 4, 6) + 0.5
    np.testing.assert_allclose(
        direction(CAGrad(c=0.0), gradients), gradients.mean(axis=0), rtol=1e-12
    )
    wide, least = direction(CAGrad(c=100.0), gradients), direction(MGDA(), gradients)
    assert wide @ least >= 0.999 * np.linalg.norm(wide) * np.linalg.norm(least)


def test_cagrad_where_the_gradients_cancel():
    """On a line, with g_0 = -1: of [-1.4, -0.6] the first client wants the most. With c > 1 that is 0, and the mean is taken instead."""
    opposite = [[1.0, 0.0], [-3.0, 0.0]]
    np.testing.assert_allclose(direction(CAGrad(c=0.4), opposite), [-0.6, 0.0], atol=1e-6)
    np.testing.assert_allclose(direction(CAGrad(c=2.0), opposite), [-1.0, 0.0], atol=1e-6)


# fedhca2


@SEEDS
@pytest.mark.parametrize(("c", "hyper_weight"), [(0.4, 1.0), (0.8, 0.3)])
def test_fedhca2_is_the_mean_plus_cagrad(seed, c, hyper_weight):
    gradients = conflicting(seed, 4, 5)
    expected = gradients.mean(axis=0) + hyper_weight * direction(CAGrad(c=c), gradients) / (
        1 + c**2
    )
    np.testing.assert_allclose(
        direction(FedHCA2(c=c, hyper_weight=hyper_weight), gradients),
        expected,
        rtol=1e-9,
        atol=1e-12,
    )


# imtl_g


@SEEDS
def test_imtl_g_of_two_clients_is_its_closed_form(seed):
    """The bisector: a_1 ‖g_1‖ = a_2 ‖g_2‖ and a_1 + a_2 = 1."""
    first, second = conflicting(seed, 2, 3)
    one, two = np.linalg.norm(first), np.linalg.norm(second)
    np.testing.assert_allclose(
        direction(IMTLG(), [first, second]), (two * first + one * second) / (one + two), rtol=1e-8
    )


@SEEDS
def test_imtl_g_has_equal_projections_onto_all_gradients(seed):
    gradients = np.abs(conflicting(seed, 4, 6))
    d = direction(IMTLG(), gradients)
    projections = gradients @ d / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-8)


def test_imtl_g_may_have_a_negative_weight_and_then_equal_ones():
    """The third gradient lies inside the angle of the other two, so it has to be walked away from. If it is short besides, Σ v < 0."""
    gradients = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.2]])
    some = some_reports(gradients)
    weights, state = IMTLG().update(IMTLG().init([]), some)
    assert weights.values["c002"] < 0
    assert min(state.weights.values()) > 0
    projections = gradients @ Mean()(some, weights).numpy() / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-8)
    assert projections[0] > 0
    gradients[2] *= 0.1
    np.testing.assert_allclose(direction(IMTLG(), gradients), gradients.mean(axis=0), rtol=1e-12)


# nash_mtl


@SEEDS
def test_nash_mtl_of_two_clients_is_its_closed_form(seed):
    """With κ the cosine: a_i = 1 / (‖g_i‖ √(1 + κ))."""
    first, second = conflicting(seed, 2, 3)
    one, two = np.linalg.norm(first), np.linalg.norm(second)
    cosine = first @ second / (one * two)
    expected = (first / one + second / two) / math.sqrt(1 + cosine)
    np.testing.assert_allclose(
        direction(NashMTL(max_norm=1e9), [first, second]), expected, rtol=1e-7
    )


@SEEDS
@pytest.mark.parametrize("count", [3, 20, 100])
def test_nash_mtl_solves_its_equation(seed, count):
    gradients = conflicting(seed, count, 150)
    gram = gradients @ gradients.T
    a = bargain(gram)
    assert a.min() > 0
    np.testing.assert_allclose(a * (gram @ a), 1.0, rtol=1e-6)


@SEEDS
def test_nash_mtl_has_the_largest_product_of_gains(seed):
    gradients = conflicting(seed, 3, 2) * 0.3 + [1.0, 0.5]
    angles = np.linspace(0, 2 * np.pi, 3601)
    gains = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ gradients.T
    best = gains[gains.min(axis=1) > 0].prod(axis=1).max()
    d = direction(NashMTL(), gradients)
    assert np.linalg.norm(d) == pytest.approx(1.0)
    assert (gradients @ d).prod() >= best * (1 - 1e-6)


def test_nash_mtl_does_not_see_the_scale_of_a_loss():
    gradients = conflicting(1, 4, 6)
    scaled = gradients * np.array([[100.0], [1.0], [0.01], [1.0]])
    np.testing.assert_allclose(
        direction(NashMTL(), scaled), direction(NashMTL(), gradients), rtol=1e-6
    )
    assert np.linalg.norm(direction(NashMTL(max_norm=0.25), gradients)) == pytest.approx(0.25)
    assert np.linalg.norm(direction(NashMTL(max_norm=9.0), gradients)) == pytest.approx(2.0)  # √4


# pcgrad


def surgery(gradients, orders):
    """The paper's algorithm on the vectors themselves."""
    total = np.zeros(gradients.shape[1])
    for own, order in enumerate(orders):
        projected = gradients[own].copy()
        for other in order:
            if other != own and projected @ gradients[other] < 0:
                projected -= (
                    projected
                    @ gradients[other]
                    / (gradients[other] @ gradients[other])
                    * gradients[other]
                )
        total += projected
    return total / len(gradients)


@SEEDS
@pytest.mark.parametrize("count", [2, 3, 12])
def test_pcgrad_is_the_surgery_on_the_vectors(seed, count):
    gradients = conflicting(seed, count, 5)
    orders = [generator(4, 1, str(index), "pcgrad").permutation(count) for index in range(count)]
    np.testing.assert_allclose(
        direction(PCGrad(seed=4), gradients), surgery(gradients, orders), rtol=1e-9, atol=1e-12
    )


def test_pcgrad_without_conflicts_is_the_mean():
    gradients = np.abs(conflicting(0, 5, 4))
    np.testing.assert_allclose(direction(PCGrad(), gradients), gradients.mean(axis=0), rtol=1e-12)


def test_pcgrad_draws_another_order_each_round_and_the_same_for_a_seed():
    some = some_reports(conflicting(3, 8, 3))
    method = PCGrad()
    first, state = method.update(method.init([]), some)
    second, state = method.update(state, some)
    assert state.memory == {"round": 2}
    assert second.values != first.values
    assert PCGrad(seed=1).update(method.init([]), some)[0].values != first.values
    assert method.update(method.init([]), some)[0] == first


# fedmgda_plus


def units(gradients):
    return gradients / np.linalg.norm(gradients, axis=1, keepdims=True)


@SEEDS
def test_fedmgda_plus_goes_from_the_mean_of_unit_gradients_to_mgda_on_them(seed):
    gradients = conflicting(seed, 4, 6)
    np.testing.assert_allclose(
        direction(FedMGDAPlus(epsilon=0.0), gradients), units(gradients).mean(axis=0), rtol=1e-9
    )
    np.testing.assert_allclose(
        direction(FedMGDAPlus(epsilon=1.0), gradients),
        direction(MGDA(), units(gradients)),
        rtol=1e-5,
        atol=1e-7,
    )


@SEEDS
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_fedmgda_plus_is_no_longer_than_any_point_of_a_grid_in_its_box(seed, epsilon):
    gradients = conflicting(seed, 3, 4)
    grid = simplex_grid(300)
    box = grid[(np.abs(grid - 1 / 3) <= epsilon).all(axis=1)]
    lengths = np.linalg.norm(box @ units(gradients), axis=1)
    ours = np.linalg.norm(direction(FedMGDAPlus(epsilon=epsilon), gradients))
    assert lengths.min() - 0.02 <= ours <= lengths.min() + 1e-9


@pytest.mark.parametrize(
    ("epsilon", "share"), [(0.0, 0.25), (0.1, 0.35), (0.25, 0.5), (0.5, 0.5), (1.0, 0.5)]
)
def test_fedmgda_plus_near_the_shares_of_examples(epsilon, share):
    """Of two unit gradients the least norm is at (1/2, 1/2); from (1/4, 3/4) it is gone towards by at most epsilon."""
    some = [report(client, 1.0, num_examples=count, gradient=torch.tensor(gradient, dtype=torch.float64))
            for client, count, gradient in (("a", 10, [2.0, 0.0]), ("b", 30, [0.0, 5.0]))]  # fmt: skip
    method = FedMGDAPlus(epsilon=epsilon, base="examples")
    weights, _ = method.update(method.init(["a", "b"]), some)
    np.testing.assert_allclose(Mean()(some, weights).numpy(), [share, 1 - share], rtol=1e-9)


def test_the_least_norm_near_many_clients_keeps_to_its_box_and_beats_random_points_in_it():
    gradients = units(conflicting(2, 80, 30) + 0.3)
    base, radius = np.full(80, 1 / 80), 0.01
    weights = least_norm_near(gradients @ gradients.T, base, radius)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.abs(weights - base).max() <= radius * (1 + 1e-9)
    slopes = gradients @ (weights @ gradients)
    free = (np.abs(weights - base) < radius * (1 - 1e-9)) & (weights > 1e-12)
    level = (
        slopes[free].mean()
    )  # stationary: the same slope wherever the box does not hold, and the right sign where it does
    np.testing.assert_allclose(slopes[free], level, atol=1e-6)
    assert slopes[weights >= base + radius * (1 - 1e-9)].max() <= level + 1e-6
    assert slopes[weights <= np.maximum(base - radius, 0) + 1e-12].min() >= level - 1e-6


def test_a_gradient_of_0_adds_nothing_to_fedmgda_plus():
    np.testing.assert_allclose(
        direction(FedMGDAPlus(epsilon=0.0), [[3.0, 0.0], [0.0, 0.0]]), [0.5, 0.0]
    )


# what they have in common


@pytest.mark.parametrize("method", EVERY, ids=name_of)
@SEEDS
def test_no_client_is_made_worse_where_a_direction_serves_all(method, seed):
    """With gradients inside one right angle each method's direction lowers every loss."""
    gradients = np.abs(conflicting(seed, 4, 6))
    assert (gradients @ direction(method, gradients)).min() > 0


@pytest.mark.parametrize("made_by", GROUPS, ids=name_of)
def test_clients_of_a_task_count_as_one_with_their_mean_gradient(made_by):
    gradients = conflicting(5, 5, 6)
    tasks = ["x", "y", "x", "z", "x"]
    means = np.stack([gradients[[0, 2, 4]].mean(axis=0), gradients[1], gradients[3]])
    assert made_by(group_by="task").group_by == "task"
    np.testing.assert_allclose(
        direction(made_by(group_by="task"), gradients, tasks),
        direction(made_by(), means),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("method", EVERY, ids=name_of)
def test_single_precision_gives_the_same_direction(method):
    gradients = np.abs(conflicting(4, 4, 1000)).astype(np.float32)
    some = [
        report(f"c{index}", 1.0, gradient=torch.tensor(gradient))
        for index, gradient in enumerate(gradients)
    ]
    weights, _ = method.update(method.init([]), some)
    np.testing.assert_allclose(
        Mean()(some, weights).numpy(),
        direction(method, gradients.astype(np.float64)),
        rtol=1e-3,
        atol=1e-5,
    )


def test_equal_weights_are_the_mean():
    gradients = conflicting(0, 3, 4)
    np.testing.assert_allclose(direction(Equal(), gradients), gradients.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {"group_by": "x"}) for method in GROUPS),
        (CAGrad, {"c": -0.1}),
        (FedHCA2, {"c": 101.0}),
        (FedHCA2, {"hyper_weight": 1.1}),
        (NashMTL, {"max_norm": 0.0}),
        (PCGrad, {"seed": -1}),
        (FedMGDAPlus, {"epsilon": 1.1}),
        (FedMGDAPlus, {"base": "x"}),
    ],
)
def test_an_option_out_of_range_is_named(method, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        method(**options)
