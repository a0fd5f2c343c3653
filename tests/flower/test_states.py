"""A client's states on its own disk."""

import os
import stat
from dataclasses import replace

import pytest
import torch

from fedgradnorm import RunError
from fedgradnorm.client import ClientState
from fedgradnorm.flower.states import MemoryStates, StateFiles


def state(round, scale=1.0):
    return ClientState(
        {"weight": torch.full((3, 2), scale), "count": torch.tensor(7)},
        initial_loss=0.1 + scale,
        encoder_buffers={
            "1.running_mean": torch.arange(4.0)[::2],
            "1.num_batches_tracked": torch.tensor(round),
        },
        head_velocity={"weight": torch.full((3, 2), 0.5, dtype=torch.float64)},
        round=round,
    )


def plain(one):
    parts = (one.head, one.encoder_buffers, one.head_velocity)
    return (
        one.round,
        one.initial_loss,
        [{name: (value.dtype, value.tolist()) for name, value in part.items()} for part in parts],
    )


@pytest.fixture(params=["files", "memory"])
def states(request, tmp_path):
    return (
        StateFiles(tmp_path / "states", "experiment", "a")
        if request.param == "files"
        else MemoryStates()
    )


def kept(states):
    if isinstance(states, MemoryStates):
        return sorted(states.by_round)
    return sorted(int(path.stem.removeprefix("round-")) for path in states.folder.iterdir())


def test_what_is_saved_is_loaded(states):
    states.save(state(3), [0])
    assert plain(states.load(3)) == plain(state(3))


def test_a_head_without_parameters_and_a_first_loss_that_is_not_known_are_kept(states):
    states.save(ClientState({}, None, round=1), [0])
    assert plain(states.load(1)) == (1, None, [{}, {}, {}])


KEEP = [
    ([0], [1, 2, 3, 5, 9]),
    ([2], [2, 5, 9]),
    ([2, 3, 4], [2, 3, 5, 9]),
    ([0, 2], [1, 2, 3, 5, 9]),
    ([], [5, 9]),
]


@pytest.mark.parametrize(("keep", "left"), KEEP)
def test_earlier_rounds_that_nobody_asks_for_go_and_later_ones_stay(states, keep, left):
    for round in (1, 2, 3, 9):
        states.save(state(round), [0])
    states.save(state(5), keep)
    assert kept(states) == left


def test_a_round_that_is_repeated_takes_the_place_of_the_first_attempt(states):
    states.save(state(1, 1.0), [0])
    states.save(state(1, 2.0), [0])
    assert plain(states.load(1)) == plain(state(1, 2.0))


@pytest.mark.parametrize(
    ("last", "left"), [(4, [3, 4, 5, 6]), (5, [4, 5, 6]), (6, [5, 6]), (7, [6, 7])]
)
def test_after_going_back_later_states_are_overwritten_and_none_counts_twice(states, last, left):
    for round in range(1, 7):
        states.save(state(round), [max(1, round - back) for back in (1, 2, 3)])
    for round in range(4, last + 1):  # it went back to round 3
        states.save(state(round, 2.0), [round - 1])
    assert kept(states) == states.rounds() == left
    assert {round for round in left if states.load(round).initial_loss > 2} == set(left) & set(
        range(4, last + 1)
    )


def test_a_round_that_is_not_there_is_named(states):
    states.save(state(4), [0])
    with pytest.raises(RunError, match="3"):
        states.load(3)


def test_experiments_and_clients_have_places_of_their_own(tmp_path):
    for experiment, client in (("x", "a"), ("x", "b"), ("y", "a")):
        StateFiles(tmp_path, experiment, client).save(
            state(1, len(experiment + client) + ord(client)), [0]
        )
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")) == [
        f"{place}/round-00000001.safetensors" for place in ("x/a", "x/b", "y/a")
    ]
    with pytest.raises(
        RunError,
        match="client 'c' needs its state of round 1, and there is no such file: restore it.*; found none",
    ):
        StateFiles(tmp_path, "x", "c").load(1)


def test_another_clients_or_rounds_file_is_refused(tmp_path):
    a, b = StateFiles(tmp_path, "x", "a"), StateFiles(tmp_path, "x", "b")
    a.save(state(1), [0])
    a.folder.rename(b.folder)
    with pytest.raises(RunError, match="it is that of client 'a' after round 1"):
        b.load(1)
    (b.folder / "round-00000001.safetensors").rename(b.folder / "round-00000002.safetensors")
    b.client = "a"
    with pytest.raises(RunError, match="it is that of client 'a' after round 1"):
        b.load(2)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x80\x04N.", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"]
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, content):
    states = StateFiles(tmp_path, "x", "a")
    states.save(state(1), [0])
    path = states.folder / "round-00000001.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"state {path}: cannot be read"):
        states.load(1)


def test_every_cut_is_noticed(tmp_path):
    states = StateFiles(tmp_path, "x", "a")
    states.save(state(1), [0])
    path = states.folder / "round-00000001.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError):
            states.load(1)


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    states = StateFiles(tmp_path, "x", "a")
    states.save(state(1), [0])
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(
        RunError, match=r"state .*round-00000002.safetensors: cannot be written: No space left"
    ):
        states.save(state(2), [])
    monkeypatch.undo()
    assert [path.name for path in states.folder.iterdir()] == ["round-00000001.safetensors"]
    assert plain(states.load(1)) == plain(state(1))


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    states = StateFiles(tmp_path, "x", "a")
    states.folder.mkdir(parents=True)
    (states.folder / ".round-00000001.safetensors.writing").write_bytes(b"half")
    states.save(state(2), [])
    assert [path.name for path in states.folder.iterdir()] == ["round-00000002.safetensors"]


def test_nobody_else_can_look_in(tmp_path):
    before = os.umask(0)
    try:
        states = StateFiles(tmp_path / "deep" / "states", "x", "a")
        states.save(state(1), [0])
    finally:
        os.umask(before)
    for folder in (states.folder, states.folder.parent, states.folder.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_state_is_not_changed_by_what_comes_after(states):
    first = state(1)
    states.save(first, [0])
    states.save(replace(first, round=2, initial_loss=5.0), [0])
    assert plain(states.load(1)) == plain(state(1))
