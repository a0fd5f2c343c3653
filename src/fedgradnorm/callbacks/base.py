"""What a callback is: code that is called while a run goes on."""

from collections.abc import Callable, Sequence

from fedgradnorm.errors import ConfigError, described
from fedgradnorm.runs.records import Row
from fedgradnorm.session import Session

OnRound = Callable[[Sequence[Row]], None]
ShouldStop = Callable[[], bool]


class Callback:
    """Code that is called while a run goes on: derive from it what you need.

    What a callback raises ends the run: its rounds are kept, and the error has the `Result` as its
    attribute ``result``. To end a run without an error, call `Session.stop`.
    """

    def on_start(self, session: Session) -> None:
        """Called once, before the first round of this start of the run."""

    def on_round(self, session: Session) -> None:
        """Called after every round; ``session.rows`` has its lines."""

    def on_checkpoint(self, session: Session) -> None:
        """Called after a checkpoint is on the disk; ``session.checkpoint`` is its path."""

    def on_end(self, session: Session) -> None:
        """Called once at the end, also of a run that fails; ``session.error`` says why."""

    def on_message(self, message: str) -> None:
        """Told where a resumed run continues, and which checkpoints are damaged."""


class Callbacks(Callback):
    """Several callbacks as one; they are called in their order.

    Raises:
        ConfigError: something that is not a callback.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(
                    "callbacks: expected objects of classes derived from fedgradnorm.Callback, "
                    f"found {callback!r:.100}"
                )
        self.callbacks = tuple(callbacks)

    def on_start(self, session: Session) -> None:
        """Call ``on_start`` of each."""
        for callback in self.callbacks:
            callback.on_start(session)

    def on_round(self, session: Session) -> None:
        """Call ``on_round`` of each."""
        for callback in self.callbacks:
            callback.on_round(session)

    def on_checkpoint(self, session: Session) -> None:
        """Call ``on_checkpoint`` of each."""
        for callback in self.callbacks:
            callback.on_checkpoint(session)

    def on_end(self, session: Session) -> None:
        """Call ``on_end`` of each, whatever the others raise; then raise the first error."""
        errors: list[BaseException] = []
        for callback in self.callbacks:
            try:
                callback.on_end(session)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
        if errors:
            for another in errors[1:]:
                errors[0].add_note(f"another callback raised {described(another)}")
            raise errors[0]

    def on_message(self, message: str) -> None:
        """Call ``on_message`` of each."""
        for callback in self.callbacks:
            callback.on_message(message)


class Functions(Callback):
    """Plain functions as a callback.

    Args:
        on_round: called after every round with its lines.
        should_stop: asked after every round; True ends the run with a StoppedError.
        on_message: called with messages of a resumed run.
    """

    def __init__(
        self,
        on_round: OnRound | None = None,
        should_stop: ShouldStop | None = None,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        self._on_round, self._should_stop, self._on_message = on_round, should_stop, on_message

    def on_round(self, session: Session) -> None:
        """Call the functions."""
        if self._on_round is not None:
            self._on_round(session.rows)
        if self._should_stop is not None and self._should_stop():
            session.interrupt()

    def on_message(self, message: str) -> None:
        """Call the function."""
        if self._on_message is not None:
            self._on_message(message)
