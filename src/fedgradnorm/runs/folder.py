"""A run's folder: written while it runs, and read back from its files alone.

::

    RUN/config.toml               the resolved settings, with the versions that ran
    RUN/metrics.jsonl             a line per round and client
    RUN/members.json              who trains what, on which data
    RUN/summary.json              per task and client: first, best and last metric, rounds to targets
    RUN/models/encoder.safetensors, RUN/models/heads/CLIENT.safetensors
    RUN/checkpoints/              the last moments that a run can go on from
    RUN/tensorboard/              the same figures as TensorBoard events
    RUN/profile/                  with --profile, a trace of two rounds
    RUN/undone/1/, 2/, ...        the lines, checkpoints and results of rounds that the run has gone back behind
    RUN/report.html               the same as one page
    RUN/status.json               with clients on other machines: where the run has got to, and who is connected
"""

import errno
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import get_ident
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import tomli_w
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fedgradnorm.atomic import sync_folder, write_atomically
from fedgradnorm.client import ClientState
from fedgradnorm.config import RunConfig, decoded, validated
from fedgradnorm.errors import ConfigError, RunError
from fedgradnorm.modules import held_tensors
from fedgradnorm.runs.checkpoint import Checkpoint, later_than, save_checkpoint
from fedgradnorm.runs.records import MembersRecord, Row, Summary
from fedgradnorm.server import ServerState

__all__ = [
    "CHECKPOINTS",
    "PROFILE",
    "Run",
    "RunWriter",
    "alone_in",
    "being_written",
    "check_free",
    "create_run",
    "how_to_resume",
    "load_config_of",
    "lock_of",
    "put_back",
    "remove_replaced",
    "replaced_by",
    "set_rounds_aside",
    "write_config",
]

CHECKPOINTS, PROFILE, UNDONE = "checkpoints", "profile", "undone"
LOCK_TIMEOUT = 5.0
"""Seconds that a run waits for another one in its folder to end, such as one that was just killed."""
STATUS = "status.json"
ENTRIES = {
    *("config.toml", "members.json", "metrics.jsonl", "summary.json", STATUS),
    *("models", CHECKPOINTS, "tensorboard", PROFILE, UNDONE, "report.html"),
}
"""All that a run's folder holds."""
RESULTS = ("summary.json", "report.html", "models/encoder.safetensors")
"""What is written when a run ends."""
HELD: dict[Path, int] = {}
"""The folders that runs of this process are writing to, links resolved, and the thread of each."""

TAIL = 2**16
"""Bytes at the end of metrics.jsonl in which the last round is looked for first."""

