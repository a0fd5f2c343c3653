r"""Study (g): do the weights converge exponentially? `python -m studies.convergence`.

The federation has a known fixed point. Client i pulls the encoder's output ω, a vector, to its
points y (a linear encoder on the constant input 1, no head)::

    F_i(ω) = (s_i / 2) mean_y ‖ω - y‖² = (s_i / 2) (x_i² + v_i),

with x_i = ‖ω - ȳ_i‖ and v_i the variance of its points,
so Σ p_i F_i is strongly convex in ω for every p. At a fixed point of ω and p,

    Σ p_i g_i = 0  with  g_i = s_i (ω - ȳ_i),  n_i = s_i x_i,
    p_i n_i = c · (F_i(ω) / F_i(0))^γ  for one c.

The second determines p. In the first, the scales s_i then cancel: with u_i the unit vector from ȳ_i
to ω,

    Σ_i ((x_i² + v_i) / (x_i(0)² + v_i))^γ u_i = 0,

so ω minimises Σ_i φ_i(‖ω - ȳ_i‖) with φ_i' = ((x² + v_i) / (x_i(0)² + v_i))^γ. Each φ_i is convex
and rises, so the sum is convex, and ω* is its only minimiser (for points that are not on one line).
p* follows from the second condition. With γ = 0, ω* is the geometric median of the ȳ_i. Nothing
here uses the weighting's code, so p* is an independent reference for ‖p_k - p*‖.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import root
from torch import Tensor, nn

from fedgradnorm import Client, Federation, FedGradNorm, Task, train
from fedgradnorm.compare.figure import save_svg
from fedgradnorm.compare.statistics import Interval, difference_of
from fedgradnorm.report.looks import DASHES, looks_for

CLIENTS, DIMENSION, EXAMPLES = 5, 6, 64
ENCODER_LR = 0.2
ROUNDS = 300
BATCH = 8
SEEDS = 10
NOISE = 0.5
ENOUGH = 1e-4
"""The fit ends at this share of the first distance: single precision ends not far below."""


@dataclass(frozen=True)
class Setting:
    """A way to train and its name. If it is noisy, steps are taken on mini-batches."""

    name: str
    method: FedGradNorm
    noisy: bool


SETTINGS = (
    Setting("exact, ρ = 0.5", FedGradNorm(solver="exact"), noisy=False),
    Setting("exact, ρ = 0.1", FedGradNorm(solver="exact", damping=0.1), noisy=False),
    Setting("step, α = 0.1", FedGradNorm(solver="step"), noisy=False),
    Setting("step, α = 0.01", FedGradNorm(solver="step", weight_lr=0.01), noisy=False),
    Setting("exact, ρ = 0.5, mini-batches", FedGradNorm(solver="exact"), noisy=True),
    Setting("step, α = 0.1, mini-batches", FedGradNorm(solver="step"), noisy=True),
)


@dataclass(frozen=True)
class Problem:
    """The quadratics.

    Attributes:
        scales: s_i, shape ``(N,)``.
        points: the clients' points, shape ``(N, examples, d)``.
    """

    scales: np.ndarray
    points: np.ndarray


def problem_of(seed: int, noise: float) -> Problem:
    """A random problem: scales between 0.3 and 3, and centres around 0.

    ``noise`` is the standard deviation of the points around their centres.
    """
    rng = np.random.default_rng([seed, 20])
    scales = 0.3 * 10 ** rng.uniform(size=CLIENTS)
    centres = rng.standard_normal((CLIENTS, 1, DIMENSION))
    return Problem(scales, centres + noise * rng.standard_normal((CLIENTS, EXAMPLES, DIMENSION)))


def fixed_point(problem: Problem, start: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """ω*, shape ``(d,)``, and p*, shape ``(N,)``, by the module's derivation.

    Args:
        problem: the quadratics.
        start: the encoder's output before the first round, shape ``(d,)``. F_i(0) depends on it.
        gamma: γ.

    Raises:
        RuntimeError: the solver did not converge.
    """
    centres = problem.points.mean(axis=1)
    variances = ((problem.points - centres[:, None]) ** 2).sum(axis=2).mean(axis=1)
    initial = ((start - centres) ** 2).sum(axis=1) + variances

    def rates(omega: np.ndarray) -> np.ndarray:
        ratios: np.ndarray = (((omega - centres) ** 2).sum(axis=1) + variances) / initial
        return ratios

    def slope(omega: np.ndarray) -> np.ndarray:
        away = omega - centres
        gradient: np.ndarray = (rates(omega) ** gamma / np.linalg.norm(away, axis=1)) @ away
        return gradient

    solution = root(slope, centres.mean(axis=0), tol=1e-13)
    if not solution.success:
        raise RuntimeError(f"no fixed point found to measure against: {solution.message}")
    omega = solution.x
    p = rates(omega) ** gamma / (problem.scales * np.linalg.norm(omega - centres, axis=1))
    return omega, p * len(p) / p.sum()


def federation_of(problem: Problem) -> Federation:
    """The quadratics as clients, each with another task."""

    def loss(outputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        return scale / 2 * ((outputs - targets) ** 2).sum(dim=1).mean()

    clients = []
    for index, (scale, points) in enumerate(zip(problem.scales, problem.points, strict=True)):
        scaled = partial(loss, scale=float(scale))
        data = (torch.ones(EXAMPLES, 1), torch.from_numpy(points).float())
        task = Task(f"task {index}", lambda _: nn.Identity(), scaled)
        clients.append(Client(f"c{index}", task, data))
    return Federation(clients, lambda: nn.Linear(1, DIMENSION, bias=False))


def start_of(federation: Federation, seed: int) -> np.ndarray:
    """The encoder's output before the first round, shape ``(d,)``."""
    outputs = federation.make_encoder(seed)(torch.ones(1, 1))
    start: np.ndarray = outputs.detach().double().numpy()[0]
    return start


