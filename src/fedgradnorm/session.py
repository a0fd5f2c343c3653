"""A run in progress: what callbacks see of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from fedgradnorm.client import ClientState
from fedgradnorm.config import RunConfig
from fedgradnorm.engine_wrappers import Costs
from fedgradnorm.errors import RunError
from fedgradnorm.federation import Members
from fedgradnorm.result import Result
from fedgradnorm.runs.records import Row
from fedgradnorm.runs.summary import summarise
from fedgradnorm.server import ServerState


@dataclass
class Session:
    """A run in progress.

    Attributes:
        config: the resolved settings.
        federation: what is trained.
        state: the server's state after the last round.
        client_states: the clients' states after the last round, by client id.
        history: the lines of all rounds, as in metrics.jsonl.
        folder: the run's folder; None where nothing is written.
        checkpoint: the newest checkpoint of this start of the run; None before the first one.
        error: what ended the run, while `Callback.on_end` is called; None where nothing did.
        stopped: why the run is to end after this round, or ended early; None where it is not.
        interrupted: whether the run is to end after this round with a StoppedError.
    """

    config: RunConfig
    federation: Members
    state: ServerState
    client_states: Mapping[str, ClientState]
    history: list[Row] = field(default_factory=list)
    folder: Path | None = None
    checkpoint: Path | None = None
    error: BaseException | None = None
    stopped: str | None = None
    interrupted: bool = False
    costs: Costs = field(default_factory=Costs)
    seconds_before: float = 0.0
    guesses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = perf_counter()

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self.state.round

    @property
    def num_rounds(self) -> int:
        """How many rounds there are to be."""
        return self.config.train.num_rounds

    @property
    def rows(self) -> Sequence[Row]:
        """The lines of the last round, one for each client; empty before the first round."""
        last = self.history[-len(self.federation.clients) :]
        return [row for row in last if row["round"] == self.round]

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all of its starts."""
        return self.seconds_before + perf_counter() - self._start

    def stop(self, reason: str) -> None:
        """End the run after this round, as if it were the last; `Result.stopped` is the reason."""
        self.stopped = reason

    def interrupt(self) -> None:
        """End the run after this round with a StoppedError, to be resumed later."""
        self.interrupted = True

    def result(self) -> Result:
        """The result of the rounds that are done. Raises RunError before the first round."""
        if not self.history:
            raise RunError("there is no result before the end of the first round")
        clients, history, config = self.federation.clients, self.history, self.config
        costs = self.seconds, self.costs.seconds
        summary = summarise(clients, history, self.guesses, config.run, *costs, self.missing)
        parts = self.federation, self.state, self.client_states
        return Result(config, *parts, history, summary, self.stopped)
