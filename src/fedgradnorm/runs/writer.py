"""Writing a run's folder while the run trains."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, Self

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fedgradnorm.atomic import write_atomically
from fedgradnorm.client import ClientState
from fedgradnorm.config import RunConfig
from fedgradnorm.errors import RunError
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.modules import held_tensors
from fedgradnorm.runs.checkpoint import Checkpoint, save_checkpoint, under
from fedgradnorm.runs.entries import CHECKPOINTS, how_to_resume, writing
from fedgradnorm.runs.records import Row, Summary
from fedgradnorm.server import ServerState


class RunWriter:
    """Writes the files of a run's folder. A context manager: leaving it closes the files.

    Args:
        folder: the run's folder, made by `create_run`.
        config: the resolved settings.
        round: the number of completed rounds. In metrics.jsonl, the lines of later rounds and an
            incomplete last line are cut off.

    Raises:
        RunError: the folder cannot be written, or its metrics.jsonl is damaged before that round.
            Every method raises it too if the folder cannot be written.
    """

    def __init__(self, folder: Path, config: RunConfig, round: int = 0) -> None:
        self.folder, self.config = folder, config
        with self._writing(), ExitStack() as undo:
            self._metrics = undo.enter_context((folder / "metrics.jsonl").open("a+b"))
            self._metrics.truncate(end_of_round(self._metrics, folder, round))
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # after an error, a second one about the same folder would only hide the first
        with self._writing() if error is None else suppress(OSError):
            self._metrics.close()

    def write_round(self, rows: Sequence[Row]) -> None:
        """Add the lines of a round to metrics.jsonl."""
        with self._writing():
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
            self._metrics.write("".join(lines).encode())
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
        """Write a checkpoint, after the lines that belong to it are on the disk; give its path."""
        with self._writing():
            os.fsync(self._metrics.fileno())
            settings = self.config.model_dump(mode="json")
            checkpoint = Checkpoint(server, clients, settings, members, seconds, costs)
            return save_checkpoint(self.folder / CHECKPOINTS, checkpoint, self.config.run.keep)

    def write_models(self, encoder: nn.Module, states: Mapping[str, ClientState]) -> None:
        """Save the encoder, and for every client its head and its own encoder tensors."""
        models = self.folder / "models"
        with self._writing():
            _save(_all_tensors(encoder), models / "encoder.safetensors")
            if self.config.run.experiment is not None:  # the heads are on other machines
                return
            for client, state in states.items():
                tensors = under("head.", state.head) | under("buffer.", state.encoder_buffers)
                if state.encoder is not None:
                    tensors["encoder"] = state.encoder
                _save(tensors, models / "heads" / f"{client}.safetensors")

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        with self._writing():
            write_atomically(self.folder / "summary.json", text.encode())

    def _writing(self) -> AbstractContextManager[None]:
        resume = how_to_resume(self.folder, self.config)
        hint = f"its last checkpoint is intact; when it can be written again: {resume}"
        return writing(self.folder, hint)


def end_of_round(file: BinaryIO, folder: Path, round: int) -> int:
    """Where a round's lines end in metrics.jsonl. RunError: earlier ones are damaged or missing."""
    file.seek(0)
    end, last, path = 0, 0, folder / "metrics.jsonl"
    for number, line in enumerate(file, start=1):
        try:
            this = json.loads(line)["round"]
            if type(this) is not int or this not in (last, last + 1):
                raise ValueError(f"round {this!r} after round {last}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if line.endswith(b"\n") and last <= round:
                expected = "expected a round's figures as JSON"
                raise RunError(f"{path} line {number}: {expected}; {error!r}") from error
            break  # the line that was being written
        if this > round or not line.endswith(b"\n"):
            break
        end, last = end + len(line), this
    if last < round:
        expected = f"expected the figures of {round} rounds, as the checkpoint has them"
        raise RunError(f"{path}: {expected}, found those of {last}")
    return end


def _all_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, and the buffers and plain tensors that are not in it."""
    state = encoder.state_dict().items()
    tensors = {name: value for name, value in state if isinstance(value, Tensor)}
    return {**tensors, **held_tensors(encoder)}


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, to_bytes(copies))
