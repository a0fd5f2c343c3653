"""A run's folder: written while it runs, and read back from its files alone.

::

    RUN/config.toml               the resolved settings, with the versions that ran
    RUN/metrics.jsonl             a line per round and client
    RUN/summary.json              per task and client: first, best and last metric, rounds to targets
    RUN/models/encoder.safetensors, RUN/models/heads/CLIENT.safetensors
    RUN/tensorboard/              the same figures as TensorBoard events
    RUN/report.html               the same as one page
"""

import json
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgradnorm.client import ClientState
from fedgradnorm.config import RunConfig, validated
from fedgradnorm.errors import RunError

__all__ = ["Run", "RunWriter", "load_config_of"]

Row = dict[str, Any]


class RunWriter:
    """Writes a run's folder. A context manager: leaving it closes the files.

    Args:
        folder: the run's folder.
        config: the resolved settings.
        overwrite: whether a run that is there already is replaced.

    Raises:
        RunError: the folder exists and is not to be overwritten, is no run, or cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig, *, overwrite: bool = False) -> None:
        check_free(folder, overwrite=overwrite)
        try:
            if folder.exists():
                shutil.rmtree(folder)
            (folder / "models" / "heads").mkdir(parents=True)
            (folder / "config.toml").write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
            self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"run folder {folder}: cannot be written; {error.strerror}") from error
        self.folder = folder
        self._tensorboard = _tensorboard_writer(folder / "tensorboard")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write_round(self, rows: Sequence[Row]) -> None:
        """Add a round's lines to metrics.jsonl and its figures to TensorBoard."""
        for row in rows:
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
            if self._tensorboard is not None:
                for key in ("loss", "inverse_training_rate", "grad_norm", "weight", "metric"):
                    if row[key] is not None:
                        self._tensorboard.add_scalar(f"{key}/{row['client']}", row[key], row["round"])
        self._metrics.flush()

    def write_models(self, encoder: Mapping[str, Tensor], states: Mapping[str, ClientState]) -> None:
        """Save the encoder's state and every client's head, with the encoder buffers of its own."""
        _save(encoder, self.folder / "models" / "encoder.safetensors")
        for id, state in states.items():
            head = {f"head.{name}": value for name, value in state.head.items()}
            buffers = {f"buffer.{name}": value for name, value in state.encoder_buffers.items()}
            _save(head | buffers, self.folder / "models" / "heads" / f"{id}.safetensors")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2, allow_nan=False)
        (self.folder / "summary.json").write_text(text + "\n", encoding="utf-8")


class Run:
    """A run, read from its folder.

    Args:
        folder: the run's folder.

    Raises:
        RunError: the folder is no run, or one of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.toml").is_file():
            raise RunError(f"{folder} is no run: expected a folder with a config.toml, as `fedgradnorm run` makes it")
        self.config = load_config_of(self.folder)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    def rows(self) -> list[Row]:
        """The lines of metrics.jsonl."""
        lines = self._text("metrics.jsonl").splitlines()
        return [self._json("metrics.jsonl", line, f" line {number}") for number, line in enumerate(lines, start=1)]

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return self._json("summary.json", self._text("summary.json"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file under models/, such as ``encoder.safetensors``."""
        path = self.folder / "models" / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: expected a sound safetensors file; {error}") from error

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{self.folder / name}: cannot be read; {error}. Did the run finish?") from error

    def _json(self, name: str, text: str, place: str = "") -> dict[str, Any]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise RunError(f"{self.folder / name}{place}: expected JSON; {error}") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.folder / name}{place}: expected a JSON object, found {type(value).__name__}")
        return value


def load_config_of(folder: Path) -> RunConfig:
    """The settings of a run. Raises RunError or ConfigError where its config.toml is damaged."""
    path = folder / "config.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read; {error}") from error
    return validated(RunConfig, values, prefix="", place=f"in {path}")


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise RunError if a run may not be written here; nothing is changed."""
    if not folder.exists():
        return
    if not overwrite:
        raise RunError(f"run folder {folder} exists: choose another run.dir, or pass --overwrite to replace it")
    if not (folder / "config.toml").is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder} is not overwritten: it exists and is no run (it has no config.toml)")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)
