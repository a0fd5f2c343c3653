"""The fixed point that the convergence study measures against, by other ways than the study's own."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fedgradnorm.compare.figure import save_svg
from studies.convergence import (
    DIMENSION,
    NOISE,
    SETTINGS,
    Problem,
    chart_of,
    distances,
    federation_of,
    fit_of,
    fixed_point,
    outcome_of,
    predicted_rate,
    problem_of,
    start_of,
    table_of,
)

EXACT, STEP = SETTINGS[0], SETTINGS[2]


def test_without_gamma_it_is_the_geometric_median_of_the_centres_found_by_weiszfelds_iteration():
    problem = problem_of(3, NOISE)
    centres = problem.points.mean(axis=1)
    omega = centres.mean(axis=0)
    for _ in range(5000):
        near = 1 / np.linalg.norm(omega - centres, axis=1)
        omega = near @ centres / near.sum()
    found, p = fixed_point(problem, np.zeros(DIMENSION), gamma=0.0)
    np.testing.assert_allclose(found, omega, atol=1e-9)
    near = 1 / (problem.scales * np.linalg.norm(omega - centres, axis=1))
    np.testing.assert_allclose(p, near * len(near) / near.sum(), rtol=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 2.0])
def test_single_points_give_the_minimiser_of_weighted_powers_of_the_distance(gamma):
    problem = problem_of(1, 0.0)
    centres, start = problem.points[:, 0], np.full(DIMENSION, 0.3)
    weights = np.linalg.norm(start - centres, axis=1) ** (-2 * gamma)
    powers = minimize(
        lambda omega: weights @ np.linalg.norm(omega - centres, axis=1) ** (1 + 2 * gamma),
        start,
        tol=1e-14,
    )
    np.testing.assert_allclose(fixed_point(problem, start, gamma)[0], powers.x, atol=1e-5)


def test_both_conditions_of_the_fixed_point_hold():
    problem, start, gamma = problem_of(2, NOISE), np.ones(DIMENSION), 0.9
    omega, p = fixed_point(problem, start, gamma)
    centres = problem.points.mean(axis=1)
    gradients = problem.scales[:, None] * (omega - centres)
    np.testing.assert_allclose(p @ gradients, 0, atol=1e-9)
    losses, initial = (
        ((at - problem.points) ** 2).sum(axis=2).mean(axis=1) for at in (omega, start)
    )
    ratios = p * np.linalg.norm(gradients, axis=1) / (losses / initial) ** gamma
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-8)
    assert p.sum() == pytest.approx(len(p))


def test_a_fixed_point_that_was_not_found_is_an_error():
    problem = problem_of(0, NOISE)
    lost = Problem(problem.scales, np.full_like(problem.points, np.nan))
    with pytest.raises(RuntimeError, match="no fixed point found to measure against"):
        fixed_point(lost, np.zeros(DIMENSION), gamma=0.9)


def test_three_centres_at_the_same_distances_have_weights_of_one_over_the_scales():
    corners = np.zeros((3, 1, DIMENSION))
    corners[[0, 1, 2], 0, [0, 1, 2]] = 1.0
    _, p = fixed_point(Problem(np.array([1.0, 2.0, 4.0]), corners), np.zeros(DIMENSION), gamma=0.9)
    np.testing.assert_allclose(p, np.array([12, 6, 3]) / 7, rtol=1e-8)


def test_exact_goes_to_it_at_the_predicted_rate_and_step_stops_short():
    problem = problem_of(0, NOISE)
    exact, step = distances(EXACT, 0, rounds=150), distances(STEP, 0, rounds=150)
    assert exact[-1] < 1e-5
    assert step[-15:].min() > 0.01
    predicted = predicted_rate(problem, start_of(federation_of(problem), 0), EXACT.method)
    assert fit_of(exact).rate == pytest.approx(predicted, abs=0.03)


def test_a_fit_gives_back_the_rate_of_an_exponential():
    fit = fit_of(3 * 0.9 ** np.arange(200))
    assert (fit.rate, fit.straight) == pytest.approx((0.9, 1.0))
    assert fit.floor < 1e-8


def test_the_table_and_the_chart_say_what_was_found(tmp_path):
    found = [outcome_of(setting, range(1), 100) for setting in (EXACT, STEP)]
    assert found[0].rate is not None
    assert found[1].rate is None
    table, chart = table_of(found), chart_of(found)
    assert "does not converge" in table.splitlines()[3]
    (axes,) = chart.axes
    assert [line.get_label() for line in axes.lines] == [EXACT.name, STEP.name]
    assert (
        axes.get_title()
        == f"{EXACT.name}: to p* at an exponential rate; the others stop short of it"
    )
    save_svg(chart, tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()
