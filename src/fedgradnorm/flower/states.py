"""Where a client keeps its states between messages: every message may find it in a new process, and a round may have to be undone.

A state is kept under the round that it was trained in. The server names the round whose state is to be used, and those that it may come
back to; all others before that are removed. Later ones stay: the message may be one that was late.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedgradnorm.atomic import write_atomically
from fedgradnorm.client import ClientState
from fedgradnorm.errors import RunError

__all__ = ["MemoryStates", "StateFiles", "States"]

PARTS, ENCODER = ("head", "encoder_buffers", "head_velocity"), "encoder"
FILE = re.compile(r"round-(\d{8})\.safetensors")


class States(Protocol):
    """A client's states, by the round that they were trained in."""

    def load(self, round: int) -> ClientState:
        """The state after a round. Raises RunError where there is none."""
        ...

    def save(self, state: ClientState, keep: Collection[int]) -> None:
        """Keep a state under its round, and remove all earlier ones but those of the rounds to be kept; with 0 among these, none."""
        ...


def superfluous(kept: Iterable[int], round: int, keep: Collection[int]) -> list[int]:
    """Which of the kept rounds nobody comes back to after this one.

    >>> superfluous([1, 2, 3, 9], 4, {2}), superfluous([1, 2, 3], 4, {0, 2})
    ([1, 3], [])
    """
    return [] if 0 in keep else [one for one in kept if one < round and one not in keep]


class MemoryStates:
    """States in memory, for clients in one process."""

    def __init__(self) -> None:
        self.by_round: dict[int, ClientState] = {}

    def load(self, round: int) -> ClientState:
        """The state after a round."""
        try:
            return self.by_round[round]
        except KeyError:
            raise RunError(f"no state of round {round} is kept, expected one of {sorted(self.by_round)}") from None

    def save(self, state: ClientState, keep: Collection[int]) -> None:
        """Keep a state."""
        for round in superfluous(self.by_round, state.round, keep):
            del self.by_round[round]
        self.by_round[state.round] = state


class StateFiles:
    """States as files, ``STATE-DIR/EXPERIMENT/CLIENT/round-00000012.safetensors``, each written whole or not at all.

    Args:
        state_dir: a folder that outlives the node's process, readable by this site alone.
        experiment: which experiment.
        client: the client's key.
    """

    def __init__(self, state_dir: Path, experiment: str, client: str) -> None:
        self.folder, self.client = state_dir / experiment / client, client

    def load(self, round: int) -> ClientState:
        """The state after a round.

        Raises:
            RunError: there is no such file, it cannot be read, or it is another client's.
        """
        path = self._path(round)
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if numbers["client"] != self.client or numbers["round"] != round:
                raise RunError(f"state {path}: it is that of client '{numbers['client']}' after round {numbers['round']}")
            encoder = tensors.pop(ENCODER, None)
            parts: dict[str, dict[str, object]] = {part: {} for part in PARTS}
            for name, tensor in tensors.items():
                part, _, own = name.partition("/")
                parts[part][own] = tensor
            return ClientState(initial_loss=numbers["initial_loss"], round=round, encoder=encoder, **parts)  # type: ignore[arg-type]
        except FileNotFoundError:
            found = sorted(entry.name for entry in self.folder.glob("round-*")) if self.folder.is_dir() else []
            raise RunError(
                f"client '{self.client}' needs its state of round {round}, and there is no such file: restore it, or begin a new experiment"
                f": {path}; found {found or 'none'}"
            ) from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise RunError(f"state {path}: cannot be read: {' '.join(repr(error).split())[:300]}") from error

    def save(self, state: ClientState, keep: Collection[int]) -> None:
        """Keep a state. Raises RunError where it cannot be written; the others are as they were."""
        tensors = {f"{part}/{name}": value.contiguous().clone() for part in PARTS for name, value in _part(state, part).items()}
        if state.encoder is not None:
            tensors[ENCODER] = state.encoder
        numbers = {"client": self.client, "round": state.round, "initial_loss": state.initial_loss}
        try:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path(state.round), to_bytes(tensors, {"state": json.dumps(numbers)}))
            kept = [int(match[1]) for path in self.folder.iterdir() if (match := FILE.fullmatch(path.name))]
            for path in [*map(self._path, superfluous(kept, state.round, keep)), *self.folder.glob(".*.writing")]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"state {self._path(state.round)}: cannot be written: {error.strerror or error}") from error

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:08}.safetensors"


def _part(state: ClientState, part: str) -> Mapping[str, Tensor]:
    return getattr(state, part)  # type: ignore[no-any-return]
