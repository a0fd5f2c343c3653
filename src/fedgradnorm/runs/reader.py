"""Reading a run back from its folder."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedgradnorm.errors import RunError
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.runs.records import Row, Summary
from fedgradnorm.runs.settings import load_config_of

TAIL = 2**16
"""The number of bytes at the end of metrics.jsonl in which the last round is searched first."""

Checked = TypeVar("Checked")
ROWS, SUMMARY, MEMBERS = TypeAdapter(list[Row]), TypeAdapter(Summary), TypeAdapter(MembersRecord)


class Run:
    """A run, read from its folder.

    Args:
        folder: the run's folder.

    Raises:
        RunError: the folder is not a run, or its config.toml is damaged. Every method raises it
            if its file cannot be read or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
            raise RunError(f"run: expected the path of a run's folder, found {folder!r:.100}")
        self.folder = Path(folder)
        try:
            if self.folder.name in ("", ".."):  # such as `.`: its name is needed for its lock
                self.folder = self.folder.resolve()
            is_run = (self.folder / "config.toml").is_file()
        except (OSError, ValueError):
            is_run = False
        if not is_run:
            expected = "expected a folder with a config.toml, as `fedgradnorm run` makes it"
            raise RunError(f"{str(folder)[:200]} is no run: {expected}")
        self.config = load_config_of(self.folder)

    def rows(self) -> list[Row]:
        """All lines of metrics.jsonl."""
        return self._parsed(self._text("metrics.jsonl").splitlines())

    def whole_rounds(self) -> list[Row]:
        """The lines of metrics.jsonl without a last round that is incomplete.

        A round is incomplete while it is written, or if the run was killed then.
        """
        if self.is_finished():
            return self.rows()
        path = self.folder / "metrics.jsonl"
        try:
            *lines, torn = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{path}: cannot be read; {error}") from error
        return _whole(self._parsed(lines), torn=torn)

    def last_round(self) -> list[Row]:
        """The last complete round, empty before the first. Only the end of the file is read."""
        size, path = TAIL, self.folder / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                while True:
                    start = file.seek(max(0, end - size))
                    *lines, torn = file.read(end - start).split(b"\n")
                    rows = self._parsed(lines[1:] if start else lines)
                    # of three rounds, the first may be cut here, and the last be incomplete
                    if start == 0 or len({row["round"] for row in rows}) > 2:
                        rows = _whole(rows, torn=torn)
                        return [row for row in rows if row["round"] == rows[-1]["round"]]
                    size *= 4
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{path}: cannot be read; {error}") from error
        except RunError:
            self.whole_rounds()  # its error names the line
            raise

    def is_finished(self) -> bool:
        """Whether summary.json is there, and has all rounds of the settings."""
        has_summary = (self.folder / "summary.json").exists()
        return has_summary and self.summary()["rounds"] >= self.config.train.num_rounds

    def members(self) -> MembersRecord | None:
        """The record in members.json; None if the clients are on other machines."""
        is_here = (self.folder / "members.json").exists()
        return self._read("members.json", MEMBERS) if is_here else None

    def summary(self) -> Summary:
        """The summary in summary.json."""
        return self._read("summary.json", SUMMARY)

    def has_results(self) -> bool:
        """Whether a round after the first one has begun, or there is a summary.

        The first round may have been cut short before there was a checkpoint.
        """
        rounds = set()
        with suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError, RecursionError):  # a damaged line
                    rounds.add(json.loads(line)["round"])
        return bool(rounds - {1}) or (self.folder / "summary.json").exists()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file in models/, such as ``encoder.safetensors``."""
        path = self.folder / "models" / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            expected = "expected a sound safetensors file, as a finished run has it"
            raise RunError(f"{path}: {expected}; {error}") from error

    def _read(self, name: str, adapter: TypeAdapter[Checked]) -> Checked:
        return self._checked(name, adapter, self._json(name, self._text(name)))

    def _parsed(self, lines: Sequence[str | bytes]) -> list[Row]:
        name = "metrics.jsonl"
        rows = [self._json(name, line, f" line {place}") for place, line in enumerate(lines, 1)]
        return self._checked(name, ROWS, rows)

    def _text(self, name: str) -> str:
        path = self.folder / name
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: cannot be read; {error}. Did the run finish?") from error

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
            text = f"{self.folder / name}{place}: {where}: {first['msg']}{found}"
            raise RunError(text) from error


def _whole(rows: list[Row], *, torn: bytes) -> list[Row]:
    """The rows without those of an incomplete last round, which has fewer than the one before.

    ``torn`` has the bytes after the last complete line.
    """
    if not rows:
        return rows
    last = rows[-1]["round"]
    count, before = (sum(row["round"] == round for row in rows) for round in (last, last - 1))
    next_begun = torn.startswith(b'{"round": %d,' % (last + 1))
    if count < before or (torn and not before and not next_begun):
        return [row for row in rows if row["round"] != last]
    return rows
