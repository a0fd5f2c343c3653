"""A run's curves as TensorBoard events."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from fedgradnorm.callbacks.base import Callback
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.session import Session

Curve = Literal["loss", "inverse_training_rate", "grad_norm", "weight", "metric"]
CURVES: tuple[Curve, ...] = get_args(Curve)


class TensorBoard(Callback):
    """Write every client's loss, training rate, gradient norm, weight and metric as events.

    Args:
        folder: where to; None: ``tensorboard/`` in the run's folder.

    Raises:
        ConfigError: when a run begins: tensorboard is not installed, or there is no folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._writer: Any = None

    def on_start(self, session: Session) -> None:
        """Open the files; events of rounds that a resumed run repeats are marked as void."""
        folder = self.folder
        if folder is None:
            if session.folder is None:
                raise ConfigError("TensorBoard: expected a folder, as the run has none")
            folder = session.folder / "tensorboard"
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                'TensorBoard: it is not installed: pip install "fedgradnorm[tensorboard]"'
            ) from error
        with _writing(folder):
            self._writer = SummaryWriter(folder, purge_step=session.round + 1)

    def on_round(self, session: Session) -> None:
        """Write the round's figures."""
        with _writing(self._writer.get_logdir()):
            for row in session.rows:
                for key in CURVES:
                    if row[key] is not None:
                        self._writer.add_scalar(f"{key}/{row['client']}", row[key], row["round"])

    def on_end(self, session: Session) -> None:  # noqa: ARG002
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextmanager
def _writing(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error