def distances(setting: Setting, seed: int, rounds: int = ROUNDS) -> np.ndarray:
    """‖p_k - p*‖ for k = 0 ... rounds."""
    problem = problem_of(seed, NOISE)
    federation = federation_of(problem)
    _, optimum = fixed_point(problem, start_of(federation, seed), setting.method.gamma)
    rows = train(
        federation,
        setting.method,
        num_rounds=rounds,
        head_steps=1,
        encoder_steps=1,
        encoder_lr=ENCODER_LR,
        batch_size=BATCH if setting.noisy else EXAMPLES,
        seed=seed,
        engine="reference",
    ).rows
    weights = np.array([row["weight"] for row in rows]).reshape(rounds, CLIENTS)
    weights = np.vstack([np.ones(CLIENTS), weights])
    away: np.ndarray = np.linalg.norm(weights - optimum, axis=1)
    return away


@dataclass(frozen=True)
class Fit:
    """The exponential fit of a curve of distances.

    Attributes:
        rate: ρ of the fitted C ρ^k, per round.
        straight: R² of that fit in the logarithm. 1 is exponential.
        floor: the final distance as a share of the first one: the median of the last tenth.
        rounds: the number of rounds of the approach.
    """

    rate: float
    straight: float
    floor: float
    rounds: int


