"""Checkpoints: all that a run needs to resume as if it had never stopped, in one file each.

A checkpoint is ``checkpoints/round-00000012-<checksum>.safetensors`` in the run's folder. Its
tensors are those of the server's and the clients' states. Its metadata holds the numbers, and the
settings of the run, as JSON.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from typing_extensions import TypedDict

from fedgradnorm.atomic import write_atomically
from fedgradnorm.client import ClientState
from fedgradnorm.errors import RunError
from fedgradnorm.identity.records import MembersRecord
from fedgradnorm.server import ServerState
from fedgradnorm.weighting.base import WeightingState

FORMAT: Literal[1] = 1
NAME = re.compile(r"round-(\d{8})-([0-9a-f]{16})\.safetensors")
WRONG_CONTENT = (KeyError, TypeError, ValueError, AttributeError, RecursionError)
UNREADABLE = (OSError, SafetensorError, *WRONG_CONTENT)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two rounds.

    Attributes:
        server: the server's state.
        clients: the clients' states, by id.
        settings: the settings of the run, as JSON values.
        members: who trained what.
        seconds: how long the run has taken so far, over all of its starts.
        costs: the parts of these seconds, by name.
    """

    server: ServerState
    clients: Mapping[str, ClientState]
    settings: Mapping[str, Any]
    members: MembersRecord
    seconds: float = 0.0
    costs: Mapping[str, float] = field(default_factory=dict)


class Numbers(TypedDict):
    """The numbers in a checkpoint's metadata."""

    format: Literal[1]
    round: Annotated[int, Field(ge=0, strict=True)]
    weights: dict[str, FiniteFloat]
    memory: dict[str, Any]
    norms: dict[str, tuple[FiniteFloat, ...]]
    clients: dict[str, FiniteFloat | None]
    rounds: dict[str, Annotated[int, Field(ge=0, strict=True)]]
    settings: dict[str, Any]
    members: MembersRecord
    seconds: FiniteFloat
    costs: dict[str, FiniteFloat]


