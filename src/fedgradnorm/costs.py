"""Where a run's time goes: every second belongs to one part."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

from torch import Tensor
from torch.profiler import record_function

from fedgradnorm.client import ClientState
from fedgradnorm.engines.base import Engine
from fedgradnorm.evaluation import EVALUATION_BATCH, Evaluation
from fedgradnorm.messages import Instruction, Report

__all__ = ["Costs", "TimedEngine"]


class Costs:
    """Seconds by part: ``head steps``, ``encoder steps``, ``evaluation``, ``aggregation``, ``writing``.

    Args:
        before: the seconds of earlier starts of the run.
    """

    def __init__(self, before: Mapping[str, float] = {}) -> None:
        self.seconds = dict.fromkeys(
            ("head steps", "encoder steps", "evaluation", "aggregation", "writing"), 0.0
        ) | dict(before)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what the block takes for a part, without what is counted for others meanwhile. A profiler sees the block by this name."""
        start, others = perf_counter(), sum(self.seconds.values())
        with record_function(part):
            yield
        self.seconds[part] += perf_counter() - start - (sum(self.seconds.values()) - others)


class TimedEngine:
    """An engine around another one, that counts its time.

    Args:
        engine: who really runs the clients.
        costs: where it counts. The time of training is shared between heads and encoders as the reports say.
    """

    def __init__(self, engine: Engine, costs: Costs) -> None:
        self.engine, self.costs = engine, costs

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

    def execute(self, instructions: Sequence[Instruction]) -> Sequence[Report]:
        """Let the instructed clients train."""
        start = perf_counter()
        reports = self.engine.execute(instructions)
        seconds, in_all = perf_counter() - start, sum(report.seconds for report in reports)
        of_heads = (
            seconds * sum(report.head_seconds for report in reports) / in_all if in_all > 0 else 0.0
        )
        self.costs.seconds["head steps"] += of_heads
        self.costs.seconds["encoder steps"] += seconds - of_heads
        return reports

    def evaluate(
        self, encoder: Tensor, buffers: Mapping[str, Tensor], batch_size: int = EVALUATION_BATCH
    ) -> Mapping[str, Evaluation]:
        """Test every client."""
        with self.costs.of("evaluation"):
            return self.engine.evaluate(encoder, buffers, batch_size)
