"""One run, every round: from the first one, or from a checkpoint."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch.profiler import profile

from fedgradnorm import client as client_side
from fedgradnorm import registry
from fedgradnorm.aggregation.base import Aggregation
from fedgradnorm.build import versions
from fedgradnorm.callbacks.base import Callback, Callbacks
from fedgradnorm.callbacks.tensorboard import TensorBoard
from fedgradnorm.checks import check_same, config_to_resume
from fedgradnorm.config import RunConfig
from fedgradnorm.engine import Engine
from fedgradnorm.engine_wrappers import Costs, TimedEngine
from fedgradnorm.errors import FedGradNormError, RunError, StoppedError, described
from fedgradnorm.evaluation import Evaluation, constant_guess
from fedgradnorm.federation import Federation, Members
from fedgradnorm.identity import members_record
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.notices import Notices
from fedgradnorm.profiling import profiler_of
from fedgradnorm.randomness import seeded
from fedgradnorm.result import Result
from fedgradnorm.runs import folder as folders
from fedgradnorm.runs.checkpoint import load_newest, set_aside
from fedgradnorm.runs.entries import CHECKPOINTS, how_to_resume
from fedgradnorm.runs.lock import alone_in
from fedgradnorm.runs.reader import Run
from fedgradnorm.runs.rows import rows_of
from fedgradnorm.runs.settings import write_config
from fedgradnorm.runs.writer import RunWriter
from fedgradnorm.server import initial_state, run_round
from fedgradnorm.session import Session
from fedgradnorm.weighting.base import Weighting

MakeEngine = Callable[[RunConfig], Engine]
"""Makes the engine, after it has raised what is wrong with clients and data."""


def begin(
    config: RunConfig,
    federation: Members,
    weighting: Weighting,
    make_engine: MakeEngine,
    callback: Callback,
    *,
    overwrite: bool = False,
    profiled: bool = False,
    locked: bool = False,
) -> Result:
    """Train a federation from the first round on.

    Args:
        config: the resolved settings; ``run.dir`` is the run's folder, None writes nothing.
        federation: what is trained.
        weighting: the clients' weights.
        make_engine: makes the engine. It is called before a folder is touched.
        callback: called while the run goes on.
        overwrite: whether a run that is in this folder already is replaced.
        profiled: whether a trace of two rounds is written.
        locked: whether the caller already has the folder to itself, by `alone_in`.

    Raises:
        FedGradNormError: as `fedgradnorm.train`.
    """
    folder = None if config.run.dir is None else Path(config.run.dir).expanduser()
    if folder is not None:
        folders.check_free(folder, overwrite=overwrite)
        config = config.model_copy(update={"versions": versions()})
    aggregate = registry.build("aggregation", config.aggregation)
    engine = make_engine(config)
    state = initial_state(federation, weighting, config.train.seed)
    session = Session(config, federation, state, engine.client_states, folder=folder)
    parts = Parts(engine, weighting, aggregate)
    if folder is None:
        return _Loop(session, parts, callback).run()
    with nullcontext() if locked else alone_in(folder):
        folders.create_run(folder, config, overwrite=overwrite)
        loop = _Loop(session, parts, callback, replaces=folders.replaced_by(folder).exists())
        profiler = profiler_of(folder, config.train.num_rounds) if profiled else nullcontext()
        try:
            with RunWriter(folder, config) as writer, profiler as tracer:
                return loop.run(writer, tracer)
        except BaseException:
            if loop.replaces:
                folders.put_back(folder)
            raise


def go_on(
    run: Run,
    federation: Members,
    weighting: Weighting,
    make_engine: MakeEngine,
    callback: Callback,
    *,
    num_rounds: int | None = None,
    locked: bool = False,
    back_to: int | None = None,
) -> Result:
    """Continue a run from its newest sound checkpoint, or from its start where there is none.

    Args:
        run: the run.
        federation: what is trained.
        weighting: the clients' weights.
        make_engine: makes the engine. It is called before the folder is changed.
        callback: called while the run goes on.
        num_rounds: how many rounds there are to be in all; None: as many as the settings say.
        locked: whether the caller already has the folder to itself, by `alone_in`.
        back_to: continue from the checkpoint of this round. Later rounds are set aside, as
            `set_rounds_aside` does.

    Raises:
        FedGradNormError: as `fedgradnorm.resume`.
    """
    folder = run.folder
    hint = how_to_resume(folder, run.config)
    with nullcontext() if locked else alone_in(folder, hint=hint):
        checkpoint, path, faults = load_newest(folder / CHECKPOINTS, back_to)
        for fault in faults.values():
            callback.on_message(f"warning: {fault}; it is skipped")
        done = 0 if checkpoint is None else checkpoint.server.round
        config = config_to_resume(run, checkpoint, done, num_rounds)
        before = run.members() if checkpoint is None else checkpoint.members
        if before is not None:
            check_same(folder if path is None else path, before, federation, config)
        aggregate = registry.build("aggregation", config.aggregation)
        engine = make_engine(config)
        state = initial_state(federation, weighting, config.train.seed)
        if checkpoint is not None:
            state = checkpoint.server
            engine.restore(checkpoint.clients)
        source = f", from {path}" if path else ": no checkpoint is there"
        callback.on_message(f"resuming after round {done} of {config.train.num_rounds}{source}")
        if back_to is not None and (aside := folders.set_rounds_aside(folder, done)) is not None:
            undone = f"the rounds after round {done} are undone"
            callback.on_message(f"warning: {undone}: their lines and checkpoints are in {aside}")
        write_config(folder, config)
        for damaged in faults:
            with suppress(OSError):
                set_aside(damaged)
        with RunWriter(folder, config, done) as writer:
            states = engine.client_states
            session = Session(config, federation, state, states, run.rows(), folder, path)
            if checkpoint is not None:
                session.seconds_before, session.costs = checkpoint.seconds, Costs(checkpoint.costs)
            parts = Parts(engine, weighting, aggregate)
            return _Loop(session, parts, callback).run(writer)


class Parts(NamedTuple):
    """What a run is made of, beside its federation."""

    engine: Engine
    weighting: Weighting
    aggregate: Aggregation


class _Loop:
    """The rounds of one start of a run. ``replaces``: a failed first round puts a run back."""

    def __init__(
        self, session: Session, parts: Parts, callback: Callback, *, replaces: bool = False
    ) -> None:
        self.session, self.parts, self.callback, self.replaces = session, parts, callback, replaces
        self.training, self.settings = session.config.train, session.config.run
        self.notices = Notices(parts.weighting, self.training)
        self.writer: RunWriter | None = None
        self._members: MembersRecord | None = None
        self._saved: int | None = None

    def run(self, writer: RunWriter | None = None, profiler: profile | None = None) -> Result:
        """Train the rounds that are left. Whatever is raised, the rounds that are done are kept."""
        self.writer, session = writer, self.session
        if writer is not None and self.settings.tensorboard and find_spec("tensorboard"):
            self.callback = Callbacks([TensorBoard(), self.callback])
        with _collector_at_rest():
            try:
                self._train(profiler)
                result = session.result()
                if writer is not None:
                    writer.write_models(result.encoder(), result.client_states)
                    writer.write_summary(result.summary)
            except BaseException as error:
                self._fail(error)
                raise
            try:
                self.notices.of_summary(result.summary)
                self.callback.on_end(session)
            except BaseException as error:
                _attach(error, result)
                raise
        return result

    def _train(self, profiler: profile | None) -> None:
        session, writer = self.session, self.writer
        session.guesses = _guesses(session.federation, self.training.eval_batch_size)
        if writer is not None and self.settings.experiment is None:
            writer.write_members(self._record())
        self.callback.on_start(session)
        engine = TimedEngine(self.parts.engine, session.costs)
        while session.round < session.num_rounds and session.stopped is None:
            self._round(engine)
            if writer is not None:
                with session.costs.of("writing"):
                    writer.write_round(session.rows)
                    if self._is_last() or session.round % self.settings.checkpoint_every == 0:
                        self._checkpoint(writer)
            if profiler is not None:
                profiler.step()
            self.notices.of_losses(session)
            if self._saved == session.round:
                self.callback.on_checkpoint(session)
            self.callback.on_round(session)
            if writer is not None:
                folders.remove_replaced(writer.folder)
            self.replaces = False
            if session.interrupted and not self._is_last():
                raise StoppedError(f"stopped after round {session.round} of {session.num_rounds}")
        if session.stopped is not None and writer is not None and self._saved != session.round:
            self._checkpoint(writer)
            self.callback.on_checkpoint(session)

    def _is_last(self) -> bool:
        return self.session.round == self.session.num_rounds

    def _round(self, engine: Engine) -> None:
        """One round. It counts with its rows and the states of all clients, or not at all."""
        session, training = self.session, self.training
        try:
            with session.costs.of("aggregation"):
                parts = engine, self.parts.weighting, self.parts.aggregate
                state, record = run_round(session.state, session.federation, *parts, training)
            evaluations: Mapping[str, Evaluation] = {}
            if state.round in (1, training.num_rounds) or state.round % training.eval_every == 0:
                batch_size = training.eval_batch_size
                evaluations = engine.evaluate(state.encoder, state.buffers, batch_size)
            notes = engine.take_notes()
            rows = rows_of(session.federation, state, record, evaluations, notes)
        except BaseException:
            engine.restore(session.client_states)
            raise
        session.state, session.client_states = state, engine.client_states
        session.history += rows
        session.missing |= {id: evaluation.failed for id, evaluation in evaluations.items()}
        self.notices.of_round(session, record, evaluations)

    def _record(self) -> MembersRecord:
        session = self.session
        if self._members is None or self.settings.experiment is not None:  # clients may come later
            self._members = members_record(session.federation, session.config.train.seed)
        return self._members

    def _checkpoint(self, writer: RunWriter) -> None:
        session = self.session
        seconds = session.seconds, session.costs.seconds
        session.checkpoint = writer.write_checkpoint(
            session.state, session.client_states, self._record(), *seconds
        )
        self._saved = session.round

    def _fail(self, error: BaseException) -> None:
        """Keep the rounds that are done, tell callbacks, and add to the error what is kept.

        Raises:
            RunError: the folder cannot be written.
        """
        session, hint = self.session, ""
        session.error = error
        try:
            if not isinstance(error, RunError):  # otherwise there is the folder's last checkpoint
                hint = self._keep()
        finally:
            try:
                self.callback.on_end(session)
            except BaseException as another:  # noqa: BLE001
                error.add_note(f"a callback's on_end raised {described(another)}")
        if isinstance(error, RunError):
            return
        if isinstance(error, FedGradNormError):
            error.hint = hint
        else:
            error.add_note(f"{session.round} rounds are done" + (f"; {hint}" if hint else ""))
        _attach(error, session.result() if session.history else None)

    def _keep(self) -> str:
        """Write what is done to the run's folder, if any. Return how to resume the run."""
        if self.writer is None:
            return ""
        folder = self.writer.folder
        if self.replaces:
            return f"the run that was in {folder} before is there again"
        self._checkpoint(self.writer)
        if self.session.history:
            result = self.session.result()
            self.writer.write_models(result.encoder(), result.client_states)
        return f"to resume: {how_to_resume(folder, self.session.config)}"


def _attach(error: BaseException, result: Result | None) -> None:
    """Give the error the result of the rounds that are done, as its attribute ``result``."""
    with suppress(AttributeError):  # some errors take no attributes
        error.result = result  # type: ignore[attr-defined]


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Let the garbage collector skip what is there already, torch's modules above all.

    With small clients it would look at all of it every few rounds.
    """
    if gc.get_freeze_count():  # the program's own frozen objects would be thawed as well
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _guesses(federation: Members, batch_size: int) -> dict[str, dict[str, float]]:
    """By client, the metrics of the constant answer; none for clients on other machines."""
    if not isinstance(federation, Federation):
        return {}
    guesses = {}
    for client in federation.clients:
        if (data := client.test_data) is not None:
            outputs, what = federation.outputs[client.id], "the constant answer to its test data"
            with client_side.naming(client.id, what), seeded(0, 0, client.id, "guess"):
                guesses[client.id] = constant_guess(client.task, data, *outputs, batch_size)
    return guesses
