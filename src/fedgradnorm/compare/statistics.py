"""Bootstrap intervals of differences over paired seeds, and the figures that are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, pstdev

import numpy as np
from scipy.stats import bootstrap, norm
from scipy.stats import t as student

CONFIDENCE = 0.95
FEWEST_PAIRS = 6
"""With fewer pairs no bootstrap interval can contain the true difference in 95 % of cases.

The widest interval goes from the least to the greatest difference. n differences around 0 all have
the same sign with probability 2 / 2^n: in 6 % of cases with five, in 3 % with six.
"""
RESAMPLES = 20_000
LAST_SHARE = 0.1
"""The end of a curve is the last tenth of its values, because single rounds are noisy."""


@dataclass(frozen=True)
class Interval:
    """A mean difference over pairs of runs with the same seed, with its 95 % interval.

    Attributes:
        mean: the mean of the differences, method less baseline.
        low: the interval's lower end; None with fewer pairs than `FEWEST_PAIRS`.
        high: its upper end, likewise.
        pairs: the number of pairs.
        below: in how many pairs the method has less than the baseline.
        above: in how many pairs it has more.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int
    below: int
    above: int

    @property
    def sign(self) -> int:
        """-1 or 1 if the whole interval is below or above 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def difference_of(method: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The paired difference of two methods over their common seeds, or None without one.

    The interval is a percentile bootstrap over the seeds, widened by `expanded_level`. A plain one
    of few numbers contains the true difference in clearly fewer than 95 % of cases. For skewed
    differences this remains so; only more seeds help.

    >>> difference_of({0: 7.0, 1: 9.0}, {0: 9.0, 1: 11.0}).mean
    -2.0
    """
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [method[seed] - baseline[seed] for seed in seeds]
    low, high = _bounds(differences)
    below, above = sum(value < 0 for value in differences), sum(value > 0 for value in differences)
    return Interval(fmean(differences), low, high, len(seeds), below, above)


def expanded_level(count: int) -> float:
    """The level at which a percentile bootstrap contains a normal mean in 95 % of cases.

    Each of the two tails is Φ(-√(n / (n - 1)) · t), where n is the count, and t the quantile of
    Student's distribution with n - 1 degrees of freedom.

    Source: Hesterberg, "What teachers should know about the bootstrap", The American Statistician
    69, 2015, section 4.3.

    >>> round(expanded_level(5), 4), round(expanded_level(1000), 3)
    (0.9981, 0.95)
    """
    tail = norm.cdf(-sqrt(count / (count - 1)) * student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return float(1 - 2 * tail)


def _bounds(differences: Sequence[float]) -> tuple[float | None, float | None]:
    if len(differences) < FEWEST_PAIRS:
        return None, None
    if len(set(differences)) == 1:
        return differences[0], differences[0]
    data, level = (np.array(differences),), expanded_level(len(differences))
    settings = {"n_resamples": RESAMPLES, "confidence_level": level}
    rng = np.random.default_rng(0)
    result = bootstrap(data, np.mean, method="percentile", rng=rng, **settings)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def delta_m(
    metrics: Mapping[str, float], single: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> float | None:
    """Δm in %: the mean relative gain of the tasks' metrics over those of single-task training.

    Δm = (100 / T) Σ_t s_t (M_t - S_t) / S_t, with s_t = 1 if more is better, and -1 if less is.
    None if a task is missing, or a reference is 0.

    Source: Maninis, Radosavovic and Kokkinos, "Attentive single-tasking of multiple tasks", CVPR
    2019, equation (5).

    >>> better = {"smile": True, "pose": False}
    >>> delta_m({"smile": 0.9, "pose": 0.1}, {"smile": 0.6, "pose": 0.2}, better)
    50.0
    """
    if not metrics or metrics.keys() != single.keys() or not all(single.values()):
        return None
    changes = [
        (metrics[task] - single[task]) / single[task] * (1 if higher_is_better[task] else -1)
        for task in metrics
    ]
    return 100 * fmean(changes)


def skill(metric: float, guess: float, *, higher_is_better: bool, percent: bool) -> float | None:
    """How far a metric is from a constant guess (0) to perfection (100), in %.

    Perfection is 1 for a share of which more is better, and 0 for an error. Otherwise it is
    unknown, and the skill is None.

    >>> skill(0.8, 0.6, higher_is_better=True, percent=True)
    50.0
    """
    perfect = 0.0 if not higher_is_better else 1.0 if percent else None
    if perfect is None or perfect == guess:
        return None
    return float(f"{100 * (metric - guess) / (perfect - guess):.10g}")


def spread(rates: Sequence[float]) -> float | None:
    """The standard deviation of inverse training rates over the tasks, divided by their mean.

    0 is balanced. None with fewer than two tasks, or a mean of 0.

    >>> spread([0.5, 0.5]), spread([0.2, 0.6])
    (0.0, 0.5)
    """
    if len(rates) < 2 or fmean(rates) == 0:
        return None
    return float(f"{pstdev(rates) / fmean(rates):.10g}")


def final_value(curve: Mapping[int, float]) -> float | None:
    """The mean of the last tenth of a curve's values (at least one), or None without values.

    >>> final_value({18: 9.0, 19: 2.0, 20: 4.0})
    4.0
    """
    values = [curve[round] for round in sorted(curve)]
    return fmean(values[-max(1, round(LAST_SHARE * len(values))) :]) if values else None