def fit_of(curve: np.ndarray) -> Fit:
    """Fit C ρ^k to the later half of the approach: the rounds before the curve is near its end."""
    floor = float(np.median(curve[-max(1, len(curve) // 10) :]))
    near = curve <= max(ENOUGH * curve[0], 3 * floor)
    rounds = max(6, int(np.argmax(near)) if near.any() else len(curve))
    k = np.arange(rounds // 2, min(rounds, len(curve)))
    logarithms = np.log(curve[k])
    slope, intercept = np.polyfit(k, logarithms, 1)
    variance = float(((logarithms - logarithms.mean()) ** 2).sum())
    left = float(((logarithms - slope * k - intercept) ** 2).sum())
    return Fit(
        float(np.exp(slope)),
        1 - left / variance if variance > 0 else 0.0,
        floor / float(curve[0]),
        rounds,
    )


def predicted_rate(problem: Problem, start: np.ndarray, method: FedGradNorm) -> float:
    """The rate of `exact` without noise near the fixed point.

    It is the spectral radius of the round's derivative there, by differences.
    """
    centres = problem.points.mean(axis=1)
    variances = ((problem.points - centres[:, None]) ** 2).sum(axis=2).mean(axis=1)
    initial = ((start - centres) ** 2).sum(axis=1) + variances

    def one_round(both: np.ndarray) -> np.ndarray:
        omega, p = both[:DIMENSION], both[DIMENSION:]
        away = omega - centres
        target = (((away**2).sum(axis=1) + variances) / initial) ** method.gamma / (
            problem.scales * np.linalg.norm(away, axis=1)
        )
        p = (1 - method.damping) * p + method.damping * target * len(p) / target.sum()
        return np.concatenate([omega - ENCODER_LR * (p * problem.scales) @ away / len(p), p])

    point, size = np.concatenate(fixed_point(problem, start, method.gamma)), 1e-6
    columns = [
        (one_round(point + size * unit) - one_round(point - size * unit)) / (2 * size)
        for unit in np.eye(len(point))
    ]
    return float(np.abs(np.linalg.eigvals(np.array(columns))).max())


@dataclass(frozen=True)
class Outcome:
    """The curves of a setting by seed, and 95 % intervals over the seeds.

    Attributes:
        rate: of the fits; None if the curves do not reach the fixed point.
        predicted: `predicted_rate`, the mean over the seeds; None except for `exact` without noise.
    """

    setting: Setting
    curves: np.ndarray
    fits: tuple[Fit, ...]
    floor: Interval
    rate: Interval | None
    predicted: float | None


def outcome_of(setting: Setting, seeds: Sequence[int], rounds: int) -> Outcome:
    """Train with every seed."""
    curves = np.array([distances(setting, seed, rounds) for seed in seeds])
    fits = tuple(fit_of(curve) for curve in curves)
    converges = all(fit.floor < ENOUGH for fit in fits)
    predicted = None
    if setting.method.solver == "exact" and not setting.noisy:
        problems = {seed: problem_of(seed, NOISE) for seed in seeds}
        predicted = fmean(
            predicted_rate(problem, start_of(federation_of(problem), seed), setting.method)
            for seed, problem in problems.items()
        )
    rate = _interval([fit.rate for fit in fits]) if converges else None
    return Outcome(setting, curves, fits, _interval([fit.floor for fit in fits]), rate, predicted)


def _interval(values: Sequence[float]) -> Interval:
    """The mean over the seeds, with the bootstrap interval that `fedgradnorm compare` uses."""
    interval = difference_of(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    assert interval is not None  # noqa: S101  # there is a seed
    return interval


def table_of(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table."""
    lines = [
        "| setting | distance at the end, share of the first | rate ρ per round | predicted "
        "| R² of the exponential |",
        "| --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        floor, rate, straight = f"< {100 * ENOUGH:g} %", "does not converge", "–"
        if outcome.rate is None:
            floor = f"{_text(outcome.floor, 100, '%.2g')} %"
        else:
            rate = _text(outcome.rate, 1, "%.3f")
            straight = f"{fmean(fit.straight for fit in outcome.fits):.3f}"
        predicted = "–" if outcome.predicted is None else f"{outcome.predicted:.3f}"
        lines.append(f"| {outcome.setting.name} | {floor} | {rate} | {predicted} | {straight} |")
    return "\n".join(lines) + "\n"


def _text(interval: Interval, factor: float, digits: str) -> str:
    text = digits % (factor * interval.mean)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({digits % (factor * interval.low)} to {digits % (factor * interval.high)})"


def chart_of(outcomes: Sequence[Outcome]) -> Figure:
    """The median over the seeds of ‖p_k - p*‖, as a share of the first, on a logarithmic axis."""
    converging = [outcome.setting.name for outcome in outcomes if outcome.rate is not None]
    names = " and ".join(converging) or "None"
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(
        f"{names}: to p* at an exponential rate; the others stop short of it", fontsize=11
    )
    axes.set_xlabel("round k")
    axes.set_ylabel("‖p_k − p*‖, share of the first (median)")
    axes.set_yscale("log")
    axes.set_ylim(1e-6, 1.5)
    axes.grid(axis="y", color="#e6e8eb")
    for at, outcome in enumerate(outcomes):
        look = looks_for([f"fedgradnorm {outcome.setting.method.solver}"])[0]
        dash = DASHES[2 if outcome.setting.noisy else at % 2]
        axes.plot(
            np.median(outcome.curves / outcome.curves[:, :1], axis=0),
            color=look.colour,
            linestyle=(0, dash) if dash else "-",
            label=outcome.setting.name,
        )
    figure.legend(loc="outside right center", frameon=False)
    return figure


def main() -> None:
    """Train, and write results.md, results.json and chart.svg."""
    question = "Do the weights converge exponentially? The federation has a known fixed point."
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/convergence"))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="the number of seeds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--full", action="store_true", help="40 seeds and 2,000 rounds")
    given = parser.parse_args()
    seeds, rounds = (40, 2000) if given.full else (given.seeds, given.rounds)
    torch.set_num_threads(1)
    outcomes = [outcome_of(setting, range(seeds), rounds) for setting in SETTINGS]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.md").write_text(table_of(outcomes), encoding="utf-8")
    save_svg(chart_of(outcomes), given.out / "chart.svg")
    curves = [
        {
            "setting": outcome.setting.name,
            "distances": outcome.curves.tolist(),
            "predicted": outcome.predicted,
        }
        for outcome in outcomes
    ]
    (given.out / "results.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(table_of(outcomes))


if __name__ == "__main__":
    main()
