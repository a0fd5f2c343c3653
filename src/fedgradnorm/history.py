"""A run's folder: written while it runs, and read back from its files alone.

::

    RUN/config.toml               the resolved settings, with the versions that ran
    RUN/metrics.jsonl             a line per round and client
    RUN/summary.json              per task and client: first, best and last metric, rounds to targets
    RUN/models/encoder.safetensors, RUN/models/heads/CLIENT.safetensors
    RUN/checkpoints/              the last moments that a run can go on from
    RUN/tensorboard/              the same figures as TensorBoard events
    RUN/profile/                  with --profile, a trace of two rounds
    RUN/report.html               the same as one page
"""

import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fedgradnorm.atomic import sync_folder, write_atomically
from fedgradnorm.checkpoint import Checkpoint, save_checkpoint
from fedgradnorm.client import ClientState
from fedgradnorm.config import RunConfig, validated
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.records import MembersRecord, Row, Summary
from fedgradnorm.server import ServerState

__all__ = ["CHECKPOINTS", "PROFILE", "Run", "RunWriter", "check_free", "create_run", "how_to_go_on", "load_config_of", "write_config"]

CHECKPOINTS, PROFILE = "checkpoints", "profile"
CURVES: tuple[Literal["loss", "inverse_training_rate", "grad_norm", "weight", "metric"], ...] = (
    "loss",
    "inverse_training_rate",
    "grad_norm",
    "weight",
    "metric",
)
"""What goes to TensorBoard."""
ENTRIES = {"config.toml", "metrics.jsonl", "summary.json", "models", CHECKPOINTS, "tensorboard", PROFILE, "report.html"}
"""All that a run's folder holds."""

Checked = TypeVar("Checked")
ROWS, SUMMARY = TypeAdapter(list[Row]), TypeAdapter(Summary)


class RunWriter:
    """Writes a run's folder, which is there already. A context manager: leaving it closes the files.

    Args:
        folder: the run's folder, made by `create_run`.
        config: the resolved settings.
        round: rounds done. The lines of later rounds in metrics.jsonl, and a torn last line, are cut off.

    Raises:
        RunError: the folder cannot be written, or its metrics.jsonl is damaged before that round.
    """

    def __init__(self, folder: Path, config: RunConfig, round: int = 0) -> None:
        self.folder, self.config = folder, config
        with self._writing(), ExitStack() as undo:
            self._metrics = undo.enter_context((folder / "metrics.jsonl").open("a+b"))
            self._metrics.truncate(_end_of_round(self._metrics, folder, round))
            events = folder / "tensorboard"
            self._tensorboard = _tensorboard_writer(events, purge_step=round + 1) if config.run.tensorboard else None
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError) if error is not None else self._writing():  # what an error left unsaid is not worth a second one
            self._metrics.close()
            if self._tensorboard is not None:
                self._tensorboard.close()

    def write_round(self, rows: Sequence[Row]) -> None:
        """Add a round's lines to metrics.jsonl and its figures to TensorBoard."""
        with self._writing():
            self._metrics.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
            self._metrics.flush()
            if self._tensorboard is not None:
                for row in rows:
                    for key in CURVES:
                        if row[key] is not None:
                            self._tensorboard.add_scalar(f"{key}/{row['client']}", row[key], row["round"])

    def write_checkpoint(self, server: ServerState, clients: Mapping[str, ClientState], members: MembersRecord) -> None:
        """Write a checkpoint, after the lines that belong to it are on the disk."""
        with self._writing():
            os.fsync(self._metrics.fileno())
            checkpoint = Checkpoint(server, clients, self.config.model_dump(mode="json"), members)
            save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.run.keep)

    def write_models(self, encoder: nn.Module, states: Mapping[str, ClientState]) -> None:
        """Save the encoder's state and every client's head, with the encoder buffers, and the encoder, of its own."""
        with self._writing():
            tensors = {**encoder.state_dict(), **dict(encoder.named_buffers())}  # buffers that are not persistent too
            _save(tensors, self.folder / "models" / "encoder.safetensors")
            if self.config.run.experiment is not None:  # the heads are with the clients, on other machines
                return
            for id, state in states.items():
                head = {f"head.{name}": value for name, value in state.head.items()}
                buffers = {f"buffer.{name}": value for name, value in state.encoder_buffers.items()}
                own = {} if state.encoder is None else {"encoder": state.encoder}
                _save(head | buffers | own, self.folder / "models" / "heads" / f"{id}.safetensors")

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        with self._writing():
            write_atomically(self.folder / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"run folder {self.folder}: cannot be written: {error.strerror or error}. Its last checkpoint is sound; "
                f"when it can be written again: {how_to_go_on(self.folder, self.config)}"
            ) from error