NUMBERS = TypeAdapter(Numbers)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, and remove all but the last ``keep``.

    Raises:
        OSError: it cannot be written; the older ones are unchanged.
    """
    # one entry of metadata: several would be written in a random order
    metadata = {"state": json.dumps(_numbers_of(checkpoint), allow_nan=False)}
    tensors = _tensors_of(checkpoint).items()
    content = to_bytes({name: tensor.contiguous().clone() for name, tensor in tensors}, metadata)
    folder.mkdir(exist_ok=True)
    path = folder / f"round-{checkpoint.server.round:08}-{_checksum(content)}.safetensors"
    write_atomically(path, content)
    for old in [*_superfluous(_paths(folder), path, keep), *folder.glob(".*.writing")]:
        old.unlink(missing_ok=True)
    return path


def _tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    server = checkpoint.server
    tensors = {"server/encoder": server.encoder}
    tensors |= under("server/buffers/", server.buffers)
    tensors |= under("server/optimizer/", server.optimizer)
    for client, state in checkpoint.clients.items():
        for part in ("head", "encoder_buffers", "head_velocity"):
            tensors |= under(f"client/{client}/{part}/", getattr(state, part))
        if state.encoder is not None:
            tensors[f"client/{client}/encoder"] = state.encoder
    return tensors


def _numbers_of(checkpoint: Checkpoint) -> dict[str, Any]:
    server, clients = checkpoint.server, checkpoint.clients
    return {
        "format": FORMAT,
        "round": server.round,
        "weights": server.weighting.weights,
        "memory": server.weighting.memory,
        "norms": server.norms,
        "clients": {client: state.initial_loss for client, state in clients.items()},
        "rounds": {client: state.round for client, state in clients.items()},
        "settings": checkpoint.settings,
        "members": checkpoint.members,
        "seconds": checkpoint.seconds,
        "costs": dict(checkpoint.costs),
    }


def _superfluous(paths: Sequence[Path], saved: Path, keep: int) -> list[Path]:
    """The checkpoints to remove after one was saved.

    These are others of its round, and those of rounds before the last ``keep``. Several of one
    round count once. Those of later rounds stay, and do not count.
    """
    round = round_of(saved)
    rounds = {round_of(path) for path in paths if round_of(path) <= round}
    first_kept = sorted(rounds, reverse=True)[:keep][-1]
    others = [path for path in paths if path != saved]
    return [path for path in others if round_of(path) == round or round_of(path) < first_kept]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        RunError: the file cannot be read, its checksum is not the one in its name, or its content
            is not a checkpoint's.
    """
    match = NAME.fullmatch(path.name)
    try:
        if match is None or _checksum(path.read_bytes()) != match[2]:
            raise RunError(f"checkpoint {path}: damaged: its checksum is not the one in its name")
        with safe_open(path, framework="pt") as file:
            numbers = NUMBERS.validate_json(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restored(numbers, tensors)
    except UNREADABLE as error:
        reason = " ".join(repr(error).split())[:300]
        raise RunError(f"checkpoint {path}: cannot be read: {reason}") from error


def load_newest(
    folder: Path, last: int | None = None
) -> tuple[Checkpoint | None, Path | None, dict[Path, str]]:
    """Read the newest sound checkpoint of a folder, of a round up to ``last`` if it is not None.

    Returns:
        The checkpoint and its path, None and None if there is no sound one; and what is wrong with
        newer ones, by path.
    """
    faults: dict[Path, str] = {}
    for path in _paths(folder):
        if last is not None and round_of(path) > last:
            continue
        try:
            return load_checkpoint(path), path, faults
        except RunError as error:
            faults[path] = str(error)
    return None, None, faults


def sound_rounds(folder: Path) -> list[int]:
    """The rounds of a folder's sound checkpoints, ascending. All checkpoints are read."""
    rounds = set()
    for path in _paths(folder):
        with suppress(RunError):
            load_checkpoint(path)
            rounds.add(round_of(path))
    return sorted(rounds)


def later_than(folder: Path, round: int) -> list[Path]:
    """The checkpoints of later rounds, newest first, including damaged ones that were set aside."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    later = [path for path in paths if NAME.match(path.name) and round_of(path) > round]
    return sorted(later, reverse=True)


def round_of(path: Path) -> int:
    """The round in a checkpoint's name."""
    return int(path.name[6:14])


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it does not take the place of a sound one."""
    path.replace(path.with_name(f"{path.name}.damaged"))


def _restored(numbers: Numbers, tensors: Mapping[str, Tensor]) -> Checkpoint:
    server = ServerState(
        round=numbers["round"],
        encoder=tensors["server/encoder"],
        buffers=with_prefix("server/buffers/", tensors),
        weighting=WeightingState(numbers["weights"], numbers["memory"]),
        optimizer=with_prefix("server/optimizer/", tensors),
        norms=numbers["norms"],
    )
    clients = {}
    for client, initial_loss in numbers["clients"].items():
        own = with_prefix(f"client/{client}/", tensors)
        clients[client] = ClientState(
            head=with_prefix("head/", own),
            initial_loss=initial_loss,
            encoder_buffers=with_prefix("encoder_buffers/", own),
            head_velocity=with_prefix("head_velocity/", own),
            round=numbers["rounds"][client],
            encoder=own.get("encoder"),
        )
    settings, members = numbers["settings"], numbers["members"]
    return Checkpoint(server, clients, settings, members, numbers["seconds"], numbers["costs"])


def _paths(folder: Path) -> Sequence[Path]:
    """The checkpoints of a folder, newest first."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    return sorted((path for path in paths if NAME.fullmatch(path.name)), reverse=True)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a prefix to their names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, without the prefix."""
    items = tensors.items()
    return {name.removeprefix(prefix): held for name, held in items if name.startswith(prefix)}