Checked = TypeVar("Checked")
ROWS, SUMMARY, MEMBERS = TypeAdapter(list[Row]), TypeAdapter(Summary), TypeAdapter(MembersRecord)


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
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with (
            suppress(OSError) if error is not None else self._writing()
        ):  # what an error left unsaid is not worth a second one
            self._metrics.close()

    def write_round(self, rows: Sequence[Row]) -> None:
        """Add a round's lines to metrics.jsonl."""
        with self._writing():
            self._metrics.write(
                "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
            )
            self._metrics.flush()

    def write_members(self, members: MembersRecord) -> None:
        """Write members.json."""
        with self._writing():
            write_atomically(self.folder / "members.json", (json.dumps(members) + "\n").encode())

    def write_checkpoint(
        self,
        server: ServerState,
        clients: Mapping[str, ClientState],
        members: MembersRecord,
        seconds: float,
        costs: Mapping[str, float],
    ) -> Path:
        """Write a checkpoint, after the lines that belong to it are on the disk.

        Returns:
            Its path.
        """
        with self._writing():
            os.fsync(self._metrics.fileno())
            checkpoint = Checkpoint(
                server, clients, self.config.model_dump(mode="json"), members, seconds, costs
            )
            return save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.run.keep)

    def write_models(self, encoder: nn.Module, states: Mapping[str, ClientState]) -> None:
        """Save the encoder's state and every client's head, with the encoder buffers, and the encoder, of its own."""
        with self._writing():
            _save(_all_tensors(encoder), self.folder / "models" / "encoder.safetensors")
            if (
                self.config.run.experiment is not None
            ):  # the heads are with the clients, on other machines
                return
            for id, state in states.items():
                head = {f"head.{name}": value for name, value in state.head.items()}
                buffers = {f"buffer.{name}": value for name, value in state.encoder_buffers.items()}
                own = {} if state.encoder is None else {"encoder": state.encoder}
                _save(head | buffers | own, self.folder / "models" / "heads" / f"{id}.safetensors")

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        with self._writing():
            write_atomically(
                self.folder / "summary.json",
                (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode(),
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"run folder {self.folder}: cannot be written: {error.strerror or error}. Its last checkpoint is sound; "
                f"when it can be written again: {how_to_resume(self.folder, self.config)}"
            ) from error


def create_run(folder: Path, config: RunConfig, *, overwrite: bool = False) -> None:
    """Make a run's folder with its settings: all of it or nothing.

    A run that is replaced is kept beside the folder, as `replaced_by` says, until `remove_replaced` or `put_back` is called.

    Args:
        folder: the run's folder.
        config: the resolved settings.
        overwrite: whether a run that is there already is replaced.

    Raises:
        RunError: the folder exists and is not to be overwritten, is no run, or cannot be written.
    """
    check_free(folder, overwrite=overwrite)
    content = _toml_of(config)
    aside, old = folder.with_name(f".{folder.name}.starting"), replaced_by(folder)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        if (
            old.exists() and folder.exists()
        ):  # a run that was killed in its first round leaves the run before it
            shutil.rmtree(old if _has_rounds(folder) else folder)
        (aside / "models" / "heads").mkdir(parents=True)
        write_atomically(aside / "config.toml", content)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync_folder(folder.parent)
    except (OSError, ValueError) as error:
        raise RunError(
            f"run folder {str(folder)!r}: cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error


def set_rounds_aside(folder: Path, round: int) -> Path | None:
    """Bring what a run has of later rounds to a new folder ``undone/NUMBER``: lines, checkpoints, and the results at its end.

    The lines are copied; `RunWriter` cuts them off. Killed at any point, it loses nothing: what is not moved yet is still in place.

    Returns:
        The new folder; None where there is nothing of later rounds.

    Raises:
        RunError: the folder cannot be written, or its metrics.jsonl is damaged before that round's end.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(_end_of_round(file, folder, round))
            lines = file.read()
        later = later_than(folder / CHECKPOINTS, round)
        if not lines and not later:
            return None
        numbers = [
            int(entry.name) for entry in (folder / UNDONE).glob("*") if entry.name.isdecimal()
        ]
        aside = folder / UNDONE / str(max(numbers, default=0) + 1)
        (aside / CHECKPOINTS).mkdir(parents=True)
        write_atomically(aside / "metrics.jsonl", lines)
        for (
            name
        ) in RESULTS:  # before the checkpoints: while these are there, it is not gone back yet
            if (folder / name).is_file():
                (folder / name).rename(aside / Path(name).name)
        for path in later:  # the newest first: the newest that is left is one to go on from
            path.rename(aside / CHECKPOINTS / path.name)
        sync_folder(aside)
        sync_folder(folder / CHECKPOINTS)
    except OSError as error:
        raise RunError(
            f"run folder {folder}: cannot be written: {error.strerror or error}"
        ) from error
    return aside


def replaced_by(folder: Path) -> Path:
    """Where the run is kept that a new one replaces, until the new one has done a round."""
    return folder.with_name(f".{folder.name}.replaced")


def remove_replaced(folder: Path) -> None:
    """Remove the run that was replaced, if there is one, as far as that is possible."""
    shutil.rmtree(replaced_by(folder), ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put the run that was replaced back into its folder, in place of the new one. Raises RunError where that fails."""
    old = replaced_by(folder)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        old.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunError(
            f"run folder {folder}: cannot be written: {error.strerror or error}; the run that was there is in {old}"
        ) from error


def _has_rounds(folder: Path) -> bool:
    """Whether a line of metrics.jsonl is complete."""
    try:
        return b"\n" in (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return False


@contextmanager
def alone_in(folder: Path, timeout: float | None = None, hint: str = "") -> Iterator[None]:
    """Keep two runs from writing to one folder: the second waits a little, and is refused.

    The lock is an empty file beside the folder, which is released when its process ends in whatever way. Links to the folder are
    resolved first. A second run in the same thread, such as one that ``on_round`` begins, is refused at once.

    Args:
        folder: the run's folder, which may not be there yet.
        timeout: seconds to wait; None: as long as a run that was just killed may take to end.
        hint: what to do when the disk can be written again.

    Raises:
        RunError: another run is writing there, or no file can be written beside the folder.
    """
    try:
        real = folder.resolve()
        if real.parent.exists() and not real.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        real.parent.mkdir(parents=True, exist_ok=True)
        file = lock_of(real)
        file.touch()  # FileLock waits where no file can be made
        if HELD.get(real) == get_ident():
            raise RunError(
                f"run folder {folder}: a run of this program is writing to it: expected another run to begin after its end"
            )
        lock = FileLock(file)
        lock.acquire(timeout=LOCK_TIMEOUT if timeout is None else timeout, poll_interval=0.1)
    except Timeout:
        raise RunError(
            f"run folder {folder}: another run is writing to it: wait for it, or stop it (with Flower: `flwr stop`)"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        reason = f"run folder {str(folder)!r:.300}: cannot be written: {getattr(error, 'strerror', None) or error}"
        raise RunError(f"{reason}; when it can be: {hint}" if hint else reason) from error
    HELD[real] = get_ident()
    try:
        yield
    finally:
        del HELD[real]
        lock.release()


def being_written(folder: Path) -> bool | None:
    """Whether a process of this machine is writing a run to a folder; None where no lock tells, as in a copy of it elsewhere."""
    try:
        import fcntl

        real = folder.resolve()
        if real in HELD:
            return True
        lock = os.open(lock_of(real), os.O_RDONLY)  # whoever may read the folder may ask
    except (ImportError, OSError, RuntimeError):  # there is no fcntl on Windows
        return None
    try:
        fcntl.flock(
            lock, fcntl.LOCK_SH | fcntl.LOCK_NB
        )  # shared: two who ask at once do not see each other
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(lock)
    return False


def lock_of(real: Path) -> Path:
    """The file with which a run keeps others from its folder, whose links are resolved; it stays when the run is over."""
    return real.with_name(f".{real.name}.lock")


def write_config(folder: Path, config: RunConfig) -> None:
    """Write config.toml. Raises RunError where that fails."""
    try:
        write_atomically(folder / "config.toml", _toml_of(config))
    except OSError as error:
        raise RunError(
            f"run folder {folder}: cannot be written: {error.strerror or error}; when it can be: {how_to_resume(folder, config)}"
        ) from error


def how_to_resume(folder: Path, config: RunConfig) -> str:
    """How a run is gone on with: by a command, or where its clients are on other machines by its Flower app."""
    return (
        f"fedgradnorm resume {folder}"
        if config.run.experiment is None
        else "start its Flower app again"
    )


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

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
            raise RunError(f"run: expected the path of a run's folder, found {folder!r:.100}")
        self.folder = Path(folder)
        try:
            if self.folder.name in ("", ".."):  # such as `.`: what lies beside it needs its name
                self.folder = self.folder.resolve()
            found = (self.folder / "config.toml").is_file()
        except (OSError, ValueError):
            found = False
        if not found:
            raise RunError(
                f"{str(folder)[:200]} is no run: expected a folder with a config.toml, as `fedgradnorm run` makes it"
            )
        self.config = load_config_of(self.folder)

    def rows(self) -> list[Row]:
        """The lines of metrics.jsonl."""
        return self._parsed(self._text("metrics.jsonl").splitlines())

    def whole_rounds(self) -> list[Row]:
        """The lines of metrics.jsonl less those of a last round that is not there in full, as while it is written or after a kill."""
        if self.is_finished():
            return self.rows()
        try:
            *lines, torn = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.folder / 'metrics.jsonl'}: cannot be read; {error}") from error
        return _whole(self._parsed(lines), torn=torn)

    def last_round(self) -> list[Row]:
        """The last of these rounds, read from the end of the file, however long that is; empty before the first."""
        size, path = TAIL, self.folder / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                while True:
                    start = file.seek(max(0, end - size))
                    *lines, torn = file.read(end - start).split(b"\n")
                    rows = self._parsed(lines[1:] if start else lines)
                    if (
                        start == 0 or len({row["round"] for row in rows}) > 2
                    ):  # the first may be cut here, and the last not be whole
                        rows = _whole(rows, torn=torn)
                        return [row for row in rows if row["round"] == rows[-1]["round"]]
                    size *= 4
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{path}: cannot be read; {error}") from error
        except RunError:
            self.whole_rounds()  # names the line
            raise

    def is_finished(self) -> bool:
        """Whether summary.json is there, and of as many rounds as the settings say. Raises RunError where it is damaged."""
        return (self.folder / "summary.json").exists() and self.summary()[
            "rounds"
        ] >= self.config.train.num_rounds

    def members(self) -> MembersRecord | None:
        """What members.json holds; None where there is none, for the clients are on other machines."""
        if not (self.folder / "members.json").exists():
            return None
        return self._checked(
            "members.json", MEMBERS, self._json("members.json", self._text("members.json"))
        )

    def summary(self) -> Summary:
        """What summary.json holds."""
        return self._checked(
            "summary.json", SUMMARY, self._json("summary.json", self._text("summary.json"))
        )

    def has_results(self) -> bool:
        """Whether it got beyond its first round, which may have been cut short before there was a checkpoint."""
        rounds = set()
        with suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            for line in file:
                with suppress(
                    ValueError, KeyError, TypeError, RecursionError
                ):  # a torn or damaged line
                    rounds.add(json.loads(line)["round"])
        return bool(rounds - {1}) or (self.folder / "summary.json").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file under models/, such as ``encoder.safetensors``."""
        path = self.folder / "models" / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{path}: expected a sound safetensors file, as a finished run has it; {error}"
            ) from error

    def _parsed(self, lines: Sequence[str | bytes]) -> list[Row]:
        rows = [
            self._json("metrics.jsonl", line, f" line {number}")
            for number, line in enumerate(lines, start=1)
        ]
        return self._checked("metrics.jsonl", ROWS, rows)

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(
                f"{self.folder / name}: cannot be read; {error}. Did the run finish?"
            ) from error

    def _json(self, name: str, text: str | bytes, place: str = "") -> Any:
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
            raise RunError(
                f"{self.folder / name}{place}: {where}: {first['msg']}{found}"
            ) from error


def _whole(rows: list[Row], *, torn: bytes) -> list[Row]:
    """The rows less those of a last round of which lines are missing. A round never has fewer lines than the one before."""
    if not rows:
        return rows
    last = rows[-1]["round"]
    count, before = (sum(row["round"] == round for row in rows) for round in (last, last - 1))
    if count < before or (
        torn and not before and not torn.startswith(b'{"round": %d,' % (last + 1))
    ):
        return [row for row in rows if row["round"] != last]
    return rows


def load_config_of(folder: Path) -> RunConfig:
    """The settings of a run. Raises RunError or ConfigError where its config.toml is damaged."""
    path = folder / "config.toml"
    try:
        values = tomllib.loads(decoded(path.read_bytes()))
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
        entries = (
            {entry.name for entry in folder.iterdir() if not entry.name.endswith(".writing")}
            if folder.is_dir()
            else None
        )
    except (OSError, ValueError) as error:
        raise RunError(
            f"run folder {str(folder)[:100]!r}: no such folder can be: {getattr(error, 'strerror', None) or error}"
        ) from error
    if entries is not None and folder.samefile("."):
        raise RunError(f"run folder {folder} is the current folder: expected one of its own")
    if entries is None or folder.is_symlink():
        raise RunError(
            f"run folder {folder} exists, and is a link or no folder: choose another run.dir"
        )
    if not overwrite:
        raise RunError(
            f"run folder {folder} exists: choose another one, or replace it: --overwrite on the command line, overwrite=True in Python"
        )
    if not entries:
        return
    if foreign := sorted(entries - ENTRIES):
        raise RunError(
            f"{folder} is not overwritten: it holds what no run writes, such as '{foreign[0]}'"
        )
    if not load_config_of(folder).versions:
        raise RunError(
            f"{folder} is not overwritten: it is no run, for its config.toml names no versions"
        )


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
                raise RunError(
                    f"{path} line {number}: expected a round's figures as JSON; {error!r}"
                ) from error
            break  # the line that was being written
        if found > round or not line.endswith(b"\n"):
            break
        end, last = end + len(line), found
    if last < round:
        raise RunError(
            f"{path}: expected the figures of {round} rounds, as the checkpoint has them, found those of {last}"
        )
    return end


def _all_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """What a state dict has, and the buffers and plain tensors that it leaves out."""
    tensors = {
        name: value for name, value in encoder.state_dict().items() if isinstance(value, Tensor)
    }
    return {**tensors, **held_tensors(encoder)}


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    write_atomically(
        path, to_bytes({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
    )
