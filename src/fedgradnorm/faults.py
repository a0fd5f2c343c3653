"""Faults on purpose: an engine whose reports get lost, late or damaged, so that users can see how their federation would fare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.config import FaultsConfig
from fedgradnorm.engines.base import Engine
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.randomness import generator

__all__ = ["FaultyEngine"]

CORRUPTIONS = ("scaled", "cut", "infinite loss", "noise")


class FaultyEngine:
    """An engine around another one, whose reports meet faults with the probabilities that the settings give.

    - ``drop``: it never arrives.
    - ``delay``: it arrives a round too late, and then counts for nothing.
    - ``nan``: one of its numbers is not a number.
    - ``corrupt``: its gradient is a thousand times too long, cut short, or noise of that length in every
      coordinate, or its loss is infinite.

    What happens depends on (seed, round, client, attempt) alone. The client itself has trained in every case.

    Args:
        engine: who really runs the clients.
        faults: the probabilities.
    """

    def __init__(self, engine: Engine, faults: FaultsConfig) -> None:
        self.engine, self.faults = engine, faults
        self._late: list[Report] = []

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """The state of every client, by id."""
        return self.engine.client_states

    @property
    def failures(self) -> Mapping[str, str]:
        """Why clients had no report, as far as the engine knows."""
        return getattr(self.engine, "failures", {})

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back."""
        self.engine.restore(states)

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> Mapping[str, Evaluation]:
        """Test every client, without faults."""
        return self.engine.evaluate(encoder, buffers, batch_size)

    def execute(self, instructions: Sequence[Instruction]) -> list[Report]:
        """Let the instructed clients train, and spoil some of their reports."""
        arrived, self._late = (
            [one for one in self._late if one.round not in {each.round for each in instructions}],
            [],
        )
        by_client = {instruction.client: instruction for instruction in instructions}
        for report in self.engine.execute(instructions):
            arrived += self._after_faults(report, by_client[report.client])
        return arrived

    def _after_faults(self, report: Report, instruction: Instruction) -> list[Report]:
        rng = generator(
            instruction.training.seed,
            instruction.round,
            instruction.client,
            f"faults {instruction.attempt}",
        )
        lost, late, nan, corrupt = rng.random(4) < (
            self.faults.drop,
            self.faults.delay,
            self.faults.nan,
            self.faults.corrupt,
        )
        if lost:
            return []
        if late:
            self._late.append(report)
            return []
        if nan:
            gradient = report.gradient.clone()
            gradient[int(rng.integers(len(gradient)))] = torch.nan
            report = replace(report, gradient=gradient)
        if corrupt:
            report = _corrupted(
                report, CORRUPTIONS[int(rng.integers(len(CORRUPTIONS)))], int(rng.integers(2**62))
            )
        return [report]


def _corrupted(report: Report, how: str, seed: int) -> Report:
    gradient = report.gradient
    if how == "scaled":
        return replace(report, gradient=1000 * gradient, grad_norm=1000 * report.grad_norm)
    if how == "cut":
        return replace(report, gradient=gradient[: len(gradient) // 2])
    if how == "infinite loss":
        return replace(report, loss=math.inf)
    noise = torch.randn(
        gradient.shape, generator=torch.Generator().manual_seed(seed), dtype=gradient.dtype
    )
    return replace(report, gradient=noise * gradient.norm())
