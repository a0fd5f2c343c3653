"""Engines around another engine: one counts its time, one spoils some of its reports on purpose."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor
from torch.profiler import record_function

from fedgradnorm.client import ClientState
from fedgradnorm.config import FaultsConfig
from fedgradnorm.engine import Engine
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.messages import Instruction, Report
from fedgradnorm.randomness import generator

CORRUPTIONS = ("scaled", "cut", "infinite loss", "noise")


class EngineWrapper(Engine):
    """An engine that hands everything on to another one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def failures(self) -> Mapping[str, str]:
        """As of the engine inside."""
        return self.engine.failures

    def take_notes(self) -> Mapping[str, list[str]]:
        """As of the engine inside."""
        return self.engine.take_notes()

    @property
    def client_states(self) -> Mapping[str, ClientState]:
        """As of the engine inside."""
        return self.engine.client_states

    def restore(self, states: Mapping[str, ClientState]) -> None:
        """Put the clients' states back."""
        self.engine.restore(states)

    def execute(self, instructions: Sequence[Instruction]) -> Sequence[Report]:
        """Let the instructed clients train."""
        return self.engine.execute(instructions)

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> Mapping[str, Evaluation]:
        """Test every client."""
        return self.engine.evaluate(encoder, buffers, batch_size)


class Costs:
    """Seconds by part of a run, with those of its earlier starts (``before``)."""

    def __init__(self, before: Mapping[str, float] = {}) -> None:
        parts = ("head steps", "encoder steps", "evaluation", "aggregation", "writing")
        self.seconds = {**dict.fromkeys(parts, 0.0), **before}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what the block takes for a part, without what is counted for others meanwhile.

        A profiler sees the block by this name.
        """
        start, others = perf_counter(), sum(self.seconds.values())
        with record_function(part):
            yield
        self.seconds[part] += perf_counter() - start - (sum(self.seconds.values()) - others)


class TimedEngine(EngineWrapper):
    """Counts the time of another engine.

    The time of training is divided between heads and encoders in the proportion that the reports
    give.
    """

    def __init__(self, engine: Engine, costs: Costs) -> None:
        super().__init__(engine)
        self.costs = costs

    def execute(self, instructions: Sequence[Instruction]) -> Sequence[Report]:
        """Let the instructed clients train."""
        start = perf_counter()
        reports = self.engine.execute(instructions)
        seconds, in_all = perf_counter() - start, sum(report.seconds for report in reports)
        head_seconds = sum(report.head_seconds for report in reports)
        of_heads = seconds * head_seconds / in_all if in_all > 0 else 0.0
        self.costs.seconds["head steps"] += of_heads
        self.costs.seconds["encoder steps"] += seconds - of_heads
        return reports

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> Mapping[str, Evaluation]:
        """Test every client."""
        with self.costs.of("evaluation"):
            return self.engine.evaluate(encoder, buffers, batch_size)


class FaultyEngine(EngineWrapper):
    """Spoils reports of another engine with the probabilities of `FaultsConfig`.

    What happens depends on (seed, round, client, attempt) alone. The client has trained in every
    case. A late report arrives in the next round, and counts for nothing. The noise of a corrupt
    one has the gradient's length in every coordinate.
    """

    def __init__(self, engine: Engine, faults: FaultsConfig) -> None:
        super().__init__(engine)
        self.faults = faults
        self._late: list[Report] = []

    def execute(self, instructions: Sequence[Instruction]) -> list[Report]:
        """Let the instructed clients train, and spoil some of their reports."""
        rounds = {instruction.round for instruction in instructions}
        arrived = [report for report in self._late if report.round not in rounds]
        self._late = []
        by_client = {instruction.client: instruction for instruction in instructions}
        for report in self.engine.execute(instructions):
            arrived += self._after_faults(report, by_client[report.client])
        return arrived

    def _after_faults(self, report: Report, instruction: Instruction) -> list[Report]:
        seed, purpose = instruction.training.seed, f"faults {instruction.attempt}"
        rng = generator(seed, instruction.round, instruction.client, purpose)
        faults = self.faults
        chances = (faults.drop, faults.delay, faults.nan, faults.corrupt)
        lost, late, nan, corrupt = rng.random(4) < chances
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
            how = CORRUPTIONS[int(rng.integers(len(CORRUPTIONS)))]
            report = _corrupted(report, how, int(rng.integers(2**62)))
        return [report]


def with_faults(engine: Engine, faults: FaultsConfig) -> Engine:
    """The engine, inside a `FaultyEngine` where a fault has a probability above 0."""
    return FaultyEngine(engine, faults) if any(faults.model_dump().values()) else engine


def _corrupted(report: Report, how: str, seed: int) -> Report:
    gradient = report.gradient
    if how == "scaled":
        return replace(report, gradient=1000 * gradient, grad_norm=1000 * report.grad_norm)
    if how == "cut":
        return replace(report, gradient=gradient[: len(gradient) // 2])
    if how == "infinite loss":
        return replace(report, loss=math.inf)
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(gradient.shape, generator=rng, dtype=gradient.dtype)
    return replace(report, gradient=noise * gradient.norm())
