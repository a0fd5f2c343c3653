r"""Study (g): do the weights converge exponentially? A federation whose fixed point is known. `python -m studies.convergence`.

Client i pulls the encoder's output ω, a vector, to points y of its own (a linear encoder on the constant input 1, no head)::

    F_i(ω) = (s_i / 2) mean_y ‖ω - y‖² = (s_i / 2) (x_i² + v_i)      x_i = ‖ω - ȳ_i‖,  v_i the variance of its points

so Σ p_i F_i is strongly convex in ω for every p. Where neither ω nor p moves any more,

    Σ p_i g_i = 0  with  g_i = s_i (ω - ȳ_i),  n_i = s_i x_i        and        p_i n_i = c · (F_i(ω) / F_i(0))^γ  for one c.

The second puts p into the first, and the scales s_i cancel: with u_i the unit vector from ȳ_i to ω,

    Σ_i ((x_i² + v_i) / (x_i(0)² + v_i))^γ u_i = 0,

which says that ω minimises Σ_i φ_i(‖ω - ȳ_i‖) with φ_i' = ((x² + v_i) / (x_i(0)² + v_i))^γ: each φ_i is convex and rises, so the sum is
convex, and ω* is its only minimiser (for points that are not on one line). p* follows from the second condition. With γ = 0 this is the
geometric median of the ȳ_i. Nothing here uses the weighting's code, so p* is an independent value to measure ‖p_k - p*‖ against.
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
"""The fit ends where the distance is so small a share of the first one: single precision ends not far below."""


@dataclass(frozen=True)
class Setting:
    """A way to train, and a name for it."""

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
    """The quadratics: scales s_i, shape ``(N,)``, and the clients' points, shape ``(N, examples, d)``."""

    scales: np.ndarray
    points: np.ndarray


def problem_of(seed: int, noise: float) -> Problem:
    """A random problem: scales between 0.3 and 3, centres around 0, and points around them with this standard deviation."""
    rng = np.random.default_rng([seed, 20])
    scales = 0.3 * 10 ** rng.uniform(size=CLIENTS)
    centres = rng.standard_normal((CLIENTS, 1, DIMENSION))
    return Problem(scales, centres + noise * rng.standard_normal((CLIENTS, EXAMPLES, DIMENSION)))


