"""Where a client keeps its states between messages: every message may find it in a new process, and a round may have to be undone.

A state is kept under the round that it was trained in. The server names the round whose state is to be used, and those that it may come
back to; all others before that are removed. Later ones stay: the message may be one that was late, or the run may have gone
back.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedgradnorm.atomic import write_atomically
from fedgradnorm.client import ClientState
from fedgradnorm.errors import RunError
from fedgradnorm.runs.records import DataRecord

__all__ = [
    "LOST_STATE",
    "Beginning",
    "LostState",
    "LostStateError",
    "MemoryStates",
    "StateFiles",
    "States",
    "begin",
]

LostState = Literal["refuse", "newest", "fresh"]
LOST_STATE: tuple[LostState, ...] = ("refuse", "newest", "fresh")
"""What a client does whose state is lost: answer with an error; go on from its newest one; go on with a fresh head."""

PARTS, ENCODER = ("head", "encoder_buffers", "head_velocity"), "encoder"
FILE = re.compile(r"round-(\d{8})\.safetensors")
DATA = TypeAdapter(DataRecord)


class LostStateError(RunError):
    """A state is not there, or damaged: reading it again will not help."""


class States(Protocol):
    """A client's states, by the round that they were trained in."""

    def load(self, round: int) -> ClientState:
        """The state after a round. Raises LostStateError where there is none, RunError where it cannot be reached."""
        ...

    def save(
        self, state: ClientState, keep: Collection[int], data: DataRecord | None = None
    ) -> None:
        """Keep a state under its round, and remove all earlier ones but those of the rounds to be kept; with 0 among these, none.

        With it goes what the data are known by that it was trained on.
        """
        ...

    def rounds(self) -> list[int]:
        """The rounds that there are states of, ascending."""
        ...

    def data(self, round: int) -> DataRecord | None:
        """What the data are known by that the state after a round was trained on; None where that is not known."""
        ...


@dataclass(frozen=True)
class Beginning:
    """The state that a client begins with when it answers a message.

    Attributes:
        state: that of the round that the server has asked for, or what stands in for it.
        round: the round that it is of; 0: the client's initial one.
        lost: whether the state that the server has asked for is lost.
    """

    state: ClientState
    round: int
    lost: bool = False


def begin(
    states: States,
    base: int,
    lost_state: LostState,
    initial: Callable[[], ClientState],
    initial_loss: float | None = None,
) -> Beginning:
    """The state after round ``base``, or what stands in for it where it is lost.

    Args:
        states: the client's.
        base: the round that the server has asked for; 0: the initial state.
        lost_state: what to do where that state is lost. ``newest`` without any earlier one that is sound is ``fresh``.
        initial: makes the client's initial state.
        initial_loss: the F(0) that the server knows, which a fresh head keeps.

    Raises:
        LostStateError: it is lost, and ``lost_state`` is ``refuse``.
        RunError: it cannot be reached, or it is another client's.
    """
    if base == 0:
        return Beginning(initial(), 0)
    try:
        return Beginning(states.load(base), base)
    except LostStateError:
        if lost_state == "refuse":
            raise
    if lost_state == "newest":
        for round in sorted((round for round in states.rounds() if round < base), reverse=True):
            with suppress(LostStateError):
                return Beginning(states.load(round), round, lost=True)
    return Beginning(replace(initial(), initial_loss=initial_loss), 0, lost=True)


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
        self._data: dict[int, DataRecord | None] = {}

    def load(self, round: int) -> ClientState:
        """The state after a round."""
        try:
            return self.by_round[round]
        except KeyError:
            raise LostStateError(
                f"no state of round {round} is kept, expected one of {self.rounds()}"
            ) from None

    def save(
        self, state: ClientState, keep: Collection[int], data: DataRecord | None = None
    ) -> None:
        """Keep a state."""
        for round in superfluous(self.by_round, state.round, keep):
            del self.by_round[round]
        self.by_round[state.round] = state
        self._data = {
            **{round: known for round, known in self._data.items() if round in self.by_round},
            state.round: data,
        }

    def rounds(self) -> list[int]:
        """The rounds that there are states of."""
        return sorted(self.by_round)

    def data(self, round: int) -> DataRecord | None:
        """What the data are known by."""
        return self._data.get(round)


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
            LostStateError: there is no such file, or it is damaged.
            RunError: it cannot be read, or it is another client's.
        """
        path = self._path(round)
        try:
            path.open("rb").close()  # so that an error of the system is told from a damaged file
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if numbers["client"] != self.client or numbers["round"] != round:
                raise RunError(
                    f"state {path}: it is that of client '{numbers['client']}' after round {numbers['round']}"
                )
            encoder = tensors.pop(ENCODER, None)
            parts: dict[str, dict[str, object]] = {part: {} for part in PARTS}
            for name, tensor in tensors.items():
                part, _, own = name.partition("/")
                parts[part][own] = tensor
            return ClientState(
                initial_loss=numbers["initial_loss"],
                round=round,
                encoder=encoder,
                **parts,  # type: ignore[arg-type]
            )
        except FileNotFoundError:
            found = (
                sorted(entry.name for entry in self.folder.glob("round-*"))
                if self.folder.is_dir()
                else []
            )
            raise LostStateError(
                f"client '{self.client}' needs its state of round {round}, and there is no such file: restore it, or begin a new experiment"
                f", or set LOST_STATE (lost-state): {path}; found {found or 'none'}"
            ) from None
        except OSError as error:
            raise RunError(f"state {path}: cannot be read: {error.strerror or error}") from error
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            raise LostStateError(
                f"state {path}: cannot be read: {' '.join(repr(error).split())[:300]}"
            ) from error

    def save(
        self, state: ClientState, keep: Collection[int], data: DataRecord | None = None
    ) -> None:
        """Keep a state. Raises RunError where it cannot be written; the others are as they were."""
        tensors = {
            f"{part}/{name}": value.contiguous().clone()
            for part in PARTS
            for name, value in _part(state, part).items()
        }
        if state.encoder is not None:
            tensors[ENCODER] = state.encoder
        numbers = {
            "client": self.client,
            "round": state.round,
            "initial_loss": state.initial_loss,
            "data": data,
        }
        try:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(
                self._path(state.round), to_bytes(tensors, {"state": json.dumps(numbers)})
            )
            for path in [
                *map(self._path, superfluous(self.rounds(), state.round, keep)),
                *self.folder.glob(".*.writing"),
            ]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"state {self._path(state.round)}: cannot be written: {error.strerror or error}"
            ) from error

    def rounds(self) -> list[int]:
        """The rounds that there are files of."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := FILE.fullmatch(name)))

    def data(self, round: int) -> DataRecord | None:
        """What the data are known by; None in a file of an older version."""
        try:
            with safe_open(self._path(round), framework="pt") as file:
                return DATA.validate_python(json.loads(file.metadata()["state"])["data"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            return None

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:08}.safetensors"


def _part(state: ClientState, part: str) -> Mapping[str, Tensor]:
    return getattr(state, part)  # type: ignore[no-any-return]
