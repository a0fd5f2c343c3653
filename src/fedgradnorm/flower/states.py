"""Where a client keeps its states between messages.

Every message may come to a new process, and a round may have to be undone. A state is kept under
the round that it was trained in. The server names the round whose state is used, and those that it
may go back to; all others before that are removed. Later states stay: the message may have been
late, or the run may have gone back.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from fedgradnorm.atomic import write_atomically
from fedgradnorm.client import ClientState
from fedgradnorm.errors import RunError
from fedgradnorm.identity.records import DataRecord

LostState = Literal["refuse", "newest", "fresh"]
LOST_STATE: tuple[LostState, ...] = ("refuse", "newest", "fresh")
"""What a client does if its state is lost: raise an error, use its newest state or a fresh head."""

PARTS, ENCODER = ("head", "encoder_buffers", "head_velocity"), "encoder"
FILE = re.compile(r"round-(\d{8})\.safetensors")
DATA = TypeAdapter(DataRecord)
DAMAGED = (SafetensorError, KeyError, TypeError, ValueError, RecursionError)
"""What reading a damaged file raises."""


class LostStateError(RunError):
    """A state is missing or damaged: to read it again will not help."""


class States(Protocol):
    """A client's states, by the round that they were trained in."""

    def load(self, round: int) -> ClientState:
        """The state after a round.

        Raises:
            LostStateError: there is none.
            RunError: it cannot be reached.
        """

    def save(
        self, state: ClientState, keep: Collection[int], data: DataRecord | None = None
    ) -> None:
        """Keep a state under its round, and remove earlier ones.

        Args:
            state: the state.
            keep: the rounds whose states stay; with 0 among them, all stay.
            data: the record of the data that it was trained on.
        """

    def rounds(self) -> list[int]:
        """The rounds whose states are kept, ascending."""

    def data(self, round: int) -> DataRecord | None:
        """The record of the data that a round's state was trained on; None where it is unknown."""


@dataclass(frozen=True)
class Beginning:
    """The state that a client begins with when it answers a message.

    Attributes:
        state: the requested state, or the one that replaces it.
        round: its round; 0: the client's initial state.
        lost: whether the requested state is lost.
    """

    state: ClientState
    round: int
    lost: bool = False

    @property
    def aside(self) -> dict[str, int]:
        """What a reply says about it, where the requested state is lost."""
        return {"began": self.round} if self.lost else {}

    def kept(self, keep: Collection[int]) -> set[int]:
        """The rounds whose states stay: those that the server may go back to, and this one."""
        return {*keep, self.round} if self.round else set(keep)


def begin(
    states: States,
    base: int,
    lost_state: LostState,
    initial: Callable[[], ClientState],
    initial_loss: float | None = None,
) -> Beginning:
    """The state after round ``base``, or the one that replaces it where it is lost.

    Args:
        states: the client's states.
        base: the round that the server has asked for; 0: the initial state.
        lost_state: what to do where that state is lost. ``newest`` acts as ``fresh`` where there is
            no sound earlier state.
        initial: makes the client's initial state.
        initial_loss: the F(0) that the server knows; a fresh head keeps it.

    Raises:
        LostStateError: the state is lost, and ``lost_state`` is ``refuse``.
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
    """The kept rounds before this one that are not in ``keep``.

    >>> superfluous([1, 2, 3, 9], 4, {2}), superfluous([1, 2, 3], 4, {0, 2})
    ([1, 3], [])
    """
    return [] if 0 in keep else [old for old in kept if old < round and old not in keep]


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
            expected = f"expected one of {self.rounds()}"
            raise LostStateError(f"no state of round {round} is kept, {expected}") from None

    def save(
        self, state: ClientState, keep: Collection[int], data: DataRecord | None = None
    ) -> None:
        """Keep a state."""
        for round in superfluous(self.by_round, state.round, keep):
            del self.by_round[round]
            self._data.pop(round, None)
        self.by_round[state.round] = state
        self._data[state.round] = data

    def rounds(self) -> list[int]:
        """The rounds whose states are kept."""
        return sorted(self.by_round)

    def data(self, round: int) -> DataRecord | None:
        """The record of the data of a round's state."""
        return self._data.get(round)


class StateFiles:
    """States as files, ``STATE-DIR/EXPERIMENT/CLIENT/round-00000012.safetensors``.

    Each file is written whole or not at all.

    Args:
        state_dir: a folder that outlives the node's process, readable by this site alone.
        experiment: the experiment.
        client: the client's key.
    """

    def __init__(self, state_dir: Path, experiment: str, client: str) -> None:
        self.folder, self.client = state_dir / experiment / client, client

    def load(self, round: int) -> ClientState:
        """The state after a round.

        Raises:
            LostStateError: the file is missing or damaged.
            RunError: the file cannot be read, or it is another client's.
        """
        path = self._path(round)
        try:
            path.open("rb").close()  # raises the system's errors; below, a file is damaged
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            if numbers["client"] != self.client or numbers["round"] != round:
                whose = f"client '{numbers['client']}' after round {numbers['round']}"
                raise RunError(f"state {path}: it is that of {whose}")
            encoder = tensors.pop(ENCODER, None)
            parts: dict[str, Any] = {part: {} for part in PARTS}
            for name, tensor in tensors.items():
                part, _, own = name.partition("/")
                parts[part][own] = tensor
            loss = numbers["initial_loss"]
            return ClientState(initial_loss=loss, round=round, encoder=encoder, **parts)
        except FileNotFoundError:
            names = sorted(entry.name for entry in self.folder.glob("round-*"))
            raise LostStateError(
                f"client '{self.client}' needs its state of round {round}, and there is no such "
                "file: restore it, or begin a new experiment, or set LOST_STATE (lost-state): "
                f"{path}; found {names or 'none'}"
            ) from None
        except OSError as error:
            raise RunError(f"state {path}: cannot be read: {error.strerror or error}") from error
        except (*DAMAGED, AttributeError) as error:
            why = " ".join(repr(error).split())[:300]
            raise LostStateError(f"state {path}: cannot be read: {why}") from error

    def save(
        self, state: ClientState, keep: Collection[int], data: DataRecord | None = None
    ) -> None:
        """Keep a state. Raises RunError if it cannot be written; then all others stay."""
        tensors = {
            f"{part}/{name}": value.contiguous().clone()
            for part in PARTS
            for name, value in getattr(state, part).items()
        }
        if state.encoder is not None:
            tensors[ENCODER] = state.encoder
        numbers = {"client": self.client, "round": state.round}
        numbers |= {"initial_loss": state.initial_loss, "data": data}
        path = self._path(state.round)
        try:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, to_bytes(tensors, {"state": json.dumps(numbers)}))
            old = map(self._path, superfluous(self.rounds(), state.round, keep))
            for unused in [*old, *self.folder.glob(".*.writing")]:
                unused.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"state {path}: cannot be written: {error.strerror or error}") from error

    def rounds(self) -> list[int]:
        """The rounds whose states are kept."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := FILE.fullmatch(name)))

    def data(self, round: int) -> DataRecord | None:
        """The record of the data of a round's state; None where the file has none."""
        try:
            with safe_open(self._path(round), framework="pt") as file:
                return DATA.validate_python(json.loads(file.metadata()["state"])["data"])
        except (OSError, *DAMAGED):
            return None

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:08}.safetensors"