def fixed_point(problem: Problem, start: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """ω*, shape ``(d,)``, and p*, shape ``(N,)``, by the module's derivation.

    Args:
        problem: the quadratics.
        start: the encoder's output before the first round, shape ``(d,)``, which F_i(0) depends on.
        gamma: γ.

    Raises:
        RuntimeError: the solver did not get there.
    """
    centres = problem.points.mean(axis=1)
    variances = ((problem.points - centres[:, None]) ** 2).sum(axis=2).mean(axis=1)
    initial = ((start - centres) ** 2).sum(axis=1) + variances

    def rates(omega: np.ndarray) -> np.ndarray:
        found: np.ndarray = (((omega - centres) ** 2).sum(axis=1) + variances) / initial
        return found

    def slope(omega: np.ndarray) -> np.ndarray:
        away = omega - centres
        found: np.ndarray = (rates(omega) ** gamma / np.linalg.norm(away, axis=1)) @ away
        return found

    solution = root(slope, centres.mean(axis=0), tol=1e-13)
    if not solution.success:
        raise RuntimeError(f"no fixed point found to measure against: {solution.message}")
    omega = solution.x
    p = rates(omega) ** gamma / (problem.scales * np.linalg.norm(omega - centres, axis=1))
    return omega, p * len(p) / p.sum()


def federation_of(problem: Problem) -> Federation:
    """The quadratics as clients, each a task of its own."""

    def loss(outputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        return scale / 2 * ((outputs - targets) ** 2).sum(dim=1).mean()

    clients = [
        Client(
            f"c{index}",
            Task(f"task {index}", lambda _: nn.Identity(), partial(loss, scale=float(scale))),
            (torch.ones(EXAMPLES, 1), torch.from_numpy(points).float()),
        )
        for index, (scale, points) in enumerate(zip(problem.scales, problem.points, strict=True))
    ]
    return Federation(clients, lambda: nn.Linear(1, DIMENSION, bias=False))


def start_of(federation: Federation, seed: int) -> np.ndarray:
    """The encoder's output before the first round, shape ``(d,)``."""
    output: np.ndarray = (
        federation.make_encoder(seed)(torch.ones(1, 1)).detach().double().numpy()[0]
    )
    return output


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
    found: np.ndarray = np.linalg.norm(np.vstack([np.ones(CLIENTS), weights]) - optimum, axis=1)
    return found


@dataclass(frozen=True)
class Fit:
    """What a curve of distances shows.

    Attributes:
        rate: ρ of the fitted C ρ^k, per round.
        straight: R² of that fit in the logarithm: 1 is exponential.
        floor: where the distance ends, as a share of the first one: the median of the last tenth.
        rounds: how many rounds the approach took.
    """

    rate: float
    straight: float
    floor: float
    rounds: int


def fit_of(curve: np.ndarray) -> Fit:
    """Fit C ρ^k to the later half of the approach: of the rounds before the curve is near where it ends, or all but there."""
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
    """The rate of `exact` without noise near the fixed point: the spectral radius of the round's derivative there, by differences."""
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
class Found:
    """What was found for a setting: every seed's curve, and 95 % intervals over the seeds.

    Attributes:
        rate: of the fits; None where the curves do not go down to the fixed point, and a fit would say nothing.
        predicted: what the derivative says, the mean over the seeds; None but for `exact` without noise.
    """

    setting: Setting
    curves: np.ndarray
    fits: tuple[Fit, ...]
    floor: Interval
    rate: Interval | None
    predicted: float | None


def found_for(setting: Setting, seeds: Sequence[int], rounds: int) -> Found:
    """Train with every seed."""
    curves = np.array([distances(setting, seed, rounds) for seed in seeds])
    fits = tuple(fit_of(curve) for curve in curves)
    converges = all(fit.floor < ENOUGH for fit in fits)
    predicted = None
    if setting.method.solver == "exact" and not setting.noisy:
        problems = [problem_of(seed, NOISE) for seed in seeds]
        starts = [
            start_of(federation_of(problem), seed)
            for problem, seed in zip(problems, seeds, strict=True)
        ]
        predicted = fmean(
            predicted_rate(problem, start, setting.method)
            for problem, start in zip(problems, starts, strict=True)
        )
    rate = _interval([fit.rate for fit in fits]) if converges else None
    return Found(setting, curves, fits, _interval([fit.floor for fit in fits]), rate, predicted)


def _interval(values: Sequence[float]) -> Interval:
    """The mean over the seeds, with the bootstrap interval that `fedgradnorm compare` uses."""
    found = difference_of(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    assert found is not None  # noqa: S101  # there is a seed
    return found


def table_of(found: Sequence[Found]) -> str:
    """A Markdown table."""
    lines = [
        "| setting | distance at the end, share of the first | rate ρ per round | predicted | R² of the exponential |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in found:
        floor = (
            _text(one.floor, 100, "%.2g") + " %" if one.rate is None else f"< {100 * ENOUGH:g} %"
        )
        rate = "does not converge" if one.rate is None else _text(one.rate, 1, "%.3f")
        predicted = "–" if one.predicted is None else f"{one.predicted:.3f}"
        straight = "–" if one.rate is None else f"{fmean(fit.straight for fit in one.fits):.3f}"
        lines.append(f"| {one.setting.name} | {floor} | {rate} | {predicted} | {straight} |")
    return "\n".join(lines) + "\n"


def _text(found: Interval, factor: float, digits: str) -> str:
    text = digits % (factor * found.mean)
    if found.low is None or found.high is None:
        return text
    return f"{text} ({digits % (factor * found.low)} to {digits % (factor * found.high)})"


def chart_of(found: Sequence[Found]) -> Figure:
    """The median over the seeds of ‖p_k - p*‖ as a share of the first distance, on a logarithmic axis."""
    there = [one.setting.name for one in found if one.rate is not None]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(
        f"{' and '.join(there) if there else 'None'}: to p* at an exponential rate; the others stop short of it",
        fontsize=11,
    )
    axes.set_xlabel("round k")
    axes.set_ylabel("‖p_k − p*‖, share of the first (median)")
    axes.set_yscale("log")
    axes.set_ylim(1e-6, 1.5)
    axes.grid(axis="y", color="#e6e8eb")
    for at, one in enumerate(found):
        look = looks_for([f"fedgradnorm {one.setting.method.solver}"])[0]
        dash = DASHES[2 if one.setting.noisy else at % 2]
        axes.plot(
            np.median(one.curves / one.curves[:, :1], axis=0),
            color=look.colour,
            linestyle=(0, dash) if dash else "-",
            label=one.setting.name,
        )
    figure.legend(loc="outside right center", frameon=False)
    return figure


def main() -> None:
    """Train, and write results.md, results.json and chart.svg."""
    parser = argparse.ArgumentParser(
        description="Do the weights converge exponentially? A federation whose fixed point is known."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies/convergence"))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--full", action="store_true", help="40 seeds and 2,000 rounds")
    asked = parser.parse_args()
    seeds, rounds = (40, 2000) if asked.full else (asked.seeds, asked.rounds)
    torch.set_num_threads(1)
    found = [found_for(setting, range(seeds), rounds) for setting in SETTINGS]
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.md").write_text(table_of(found), encoding="utf-8")
    save_svg(chart_of(found), asked.out / "chart.svg")
    curves = [
        {"setting": one.setting.name, "distances": one.curves.tolist(), "predicted": one.predicted}
        for one in found
    ]
    (asked.out / "results.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    print(table_of(found))


if __name__ == "__main__":
    main()
