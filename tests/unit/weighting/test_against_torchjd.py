"""The directions of TorchJD's aggregators, where it has the same method: a second implementation, with other solvers."""

from functools import partial

import numpy as np
import pytest
import torch

from fedgradnorm.aggregation import Mean
from fedgradnorm.randomness import generator
from fedgradnorm.weighting import IMTLG, MGDA, CAGrad, NashMTL, PCGrad
from tests.helpers import report

peers = pytest.importorskip(
    "torchjd.aggregation", reason="needs torchjd: pip install 'fedgradnorm[dev]'"
)

SHAPES = pytest.mark.parametrize(
    ("count", "length", "seed"),
    [(2, 3, 0), (2, 50, 1), (3, 10, 2), (4, 40, 3), (6, 100, 4), (8, 1000, 5)],
)


def gradients_of(count, length, seed):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=length) * 0.7
    return torch.tensor(
        (rng.normal(size=(count, length)) + common) * np.exp(0.5 * rng.normal(size=(count, 1)))
    )


def ours(method, gradients):
    some = [report(f"c{index}", 1.0, gradient=gradient) for index, gradient in enumerate(gradients)]
    weights, _ = method.update(method.init([one.client for one in some]), some)
    return Mean()(some, weights)


def check(found, expected):
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("count", "length", "seed"), [(2, 3, 0), (2, 50, 1), (3, 10, 2), (6, 100, 4)]
)
def test_mgda(count, length, seed):
    gradients = gradients_of(count, length, seed)
    check(ours(MGDA(), gradients), peers.MGDA(epsilon=1e-14, max_iters=20_000)(gradients))


@SHAPES
def test_mgda_is_as_near_as_the_peers_excess_length_says(count, length, seed):
    """Its Frank-Wolfe steps zigzag on a face. ‖theirs - d‖² ≤ ‖theirs‖² - ‖d‖² holds where d is the shortest, and only there for all."""
    gradients = gradients_of(count, length, seed)
    mine, theirs = ours(MGDA(), gradients), peers.MGDA(epsilon=1e-6, max_iters=300)(gradients)
    excess = theirs @ theirs - mine @ mine
    assert (theirs - mine) @ (theirs - mine) <= excess + 1e-12 * (theirs @ theirs)


@SHAPES
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")  # than asked for below
@pytest.mark.parametrize("c", [0.4, 1.5])
def test_cagrad(count, length, seed, c, monkeypatch):
    cvxpy = pytest.importorskip("cvxpy", reason="needs torchjd[cagrad]")
    solve = (
        cvxpy.Problem.solve
    )  # by default it stops at 1e-8 of the objective, which is 1e-4 of the direction
    exactly = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
    monkeypatch.setattr(
        cvxpy.Problem, "solve", lambda problem, solver: solve(problem, solver, **exactly)
    )
    gradients = gradients_of(count, length, seed)
    check(ours(CAGrad(c=c), gradients), peers.CAGrad(c=c, norm_eps=0.0)(gradients))


@SHAPES
def test_imtl_g(count, length, seed):
    gradients = gradients_of(count, length, seed)
    check(ours(IMTLG(), gradients), peers.IMTLG()(gradients))


@SHAPES
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_nash_mtl(count, length, seed, max_norm):
    pytest.importorskip("ecos", reason="needs torchjd[nash_mtl]")
    gradients = gradients_of(count, length, seed)
    check(
        ours(NashMTL(max_norm=max_norm), gradients),
        peers.NashMTL(count, max_norm=max_norm, optim_niter=200)(gradients),
    )


@SHAPES
def test_pcgrad_in_the_same_order(count, length, seed, monkeypatch):
    """It sums where ours takes the mean."""
    gradients = gradients_of(count, length, seed) - 0.5
    orders = iter(
        [generator(3, 1, str(index), "pcgrad").permutation(count) for index in range(count)]
    )
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(next(orders)))
    check(ours(PCGrad(seed=3), gradients), peers.PCGrad()(gradients) / count)


def test_pcgrad_draws_its_orders_evenly():
    """The means of both over many draws agree to within what chance allows: a bound of four standard errors."""
    gradients = gradients_of(4, 6, 8) - 1.0
    torch.manual_seed(0)
    draw = partial(peers.PCGrad(), gradients)
    theirs = torch.stack([draw() / 4 for _ in range(1500)])
    mine = torch.stack([ours(PCGrad(seed=seed), gradients) for seed in range(1500)])
    error = ((theirs.var(dim=0) + mine.var(dim=0)) / 1500).sqrt()
    assert ((theirs.mean(dim=0) - mine.mean(dim=0)).abs() <= 4 * error + 1e-9).all()
