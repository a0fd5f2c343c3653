"""FedGradNorm: weights with which the weighted gradient norms follow the training rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedgradnorm.weighting.base import Reports, Update, Weighting, WeightingState, Weights
from fedgradnorm.weighting.combination import start
from fedgradnorm.weighting.losses import has_a_rate

if TYPE_CHECKING:
    from fedgradnorm.messages import Report

ROUNDING = 1e-12
"""Gaps below this share of the mean are rounding, and move nothing: their sign is noise."""


@dataclass(frozen=True)
class FedGradNorm(Weighting):
    r"""Weighted gradient norms follow how much the tasks still have to learn.

    Source: Mortaheb, Vahapoglu, Ulukus, SPAWC 2022.

    It is GradNorm (Chen et al., ICML 2018) at the server. With n_i the gradient norm of client i
    over the norm layer, F̃_i its inverse training rate and S the participants::

        G_i = p_i n_i     Ḡ = mean over S of G_i     r_i = F̃_i / mean over S of F̃_j
        target_i = Ḡ r_i^γ

        F_grad(p) = Σ_{i∈S} |p_i n_i - target_i|,   the targets held constant

    The solver ``"step"`` takes ``weight_steps`` subgradient steps,
    p_i ← p_i - α_p sign(G_i - target_i) n_i. The solver ``"exact"`` goes to the minimiser
    p* ∝ r^γ / n that those steps approach: p ← (1 - ρ) p + ρ p*. Either way p is then raised to at
    least ``min_weight``, and the participants are rescaled to the sum that they had, so that all
    weights sum to N.

    A client keeps its weight in a round in which n_i = 0. With γ > 0 it also does if it has no
    training rate: F_i(0) is not above the task's floor, or F_i is below it. S is then all other
    participants (ours). With ``group_by="task"`` the means n and F̃ of a task are over those of its
    clients that have both.

    Args:
        gamma: γ ≥ 0, the strength of the restoring force: 0 only equalises the norms, a larger one
            pushes slow tasks harder.
        solver: ``"step"`` or ``"exact"``.
        weight_lr: α_p > 0, the step size of ``"step"``.
        weight_steps: D ≥ 1, its steps per round.
        damping: ρ in (0, 1], the share of the way that ``"exact"`` goes.
        min_weight: p_min in [1e-12, 1).
        normalize: ``"sum"`` leaves the aggregated direction as the weights make it. ``"norm"``
            scales it by the mean of n_i over its p-weighted mean, which is Σ n_i / Σ p_i n_i when
            all take part: its length stays comparable to that of equal weights.
        group_by: ``"client"`` for a weight per client; ``"task"`` pools n and F̃ over the clients of
            a task (their means), and gives these clients one weight. A client's task is known from
            its first report on.

    >>> import torch
    >>> from fedgradnorm.messages import Report
    >>> def report(client, grad_norm):
    ...     return Report(client, "task", torch.zeros(1), 1.0, 1.0, grad_norm, num_examples=9)
    >>> method = FedGradNorm(solver="exact", damping=1.0)
    >>> weights, _ = method.update(method.init(["a", "b"]), [report("a", 1.0), report("b", 3.0)])
    >>> weights.values
    {'a': 1.5, 'b': 0.5}
    """

    reads_gradients: ClassVar[bool] = False

    gamma: Annotated[float, Field(ge=0, le=10)] = 0.9
    solver: Literal["step", "exact"] = "step"
    weight_lr: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    weight_steps: Annotated[int, Field(ge=1)] = 1
    damping: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_weight: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-3
    normalize: Literal["sum", "norm"] = "sum"
    group_by: Literal["client", "task"] = "client"

    @property
    def needs_positive_losses(self) -> bool:
        """Whether training rates count."""
        return self.gamma > 0

    def init(self, client_ids: Sequence[str]) -> WeightingState:
        """Weight 1 for every client, and no group yet."""
        return start(client_ids, groups={})

    def update(self, state: WeightingState, reports: Reports) -> Update:
        """Move the participants' weights towards balance. The others keep theirs."""
        weighed = [report for report in reports if self._can_be_weighed(report)]
        weights = {**{report.client: 1.0 for report in reports}, **state.weights}
        groups = {**state.memory["groups"]}
        groups |= {report.client: self._group(report) for report in reports}
        targets: dict[str, float] = {}
        if weighed:
            moved, targets = self._moved(weights, weighed, groups)
            weights |= moved
        values = {report.client: weights[report.client] for report in reports}
        after = WeightingState(weights, {"groups": groups})
        return Weights(values, targets, self._scale(values, reports)), after

    def _moved(
        self, weights: Mapping[str, float], reports: Reports, groups: Mapping[str, str]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The next weights of the clients in the reporting groups, and the reports' targets.

        The reports have a norm and a rate. All clients of a group move, reporting or not.
        """
        reporting_groups = dict.fromkeys(self._group(report) for report in reports)
        number = {group: index for index, group in enumerate(reporting_groups)}
        members = [client for client, group in groups.items() if group in number]
        reporting = np.array([number[groups[report.client]] for report in reports])
        group_of = np.array([number[groups[client]] for client in members])
        counts = np.bincount(group_of)
        p = _means(group_of, [weights[client] for client in members])
        n = _means(reporting, [report.grad_norm for report in reports])
        rates = [report.inverse_training_rate if self.gamma > 0 else 1.0 for report in reports]
        mean_rates = _means(reporting, rates)

        mean = mean_rates.mean()
        relative_rates = mean_rates / mean if mean > 0 else np.ones_like(mean_rates)
        targets = (p * n).mean() * relative_rates**self.gamma
        if self.solver == "step":
            moved = self._step(p, n, targets)
        else:
            moved = self._exact(p, n, relative_rates, counts)
        moved = np.maximum(moved, self.min_weight)
        moved *= (counts @ p) / (counts @ moved)

        clients = [report.client for report in reports]
        return (
            dict(zip(members, moved[group_of].tolist(), strict=True)),
            dict(zip(clients, targets[reporting].tolist(), strict=True)),
        )

    def _can_be_weighed(self, report: "Report") -> bool:
        return report.grad_norm > 0 and (self.gamma == 0 or has_a_rate(report))

    def _group(self, report: "Report") -> str:
        return report.client if self.group_by == "client" else report.task

    def _step(self, p: np.ndarray, n: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """D subgradient steps on F_grad, the targets held."""
        for _ in range(self.weight_steps):
            gap = p * n - targets
            sign = np.where(np.abs(gap) > ROUNDING * targets.mean(), np.sign(gap), 0.0)
            p = p - self.weight_lr * sign * n
        return p

    def _exact(
        self, p: np.ndarray, n: np.ndarray, relative_rates: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """A damped step to the minimiser p* ∝ r^γ / n that keeps the sum."""
        with np.errstate(divide="ignore"):  # in logarithms, so that nothing overflows
            powers = self.gamma * np.log(relative_rates) if self.gamma > 0 else 0.0
            logarithms = powers - np.log(n)
        minimiser = np.exp(logarithms - logarithms.max())
        minimiser *= (counts @ p) / (counts @ minimiser)
        damped: np.ndarray = (1 - self.damping) * p + self.damping * minimiser
        return damped

    def _scale(self, values: Mapping[str, float], reports: Reports) -> float:
        most = max(report.grad_norm for report in reports)
        if self.normalize == "sum" or most == 0:
            return 1.0
        plain = sum(report.grad_norm / most for report in reports) / len(reports)
        weighted = sum(values[report.client] * (report.grad_norm / most) for report in reports)
        return plain / (weighted / sum(values.values()))


def _means(groups: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """The mean of the values of each group, groups being numbers from 0."""
    sums: np.ndarray = np.bincount(groups, weights=values)
    return sums / np.bincount(groups)