def create_run(folder: Path, config: RunConfig, *, overwrite: bool = False) -> None:
    """Make a run's folder with its settings: all of it or nothing.

    Args:
        folder: the run's folder.
        config: the resolved settings.
        overwrite: whether a run that is there already is replaced.

    Raises:
        RunError: the folder exists and is not to be overwritten, is no run, or cannot be written.
    """
    check_free(folder, overwrite=overwrite)
    content = _toml_of(config)
    aside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("starting", "replaced"))
    try:
        for left_over in (aside, old):
            if left_over.exists():
                shutil.rmtree(left_over)
        (aside / "models" / "heads").mkdir(parents=True)
        write_atomically(aside / "config.toml", content)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync_folder(folder.parent)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, ValueError) as error:
        raise RunError(f"run folder {str(folder)!r}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.toml. Raises RunError where that fails."""
    try:
        write_atomically(folder / "config.toml", _toml_of(config))
    except OSError as error:
        raise RunError(
            f"run folder {folder}: cannot be written: {error.strerror or error}; when it can be: {how_to_go_on(folder, config)}"
        ) from error


def how_to_go_on(folder: Path, config: RunConfig) -> str:
    """How a run is gone on with: by a command, or where its clients are on other machines by its Flower app."""
    return f"fedgradnorm resume {folder}" if config.run.experiment is None else "start its Flower app again"


def _toml_of(config: RunConfig) -> bytes:
    try:
        return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)).encode()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a setting cannot be written to config.toml: {error}") from error


class Run:
    """A run, read from its folder.

    Args:
        folder: the run's folder.

    Raises:
        RunError: the folder is no run, or one of its files is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            found = (self.folder / "config.toml").is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise RunError(f"{str(folder)[:200]} is no run: expected a folder with a config.toml, as `fedgradnorm run` makes it")
        self.config = load_config_of(self.folder)

    def rows(self) -> list[Row]:
        """The lines of metrics.jsonl."""
        lines = self._text("metrics.jsonl").splitlines()
        rows = [self._json("metrics.jsonl", line, f" line {number}") for number, line in enumerate(lines, start=1)]
        return self._checked("metrics.jsonl", ROWS, rows)

    def summary(self) -> Summary:
        """What summary.json holds."""
        return self._checked("summary.json", SUMMARY, self._json("summary.json", self._text("summary.json")))

    def has_results(self) -> bool:
        """Whether it got beyond its first round, which may have been cut short before there was a checkpoint."""
        rounds = set()
        with suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError, RecursionError):  # a torn or damaged line
                    rounds.add(json.loads(line)["round"])
        return bool(rounds - {1}) or (self.folder / "summary.json").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file under models/, such as ``encoder.safetensors``."""
        path = self.folder / "models" / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: expected a sound safetensors file, as a finished run has it; {error}") from error

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{self.folder / name}: cannot be read; {error}. Did the run finish?") from error

    def _json(self, name: str, text: str, place: str = "") -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.folder / name}{place}: expected JSON; {error}") from error

    def _checked(self, name: str, adapter: TypeAdapter[Checked], value: Any) -> Checked:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            keys = list(first["loc"])
            place = f" line {int(keys.pop(0)) + 1}" if adapter is ROWS else ""
            where = ".".join(map(str, keys)) or "the whole"
            found = "" if first["type"] == "missing" else f", found {repr(first['input'])[:100]}"
            raise RunError(f"{self.folder / name}{place}: {where}: {first['msg']}{found}") from error


def load_config_of(folder: Path) -> RunConfig:
    """The settings of a run. Raises RunError or ConfigError where its config.toml is damaged."""
    path = folder / "config.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read; {error}") from error
    return validated(RunConfig, values, prefix="", place=f"in {path}")


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise RunError if a run may not be written here; nothing is changed.

    Only a folder that holds a run, and nothing that a run does not write, is ever replaced.
    """
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        entries = {entry.name for entry in folder.iterdir() if not entry.name.endswith(".writing")} if folder.is_dir() else None
    except (OSError, ValueError) as error:
        raise RunError(f"run folder {str(folder)[:100]!r}: no such folder can be: {getattr(error, 'strerror', None) or error}") from error
    if entries is not None and folder.samefile("."):
        raise RunError(f"run folder {folder} is the current folder: expected one of its own")
    if entries is None or folder.is_symlink():
        raise RunError(f"run folder {folder} exists, and is a link or no folder: choose another run.dir")
    if not overwrite:
        raise RunError(f"run folder {folder} exists: choose another run.dir, or pass --overwrite to replace it")
    if not entries:
        return
    if foreign := sorted(entries - ENTRIES):
        raise RunError(f"{folder} is not overwritten: it holds what no run writes, such as '{foreign[0]}'")
    if not load_config_of(folder).versions:
        raise RunError(f"{folder} is not overwritten: it is no run, for its config.toml names no versions")


def _end_of_round(file: BinaryIO, folder: Path, round: int) -> int:
    """Where the lines up to a round end. Raises RunError where lines before that are damaged or missing."""
    file.seek(0)
    end, last, path = 0, 0, folder / "metrics.jsonl"
    for number, line in enumerate(file, start=1):
        try:
            found = json.loads(line)["round"]
            if type(found) is not int or found not in (last, last + 1):
                raise ValueError(f"round {found!r} after round {last}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if line.endswith(b"\n") and last <= round:
                raise RunError(f"{path} line {number}: expected a round's figures as JSON; {error!r}") from error
            break  # the line that was being written
        if found > round or not line.endswith(b"\n"):
            break
        end, last = end + len(line), found
    if last < round:
        raise RunError(f"{path}: expected the figures of {round} rounds, as the checkpoint has them, found those of {last}")
    return end


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    write_atomically(path, to_bytes({name: tensor.contiguous().clone() for name, tensor in tensors.items()}))


def _tensorboard_writer(folder: Path, purge_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=purge_step)
